"""The maps of derived cores, read from a file: `word` or `word(legs [-> legs] {, name=expression or word})`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tnpeft.documents.nodes import Node
from tnpeft.errors import Position, Problems, clip, near_miss, ticked
from tnpeft.spec.expression import Expression, ExpressionError, is_name, parse_expression, split_at_commas
from tnpeft.spec.map_kinds import (
    NOT_ZERO,
    WORDS,
    MapCall,
    MapKind,
    RegisteredMap,
    map_kind,
    map_names,
    passes_zero,
    place_legs,
    places_legs,
    register_map,
    registered_map,
    registered_maps,
    repeats_places,
    unregistered_map,
)
from tnpeft.spec.map_sizes import size_problem
from tnpeft.spec.pattern import ELLIPSIS, check_index
from tnpeft.spec.wavelets import FAMILIES

__all__ = [
    "NOT_ZERO",
    "MapCall",
    "MapKind",
    "RegisteredMap",
    "map_kind",
    "map_names",
    "parse_map",
    "passes_zero",
    "place_legs",
    "places_legs",
    "register_map",
    "registered_map",
    "registered_maps",
    "repeats_places",
    "size_problem",
    "unregistered_map",
]

_CALL = re.compile(r"\s*([A-Za-z_]\w*)\s*(?:\((.*)\))?\s*", re.ASCII | re.DOTALL)
_ARGUMENT = re.compile(r"([A-Za-z_]\w*)\s*=(?!=)\s*(.*)", re.ASCII | re.DOTALL)


def parse_map(node: Node, problems: Problems, owner: str, known: bool = True) -> MapCall | None:
    """One map of `owner`; None, with the reason reported, where the text is none.

    If it need not be `known`, an unregistered name with any arguments is accepted.
    """
    match = _CALL.fullmatch(node.text) if node.kind == "scalar" else None
    if match is None:
        fix = "For example `cayley(x y)`, or `skew(e -> x y)`."
        if node.text.count("(") != node.text.count(")"):
            fix = 'Close the parentheses; in a list, quote what has a comma: `"neumann(x y, terms=5)"`.'
        problems.add(node.position, f"{owner}, a map", "a name with legs in parentheses", node.describe(), fix)
        return None
    name = match.group(1)
    kind = map_kind(name)
    if kind is None and known:
        fix = near_miss(name, map_names()) or "Use one of them, or register yours with `tnpeft.register_map`."
        what = f"{owner}, unknown map '{clip(name)[1:-1]}'"
        problems.add(node.position, what, f"one of {', '.join(map_names())}", ticked(name), fix)
        return None
    return _Call(node, problems, f"{owner}, map `{name}`", name, kind, match).parse()


@dataclass(frozen=True)
class _Call:
    """A call being read; `kind` is None for a map that is not registered here."""

    node: Node
    problems: Problems
    what: str
    name: str
    kind: MapKind | None
    match: re.Match[str]

    def parse(self) -> MapCall | None:
        before = len(self.problems)
        parts = split_at_commas(self.match.group(2) or "")
        legs = "" if not parts or _ARGUMENT.match(parts[0]) else parts.pop(0)
        sides = self._legs(legs)
        arguments = self._arguments(parts)
        if sides is None or len(self.problems) > before:
            return None
        takes, gives = sides[0], sides[-1]
        if self.kind is not None:
            if fix := _misfit(self.kind, self.name, takes, gives if len(sides) == 2 else None):
                self._add(f"`{self.kind.usage}`", ticked(self.node.text.strip()), fix)
                return None
            gives = () if self.kind.removes else gives
        return MapCall(self.name, takes, gives, arguments, self.node.text.strip(), self.node.position)

    def _add(self, expected: str, found: str, fix: str, where: Position | None = None) -> None:
        self.problems.add(where or self.node.position, self.what, expected, found, fix)

    def _legs(self, text: str) -> tuple[tuple[str, ...], ...] | None:
        """The legs before the arrow and, where there is one, after it."""
        sides = text.split("->")
        if len(sides) > 2:
            self._add("one arrow", f"{len(sides) - 1} of them", "Write each step as a map of its own.")
            return None
        if re.search(r"[()]", text):
            fix = "Name the legs one by one: `unit(i k...)`."
            self._add("legs without parentheses", ticked(text), fix)
            return None
        start = self.node.text.find(text, self.match.start(2)) if text else 0
        read = []
        for side in sides:
            read.append(self._side(side, start))
            start += len(side) + len("->")
        return tuple(read)

    def _side(self, text: str, start: int) -> tuple[str, ...]:
        legs: dict[str, None] = {}
        for match in re.finditer(r"\S+", text):
            word, where = match.group(), self.node.at(start + match.start())
            if word in legs:
                self._add("each leg once", f"`{word}` twice", "Name the second one otherwise.", where)
            elif word == ELLIPSIS or check_index(word, where, self.what, self.problems):
                legs[word] = None
        return tuple(legs)

    def _arguments(self, parts: list[str]) -> dict[str, Expression | str]:
        given: dict[str, Expression | str] = {}
        before = len(self.problems)
        for part in parts:
            match = _ARGUMENT.fullmatch(part)
            if match is None:
                fix = f"Write `{self.kind.usage}`." if self.kind else "Write `name=value`."
                if all(word == ELLIPSIS or is_name(word) for word in part.split()):
                    fix = "Blanks separate legs, and arguments have a name: `unit(i k..., floor=1e-4)`."
                self._add("`name=value` after the legs", clip(part), fix)
                continue
            key, text = match.groups()
            if key in given:
                self._add("each argument once", f"`{key}` twice", "Remove one of the two.")
            elif self.kind is not None and key not in self.kind.arguments:
                expected = " and ".join(f"`{word}`" for word in self.kind.arguments) or "no arguments"
                self._add(expected, ticked(part), near_miss(key, self.kind.arguments) or "Remove it.")
            elif (value := self._value(key, text)) is not None:
                given[key] = value
        required = self.kind.arguments.items() if self.kind else ()
        missing = [key for key, must in required if must and key not in given]
        if missing and len(self.problems) == before:
            usage = self.kind.usage if self.kind and "=" in self.kind.usage else f"{self.name}({missing[0]}=...)"
            self._add(f"`{missing[0]}`", "it missing", f"Write it as in `{usage}`.")
        return given

    def _value(self, key: str, text: str) -> Expression | str | None:
        """An argument's value; for an unregistered map a single word is kept, because its meaning is unknown."""
        if self.kind is None and is_name(text):
            return text
        if key in (WORDS if self.kind is None else self.kind.words):
            return self._word(key, text)
        try:
            return parse_expression(text)
        except ExpressionError as error:
            self.problems.add(self.node.position, f"{self.what}, `{key}`", error.expected, error.found, error.fix)
            return None

    def _word(self, key: str, text: str) -> str | None:
        built_in = registered_map(self.name) is None
        if key == "family" and built_in and self.kind is not None and text not in FAMILIES:
            fix = near_miss(text, FAMILIES) or "Use one of them."
            self._add(f"`family` as one of {', '.join(FAMILIES)}", ticked(text), fix)
        elif is_name(text):
            return text
        else:
            expected = "the name of an index core" if key == "at" and built_in else "a word"
            self.problems.add(
                self.node.position, f"{self.what}, `{key}`", expected, ticked(text), "Write one word, without quotes."
            )
        return None


def _misfit(kind: MapKind, name: str, takes: tuple[str, ...], gives: tuple[str, ...] | None) -> str:
    """How to fix the legs of a call (`gives` is None if it has no arrow); empty if they fit."""
    if kind.takes == (0, 0):
        return f"It works entry by entry: write `{name}`." if takes or gives is not None else ""
    if name == "roll":
        return _misfit_of_roll(takes, gives)
    if kind.gives is None and gives is not None:
        return "It removes its legs: take the arrow out." if kind.removes else "Take the arrow out: its legs stay."
    if registered_map(name) is not None:
        return ""
    if fix := _miscounted(takes, kind.takes, "takes"):
        return fix
    if name == "qr" and takes[-1] == ELLIPSIS:
        return "Its last leg counts the columns: name one."
    if kind.gives is None:
        return ""
    return _miscounted(gives, kind.gives, "makes") if gives is not None else "Write the legs that it makes after `->`."


def _miscounted(legs: tuple[str, ...], counts: tuple[int, int | None], verb: str) -> str:
    low, high = counts
    number = ("no", "one", "two")[low] + (" leg" if low == 1 else " legs")
    if len(legs) < low or (high is not None and len(legs) > high):
        return f"It {verb} {number}{' or more' if high is None else ''}."
    if high is not None and ELLIPSIS in legs:
        return f"It {verb} {number}, and `{ELLIPSIS}` may be any number: name them."
    return ""


def _misfit_of_roll(takes: tuple[str, ...], gives: tuple[str, ...] | None) -> str:
    """As `_misfit`, for `roll`: a vector becomes a matrix, or the rows of a matrix are rolled."""
    named = ELLIPSIS not in takes + (gives or ())
    vector = len(takes) == 1 and gives is not None and len(gives) == 2 and gives[1] == takes[0] != gives[0]
    if named and (vector or (len(takes) == 2 and gives in (None, takes))):
        return ""
    return "Write `roll(y -> x y)` for the rolls of a vector, or `roll(x y -> x y)` for those of a matrix's rows."
