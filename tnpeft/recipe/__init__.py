"""Which spec goes on which layers, what else trains, and the report on it. Reading a recipe needs no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tnpeft.recipe.model import Entry, Recipe, Train, list_recipes, load_recipe

if TYPE_CHECKING:
    from tnpeft.recipe.attachment import attach
    from tnpeft.recipe.handle import Handle
    from tnpeft.recipe.report import LayerReport, Report, report_of

__all__ = [
    "Entry",
    "Handle",
    "LayerReport",
    "Recipe",
    "Report",
    "Train",
    "attach",
    "list_recipes",
    "load_recipe",
    "report_of",
]

_LAZY = {"Handle": "handle", "attach": "attachment"} | dict.fromkeys(("LayerReport", "Report", "report_of"), "report")


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'tnpeft.recipe' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"tnpeft.recipe.{_LAZY[name]}"), name)
    globals()[name] = value
    return value
