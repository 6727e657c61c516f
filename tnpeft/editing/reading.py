"""What a text declares, and every mistake in it with the characters to underline."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from tnpeft.documents.nodes import Node, read_document
from tnpeft.errors import Position, Problem, Problems, TnpeftError
from tnpeft.network import Layer, Network, Spec
from tnpeft.recipe import Recipe
from tnpeft.spec.tables import parse_table

__all__ = ["Mistake", "Reading", "bound", "kind_of_node", "located", "mistakes_of", "read_spec"]

_WORD = re.compile(r"""(["']).*?\1|["']|[^\s,\[\]{}()"':]+|:""")


@dataclass(frozen=True)
class Mistake:
    """One mistake: its sentence and its place. Lines and columns count from 1; `end` is the column after it.

    A mistake that is not in this text has `line` 0: it is about the layer, or in another file.
    """

    text: str
    line: int = 0
    column: int = 0
    end: int = 0

    @property
    def has_place(self) -> bool:
        return self.line > 0


@dataclass(frozen=True)
class Reading:
    """A text and its spec; `spec` is None if there are mistakes."""

    text: str
    spec: Spec | None
    mistakes: tuple[Mistake, ...] = ()


def read_spec(text: str, file: str = "<spec>") -> Reading:
    """The spec of a text, or its mistakes."""
    try:
        return Reading(text, Spec.from_yaml(text, file))
    except TnpeftError as error:
        return Reading(text, None, located(error.problems, text, file))


def bound(
    spec: Spec, layer: Layer, params: Mapping[str, float], file: str = "<spec>"
) -> tuple[Network | None, tuple[Mistake, ...]]:
    """The network on a layer, or why there is none."""
    try:
        return spec.bind(layer, **dict(params)), ()
    except TnpeftError as error:
        return None, located(error.problems, spec.text, file)


def mistakes_of(text: str, file: str) -> tuple[Mistake, ...]:
    """The mistakes of a spec, a recipe or a factor table; `file` is its path, for files that it names."""
    try:
        root = read_document(text, file)
        kind = kind_of_node(root)
        if kind == "recipe":
            Recipe.from_yaml(text, file)
        elif kind == "factors":
            problems = Problems()
            parse_table(root, problems)
            problems.raise_if_any()
        else:
            Spec.from_yaml(text, file)
    except TnpeftError as error:
        return located(error.problems, text, file)
    return ()


def kind_of_node(root: Node) -> str:
    """What a document is: a recipe has `adapters`, a factor table numbers for keys, a spec `tnpeft` or `cores`."""
    keys = [key.value for key, _ in root.items()]
    if "adapters" in keys and "cores" not in keys:
        return "recipe"
    if keys and all(isinstance(key, int) for key in keys):
        return "factors"
    return "spec" if not {"tnpeft", "cores"}.isdisjoint(keys) else "other"


def located(problems: Iterable[Problem], text: str, file: str) -> tuple[Mistake, ...]:
    """Problems as mistakes of a text; the sentence of a problem in another file names that file."""
    lines = text.split("\n")
    return tuple(_located(problem, lines, file) for problem in problems)


def _located(problem: Problem, lines: list[str], file: str) -> Mistake:
    where = problem.where
    if not isinstance(where, Position) or where.file != file:
        return Mistake(str(problem if isinstance(where, Position) else replace(problem, where=None)))
    number = min(max(where.line, 1), len(lines))
    start = max(where.column - 1, 0)
    match = _WORD.match(lines[number - 1], start)
    end = match.end() if match else start + 1
    if end > len(lines[number - 1].rstrip()):  # nothing stands there: the last character before it is underlined
        number = next((above for above in range(number, 0, -1) if lines[above - 1].strip()), number)
        end = max(len(lines[number - 1].rstrip()), 1)
        start = end - 1
    return Mistake(str(replace(problem, where=None)), number, start + 1, end + 1)
