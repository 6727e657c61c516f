"""Which spec on which layer, what else trains, and the report of it."""

from tnpeft.recipe.attach import Handle, attach
from tnpeft.recipe.model import Entry, Recipe, Train, list_recipes, load_recipe
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
