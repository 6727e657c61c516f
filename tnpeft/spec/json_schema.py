"""What a spec file looks like, as a JSON Schema."""

from __future__ import annotations

from typing import Any

from tnpeft.documents.json_schema import NAME, WORD, Keywords, schema_document
from tnpeft.spec.pattern import KINDS
from tnpeft.spec.reader import SHORT_KINDS
from tnpeft.spec.schema import SPEC

__all__ = ["spec_schema"]

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
    "cores.*.legs": {"pattern": rf"{_LEGS}|\(|(^|\s)1(\s|$)", "examples": ["o r", "r i k..."]},
    "cores.*.init": _INIT,
    "cores.*.shared": {"pattern": rf"^{WORD}$", "examples": ["model", "layer", "matrix"]},
    "weight": {"pattern": _PATTERN, "examples": ["o i k...", "(o1 o2) (i1 i2) k..."]},
    "terms": {"minItems": 1, "description": "Several networks whose sum is the update, instead of one `weight`."},
    "terms.*.cores": {"minItems": 1},
    "terms.*.weight": {"pattern": _PATTERN, "examples": ["o i k..."]},
    "scale": {"examples": ["alpha / r"]},
    "compose": {"examples": ["dora"]},
    "start_std": {"examples": [0.01]},
}


def spec_schema() -> dict[str, Any]:
    """The JSON Schema of spec files."""
    return schema_document(SPEC, "tnpeft spec: a tensor network that adapts a layer", _SPEC, optional=("weight",))
