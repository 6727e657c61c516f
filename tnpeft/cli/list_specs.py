"""`tnpeft list`: what is shipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tnpeft.cli.arguments import parse_layer, parse_number
from tnpeft.cli.output import Output, UsageError, table
from tnpeft.errors import BindError, Problem
from tnpeft.network import Layer, Spec, load_spec
from tnpeft.spec import list_specs
from tnpeft.spec.pattern import KINDS

if TYPE_CHECKING:
    from tnpeft.recipe import Recipe

__all__ = ["Filter", "print_list", "short_layers"]

_ADD_LAYER = "Add --layer, e.g. --layer Linear:48,64."
SHORT = {
    frozenset({"Conv1d", "Conv2d", "Conv3d"}): "conv",
    frozenset({"ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"}): "conv_transpose",
}


@dataclass(frozen=True)
class Filter:
    """Which specs are listed: by kind of layer, by parameters and directions on one layer, and by source.

    `params` is the largest number that may train on `layer`, `rank` the smallest number of directions in which the
    first steps move its weight.
    """

    kind: str | None = None
    layer: Layer | None = None
    params: int | None = None
    rank: int | None = None
    source: str | None = None

    @classmethod
    def of(cls, layer: str | None, params: str | None, rank: int | None, source: str | None) -> Filter:
        """The filter of a command line; a kind alone is a layer without numbers. Raises UsageError."""
        known = None if layer is None or layer in KINDS else parse_layer(layer)
        for option, value in (("--params", params), ("--rank", rank)):
            if value is not None and known is None:
                raise UsageError(Problem(f"{option} without a layer", "--layer with its sizes", "none", _ADD_LAYER))
        most = None if params is None else parse_number(params, "--params")
        return cls(known.kind if known else layer, known, most, rank, source)

    def rows(self, progress: Callable[[str], None]) -> list[Row]:
        """The specs that pass, cheap questions first."""
        rows = []
        for spec in map(load_spec, list_specs()):
            if self.kind is not None and self.kind not in spec.layers:
                continue
            if self.source is not None and self.source.casefold() not in f"{spec.source} {spec.title}".casefold():
                continue
            if (row := self._on_layer(spec)) is not None:
                rows.append(row)
        return rows if self.rank is None else self._moving(rows, self.rank, progress)

    def _on_layer(self, spec: Spec) -> Row | None:
        if self.layer is None:
            return Row(spec)
        try:
            parameters = spec.bind(self.layer).num_parameters
        except BindError:
            return None
        return Row(spec, parameters) if self.params is None or parameters <= self.params else None

    def _moving(self, rows: list[Row], least: int, progress: Callable[[str], None]) -> list[Row]:
        from tnpeft.fitting.tangent import rank_on

        assert self.layer is not None
        found = []
        for number, row in enumerate(rows, 1):
            rank = rank_on(row.spec, self.layer)
            progress(f"[{number}/{len(rows)}] {row.spec.name}: rank {rank:,}")
            if rank >= least:
                found.append(replace(row, rank=rank))
        return found


@dataclass(frozen=True)
class Row:
    """A spec; on a given layer also its trained parameters, and in how many directions it moves the weight."""

    spec: Spec
    parameters: int | None = None
    rank: int | None = None


def print_list(output: Output, chosen: Filter, quiet: bool, as_json: bool) -> None:
    """Print every shipped spec that passes, with its layers and title; without a filter every recipe as well."""
    from tnpeft.recipe import list_recipes, load_recipe

    rows = chosen.rows((lambda text: None) if quiet else output.progress)
    recipes = [load_recipe(name) for name in list_recipes()] if chosen == Filter() else []
    if as_json:
        recipes_data = [_head(recipe) | {"specs": [entry.spec.name for entry in recipe.entries]} for recipe in recipes]
        output.data({"specs": [_data(row) for row in rows], "recipes": recipes_data})
        return
    if not rows:
        output.say(f"none of {len(list_specs())} specs")
        return
    counts = {"parameters": chosen.layer is not None, "rank": chosen.rank is not None}
    columns = {"spec": "left", "layers": "left", "start": "left"}
    columns |= {name: "right" for name, shown in counts.items() if shown} | {"title": "left"}
    output.show(table("", columns, (_cells(row) for row in rows)))
    if recipes:
        output.say()
        output.show(table("", {"recipe": "left", "specs": "left", "title": "left"}, map(_recipe_row, recipes)))


def _cells(row: Row) -> tuple[str, ...]:
    counts = (f"{count:,}" for count in (row.parameters, row.rank) if count is not None)
    return row.spec.name, short_layers(row.spec), row.spec.start, *counts, row.spec.title or ""


def _data(row: Row) -> dict[str, Any]:
    counts = {"parameters": row.parameters, "rank": row.rank}
    spec = {"layers": list(row.spec.layers), "start": row.spec.start}
    return _head(row.spec) | spec | {name: count for name, count in counts.items() if count is not None}


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
