"""References to cores, and cores that are derived from others: `of` and `map`, and the `cores` of a term.

    turn: {of: R, legs: n x y, map: [skew(e -> x y), "cayley(x y)"]}
    weight: o (n x)                         # of W(o n y) and turn

A derived core is a network of its own: the product of what `of` names, or the sum of several, on which its maps act in
order. A reference renames a core's axes, in order, and may split them: `P`, `P(j r)`, `turn((c u) (q m) (v t))`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tnpeft.documents.nodes import Node
from tnpeft.errors import Position, Problems, clip
from tnpeft.spec.expression import Expression
from tnpeft.spec.maps import MapCall
from tnpeft.spec.pattern import Axes, parse_axes

__all__ = ["Derivation", "Reference", "Summand", "arrow_legs", "index_of", "legs_before_maps", "parse_reference"]


@dataclass(frozen=True)
class Reference:
    """A core as a product names it: with its own legs, or with the legs of `axes` for its axes, in order."""

    core: str
    axes: Axes | None
    position: Position
    places: Mapping[str, Position] = field(default_factory=dict, repr=False)  # of the legs in `axes`

    @property
    def label(self) -> str:
        """Its text with single spaces: equal texts mean the same tensor."""
        if self.axes is None:
            return self.core
        groups = (axis[0] if len(axis) == 1 else f"({' '.join(axis)})" if axis else "1" for axis in self.axes)
        return f"{self.core}({' '.join(groups)})"


@dataclass(frozen=True)
class Summand:
    """One product of a derived core: `scale` times the network of some cores."""

    references: tuple[Reference, ...]
    scale: Expression
    label: str
    scale_position: Position | None = None


@dataclass(frozen=True)
class Derivation:
    """What a derived core is made of: the sum of its summands, times `scale`, on which the maps act in order."""

    summands: tuple[Summand, ...]
    scale: Expression
    maps: tuple[MapCall, ...]
    scale_position: Position | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """The cores that it is made of, index cores included, each once."""
        named = (reference.core for summand in self.summands for reference in summand.references)
        return tuple(dict.fromkeys((*named, *(index for call in self.maps if (index := index_of(call))))))


def index_of(call: MapCall) -> str | None:
    """The index core of a map, None where it has none."""
    at = call.arguments.get("at")
    return at if isinstance(at, str) else None


def legs_before_maps(legs: Sequence[str], maps: Sequence[MapCall]) -> tuple[str, ...]:
    """The legs of the tensor on which the maps act, from those of the result: arrows are undone."""
    before = list(legs)
    for call in reversed(maps):
        if call.takes != call.gives:
            before = [*(leg for leg in before if leg not in call.gives), *call.takes]
    return tuple(before)


def parse_reference(node: Node, owner: str, problems: Problems) -> Reference | None:
    """`name` or `name(legs)`, groups allowed; None, with the reason reported, for what is neither."""
    text = node.text
    match = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*(?:\((.*)\))?\s*", text, re.ASCII | re.DOTALL)
    if node.kind != "scalar" or match is None:
        fix = "For example `up`, or `up(o s)` for its axes under other names."
        problems.add(node.position, owner, "a core's name, perhaps with legs in parentheses", clip(text), fix)
        return None
    name, inside = match.groups()
    if inside is None:
        return Reference(name, None, node.position)
    before = len(problems)
    axes, places = parse_axes(node, f"{owner}, `{name}(...)`", problems, match.span(2))
    return None if len(problems) > before else Reference(name, axes, node.position, places)


def arrow_legs(call: MapCall) -> tuple[str, ...]:
    """The legs that a map removes or makes: their sizes must be given, and are never that of `bond`."""
    return () if call.takes == call.gives else (*call.takes, *call.gives)
