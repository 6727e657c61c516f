"""What a spec file looks like, as a JSON Schema: editors complete keys and mark mistakes with it.

Draft 7, which the YAML extension of VS Code reads best. The types come from the models that the files are checked
with, the sentences from the tables that mistakes are reported with, so that editor and compiler say the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tnpeft.spec.pattern import KINDS
from tnpeft.spec.reader import SHORT_KINDS
from tnpeft.spec.schema import SPEC
from tnpeft.spec.shape import Schema

__all__ = ["NAME", "WORD", "Keywords", "schema_document", "spec_schema"]

Keywords = Mapping[str, Any]

WORD = "[A-Za-z_][A-Za-z0-9_]*"
NAME = "^[A-Za-z0-9_.-]+$"
_INDEX = rf"({WORD}|k\.\.\.)"
_WORDS = rf"^\s*{_INDEX}(\s+{_INDEX})*\s*$"
_LEGS = rf"^\s*({_INDEX}(\s+{_INDEX})*)?\s*$"
_PATTERN = r"^[A-Za-z0-9_.()\s]+$"
_PLAIN_INITS = ("zeros", "ones", "eye", "orthogonal", "svd_us", "svd_vs")
_INIT = {
    "anyOf": [{"enum": list(_PLAIN_INITS)}, {"type": "string", "pattern": rf"^\s*{WORD}\s*(\(.*\))?\s*$"}],
    "examples": ["zeros", "normal(0.02)", "kaiming_uniform(fan=last(2), gain=relu)", "constant(0.1)"],
}
_KIND = {"enum": [*KINDS, *SHORT_KINDS]}

# Keywords that the models do not know, by the path of keys: `cores.*` is any core, `terms.*` any term.
_SPEC: dict[str, Keywords] = {
    "": {
        "oneOf": [{"required": ["weight"]}, {"required": ["terms"]}],
        "defaultSnippets": [
            {
                "label": "low-rank update",
                "description": "A whole spec to start from",
                "body": {
                    "tnpeft": 1,
                    "name": "${1:my_adapter}",
                    "layers": "any",
                    "params": {"r": 4},
                    "sizes": {"o": "out_channels", "i": "in_channels"},
                    "cores": {"down": "r i k...", "up": {"legs": "o r", "init": "zeros"}},
                    "weight": "o i k...",
                    "start": "zero",
                },
            }
        ],
    },
    "name": {"pattern": NAME},
    "title": {"description": "What the adapter is, in a few words."},
    "source": {"description": "Where it comes from: authors, venue, arXiv number."},
    "start": {"description": "`zero`: one core is zeros. `frozen_copy`: the update is T(now) - T(start)."},
    "layers": {
        "anyOf": [_KIND, {"type": "array", "items": _KIND, "minItems": 1}],
        "examples": ["any", "conv", ["Linear", "Conv3d"]],
    },
    "params": {"propertyNames": {"pattern": rf"^{WORD}$"}, "examples": [{"r": 4, "alpha": "r"}]},
    "bond": {"examples": ["r"]},
    "sizes": {
        "propertyNames": {"pattern": _WORDS},
        "examples": [{"o": "out_channels", "i": "in_channels", "kd kh kw": "kernel_size"}],
    },
    "factors": {"examples": ["tenvoo", {"32": [4, 4, 2]}]},
    "init": _INIT,
    "cores": {
        "minProperties": 1,
        "propertyNames": {"pattern": rf"^{WORD}$"},
        "defaultSnippets": [
            {"label": "a core", "body": {"${1:name}": "${2:o r}"}},
            {"label": "the core of zeros", "body": {"${1:up}": {"legs": "${2:o r}", "init": "zeros"}}},
            {"label": "the base weight", "body": {"${1:W}": {"legs": "o i k...", "from": "weight"}}},
        ],
    },
    "cores.*": {"description": "A core: its legs, and where its values come from."},
    "cores.*.legs": {"pattern": rf"{_LEGS}|\(", "examples": ["o r", "r i k..."]},
    "cores.*.init": _INIT,
    "cores.*.shared": {"pattern": rf"^{WORD}$", "examples": ["model", "layer", "matrix"]},
    "weight": {"pattern": _PATTERN, "examples": ["o i k...", "(o1 o2) (i1 i2) k..."]},
    "terms": {"minItems": 1, "description": "Several networks whose sum is the update, instead of one `weight`."},
    "terms.*.cores": {"minItems": 1},
    "terms.*.weight": {"pattern": _PATTERN, "examples": ["o i k..."]},
    "scale": {"examples": ["alpha / r"]},
    "compose": {"examples": ["dora"]},
}


def spec_schema() -> dict[str, Any]:
    """The JSON Schema of spec files."""
    return schema_document(SPEC, "tnpeft spec: a tensor network that adapts a layer", _SPEC, optional=("weight",))


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
    """Without the titles that pydantic makes of names, and without null, which no file writes."""
    if isinstance(node, list):
        return [_tidied(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {key: value for key, value in node.items() if key not in ("title", "description")}
    if "properties" in node:
        kept["properties"] = node["properties"]  # a property may be called `title`
        kept["properties"] = {key: _tidied(value) for key, value in node["properties"].items()}
    if kept.get("default", 0) is None or kept.get("default") == {}:
        del kept["default"]
    options = [_tidied(option) for option in kept.pop("anyOf", ()) if option != {"type": "null"}]
    rest = {key: value if key == "properties" else _tidied(value) for key, value in kept.items()}
    if len(options) == 1:
        return {**options[0], **rest}
    return {**rest, "anyOf": options} if options else rest


def _inlined(node: Any, models: Mapping[str, Any]) -> Any:
    """With every model in its place: editors show the sentence beside the key."""
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
    below = [node.get("additionalProperties"), node.get("items"), *node.get("anyOf", ())]
    for value in below:
        if isinstance(value, dict) and "properties" in value:
            _describe(value, f"{path}.*".lstrip("."), schema, keywords)
        elif isinstance(value, dict):
            for option in value.get("anyOf", ()):
                if "properties" in option:
                    _describe(option, f"{path}.*".lstrip("."), schema, keywords)
