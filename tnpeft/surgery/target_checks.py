"""Why an adapter cannot be put on its targets."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from torch import nn

from tnpeft.adapters import Adapter
from tnpeft.adapters.base_weight import is_computed
from tnpeft.adapters.parked import LOOKUPS
from tnpeft.errors import Problem, near_miss
from tnpeft.execution import AdaptedLayer
from tnpeft.network import layer_of
from tnpeft.network.orientation import orientation_of
from tnpeft.network.signature import is_opaque_layer
from tnpeft.surgery.checks import layer_problem
from tnpeft.surgery.parameters import parameter_problem, table_layer
from tnpeft.surgery.tree import Slot, places, plain_modules

__all__ = ["target_problems"]


def target_problems(
    root: nn.Module, parameters: Mapping[str, Slot], targets: Mapping[str, Adapter]
) -> Iterator[Problem]:
    """Why some of the targets cannot be adapted."""
    modules = plain_modules(root)
    claimed: dict[Hashable, str] = {}
    for name, adapter in targets.items():
        where = (name,)
        layer = modules.get(name)
        if layer is None and name in parameters:
            yield from _parameter_problems(parameters[name], adapter, claimed)
            continue
        if isinstance(layer, LOOKUPS):
            yield from _table_problems(name, layer, adapter, claimed)
            continue
        if layer is None:
            adapted = [place.name for place in places(root) if isinstance(place.module, AdaptedLayer)]
            outer = next((outer for outer in adapted if name.startswith(outer + ".")), None)
            found = "no such layer" if outer is None else f"a part of the adapted layer '{outer}'"
            fix = near_miss(name, modules) or "Use a name from `model.named_modules()`."
            fix = fix if outer is None else f"Name '{outer}' itself."
            yield Problem("target", "a layer of the model", found, fix, layers=where)
            continue
        problem = layer_problem(name, layer)
        if problem is not None:
            yield problem
        elif inner := _bypassed(name, layer, modules):
            yield inner
        elif id(layer) in claimed:
            found = f"the layer that is also called '{claimed[id(layer)]}'"
            yield Problem("target", "a layer of its own", found, "Name it once: it is adapted at both.", layers=where)
        elif adapter.network.layer != layer_of(layer):
            fix = "Compile the adapter for this layer."
            yield Problem(
                "adapter", f"one for {layer_of(layer)}", f"one for {adapter.network.layer}", fix, layers=where
            )
        claimed[id(layer)] = name


def _bypassed(name: str, layer: nn.Module, modules: Mapping[str, nn.Module]) -> Problem | None:
    """The problem where torch's attention reads the weight of an opaque layer itself: the update is not in it."""
    attention = modules.get(name.rpartition(".")[0])
    if not isinstance(attention, nn.MultiheadAttention) or not is_opaque_layer(layer) or is_computed(layer):
        return None
    found, fix = "one that torch's MultiheadAttention reads and never calls", "Match other layers."
    return Problem("opaque layer", "one that is called", found, fix, layers=(name,))


def _table_problems(name: str, layer: Any, adapter: Adapter, claimed: dict[Hashable, str]) -> Iterator[Problem]:
    if problem := layer_problem(name, layer):
        yield problem
        return
    signature = table_layer(name, layer).signature
    if id(layer) in claimed:
        found, fix = f"the layer that is also called '{claimed[id(layer)]}'", "Name it once: it is adapted at both."
        yield Problem("target", "a layer of its own", found, fix, layers=(name,))
    elif adapter.network.layer != signature:
        fix = "Compile the adapter for this layer."
        yield Problem("adapter", f"one for {signature}", f"one for {adapter.network.layer}", fix, layers=(name,))
    claimed[id(layer)] = name


def _parameter_problems(slot: Slot, adapter: Adapter, claimed: dict[Hashable, str]) -> Iterator[Problem]:
    """Why a parameter cannot be adapted, or not by this adapter."""
    where = f"parameter '{slot.name}'"
    signature = adapter.network.layer
    place = id(slot.owner), slot.key
    if problem := parameter_problem(slot, orientation_of(signature)):
        yield problem
    elif place in claimed:
        fix = "Name it once: it is adapted at both."
        yield Problem("target", "a parameter of its own", f"that which is '{claimed[place]}' too", fix, where=where)
    elif signature.stored_shape != (shape := tuple(slot.tensor.shape)):
        fix = "Compile the adapter for this parameter."
        yield Problem("adapter", f"one for a weight of shape {shape}", f"one for {signature}", fix, where=where)
    claimed[place] = slot.name
