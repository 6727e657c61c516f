"""`tnpeft list`: what is shipped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tnpeft.cli.output import Output, table
from tnpeft.network import Spec, load_spec
from tnpeft.spec import list_specs

if TYPE_CHECKING:
    from tnpeft.recipe import Recipe

__all__ = ["print_list", "short_layers"]

SHORT = {
    frozenset({"Conv1d", "Conv2d", "Conv3d"}): "conv",
    frozenset({"ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"}): "conv_transpose",
}


def print_list(output: Output, as_json: bool) -> None:
    """Print every shipped spec with its layers and title, and every recipe with its specs."""
    from tnpeft.recipe import list_recipes, load_recipe

    specs = [load_spec(name) for name in list_specs()]
    recipes = [load_recipe(name) for name in list_recipes()]
    if as_json:
        specs_data = [_head(spec) | {"layers": list(spec.layers), "start": spec.start} for spec in specs]
        recipes_data = [_head(recipe) | {"specs": [entry.spec.name for entry in recipe.entries]} for recipe in recipes]
        output.data({"specs": specs_data, "recipes": recipes_data})
        return
    rows = ((spec.name, short_layers(spec), spec.start, spec.title or "") for spec in specs)
    output.show(table("", {"spec": "left", "layers": "left", "start": "left", "title": "left"}, rows))
    output.say()
    output.show(table("", {"recipe": "left", "specs": "left", "title": "left"}, map(_recipe_row, recipes)))


def _head(what: Spec | Recipe) -> dict[str, Any]:
    return {"name": what.name, "title": what.title, "source": what.source}


def _recipe_row(recipe: Recipe) -> tuple[str, ...]:
    specs = dict.fromkeys(entry.spec.name for entry in recipe.entries)
    return recipe.name, ", ".join(specs), recipe.title


def short_layers(spec: Spec) -> str:
    """The kinds of layers a spec is for, in few words."""
    kinds = set(spec.layers)
    if len(kinds) == 7:
        return "any"
    words = []
    for group, word in SHORT.items():
        if group <= kinds:
            words.append(word)
            kinds -= group
    return ", ".join([*(kind for kind in spec.layers if kind in kinds), *words])
