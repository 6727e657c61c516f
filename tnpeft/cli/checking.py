"""`tnpeft check`: every mistake of every file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tnpeft.cli.output import Output, problem_data
from tnpeft.errors import Problem, SpecError
from tnpeft.spec import list_specs, load_spec
from tnpeft.spec.document import Problems, read_file
from tnpeft.spec.reader import parse_table

__all__ = ["SUFFIXES", "check_files", "kind_of"]

SUFFIXES = (".yaml", ".yml")


def check_files(output: Output, names: Sequence[str], as_json: bool) -> bool:
    """Check files, folders (all YAML files below them) and shipped names; true where nothing is wrong."""
    results = [(name, *_check(name)) for name in _expand(names)]
    mistakes = sum(len(problems) for _, _, problems in results)
    if as_json:
        files = [
            {
                "file": name,
                "kind": kind,
                "ok": not problems,
                "problems": [problem_data(problem) for problem in problems],
            }
            for name, kind, problems in results
        ]
        output.data({"files": files, "mistakes": mistakes})
        return not mistakes
    for name, kind, problems in results:
        if not problems:
            output.say(f"ok     {name} ({kind})")
        for problem in problems:
            output.mistake(problem)
    good = sum(not problems for _, _, problems in results)
    output.say(f"{_plural(len(results), 'file')}, {good} without mistakes, {_plural(mistakes, 'mistake')}")
    return not mistakes


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _expand(names: Iterable[str]) -> list[str]:
    """Folders become the YAML files below them, in order; every file once."""
    found: dict[str, None] = {}
    for name in names:
        path = Path(name)
        if not path.is_dir():
            found[name] = None
            continue
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        found.update(dict.fromkeys(map(str, files or [path])))
    return list(found)


def _check(name: str) -> tuple[str, tuple[Problem, ...]]:
    """What a file is, and its mistakes."""
    if Path(name).is_dir():
        return "folder", (
            Problem("nothing to check", "YAML files in this folder", "none", "Name another folder.", name),
        )
    kind = "spec"
    try:
        kind = kind_of(name)
        if kind == "recipe":
            from tnpeft.recipe import load_recipe

            load_recipe(name)
        elif kind == "factors":
            problems = Problems()
            parse_table(read_file(Path(name), "factor table"), problems)
            problems.raise_if_any()
        else:
            load_spec(name)
    except SpecError as error:
        return kind, error.problems
    return kind, ()


def kind_of(name: str) -> str:
    """A recipe has `adapters`, a factor table numbers for keys; everything else is read as a spec."""
    path = Path(name)
    if path.suffix not in SUFFIXES and not path.is_file():
        return "spec" if name in list_specs() or name not in _recipes() else "recipe"
    node = read_file(path)
    keys = [key.value for key, _ in node.items()]
    if "adapters" in keys and "cores" not in keys:
        return "recipe"
    return "factors" if keys and all(isinstance(key, int) for key in keys) else "spec"


def _recipes() -> tuple[str, ...]:
    from tnpeft.recipe import list_recipes

    return tuple(list_recipes())
