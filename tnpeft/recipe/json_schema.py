"""What a recipe looks like, as a JSON Schema."""

from __future__ import annotations

from typing import Any

from tnpeft.documents.json_schema import NAME, WORD, Keywords, schema_document
from tnpeft.recipe.model import ALL, RECIPE
from tnpeft.spec import list_specs

__all__ = ["recipe_schema"]


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of recipes."""
    shipped = list(list_specs())
    entry = {"spec": "${1:lora}", "match": "${2:to_[qv]\\$}", "params": {"r": 4}}
    keywords: dict[str, Keywords] = {
        "name": {"pattern": NAME},
        "adapters": {
            "minItems": 1,
            "defaultSnippets": [{"label": "a spec on some layers", "body": [entry]}],
        },
        "adapters.*.spec": {"anyOf": [{"enum": shipped}, {"type": "string", "pattern": r"\.ya?ml$"}]},
        "adapters.*.match": {"examples": [r"conv[12]\.conv$", ALL]},
        "adapters.*.params": {"propertyNames": {"pattern": rf"^{WORD}$"}, "examples": [{"r": 4}]},
        "scopes": {
            "propertyNames": {"pattern": rf"^{WORD}$"},
            "examples": [{"layer": r"layers\.(\d+)\.", "matrix": r"\.([qkvo])_proj$"}],
        },
        "train.norm": {"examples": [True, "all"]},
        "train.also": {"examples": [[r"^out\."]]},
    }
    return schema_document(RECIPE, "tnpeft recipe: which spec goes on which layers", keywords)
