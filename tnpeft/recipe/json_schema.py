"""What a recipe looks like, as a JSON Schema."""

from __future__ import annotations

from typing import Any

from tnpeft.documents.json_schema import NAME, WORD, Keywords, schema_document
from tnpeft.recipe.model import RECIPE
from tnpeft.recipe.selection import ALL, SPANS
from tnpeft.spec import list_specs
from tnpeft.spec.pattern import KINDS
from tnpeft.spec.reader import SHORT_KINDS

__all__ = ["recipe_schema"]

_KIND = {"enum": [*KINDS, *SHORT_KINDS]}
_NUMBER = {"type": "integer", "minimum": 0}
_NUMBERS = [_NUMBER, {"type": "string", "pattern": SPANS}, {"type": "array", "items": _NUMBER, "minItems": 1}]
_ENTRY = {"spec": "${1:lora}", "match": "${2:to_[qv]\\$}", "params": {"r": 4}}
_DROPPED = {
    "input": "The probability, below 1, that an entry of the update's input is dropped. For example `input: 0.05`.",
    "bond": "The probability, below 1, that an entry of a bond is dropped. For example `bond: 0.1`.",
    "module": "The probability, below 1, that a call leaves a layer's update out. For example `module: 0.1`.",
}

# Keywords that the models do not know, by the path of keys: `adapters.*` is any entry.
_RECIPE: dict[str, Keywords] = {
    "name": {"pattern": NAME, "description": "The recipe's name, a word. Quote it if it looks like a number."},
    "title": {"description": "What the recipe is for, in a few words."},
    "source": {"description": "Where it comes from: authors, venue, arXiv number."},
    "adapters": {"minItems": 1, "defaultSnippets": [{"label": "a spec on some layers", "body": [_ENTRY]}]},
    "adapters.*": {
        "description": "One spec, and the layers that it adapts.",
        "required": ["spec"],
        "if": {"not": {"required": ["match"]}},
        "then": {"required": ["parameters"]},
    },
    "adapters.*.match": {
        "description": "Which layers the spec adapts: a regular expression, searched in their names, a list of "
        r"names, or `all`, every layer of the spec's kinds. For example `match: 'conv[12]\.conv$'`.",
        "examples": [r"conv[12]\.conv$", ALL],
    },
    "adapters.*.parameters": {
        "description": "Weights to adapt beside layers, or alone: regular expressions on parameters' names, each "
        "with its stored axes: `e` slices, `o` outputs, `i` inputs. For example `parameters: "
        r"{'experts\.down_proj$': e o i}`. Expressions or names alone are enough where tnpeft knows the module that "
        "owns the weight.",
        "examples": [{r"experts\.(gate_up|down)_proj$": "e o i"}, r"\.in_proj_weight$"],
    },
    "adapters.*.params": {
        "description": "Values for the spec's params. For example `params: {r: 4}`.",
        "propertyNames": {"pattern": rf"^{WORD}$"},
        "examples": [{"r": 4}],
    },
    "adapters.*.exclude": {
        "description": "What `match` finds and is left out: a regular expression or a list of names. For example "
        "`exclude: 'lm_head$'`.",
        "examples": ["lm_head$", ["vision_tower", "lm_head"]],
    },
    "adapters.*.kinds": {
        "description": "Which of the spec's kinds of layers are adapted. For example `kinds: Linear`.",
        "anyOf": [_KIND, {"type": "array", "items": _KIND, "minItems": 1}],
    },
    "adapters.*.layers": {
        "description": "The numbers of the blocks whose layers are adapted. For example `layers: 0-5, 8`, or `layers: "
        "{decoder.layers: 0-5}` where a model has several lists of blocks.",
        "anyOf": [*_NUMBERS, {"type": "object", "additionalProperties": {"anyOf": _NUMBERS}, "minProperties": 1}],
        "examples": ["0-5, 8", "16-", {"decoder.layers": "0-5"}],
    },
    "adapters.*.ranks": {
        "description": "Params of some layers, in place of those in `params`, by regular expressions on layers' "
        "names. For example `ranks: {'q_proj$': {r: 8}}`. For each param the first expression that finds a layer "
        "counts.",
        "examples": [{"q_proj$": {"r": 8}}],
    },
    "adapters.*.dropout": {
        "description": "Probabilities of dropout in training. For example `dropout: {input: 0.05, bond: 0.1}`.",
        "examples": [{"input": 0.05}, {"bond": 0.1, "module": 0.1}],
    },
    **{
        f"adapters.*.dropout.{key}": {"description": text, "minimum": 0, "exclusiveMaximum": 1}
        for key, text in _DROPPED.items()
    },
    "scopes": {
        "description": "The scopes of shared cores, each with a regular expression. Layers share a core where it "
        r"captures the same text in their names. For example `scopes: {block: 'layers\.(\d+)\.'}`.",
        "propertyNames": {"pattern": rf"^{WORD}$"},
        "examples": [{"layer": r"layers\.(\d+)\.", "matrix": r"\.([qkvo])_proj$"}],
    },
    "train.bias": {"description": "Which biases train: `none`, `adapted` (those of adapted layers) or `all`."},
    "train.norm": {
        "description": "Which norms train: `true`, those with `norm` in their names (all, if there are none), "
        "`false` or `all`.",
        "examples": [True, "all"],
    },
    "train.also": {
        "description": "Other parameters that train: a list of regular expressions on their names. For example "
        r"`also: ['^out\.']`.",
        "examples": [[r"^out\."]],
    },
}


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of recipes."""
    spec: Keywords = {"anyOf": [{"enum": list(list_specs())}, {"type": "string", "pattern": r"\.ya?ml$"}]}
    keywords = {**_RECIPE, "adapters.*.spec": spec}
    return schema_document(RECIPE, "tnpeft recipe: which spec goes on which layers", keywords)
