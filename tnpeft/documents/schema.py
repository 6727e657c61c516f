"""The shape of a YAML file: its keys and their types, checked by pydantic.

pydantic says *where* a value is wrong; the sentence about it comes from the schema's tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from tnpeft.documents.nodes import Node
from tnpeft.errors import MAX_PROBLEMS, Position, Problem, Problems, clip, closest, near_miss

__all__ = ["FilePart", "Path", "Schema", "check_shape", "entries_problem", "is_remnant", "keys_at", "with_text_keys"]

Path = tuple[str | int, ...]


class FilePart(BaseModel):
    """A mapping in a file: only known keys are allowed, and no type is converted into another."""

    model_config = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class Schema:
    """What a file should look like, in types and in words.

    `expected` gives, for each key, what is expected there and how to fix it; `parts` gives the same for the entries
    below a key (under `cores` for each core). `instead` maps a key that may be missing to the key that replaces it.
    `advice` says what to write for an unknown key that resembles no known one, from the keys above it, the key and its
    value. For a key that `is_word` knows from elsewhere, `advice` comes first even if a known key is near.
    """

    what: str
    model: type[FilePart]
    expected: Mapping[str, tuple[str, str]]
    parts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    instead: Mapping[str, str] = field(default_factory=dict)
    versioned: str = "tnpeft"
    advice: Callable[[Path, str, object], str] = lambda path, key, value: ""
    is_word: Callable[[str], bool] = lambda key: False

    def words_for(self, path: Path, key: str) -> tuple[str, str] | None:
        """What is expected under `key`; `terms.cores` differs from `cores`."""
        return self.expected.get(f"{path[0]}.{key}" if len(path) > 1 else key, self.expected.get(key))


def with_text_keys(node: Node, problems: Problems, numbers_under: str = "factors") -> Node:
    """The tree without keys that are no texts, which are reported; keys below `numbers_under` may be numbers."""
    if node.kind == "list":
        return replace(node, value=tuple(with_text_keys(item, problems, numbers_under) for item in node.value))
    if node.kind != "mapping":
        return node
    pairs = []
    for key, value in node.value:
        if not isinstance(key.value, str):
            fix = "Quote it if it is meant as a word."
            problems.add(key.position, "a key", "a word", clip(key.text), fix)
        else:
            pairs.append((key, value if key.value == numbers_under else with_text_keys(value, problems, numbers_under)))
    return replace(node, value=tuple(pairs))


def check_shape(root: Node, problems: Problems, schema: Schema) -> set[Path]:
    """Report what does not fit the schema; returns the paths of the parts that cannot be used."""
    if root.kind != "mapping":
        fix = f"A {schema.what} is `key: value` lines, the first one `tnpeft: 1`."
        problems.add(root.position, "the file", "a mapping", root.describe(), fix)
        problems.raise_if_any()
    kinds: dict[Path, str] = {}
    version = root.get(schema.versioned)
    if version is not None and version.value == 1 and type(version.value) is not int:
        kinds[(schema.versioned,)] = "literal_error"  # `true` and `1.0` equal 1 in Python
    try:
        schema.model.model_validate(root.plain())
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_context=False, include_input=False):
            path = _existing(root, detail["loc"])
            if detail["type"] == "missing":
                path = (*path, str(detail["loc"][-1]))
            kinds.setdefault(path, str(detail["type"]))
    # Every member of a union complains: the one that got further into the value knows more.
    inner = {path[:length] for path in kinds for length in range(len(path))}
    unknown = itertools.islice((path for path, kind in kinds.items() if kind == "extra_forbidden"), MAX_PROBLEMS)
    misspelt = {(*path[:-1], _meant(path, schema)) for path in unknown}
    for path, kind in kinds.items():
        if path not in inner and not (kind == "missing" and path in misspelt):
            _report(root, path, kind, schema, problems)
    return {path for path in kinds if not _is_replaced(root, path, schema)} | misspelt


def _is_replaced(root: Node, path: Path, schema: Schema) -> bool:
    """Whether a missing key is replaced by another one."""
    parent = root.along(path[:-1])[-1] if path else root
    other = schema.instead.get(str(path[-1])) if path else None
    return other is not None and parent.get(path[-1]) is None and parent.get(other) is not None


def is_remnant(key: Node, value: Node) -> bool:
    """Whether a comma split this pair off an unquoted value: `{init: normal(1, 2)}` has a key `2)` without value."""
    return value.value is None and key.text.rstrip().endswith(")")


def entries_problem(root: Node, expected: str) -> Problem | None:
    """The problem of a file that has only entries of a recipe, one or a list; None for anything else."""
    entry = next((item for item in root.value if item.get("spec")), root) if root.kind == "list" else root
    known = ("spec", "match", "parameters", "params", "exclude", "kinds", "layers", "ranks", "dropout")
    keys = [key for key, _ in entry.items() if key.value in known]
    if entry.get("spec") is None or any(entry.get(key) for key in ("adapters", "cores", "weight", "start")):
        return None
    found = " and ".join(f"`{key.value}`" for key in keys)
    fix = (
        "It looks like a recipe, whose entries stand under `adapters`: write `tnpeft: 1`, `name: my_recipe` and "
        "`adapters: [{spec: lora, match: all, params: {r: 4}}]`, say."
    )
    return Problem("the file", expected, f"{found}, which an entry of a recipe has", fix, keys[0].position)


def _meant(path: Path, schema: Schema) -> str:
    """The key that an unknown one was probably meant to be, or an empty string."""
    return closest(str(path[-1]), keys_at(schema.model, path[:-1])) or ""


def _existing(root: Node, loc: tuple[str | int, ...]) -> Path:
    """The part of pydantic's `loc` that exists in the file; the tags of union members are left out."""
    path: list[str | int] = []
    node = root
    for step in loc:
        below = node.get(step)
        if below is not None:
            path.append(step)
            node = below
    return tuple(path)


def _report(root: Node, path: Path, kind: str, schema: Schema, problems: Problems) -> None:
    parent, key = root.along(path[:-1])[-1], path[-1]
    owner, core = _owner(root, path, schema)
    node = parent.get(key)
    if node is None:
        if parent.get(schema.instead.get(str(key), "")) is not None:
            return
        expected, fix = schema.words_for(path, str(key)) or ("it", "Add it.")
        problems.add(parent.position, f"{owner} has no `{key}`", expected, "nothing", fix, core=core)
    elif node.value is None and str(key).rstrip().endswith(")"):
        fix = 'A comma ends a value inside `{...}`: quote this, `init: "kaiming_uniform(fan=8, gain=relu)"`.'
        what = f"{owner if kind == 'extra_forbidden' else f'`{path[-2]}`'}, key {clip(str(key))}"
        found = "the rest of one that a comma split"
        problems.add(_name(parent, str(key)), what, "a quoted value", found, fix, core=core)
    elif kind == "extra_forbidden":
        known = sorted(keys_at(schema.model, path[:-1]))
        advice = schema.advice(path[:-1], str(key), node.plain())
        near = "" if schema.is_word(str(key)) else near_miss(str(key), known)
        fix = near or advice or near_miss(str(key), known) or "Remove it."
        what = f"unknown key {clip(str(key))} in {owner}"
        problems.add(_name(parent, str(key)), what, f"one of {', '.join(known)}", clip(str(key)), fix, core=core)
    elif len(path) == 2 and path[0] in schema.parts:
        expected, fix = schema.parts[str(path[0])]
        place = f"entry {key + 1}" if isinstance(key, int) else clip(key)
        what = owner if core else f"`{path[0]}`, {place}"
        problems.add(node.position, what, expected, node.describe(), fix, core=core)
    else:
        named = next((str(step) for step in reversed(path) if step in schema.expected), str(path[0]))
        expected, fix = schema.words_for(path, named) or ("another value", "Change it.")
        if named == schema.versioned and isinstance(node.value, int) and node.value > 1:
            fix = "This file needs a newer tnpeft: upgrade it, or write `tnpeft: 1`."
        what = f"`{named}`" if owner in ("the file", f"`{named}`") else f"{owner}, `{named}`"
        problems.add(node.position, what, expected, node.describe(), fix, core=core)


def _owner(root: Node, path: Path, schema: Schema) -> tuple[str, str | None]:
    """A name for the mapping that holds a path's end, and the core if it is one."""
    if len(path) > 1 and path[0] == "cores":
        return f"core '{clip(path[1])[1:-1]}'", str(path[1])
    top = root.get(path[0]) if path else None
    if len(path) > 2 and isinstance(path[1], int) and top is not None and top.kind == "list":
        return f"`{path[0]}`, entry {path[1] + 1}", None
    if len(path) > 1 and path[0] not in schema.parts and path[0] in schema.model.model_fields:
        return f"`{path[0]}`", None
    return "the file", None


def keys_at(model: type[BaseModel], path: Iterable[str | int]) -> list[str]:
    """The keys, as files write them, of the mapping at a path of the files that a model describes."""
    annotation: Any = model
    for step in path:
        annotation = _inner(annotation, step)
    return list(_fields(annotation))


def _fields(annotation: Any) -> dict[str, Any]:
    """The types under each key of a mapping; none for an annotation without a model."""
    models = [part for part in _options(annotation) if isinstance(part, type) and issubclass(part, BaseModel)]
    return {info.alias or name: info.annotation for part in models for name, info in part.model_fields.items()}


def _inner(annotation: Any, step: str | int) -> Any:
    """The type under a key, or of the items of a list or of a mapping by names."""
    if fields := _fields(annotation):
        return fields.get(str(step))
    entries = (get_args(option)[-2:] for option in _options(annotation))
    return next((pair[0] if pair[-1] is Ellipsis else pair[-1] for pair in entries if pair), None)


def _options(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _name(parent: Node, key: str) -> Position:
    """The position of a mapping's key."""
    return (parent.key(key) or parent).position
