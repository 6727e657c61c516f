"""Legs and weight patterns: the two places where indices are written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from tnpeft.documents.nodes import Node
from tnpeft.errors import Position, Problems, clip, ticked
from tnpeft.spec.expression import FUNCTIONS, is_name

__all__ = [
    "ELLIPSIS",
    "KINDS",
    "LAYER_NAMES",
    "RESERVED",
    "Axes",
    "check_name",
    "expand",
    "expand_axes",
    "parse_axes",
    "parse_legs",
]

ELLIPSIS = "k..."
LAYER_NAMES = ("in_channels", "out_channels", "in_features", "out_features", "groups", "kernel_size")
# Argument names of `attach` and `bind`: a param or index of that name could not be told apart from them.
RESERVED = (
    "model", "what", "spec", "layer", "kind", "match", "exclude", "kinds", "layers", "ranks", "name", "train", "seed",
    "mode", "scopes",
)  # fmt: skip

KINDS = {  # layer kind → its number of kernel axes
    "Linear": 0,
    "Conv1d": 1,
    "Conv2d": 2,
    "Conv3d": 3,
    "ConvTranspose1d": 1,
    "ConvTranspose2d": 2,
    "ConvTranspose3d": 3,
}

Axes = tuple[tuple[str, ...], ...]


def check_name(word: str, where: Position, what: str, problems: Problems) -> bool:
    """Whether `word` may name an index or a param; reports why not."""
    if not is_name(word):
        expected = "an ASCII word that is no Python keyword"
        problems.add(where, what, expected, clip(word), "Use letters, digits and `_`, starting with a letter.")
        return False
    roles = {"a function": FUNCTIONS, "a number of the layer": LAYER_NAMES, "an argument of `attach`": RESERVED}
    for role, words in roles.items():
        if word in words:
            problems.add(where, what, "a name of its own", f"`{word}`, {role}", "Choose another name.")
            return False
    return True


def parse_legs(node: Node, core: str, problems: Problems) -> tuple[tuple[str, Position], ...]:
    """A core's legs with their places; `k...` stays one word until a layer is known."""
    legs: dict[str, Position] = {}
    for word, where in node.words():
        if word in legs:
            fix = "Name the second one otherwise; a trace needs a core of ones."
            problems.add(
                where, f"core '{core}', index '{word}'", "each leg once", "it twice", fix, core=core, index=word
            )
        elif word == ELLIPSIS or check_index(word, where, f"core '{core}'", problems):
            legs[word] = where
    return tuple(legs.items())


def check_index(word: str, where: Position, owner: str, problems: Problems) -> bool:
    if word.endswith("..."):
        fix = f"Write `{ELLIPSIS}`, one index per kernel axis."
        problems.add(where, owner, f"`{ELLIPSIS}` as the only open-ended name", ticked(word), fix)
        return False
    return check_name(word, where, f"{owner}, index {clip(word)}", problems)


def parse_axes(
    node: Node, owner: str, problems: Problems, span: tuple[int, int] | None = None
) -> tuple[Axes, dict[str, Position]]:
    """A pattern's axes (a bare leg is a group of one, `1` an empty group) and each leg's place.

    `k...` alone is the axis ("k...",), which `expand_axes` turns into one axis per kernel axis. `owner` names the
    pattern's owner in errors. With `span` the pattern is that part of the node's text.
    """
    axes: list[tuple[str, ...]] = []
    legs: dict[str, Position] = {}
    group: list[str] | None = None
    for token, where in _tokens(node, *(span or (0, len(node.text)))):
        if token == "(":
            if group is not None:
                problems.add(where, owner, "one level of parentheses", "a second `(`", "Close the first one.")
            group = []
        elif token == ")":
            if group is None:
                problems.add(where, owner, "`(` before `)`", "`)` alone", "Remove it, or open it.")
            else:
                axes.append(tuple(group))
            group = None
        elif token == "1":
            if group is None:
                axes.append(())
        elif token in legs:
            fix = "Each open leg makes one part of the weight."
            problems.add(where, f"{owner}, index '{token}'", "each index once", "it twice", fix, index=token)
        elif token == ELLIPSIS or check_index(token, where, owner, problems):
            legs[token] = where
            if group is None:
                axes.append((token,))
            else:
                group.append(token)
    if group is not None:
        problems.add(node.position, owner, "`)`", "the end", "Close the parenthesis.")
    return tuple(axes), legs


def _tokens(node: Node, start: int, end: int) -> Iterator[tuple[str, Position]]:
    for match in re.compile(r"[()]|[^\s()]+").finditer(node.text, start, end):
        yield match.group(), node.at(match.start())


def kernel_indices(spatial: int) -> tuple[str, ...]:
    """The indices that `k...` stands for; they contain a dot, which no name in a file can."""
    return tuple(f"k.{axis}" for axis in range(spatial))


def expand(legs: Sequence[str], spatial: int) -> tuple[str, ...]:
    """`legs` with `k...` replaced by one index per kernel axis."""
    return tuple(leg for word in legs for leg in (kernel_indices(spatial) if word == ELLIPSIS else (word,)))


def expand_axes(axes: Axes, spatial: int) -> Axes:
    """The weight's axes with `k...` expanded: alone into one axis per kernel axis, in a group into more legs."""
    expanded: list[tuple[str, ...]] = []
    for axis in axes:
        if axis == (ELLIPSIS,):
            expanded.extend((leg,) for leg in kernel_indices(spatial))
        else:
            expanded.append(expand(axis, spatial))
    return tuple(expanded)
