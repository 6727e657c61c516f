"""The parameters that an entry matches, and the layers whose weights they are."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from tnpeft.errors import Problem, clip, listed, near_miss
from tnpeft.network import Layer
from tnpeft.network.orientation import oriented
from tnpeft.recipe.model import Entry
from tnpeft.recipe.parameters import Parameters
from tnpeft.recipe.selection import compiled
from tnpeft.surgery import plain_name
from tnpeft.surgery.parameters import known_orientation, parameter_problem
from tnpeft.surgery.tree import Slot, slots

__all__ = ["matched_parameters", "signatures"]


def matched_parameters(
    entry: Entry, wanted: Parameters, parameters: Mapping[str, Slot], problems: list[Problem]
) -> list[str]:
    """The parameters that an entry adapts. Names without effect, and what cannot be adapted, are problems."""
    found: dict[str, None] = {}
    for given in wanted.names:
        name = given if given in parameters else plain_name(given)
        if name in parameters:
            found[name] = None
        else:
            fix = near_miss(given, parameters) or "List the names with `model.named_parameters()`."
            where = f"parameter {clip(given)}"
            problems.append(Problem("", "the name of a parameter", "no such parameter", fix, where=where))
    for pattern in wanted.patterns:
        names = [name for name in parameters if compiled(pattern).search(name)]
        found |= dict.fromkeys(names)
        if not names:
            wide = [name for name, slot in parameters.items() if slot.tensor.dim() > 1]
            plain = pattern.replace("\\", "").strip("^$")
            fix = near_miss(plain, wide) or near_miss(plain, {name.rpartition(".")[2] for name in wide})
            fix = fix or f"The model has {listed(wide) if wide else 'no parameter that can be adapted'}."
            what = f"spec '{entry.spec.name}', parameters {clip(pattern)}"
            problems.append(Problem(what, "at least one parameter", "none", fix, entry.where))
    for name in found:
        if len(told := wanted.told_of(name)) > 1:
            axes = " and ".join(f"`{each}`" for each in told)
            fix = f"Let one of the patterns alone find it: {', '.join(map(clip, told.values()))}."
            problems.append(Problem("its orientation", "one", axes, fix, where=f"parameter '{name}'"))
        elif problem := parameter_problem(parameters[name], _orientation(wanted, parameters[name])):
            problems.append(problem)
    return list(found)


def _orientation(wanted: Parameters, slot: Slot) -> str | None:
    return wanted.orientation_of(slot.name) or known_orientation(slot)


def signatures(model: nn.Module, claimed: Mapping[str, Entry]) -> dict[str, Layer | None]:
    """For each claimed name: if it is a parameter, the signature of the layer whose weight it is; None for a layer."""
    found: dict[str, Layer | None] = {}
    parameters: dict[str, Slot] = {}
    for name, entry in claimed.items():
        found[name] = None
        if entry.parameters is not None:
            parameters = parameters or slots(model)
            orientation = _orientation(entry.parameters, parameters[name]) if name in parameters else None
            found[name] = None if orientation is None else oriented(parameters[name].tensor.shape, orientation)
    return found
