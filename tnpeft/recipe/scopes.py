"""Scopes of shared cores: which layers share a tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from tnpeft.adapters import Captured
from tnpeft.errors import AttachError, Problem, SpecError, clip, near_miss, ticked
from tnpeft.recipe.model import Entry, Recipe
from tnpeft.recipe.selection import compiled

__all__ = ["captures", "scopes_from"]

_SHOWN = 3  # layers named in an error


def scopes_from(given: object, recipe: Recipe) -> dict[str, str]:
    """The recipe's scopes, overridden by those of `attach`'s argument.

    Raises AttachError for a scope that no spec has or that is not bound, SpecError for an invalid regular expression.
    """
    if given is not None and not isinstance(given, Mapping):
        fix = r"For example `scopes={'block': r'layers\.(\d+)\.'}`."
        raise AttachError(Problem("`scopes`", "a mapping of scopes to regular expressions", clip(given), fix))
    scopes = {**recipe.scopes, **(given or {})}
    known = dict.fromkeys(scope for entry in recipe.entries for scope in entry.spec.scopes)
    problems = []
    for name, pattern in scopes.items():
        if name not in known:
            expected = f"one of {', '.join(known)}" if known else "none: no core here is shared within one"
            fix = near_miss(str(name), known) or "Remove it."
            problems.append(Problem(f"scope {clip(name)}", expected, ticked(name), fix))
        elif not isinstance(pattern, str):
            fix = r"For example `r'layers\.(\d+)\.'`."
            problems.append(Problem(f"scope '{name}'", "a regular expression", clip(pattern), fix))
    for name in known:
        if name not in scopes:
            specs = dict.fromkeys(f"'{entry.spec.name}'" for entry in recipe.entries if name in entry.spec.scopes)
            fix = rf"Pass `scopes={{'{name}': r'layers\.(\d+)\.'}}`, say, or write it in the recipe."
            problems.append(Problem(f"scope '{name}' of {', '.join(specs)}", "a regular expression", "none", fix))
    if problems:
        raise AttachError(*problems)
    return scopes


def captures(claimed: Mapping[str, Entry], scopes: Mapping[str, str]) -> Mapping[str, Captured]:
    """For each layer, what each scope of its spec captures in its name: its groups, or without groups the whole match.

    Raises AttachError for a scope that does not match a layer that needs it.
    """
    found: dict[str, dict[str, tuple[str, ...]]] = {layer: {} for layer in claimed}
    missed: dict[str, list[str]] = {}
    for scope, pattern in scopes.items():
        expression = _compiled(scope, pattern)
        for layer, entry in claimed.items():
            if scope not in entry.spec.scopes:
                continue
            match = expression.search(layer)
            if match is None:
                missed.setdefault(scope, []).append(layer)
            else:
                found[layer][scope] = match.groups("") or (match.group(),)
    if missed:
        raise AttachError(*(_missed(scope, scopes[scope], layers) for scope, layers in missed.items()))
    return found


def _compiled(scope: str, pattern: str) -> re.Pattern[str]:
    try:
        return compiled(pattern)
    except SpecError as error:
        raise SpecError(
            *(replace(problem, what=f"scope '{scope}', {problem.what}") for problem in error.problems)
        ) from None


def _missed(scope: str, pattern: str, layers: list[str]) -> Problem:
    names = ", ".join(f"'{layer}'" for layer in layers[:_SHOWN])
    more = f" and {len(layers) - _SHOWN} more" if len(layers) > _SHOWN else ""
    fix = "Widen the pattern, or match fewer layers."
    return Problem(
        f"scope '{scope}' ({clip(pattern)})", "a match in the name of each layer", f"none in {names}{more}", fix
    )
