"""`tnpeft budget`: the largest rank within a number of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tnpeft.cli.arguments import parse_number, parse_scopes, parse_settings
from tnpeft.cli.count import check_match, check_params, load_what
from tnpeft.cli.models import build_model
from tnpeft.cli.output import Output, UsageError, table
from tnpeft.errors import Problem

if TYPE_CHECKING:
    from tnpeft.fitting import Budget

__all__ = ["find_budget"]


def find_budget(
    output: Output,
    name: str,
    model_text: str,
    params_text: str,
    match: str | None,
    param: str,
    fixed: Sequence[str],
    settings: Sequence[str],
    scopes: Sequence[str],
    as_json: bool,
) -> None:
    """Solve for the rank and print it with its neighbours."""
    from tnpeft.fitting import budget

    params = parse_number(params_text, "--params")
    what = load_what(name)
    given: dict[str, Any] = parse_settings(settings)
    check_params(what, given)
    if param in given:
        fix = f"Leave --set {param} out."
        raise UsageError(Problem(f"--set {param}", f"{param} to be solved for", "a value for it", fix))
    check_match(what, match)
    bound = parse_scopes(scopes) or None
    model = build_model(model_text)
    found = budget(what, model, params, match=match, param=param, fixed=fixed, scopes=bound, **given)
    if as_json:
        output.data({"what": name, "model": model_text} | found.as_dict() | {"settings": found.settings})
    else:
        _print_budget(output, f"{name} on {model_text}", found)


def _print_budget(output: Output, title: str, found: Budget) -> None:
    columns = {"": "left", found.param: "right", "cores": "right", "trained": "right", "of the budget": "right"}
    rows = (
        (">" * (row.value == found.value), f"{row.value}", f"{row.cores:,}", f"{row.total:,}", f"{row.share:.1%}")
        for row in found.rows
    )
    output.show(table(title, columns, rows))
    output.say()
    for spec, value in found.specs.items():
        kept = " (kept)" if spec in found.fixed else ""
        output.say(f"{spec:<14}{found.param}={value}{kept}")
    output.say(f"{'layers':<14}{found.layers}")
    parts = (("cores", found.cores), ("biases", found.bias), ("norms", found.norm), ("others", found.also))
    for label, count in parts:
        output.say(f"{label:<14}{count:,}")
    output.say(f"{'trained':<14}{found.total:,} of {found.params:,} ({found.total / found.params:.1%})")
    if found.fixed:
        free = ", ".join(f"'{spec}'" for spec in found.specs if spec not in found.fixed)
        output.say(f"{'use':<14}params: {{{found.param}: {found.value}}} at {free} in the recipe")
    else:
        output.say(f"{'use':<14}--set {found.param}={found.value}")
