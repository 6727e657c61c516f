"""The parameters that an entry matches, and the layers that they are the weights of."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from tnpeft.errors import Problem, clip, listed, near_miss
from tnpeft.network import Layer
from tnpeft.network.orientation import oriented
from tnpeft.recipe.model import Entry
from tnpeft.recipe.selection import compiled
from tnpeft.surgery import plain_name
from tnpeft.surgery.parameters import known_orientation, parameter_problem
from tnpeft.surgery.tree import Slot, slots

__all__ = ["matched_parameters", "signatures"]


def matched_parameters(entry: Entry, parameters: Mapping[str, Slot], problems: list[Problem]) -> list[str]:
    """The parameters that `parameters` of an entry finds; what it says in vain, and what cannot be, is a problem."""
    found: dict[str, None] = {}
    for given in entry.parameters.names:
        name = given if given in parameters else plain_name(given)
        if name in parameters:
            found[name] = None
        else:
            fix = near_miss(given, parameters) or "List the names with `model.named_parameters()`."
            where = f"parameter {clip(given)}"
            problems.append(Problem("", "the name of a parameter", "no such parameter", fix, where=where))
    for pattern in entry.parameters.patterns:
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
        if problem := parameter_problem(parameters[name], _orientation(entry, parameters[name])):
            problems.append(problem)
    return list(found)


def _orientation(entry: Entry, slot: Slot) -> str | None:
    return entry.parameters.orientation_of(slot.name) or known_orientation(slot)


def signatures(model: nn.Module, claimed: Mapping[str, Entry]) -> dict[str, Layer | None]:
    """For each name that entries claim: of a parameter the layer that it is the weight of, None of a layer."""
    if not any(entry.parameters for entry in claimed.values()):
        return dict.fromkeys(claimed)
    parameters = slots(model)
    return {name: _signature(entry, parameters.get(name)) for name, entry in claimed.items()}


def _signature(entry: Entry, slot: Slot | None) -> Layer | None:
    orientation = None if slot is None else _orientation(entry, slot)
    return None if slot is None or orientation is None else oriented(slot.tensor.shape, orientation)
