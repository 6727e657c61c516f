"""YAML file + `--set key=value` → `Config`, every mistake with its file, line and column."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from ddpm_lab.support.faults import LabError
from tnpeft.documents.nodes import Node, read_document, read_file
from tnpeft.errors import Position, Problem, SpecError, near_miss

__all__ = ["read_config"]

C = TypeVar("C", bound=BaseModel)
Key = tuple[str | int, ...]
Place = Position | str

NAME = -1  # marks the place of a key itself


def read_config(path: Path, overrides: Sequence[str], kind: type[C]) -> C:
    """Read a configuration and apply `key.key=value` overrides; raises LabError with every mistake."""
    try:
        root = read_file(path, "configuration")
        if root.kind != "mapping":
            raise LabError(
                Problem("the configuration", "a mapping", root.describe(), "Start with `data:`.", root.position)
            )
        values: dict[str, Any] = root.plain()
        places: dict[Key, Place] = dict(_places(root, ()))
        for override in overrides:
            _apply(override, values, places)
    except SpecError as error:
        raise LabError(*(_about_us(problem) for problem in error.problems)) from None
    _refuse_infinities(values, places)
    try:
        # JSON's rules: a list is a tuple, "3" is no number.
        return kind.model_validate_json(json.dumps(values), context={"folder": path.parent})
    except ValidationError as error:
        problems = [_problem(item, values, places, kind, path) for item in error.errors(include_url=False)]
        raise LabError(*sorted(problems, key=_line)) from None


def _about_us(problem: Problem) -> Problem:
    """The reader's problems speak of specs; an empty file is the one where that misleads."""
    return replace(problem, fix="Start with `data:`.") if problem.what == "the file is empty" else problem


def _line(problem: Problem) -> int:
    return problem.where.line if isinstance(problem.where, Position) else 0


def _places(node: Node, key: Key) -> Iterator[tuple[Key, Place]]:
    """Where each value stands; under `(*key, NAME)` where its name does."""
    yield key, node.position
    for name, value in node.items():
        yield (*key, name.value, NAME), name.position
        yield from _places(value, (*key, name.value))
    if node.kind == "list":
        for index, item in enumerate(node.value):
            yield from _places(item, (*key, index))


def _apply(override: str, values: dict[str, Any], places: dict[Key, Place]) -> None:
    """Put `a.b=value` into `values`; the value is YAML, so that `[1, 2]` and `null` work."""
    name, equals, text = override.partition("=")
    where = f"--set {override}"
    if not equals or not all(name.split(".")):
        raise LabError(
            Problem("an override", "key.key=value", repr(override), "Write `--set training.steps=100`.", where)
        )
    value = read_document(text, where).plain() if text.strip() else None
    *parents, last = name.split(".")
    inner = values
    for depth, parent in enumerate(parents, 1):
        if not isinstance(inner.get(parent), dict):  # not there, or replaced: what is wrong with it, the override did
            inner[parent] = {}
            places[tuple(parents[:depth])] = places[(*parents[:depth], NAME)] = where
        inner = inner[parent]
    inner[last] = value
    key: Key = (*parents, last)
    for old in [old for old in places if old[: len(key)] == key]:
        del places[old]
    places[key] = places[(*key, NAME)] = where


def _refuse_infinities(value: Any, places: dict[Key, Place], key: Key = ()) -> None:
    """No number of a configuration may be infinite or not a number; pydantic lets both pass."""
    if isinstance(value, float) and not math.isfinite(value):
        name = ".".join(str(part) for part in key)
        raise LabError(Problem(name, "a finite number", str(value), "Write a number.", _place(key, places)))
    if isinstance(value, dict):
        for name, inner in value.items():
            _refuse_infinities(inner, places, (*key, name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _refuse_infinities(inner, places, (*key, index))


def _place(key: Key, places: dict[Key, Place]) -> Place | None:
    """Where a key stands, or the closest thing around it that has a place."""
    for length in range(len(key), -1, -1):
        if key[:length] in places:
            return places[key[:length]]
    return None


def _problem(item: Any, values: dict[str, Any], places: dict[Key, Place], kind: type[BaseModel], path: Path) -> Problem:
    key: Key = tuple(item["loc"])
    if key[-1:] == ("[key]",):  # pydantic's word for the name of an entry
        return _bad_name(key[:-1], places, path)
    name = ".".join(str(part) for part in key)
    where = _place(key, places) or str(path)
    if item["type"] == "extra_forbidden":
        known = _known(kind, key[:-1])
        fix = near_miss(str(key[-1]), known) or "The keys are " + ", ".join(f"`{word}`" for word in known) + "."
        where = places.get((*key, NAME), where)
        return Problem("an unknown key", "a key of this section", f"`{key[-1]}`", fix, where)
    expected, fix = _wording(item)
    return Problem(f"`{name}`", expected, _shown(values, key), fix, where)


def _bad_name(key: Key, places: dict[Key, Place], path: Path) -> Problem:
    """The name of an entry that cannot name a folder."""
    where = places.get((*key, NAME)) or _place(key, places) or str(path)
    expected = "at most 60 letters, digits, `_` and `-`, the first a letter or a digit"
    section = ".".join(str(part) for part in key[:-1])
    return Problem(f"a name in `{section}`", expected, f"`{key[-1]}`", "Choose another name.", where)


def _known(kind: type[BaseModel], key: Key) -> list[str]:
    """The keys of the section that `key` names."""
    annotation: Any = kind
    for part in key:
        section = _section(annotation)
        if section is not None:
            field = section.model_fields.get(str(part))
            annotation = field.annotation if field is not None else None
        else:  # an entry of a mapping or a list
            annotation = next((kind for kind in reversed(get_args(annotation)) if kind is not Ellipsis), None)
    section = _section(annotation)
    return list(section.model_fields) if section is not None else []


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation is: itself, or beside None."""
    for kind in (annotation, *get_args(annotation)) if _optional(annotation) else (annotation,):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _optional(annotation: Any) -> bool:
    return type(None) in get_args(annotation)


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


def _shown(values: Any, key: Key) -> str:
    """The value under `key` as a reader would name it."""
    for part in key:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            return "nothing"
    if isinstance(values, dict):
        return "a mapping"
    if isinstance(values, list):
        return f"a list of {len(values)}"
    return "nothing" if values is None else repr(values)
