"""What may be written at a cursor: keys and values of the schema, and names from the text itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tnpeft.documents.writing import as_yaml
from tnpeft.editing.cursor import ITEM, Cursor, cursor_at
from tnpeft.network import Spec
from tnpeft.recipe.json_schema import recipe_schema
from tnpeft.spec.expression import FUNCTIONS
from tnpeft.spec.json_schema import spec_schema
from tnpeft.spec.pattern import ELLIPSIS, LAYER_NAMES

__all__ = ["Completion", "complete", "described"]

_PLACEHOLDER = re.compile(r"\$\{\d+:([^}]*)\}")
_EXPRESSIONS = {("params", "*"), ("sizes", "*"), ("bond",), ("scale",), ("start_std",), ("terms", ITEM, "scale")}
_LEGS = {("weight",), ("cores", "*"), ("cores", "*", "legs"), ("terms", ITEM, "weight")}
_CORES = {("terms", ITEM, "cores"), ("terms", ITEM, "cores", ITEM), ("cores", "*", "of"), ("cores", "*", "of", ITEM)}


@dataclass(frozen=True)
class Completion:
    """One thing to write: `label` is shown, `text` replaces the word before the cursor.

    `kind` is key, value, name or snippet.
    """

    label: str
    text: str
    kind: str
    detail: str = ""


def complete(text: str, line: int, column: int, spec: Spec | None = None) -> tuple[tuple[Completion, ...], Cursor]:
    """What may be written before character `column` of `line`, both from 1; `spec` is this text's last valid one."""
    cursor = cursor_at(text, line, column)
    if cursor.place == "comment":
        return (), cursor
    schema = _schema("recipe" if re.search(r"^adapters\s*:", text, re.MULTILINE) else "spec")
    nodes = list(_nodes_at(schema, cursor.path))
    if cursor.place == "key":
        found = list(_keys(nodes, {*cursor.keys, *_later_keys(text, cursor)}))
    else:
        found = [*_values(nodes), *_names(cursor.path, spec)]
    first: dict[str, Completion] = {}
    for completion in found:
        if completion.label.casefold().startswith(cursor.word.casefold()) and completion.label != cursor.word:
            first.setdefault(completion.label, completion)
    return tuple(first.values()), cursor


def described(text: str, path: Sequence[str]) -> str:
    """The schema's description of the key at the end of a path, or an empty text."""
    schema = _schema("recipe" if re.search(r"^adapters\s*:", text, re.MULTILINE) else "spec")
    return next((node["description"] for node in _nodes_at(schema, path) if node.get("description")), "")


@lru_cache(maxsize=2)
def _schema(what: str) -> dict[str, Any]:
    return spec_schema() if what == "spec" else recipe_schema()


def _nodes_at(schema: Mapping[str, Any], path: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """The parts of a schema that a path of keys leads to, each alternative by itself."""
    if path:
        step, *rest = path
        for node in _options(schema):
            below = node.get("items") if step == ITEM else node.get("properties", {}).get(step)
            if below is None and step != ITEM:
                below = node.get("additionalProperties")
            if isinstance(below, Mapping):
                yield from _nodes_at(below, rest)
        return
    yield from _options(schema)


def _options(node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield node
    for option in node.get("anyOf", ()):
        yield from _options(option)


def _keys(nodes: Sequence[Mapping[str, Any]], present: set[str]) -> Iterator[Completion]:
    for node in nodes:
        for name, below in node.get("properties", {}).items():
            if name not in present:
                yield Completion(name, f"{name}: ", "key", below.get("description", ""))
        for snippet in node.get("defaultSnippets", ()):
            body = snippet["body"]
            if isinstance(body, Mapping) and not ("tnpeft" in body and present):
                written = _PLACEHOLDER.sub(r"\1", as_yaml(_plain(body)).rstrip("\n"))
                yield Completion(snippet["label"], written, "snippet", snippet.get("description", ""))


def _plain(value: Any) -> Any:
    """A snippet's body with the default texts of its placeholders."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return _PLACEHOLDER.sub(r"\1", value).replace("\\$", "$") if isinstance(value, str) else value


def _values(nodes: Sequence[Mapping[str, Any]]) -> Iterator[Completion]:
    detail = next((node["description"] for node in nodes if node.get("description")), "")
    for node in nodes:
        if node.get("type") == "boolean":
            yield from (Completion(word, word, "value", detail) for word in ("true", "false"))
        values = [*node.get("enum", ()), *([node["const"]] if "const" in node else ()), *node.get("examples", ())]
        for value in values:
            if isinstance(value, str | int | float) and not isinstance(value, bool):
                yield Completion(str(value), str(value), "value", detail)


def _names(path: tuple[str, ...], spec: Spec | None) -> Iterator[Completion]:
    """Names from the text itself: indices in legs, cores where cores are named, params in expressions."""
    patterns = {path, *((path[0], "*", *path[2:]) for _ in (0,) if len(path) > 1)}
    if patterns & _LEGS:
        yield Completion(ELLIPSIS, ELLIPSIS, "name", "one index for each kernel axis")
    if patterns & _EXPRESSIONS:
        yield from (Completion(name, name, "name", "of the layer") for name in LAYER_NAMES)
        yield from (Completion(name, f"{name}(", "name", "a function") for name in FUNCTIONS)
    if spec is None:
        return
    if patterns & _LEGS:
        legs = dict.fromkeys(leg for core in spec.cores for leg in core.legs)
        yield from (Completion(leg, leg, "name", "an index") for leg in (*spec.sized, *legs) if leg != ELLIPSIS)
    if patterns & _CORES:
        yield from (Completion(core.name, core.name, "name", "a core") for core in spec.cores)
    if patterns & _EXPRESSIONS:
        yield from (Completion(name, name, "name", "a param") for name in spec.params)


def _later_keys(text: str, cursor: Cursor) -> set[str]:
    """The keys of the whole file, to know those below the cursor."""
    return set() if cursor.path else set(re.findall(r"^([A-Za-z_]\w*)[ ]*:", text, re.MULTILINE))
