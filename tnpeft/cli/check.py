"""`tnpeft check`: every mistake of every file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tnpeft.cli.output import Output, problem_data
from tnpeft.documents.nodes import read_file
from tnpeft.documents.paths import is_file, is_folder
from tnpeft.editing.reading import kind_of_node
from tnpeft.errors import Problem, Problems, SpecError
from tnpeft.network import load_spec
from tnpeft.spec import find_shipped, list_specs
from tnpeft.spec.library import not_yaml
from tnpeft.spec.tables import parse_table

__all__ = ["SUFFIXES", "check_files", "expand", "kind_of"]

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class _Result:
    name: str
    kind: str  # "spec", "recipe", "factors", "folder" or "other"
    problems: tuple[Problem, ...] = ()

    def data(self) -> dict[str, Any]:
        problems = [problem_data(problem) for problem in self.problems]
        return {"file": self.name, "kind": self.kind, "ok": not problems, "problems": problems}


def check_files(output: Output, names: Sequence[str], as_json: bool) -> bool:
    """Check files, folders (all YAML files below them) and shipped names; true where nothing is wrong.

    A file that is neither spec, recipe nor factor table is a mistake if it was named; in a folder it is passed over.
    """
    results = [_check(name, found) for name, found in expand(names).items()]
    mistakes = sum(len(result.problems) for result in results)
    if as_json:
        output.data({"files": [result.data() for result in results], "mistakes": mistakes})
    else:
        _print(output, results, mistakes)
    return not mistakes


def _print(output: Output, results: Sequence[_Result], mistakes: int) -> None:
    for result in results:
        if result.kind == "other":
            output.say(f"passed {result.name} (no spec, recipe or factor table)")
        elif not result.problems:
            output.say(f"ok     {result.name} ({result.kind})")
        for problem in result.problems:
            output.mistake(problem)
    checked = [result for result in results if result.kind != "other"]
    good = sum(not result.problems for result in checked)
    output.say(f"{_plural(len(checked), 'file')}, {good} without mistakes, {_plural(mistakes, 'mistake')}")


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def expand(names: Iterable[str]) -> dict[str, bool]:
    """Each name with whether it was found in a folder. Folders become the YAML files below them, not hidden ones."""
    expanded: dict[str, bool] = {}
    for name in names:
        path = Path(name)
        if not name or not is_folder(path):
            expanded[name] = False
            continue
        below = sorted(Path(folder, file) for folder, _, files in os.walk(path) for file in files)
        files = [file for file in below if file.suffix in SUFFIXES and is_file(file)]
        shown = [str(file) for file in files if not any(part[0] == "." for part in file.relative_to(path).parts)]
        for file in shown or [name]:
            expanded.setdefault(file, bool(shown))
    return expanded


def _check(name: str, found: bool) -> _Result:
    """What a file is, and its mistakes."""
    if name and is_folder(name):
        problem = Problem("nothing to check", "YAML files in this folder", "none", "Name another folder.", name)
        return _Result(name, "folder", (problem,))
    kind = "spec"
    try:
        kind = kind_of(name)
        if kind == "other" and found:
            return _Result(name, kind)
        _read(name, kind)
    except SpecError as error:
        return _Result(name, "spec" if kind == "other" else kind, error.problems)
    return _Result(name, kind)


def _read(name: str, kind: str) -> None:
    """Raises SpecError with the file's mistakes."""
    if kind == "recipe":
        from tnpeft.recipe import load_recipe

        load_recipe(name)
    elif kind == "factors":
        problems = Problems()
        parse_table(read_file(Path(name), "factor table"), problems)
        problems.raise_if_any()
    else:
        load_spec(name)


def kind_of(name: str) -> str:
    """What a file or shipped name is: a recipe has `adapters`, a factor table numbers for keys, a spec most others."""
    path = Path(name)
    if path.suffix not in SUFFIXES and not is_file(path):
        return "spec" if name in list_specs() or name not in _recipes() else "recipe"
    if path.suffix not in SUFFIXES and (problem := not_yaml(path, "spec or recipe")):
        raise SpecError(problem)
    return kind_of_node(read_file(find_shipped(path, "recipe or spec", "recipes", "")))


def _recipes() -> tuple[str, ...]:
    from tnpeft.recipe import list_recipes

    return tuple(list_recipes())
