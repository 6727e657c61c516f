"""A JSON Schema of the files that a `Schema` describes: editors complete keys and mark mistakes with it.

Draft 7, which the YAML extension of VS Code reads best. The types come from the models that the files are checked
with, the sentences from the tables that mistakes are reported with, so that editor and compiler say the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tnpeft.documents.schema import Schema

__all__ = ["NAME", "WORD", "Keywords", "schema_document"]

Keywords = Mapping[str, Any]

WORD = "[A-Za-z_][A-Za-z0-9_]*"
NAME = "^[A-Za-z0-9_.-]+$"


def schema_document(
    schema: Schema, title: str, keywords: Mapping[str, Keywords], optional: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The JSON Schema of the files that `schema` describes, with `keywords` beside what its models say.

    `optional` are keys that may be missing though the model asks for them.
    """
    generated = schema.model.model_json_schema(by_alias=True)
    models = {name: _tidied(model) for name, model in generated.pop("$defs", {}).items()}
    root = _inlined(_tidied(generated), models)
    root["required"] = [key for key in root["required"] if key not in optional]
    _describe(root, "", schema, keywords)
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": title, **root}


def _tidied(node: Any) -> Any:
    """The node without titles that pydantic makes from names, and without null, which no file writes."""
    if isinstance(node, list):
        return [_tidied(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {key: value for key, value in node.items() if key not in ("title", "description")}
    if "properties" in node:
        kept["properties"] = {key: _tidied(value) for key, value in node["properties"].items()}  # perhaps a `title`
    if kept.get("default", 0) is None or kept.get("default") == {}:
        del kept["default"]
    options = [_tidied(option) for option in kept.pop("anyOf", ()) if option != {"type": "null"}]
    rest = {key: value if key == "properties" else _tidied(value) for key, value in kept.items()}
    if len(options) == 1:
        return {**options[0], **rest}
    return {**rest, "anyOf": options} if options else rest


def _inlined(node: Any, models: Mapping[str, Any]) -> Any:
    """The node with every model in its place, so that editors show the sentence with the key."""
    if isinstance(node, list):
        return [_inlined(item, models) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inlined(models[str(node["$ref"]).rpartition("/")[2]], models)
    return {key: _inlined(value, models) for key, value in node.items()}


def _describe(node: dict[str, Any], path: str, schema: Schema, keywords: Mapping[str, Keywords]) -> None:
    """Add sentences and keywords to a node and to what stands below it."""
    name = path.rpartition(".")[2]
    expected = schema.expected.get(path.replace(".*", ""), schema.expected.get(name))
    if expected is not None:
        what, fix = expected
        node["description"] = f"{what[:1].upper()}{what[1:]}. {fix}"
    if "anyOf" in keywords.get(path, {}):
        node.pop("type", None)
    node.update(keywords.get(path, {}))
    for key, value in node.get("properties", {}).items():
        _describe(value, f"{path}.{key}".lstrip("."), schema, keywords)
    options = node.get("anyOf", ())
    below = [node.get("additionalProperties"), node.get("items"), *options, *(each.get("items") for each in options)]
    for value in below:
        if isinstance(value, dict) and "properties" in value:
            _describe(value, f"{path}.*".lstrip("."), schema, keywords)
        elif isinstance(value, dict):
            for option in value.get("anyOf", ()):
                if "properties" in option:
                    _describe(option, f"{path}.*".lstrip("."), schema, keywords)
