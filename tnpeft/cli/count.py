"""`tnpeft count`: what a recipe or spec trains on a model, without the model's values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tnpeft.cli.arguments import parse_scopes, parse_settings
from tnpeft.cli.check import kind_of
from tnpeft.cli.models import build_model
from tnpeft.cli.output import Output, UsageError, number, table
from tnpeft.errors import Problem, listed
from tnpeft.network import Spec, load_spec
from tnpeft.network.degenerate import factor_notes
from tnpeft.spec import find_shipped
from tnpeft.spec.habits import unknown_params

if TYPE_CHECKING:
    from tnpeft.recipe import Handle, LayerReport, Recipe, Report

__all__ = ["check_match", "check_params", "count_parameters", "load_what"]


def count_parameters(
    output: Output,
    name: str,
    model_text: str,
    match: str | None,
    settings: Sequence[str],
    as_json: bool,
    scopes: Sequence[str] = (),
) -> None:
    """Attach to the model on the meta device and print the report: a row for each layer, then totals."""
    from tnpeft.recipe import attach

    params: dict[str, Any] = parse_settings(settings)
    what = load_what(name)
    check_params(what, params)
    check_match(what, match)
    bound = parse_scopes(scopes) or None
    handle = attach(build_model(model_text), what, match=match, scopes=bound, **params)
    report, notes = handle.report(), _notes(handle)
    if as_json:
        output.data({"what": name, "model": model_text} | report.as_dict() | {"factors": notes})
    else:
        _print(output, f"{name} on {model_text}", report, notes)


def _notes(handle: Handle) -> dict[str, list[str]]:
    """Notes on channel counts that do not factor, with the layers that have them."""
    from tnpeft.surgery import adapters_of

    notes: dict[str, list[str]] = {}
    for layer, adapter in adapters_of(handle.model, handle.name).items():
        for note in factor_notes(adapter.network):
            notes.setdefault(note, []).append(layer)
    return notes


def load_what(name: str) -> Spec | Recipe:
    """The recipe or spec of this shipped name or in this file. Raises TnpeftError."""
    from tnpeft.recipe import load_recipe

    path = find_shipped(name, "recipe or spec", "recipes", "")
    return load_recipe(path) if kind_of(name) == "recipe" else load_spec(path)


def check_params(what: Spec | Recipe, params: Mapping[str, object]) -> None:
    """Raises UsageError for a `--set` that no spec knows."""
    specs = (what,) if isinstance(what, Spec) else tuple(entry.spec for entry in what.entries)
    known = dict.fromkeys(param for spec in specs for param in spec.params)
    if problems := [each for param in params for each in unknown_params(f"--set {param}", [param], known)]:
        raise UsageError(*problems)


def check_match(what: Spec | Recipe, match: str | None) -> None:
    """Raises UsageError for a spec without `--match`, or a recipe with one."""
    if isinstance(what, Spec) and match is None:
        fix = r"Add --match, e.g. --match 'attn\.to_[qv]$', or --match all."
        raise UsageError(Problem(f"spec '{what.name}'", "--match, which layers it goes on", "none", fix))
    if not isinstance(what, Spec) and match is not None:
        fix = "Leave --match out, or count a spec."
        raise UsageError(Problem(f"recipe '{what.name}'", "its own patterns", f"--match {match[:60]!a}", fix))


def _print(output: Output, title: str, report: Report, notes: Mapping[str, Sequence[str]]) -> None:
    columns = {"layer": "left", "kind": "left", "spec": "left", "params": "left"}
    columns |= {"weight": "right", "cores": "right", "bias": "right"}
    output.show(table(title, columns, map(_row, report.layers)))
    totals = {
        "layers": f"{len(report.layers)}, their weights {sum(row.weight for row in report.layers):,}",
        "cores": f"{report.cores:,}",
        "biases": f"{report.bias:,}",
        "norms": f"{report.norm:,}",
        "others": f"{report.also:,}",
        "trained": f"{report.trained:,} of {report.base:,} ({report.share:.3%})",
    }
    output.say()
    for note in report.notes:
        output.say(note)
    for note, layers in notes.items():
        output.say(f"{listed(layers)}: {note}")
    for name, total in totals.items():
        output.say(f"{name:<9}{total}")


def _row(row: LayerReport) -> tuple[str, ...]:
    params = " ".join(f"{name}={number(value)}" for name, value in row.params.items())
    return row.name, row.layer, row.spec, params, f"{row.weight:,}", f"{row.cores:,}", f"{row.bias:,}"
