"""Derived cores on the page: what each is made of, an arrow with its maps, and the core itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tnpeft.draw.diagram import Diagram, diagram_of_product
from tnpeft.draw.text import clean, text_size
from tnpeft.network import Network
from tnpeft.network.derived import BoundReference, DerivedCore
from tnpeft.spec.maps import MapCall

__all__ = ["ABOVE", "MAP_POINTS", "MOST_DERIVED", "SIGN_POINTS", "Arrow", "Sign", "diagrams_of_derived", "sign_of"]

MOST_DERIVED = 24  # of more, the first are drawn
MAP_POINTS, SIGN_POINTS = 7.0, 13.0
ABOVE = 0.06  # between an arrow and its words
_SHORTEST = 0.5  # arrow
_MOST_SUMMANDS = 12


@dataclass(frozen=True)
class Arrow:
    """From sources to the core that is made of them: the maps in order, and the index cores that they read."""

    maps: tuple[str, ...]
    indices: tuple[str, ...]

    @property
    def width(self) -> float:
        return max([_SHORTEST, *(text_size(word, MAP_POINTS)[0] + 0.2 for word in (*self.maps, *self.indices))])

    @property
    def reach(self) -> tuple[float, float]:
        """How far it reaches below and above its line, in inches."""
        line = text_size("x", MAP_POINTS)[1]
        return 2 * ABOVE + (line + ABOVE) * len(self.indices), ABOVE + line * len(self.maps)


@dataclass(frozen=True)
class Sign:
    """What stands before a panel: a text, nothing, or an arrow."""

    text: str = ""
    arrow: Arrow | None = None

    @property
    def width(self) -> float:
        if self.arrow is not None:
            return self.arrow.width
        return text_size(self.text, SIGN_POINTS, True)[0] if self.text else 0.0

    @property
    def reach(self) -> tuple[float, float]:
        return self.arrow.reach if self.arrow is not None else (0.0, 0.0)


def sign_of(number: int, scale: float) -> str:
    """What stands before the panel of a term or summand: nothing, a sign, or a sign and a factor."""
    sign = "\N{MINUS SIGN}" if scale < 0 else "+" if number else ""
    size = abs(scale)
    factor = "" if math.isclose(size, 1) else f"{size:.4g} \N{MULTIPLICATION SIGN}"
    return f"{sign} {factor}".strip()


def diagrams_of_derived(network: Network) -> Iterator[list[tuple[Diagram, Sign]]]:
    """For each derived core, in the order of the file, the panels that show it: its summands, then itself."""
    made = {core.name: core for core in network.derived}
    calls = {name: each.maps for name, each in network.spec.derivations.items()} if made else {}
    for name in [name for name in calls if name in made][:MOST_DERIVED]:
        yield list(_panels(network, made[name], calls[name]))


def _panels(network: Network, core: DerivedCore, calls: Sequence[MapCall]) -> Iterator[tuple[Diagram, Sign]]:
    for number, summand in enumerate(core.summands[:_MOST_SUMMANDS]):
        yield diagram_of_product(network, summand.references, core.before), Sign(sign_of(number, summand.scale))
    maps = tuple(clean(" ".join(call.text.split()), 48) for call in calls)
    indices = tuple(dict.fromkeys(clean(each.at, 24) for each in core.maps if each.at is not None))
    itself = BoundReference(core.name, core.legs, core.shape)
    more = len(core.summands) - _MOST_SUMMANDS
    words = (f"and {more} more", *maps) if more > 0 else maps
    yield diagram_of_product(network, (itself,), core.legs), Sign(arrow=Arrow(words, indices))
