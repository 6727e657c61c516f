"""YAML file + `--set key=value` → `Config`, every mistake with its file, line and column."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ddpm_lab.support.faults import LabError
from tnpeft.documents.nodes import Node, read_document, read_file
from tnpeft.documents.schema import keys_at
from tnpeft.errors import Position, Problem, SpecError, near_miss

__all__ = ["read_config"]

C = TypeVar("C", bound=BaseModel)
Key = tuple[str | int, ...]

OPTION = "--set "


def read_config(path: Path, overrides: Sequence[str], kind: type[C]) -> C:
    """Read a configuration and apply `key.key=value` overrides; raises LabError with every mistake."""
    try:
        root = read_file(path, "configuration")
        if root.kind != "mapping":
            raise LabError(
                Problem("the configuration", "a mapping", root.describe(), "Start with `data:`.", root.position)
            )
        for override in overrides:
            root = _overridden(root, override)
    except SpecError as error:
        raise LabError(*(_about_us(problem) for problem in error.problems)) from None
    if problem := next(_infinities(root), None):
        raise LabError(problem)
    try:
        # JSON's rules: a list is a tuple, "3" is no number.
        return kind.model_validate_json(json.dumps(root.plain()), context={"folder": path.parent})
    except ValidationError as error:
        problems = [_problem(item, root, kind) for item in error.errors(include_url=False)]
        raise LabError(*sorted(problems, key=_line)) from None


def _about_us(problem: Problem) -> Problem:
    """The reader's problems speak of specs; an empty file is the one where that misleads."""
    return replace(problem, fix="Start with `data:`.") if problem.what == "the file is empty" else problem


def _line(problem: Problem) -> int:
    return problem.where.line if isinstance(problem.where, Position) else 0


def _overridden(root: Node, override: str) -> Node:
    """The configuration with `a.b=value` in it; the value is YAML, so that `[1, 2]` and `null` work."""
    name, equals, text = override.partition("=")
    option = f"{OPTION}{override}"
    names = name.split(".")
    if not equals or not all(names):
        raise LabError(
            Problem("an override", "key.key=value", repr(override), "Write `--set training.steps=100`.", option)
        )
    where = Position(option, 1, 1)
    return _with(root, names, read_document(text, option) if text.strip() else Node("scalar", None, where), where)


def _with(node: Node, names: Sequence[str], value: Node, where: Position) -> Node:
    """A mapping with a value under a path of names. What was no mapping there is replaced: its fault is then ours."""
    if not names:
        return value
    name, *below = names
    pairs = {key.value: (key, item) for key, item in node.items()}
    key, inner = pairs.get(name, (None, None))
    if key is None or inner is None or not below or inner.kind != "mapping":
        key, inner = Node("scalar", name, where, name), Node("mapping", (), where)
    pairs[name] = key, _with(inner, below, value, where)
    return replace(node, value=tuple(pairs.values()))


def _infinities(node: Node, key: Key = ()) -> Iterator[Problem]:
    """Numbers that are infinite or none, which no configuration may have; pydantic lets both pass."""
    if isinstance(node.value, float) and not math.isfinite(node.value):
        what = ".".join(str(part) for part in key)
        yield Problem(what, "a finite number", str(node.value), "Write a number.", _place(node))
    for name, inner in node.items():
        yield from _infinities(inner, (*key, name.value))
    for index, inner in enumerate(node.value if node.kind == "list" else ()):
        yield from _infinities(inner, (*key, index))


def _place(node: Node) -> Position | str:
    """Where a value or a key stands; of an override all of it."""
    return node.position.file if node.position.file.startswith(OPTION) else node.position


def _problem(item: Any, root: Node, kind: type[BaseModel]) -> Problem:
    key: Key = tuple(item["loc"])
    is_name = key[-1:] == ("[key]",)  # pydantic's word for the name of an entry
    key = key[:-1] if is_name else key
    nodes = root.along(key)
    node = nodes[-1] if len(nodes) > len(key) else None
    name = nodes[len(key) - 1].key(key[-1]) if key and node else None
    if is_name:
        return _bad_name(key, _place(name or nodes[-1]))
    if item["type"] == "extra_forbidden":
        known = keys_at(kind, key[:-1])
        fix = near_miss(str(key[-1]), known) or "The keys are " + ", ".join(f"`{word}`" for word in known) + "."
        return Problem("an unknown key", "a key of this section", f"`{key[-1]}`", fix, _place(name or nodes[-1]))
    expected, fix = _wording(item)
    what = ".".join(str(part) for part in key)
    return Problem(f"`{what}`", expected, _shown(node), fix, _place(nodes[-1]))


def _bad_name(key: Key, where: Position | str) -> Problem:
    """The name of an entry that cannot name a folder."""
    expected = "at most 60 letters, digits, `_` and `-`, the first a letter or a digit"
    section = ".".join(str(part) for part in key[:-1])
    return Problem(f"a name in `{section}`", expected, f"`{key[-1]}`", "Choose another name.", where)


def _wording(item: Any) -> tuple[str, str]:
    """What pydantic expected, in this project's words."""
    context = item.get("ctx", {})
    words = {
        "int_parsing": "a whole number",
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_parsing": "a number",
        "float_type": "a number",
        "bool_parsing": "true or false",
        "bool_type": "true or false",
        "string_type": "a text",
        "path_type": "a path",
        "tuple_type": "a list",
        "dict_type": "a mapping",
        "model_type": "a mapping",
        "too_short": f"{context.get('min_length')} values",
        "too_long": f"{context.get('max_length')} values",
        "missing": "a value",
        "greater_than": f"a number above {context.get('gt')}",
        "greater_than_equal": f"at least {context.get('ge')}",
        "less_than": f"a number below {context.get('lt')}",
        "less_than_equal": f"at most {context.get('le')}",
        "literal_error": f"one of {context.get('expected')}",
    }
    if item["type"] == "literal_error" and isinstance(item["input"], str):
        choices = str(context["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
        return words["literal_error"], near_miss(item["input"], choices) or "Choose one of these."
    message = str(item["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
    return words.get(str(item["type"]), message), "Change the value."


def _shown(node: Node | None) -> str:
    """A value as a reader would name it."""
    if node is None or node.value is None:
        return "nothing"
    if node.kind == "list":
        return f"a list of {len(node.value)}"
    return "a mapping" if node.kind == "mapping" else repr(node.value)
