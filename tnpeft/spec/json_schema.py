"""What a spec file looks like, as a JSON Schema."""

from __future__ import annotations

from typing import Any

from tnpeft.documents.json_schema import NAME, WORD, Keywords, schema_document
from tnpeft.spec.inits import SINGULAR_INITS
from tnpeft.spec.map_kinds import map_usages
from tnpeft.spec.pattern import KINDS
from tnpeft.spec.reader import SHORT_KINDS
from tnpeft.spec.schema import SPEC

__all__ = ["spec_schema"]

_INDEX = rf"({WORD}|k\.\.\.)"
_WORDS = rf"^\s*{_INDEX}(\s+{_INDEX})*\s*$"
_LEGS = rf"^\s*({_INDEX}(\s+{_INDEX})*)?\s*$"
_PATTERN = r"^[A-Za-z0-9_.()\s]+$"
_REFERENCE = {
    "type": "string",
    "pattern": rf"^\s*{WORD}\s*(\([A-Za-z0-9_.()\s]*\))?\s*$",
    "examples": ["R", "bank(w y)", "turn((c u) (q m) (v t))"],
}
_REFERENCES = {"type": "array", "items": _REFERENCE, "minItems": 1, "examples": [["up", "down"], ["U", "U(i k... s)"]]}
_PLAIN_INITS = ("zeros", "ones", "eye", "orthogonal", *SINGULAR_INITS)
_INIT = {
    "anyOf": [{"enum": list(_PLAIN_INITS)}, {"type": "string", "pattern": rf"^\s*{WORD}\s*(\(.*\))?\s*$"}],
    "examples": [
        *("zeros", "normal(0.02)", "kaiming_uniform(fan=last(2), gain=relu)", "constant(0.1)"),
        *("normal(0.02, same=[q])", "value(part)", "choice(o i k...)", "random(d)", "largest(o i k...)"),
        *("entries(1 if i >= r else 0)", "places(o - i + in_channels - 1)", "svd_us(skip=2)"),
    ],
}
_MAPS = map_usages()  # each as a file may write it
_MAP = {"anyOf": [{"enum": _MAPS}, {"type": "string", "pattern": rf"^\s*{WORD}\s*(\(.*\))?\s*$"}]}
_STORED_ONLY = ("init", "frozen", "shared", "from")
_KIND = {"enum": [*KINDS, *SHORT_KINDS]}

# Keywords that the models do not know, by the path of keys: `cores.*` is any core, `terms.*` any term.
_SPEC: dict[str, Keywords] = {
    "": {
        "oneOf": [{"required": ["weight"]}, {"required": ["terms"]}],
        "if": {"properties": {"tnpeft": {"const": 1, "description": "The language version."}}},
        "then": {
            "properties": {
                "cores": {
                    "description": "Derived cores need `tnpeft: 2`.",
                    "additionalProperties": {"not": {"type": "object", "required": ["of"]}},
                }
            }
        },
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
    "name": {"pattern": NAME, "description": "The adapter's name, a word. Quote it if it looks like a number."},
    "title": {"description": "What the adapter is, in a few words."},
    "source": {"description": "Where it comes from: authors, venue, arXiv number."},
    "start": {
        "description": "`zero`: one core starts as zeros, and so does the update. `frozen_copy`: the update is "
        "T(now) - T(start), where T is the contracted network.",
    },
    "layers": {
        "description": "The kinds of layers that the spec adapts: one, a list, or `any`. For example `layers: "
        "[Linear, Conv3d]`.",
        "anyOf": [_KIND, {"type": "array", "items": _KIND, "minItems": 1}],
        "examples": ["any", "conv", ["Linear", "Conv3d"]],
    },
    "params": {
        "description": "The spec's numbers, with defaults that `attach` can override. For example `params: {r: 4, "
        "alpha: r}`.",
        "propertyNames": {"pattern": rf"^{WORD}$"},
        "examples": [{"r": 4, "alpha": "r"}],
    },
    "bond": {
        "description": "The size of every bond that `sizes` does not name. For example `bond: r`.",
        "examples": ["r"],
    },
    "sizes": {
        "description": "The sizes of indices. For example `sizes: {o: out_channels, i: in_channels}`.",
        "propertyNames": {"pattern": _WORDS},
        "examples": [{"o": "out_channels", "i": "in_channels", "kd kh kw": "kernel_size"}],
    },
    "factors": {
        "description": "How `factorize` splits some numbers: a table's name, or numbers with their factors. For "
        "example `factors: {32: [4, 4, 2]}`.",
        "examples": ["tenvoo", {"32": [4, 4, 2]}],
    },
    "init": {**_INIT, "description": "The init of every core that names none. For example `init: normal(0.02)`."},
    "cores": {
        "description": "The cores by name: legs, or a mapping with `legs`. For example `cores: {up: o r, down: r i}`.",
        "minProperties": 1,
        "propertyNames": {"pattern": rf"^{WORD}$"},
        "defaultSnippets": [
            {"label": "a core", "body": {"${1:name}": "${2:o r}"}},
            {"label": "the core of zeros", "body": {"${1:up}": {"legs": "${2:o r}", "init": "zeros"}}},
            {"label": "the base weight", "body": {"${1:W}": {"legs": "o i k...", "from": "weight"}}},
            {
                "label": "a derived core",
                "description": "Made of other cores by maps, never stored; needs `tnpeft: 2`",
                "body": {"${1:turn}": {"of": "${2:R}", "legs": "${3:x y}", "map": ["skew(e -> x y)", "cayley(x y)"]}},
            },
            {
                "label": "an index core",
                "description": "Places for `at=` of `scatter` or `gather`; needs `tnpeft: 2`",
                "body": {"${1:places}": {"legs": "${2:n}", "frozen": True, "init": "choice(${3:o i k...})"}},
            },
        ],
    },
    "cores.*": {
        "description": "A core: its legs, and where its values come from.",
        "dependencies": {
            "map": ["of"],
            "scale": ["of"],
            "of": {"not": {"anyOf": [{"required": [key]} for key in _STORED_ONLY]}},
        },
    },
    "cores.*.legs": {
        "description": "The core's indices, in the order in which it is stored. For example `legs: o r`; "
        '`legs: ""` is a scalar.',
        "pattern": rf"{_LEGS}|\(|(^|\s)1(\s|$)",
        "examples": ["o r", "r i k...", "(i k...) r", "o 1"],
    },
    "cores.*.frozen": {"description": "`true` for a core that does not train."},
    "cores.*.from": {
        "description": "What of the base weight the core is: `weight` itself, or `svd_u`, `svd_s`, `svd_v` of its "
        "singular value decomposition.",
    },
    "cores.*.of": {
        "description": "What a derived core is made of: a core, a list of cores (their product), or a list of "
        "products with `cores` (their sum). For example `of: R`, or `of: [A, W]`.",
        "anyOf": [
            _REFERENCE,
            _REFERENCES,
            {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "cores": {**_REFERENCES},
                        "scale": {"type": ["number", "string"]},
                    },
                    "required": ["cores"],
                    "additionalProperties": False,
                },
                "minItems": 1,
            },
        ],
    },
    "cores.*.of.*.cores": {"description": "The cores of one product of the sum. For example `cores: [A, W]`."},
    "cores.*.of.*.scale": {"description": "A factor of this product. For example `scale: -1 / 2`."},
    "cores.*.map": {
        "description": "The maps that make a derived core, in the order in which they act. For example `map: tanh`, or "
        "`map: [skew(e -> x y), cayley(x y)]`.",
        "anyOf": [_MAP, {"type": "array", "items": _MAP}],
    },
    "cores.*.scale": {"description": "A factor of a derived core. For example `scale: -1 / 2`."},
    "cores.*.init": {
        **_INIT,
        "description": "How the core's first values are drawn. For example `init: normal(0.02)`.",
    },
    "cores.*.shared": {"pattern": rf"^{WORD}$", "examples": ["model", "layer", "matrix"]},
    "weight": {
        "description": "The axes of the layer's weight, each with its open legs. For example `weight: o i k...`.",
        "pattern": _PATTERN,
        "examples": ["o i k...", "(o1 o2) (i1 i2) k..."],
    },
    "terms": {"minItems": 1, "description": "Several networks whose sum is the update, instead of one `weight`."},
    "terms.*": {"description": "One network of the sum. For example `{cores: [up, down], weight: o i}`."},
    "terms.*.cores": {
        "description": "The cores of this network. For example `cores: [up, down]`.",
        "minItems": 1,
        "items": _REFERENCE,
    },
    "terms.*.weight": {
        "description": "The axes of the layer's weight, each with its open legs. For example `weight: o i k...`.",
        "pattern": _PATTERN,
        "examples": ["o i k..."],
    },
    "terms.*.scale": {"description": "A factor of this network. For example `scale: alpha / r`."},
    "scale": {
        "description": "A factor of the update, a number or an expression. For example `scale: alpha / r`.",
        "examples": ["alpha / r"],
    },
    "compose": {
        "description": "`dora`: the weight plus the update keeps its direction, at a trained magnitude for each output "
        "channel. Left out, the update is added to the weight.",
        "examples": ["dora"],
    },
    "start_std": {
        "description": "With `start: frozen_copy`: the standard deviation of T(start), as a share of the weight's. "
        "For example `start_std: 0.01`.",
        "examples": [0.01],
    },
    "seed": {"description": "The seed of all inits; `attach` can override it. For example `seed: 0`."},
}


def spec_schema() -> dict[str, Any]:
    """The JSON Schema of spec files."""
    return schema_document(SPEC, "tnpeft spec: a tensor network that adapts a layer", _SPEC, optional=("weight",))
