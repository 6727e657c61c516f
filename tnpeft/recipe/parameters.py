"""`parameters` of an entry: which parameters beside layers it adapts, and which of their axes are outputs and inputs.

Files and `attach` take the same: a regular expression searched in full parameter names, a list of names, or a mapping
of regular expressions to orientations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tnpeft.errors import Problem, SpecError, clip, near_miss
from tnpeft.network.orientation import ORIENTATIONS
from tnpeft.recipe.selection import Told, compiled

__all__ = ["Parameters", "parameters_from"]

_EXPECTED = "regular expressions on parameters' names, with orientations"
_EXAMPLE = r"For example `parameters: {'experts\.down_proj$': e o i}`."


@dataclass(frozen=True)
class Parameters:
    """Regular expressions with orientations, or exact names; with None the owner's type decides the orientation."""

    patterns: Mapping[str, str | None] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    def orientation_of(self, name: str) -> str | None:
        """The orientation that the patterns which find a parameter give it, or None."""
        return next(iter(self.told_of(name)), None)

    def told_of(self, name: str) -> dict[str, str]:
        """The orientations that a parameter is given, each with its first pattern; more than one is a contradiction."""
        told: dict[str, str] = {}
        for pattern, axes in self.patterns.items():
            if axes is not None and compiled(pattern).search(name):
                told.setdefault(axes, pattern)
        return told


def parameters_from(value: Any) -> tuple[Parameters, list[tuple[tuple[str, ...], Problem]]]:
    """What `parameters` gives, and its problems, each with the keys under which it stands."""
    told = [*_problems(value)]
    if told:
        return Parameters(), told
    if isinstance(value, str):
        return Parameters({value: None}), []
    if isinstance(value, Mapping):
        return Parameters({pattern: axes and " ".join(axes.split()) for pattern, axes in value.items()}), []
    return Parameters(names=tuple(value)), []


def _problems(value: Any) -> Told:
    if isinstance(value, str) and value:
        yield from _pattern_problems(value, ("parameters",))
    elif isinstance(value, Mapping) and value:
        for pattern, axes in value.items():
            yield from _item_problems(pattern, axes)
    elif not isinstance(value, list | tuple) or not value or not all(isinstance(name, str) and name for name in value):
        yield ("parameters",), Problem("`parameters`", _EXPECTED, clip(value), _EXAMPLE)


def _item_problems(pattern: Any, axes: Any) -> Told:
    if not isinstance(pattern, str) or not pattern:
        yield ("parameters",), Problem("`parameters`", _EXPECTED, clip(pattern), _EXAMPLE)
        return
    path = "parameters", pattern
    yield from _pattern_problems(pattern, path)
    if axes is not None and (not isinstance(axes, str) or " ".join(axes.split()) not in ORIENTATIONS):
        known = ", ".join(f"`{each}`" for each in ORIENTATIONS)
        fix = near_miss(str(axes), ORIENTATIONS) or "`e` are slices, `o` outputs and `i` inputs, as they are stored."
        yield path, Problem(f"the orientation of {clip(pattern)}", f"one of {known}", clip(axes), fix)


def _pattern_problems(pattern: str, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Problem]]:
    try:
        compiled(pattern)
    except SpecError as error:
        yield path, error.problems[0]
