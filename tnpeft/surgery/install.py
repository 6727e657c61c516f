"""Attaching: everything is checked and built first, then the model changes in one pass that cannot fail."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from tnpeft.adapters import Adapter
from tnpeft.adapters.distributed import DISTRIBUTED
from tnpeft.adapters.parked import ParameterLayer
from tnpeft.adapters.parked_states import note_tie
from tnpeft.adapters.units import hold_alike, mesh_of
from tnpeft.errors import AttachError, TnpeftWarning
from tnpeft.execution import AdaptedLayer, AdaptedParameter, ModelResults, wrap
from tnpeft.surgery.adapted_model import AdaptedModel, AdapterRecord, adapted, find
from tnpeft.surgery.checks import model_problems, name_problems, other_roads, trained_problems
from tnpeft.surgery.parameters import bases_of
from tnpeft.surgery.queries import layers_of
from tnpeft.surgery.switch import apply_state, refuse_disabled, refuse_merged
from tnpeft.surgery.target_checks import target_problems
from tnpeft.surgery.trained import Tied, all_tied, norm_statistics
from tnpeft.surgery.tree import Slot, places, slots, ties

__all__ = ["install", "replace_adapters"]


def install(
    model: nn.Module,
    name: str,
    targets: Mapping[str, Adapter],
    trained: Iterable[str] = (),
    about: Mapping[str, Any] | None = None,
) -> AdapterRecord:
    """Put the adapter `name` on `model`: compiled adapters on the target layers, own copies of the trained parameters.

    All names are those of the plain model (`plain_modules`, `plain_parameters`), whatever is adapted already; a layer
    or parameter with several names is given once, by any of them. A target is a layer or, for an adapter of a
    `ParameterLayer`, a parameter. Every other parameter is frozen. Only the new adapter is active, at scale 1, so that
    the model computes what the base computes. `about` is kept in the record and in saved files; it must be JSON-like.

    Raises AttachError with every problem found; the model is then as it was.
    """
    state, parameters = _checked(model, name, targets, trained := tuple(dict.fromkeys(trained)))
    tied_names = ties(parameters)
    record = _record(model, parameters, tied_names, name, targets, trained, about or {})
    layers = bases_of(model, {target: adapter.network.layer for target, adapter in targets.items()})
    wrappers = _wrappers(model, layers.values(), state.results)
    if problem := other_roads(model, layers):
        warnings.warn(TnpeftWarning(problem), stacklevel=3)
    copies = _copies(model, parameters, state, record)

    for tied, copy in copies:
        tied.add(name, copy)
    for place in places(model):
        if id(place.module) in wrappers:
            place.put(wrappers[id(place.module)])
    for layer in wrappers.values():
        if isinstance(layer, AdaptedParameter):
            layer.hang()
    for target, layer in zip(targets.values(), wrappers.values(), strict=True):
        if DISTRIBUTED in sys.modules and (held := mesh_of(layer.base)) is not None:
            hold_alike(target, *held)
        layer.add_adapter(name, target)
    for slot in parameters.values():
        slot.tensor.requires_grad_(False)
    for names in tied_names.values():
        for key in names if len(names) > 1 else ():
            note_tie(parameters[key].owner, parameters[key].key)
    state.adapters[name] = record
    state.active = {name: 1.0}
    state.keep_on(model)
    apply_state(model, state)
    return record


def replace_adapters(model: nn.Module, name: str, adapters: Mapping[str, Adapter]) -> None:
    """Put other compiled adapters in the place of those that some layers have under the name `name`.

    What acts stays. Raises AttachError for merged models and inside a `disabled` context.
    """
    root, state = adapted(model)
    refuse_disabled(state)
    refuse_merged(state)
    for layer, adapted_layer in layers_of(root, name).items():
        if layer in adapters:
            adapted_layer.add_adapter(name, adapters[layer])
    apply_state(root, state)


def _checked(
    model: nn.Module, name: str, targets: Mapping[str, Adapter], trained: Iterable[str]
) -> tuple[AdaptedModel, dict[str, Slot]]:
    """The model's state (a new one at the first attach) and its parameters. Raises AttachError."""
    problems = [*model_problems(model)]
    if problems:
        raise AttachError(*problems)
    parameters = slots(model)
    existing = find(model)
    trains = {key: slot.tensor.requires_grad for key, slot in parameters.items()}
    state = existing[1] if existing else AdaptedModel.new(model, trains)
    problems += name_problems(name, state)
    problems += target_problems(model, parameters, targets)
    problems += trained_problems(model, parameters, targets, trained)
    if problems:
        raise AttachError(*problems)
    return state, parameters


def _record(
    model: nn.Module,
    parameters: dict[str, Slot],
    names: dict[int, tuple[str, ...]],
    name: str,
    targets: Iterable[str],
    trained: Iterable[str],
    about: Mapping[str, Any],
) -> AdapterRecord:
    tied = dict.fromkeys(names[id(parameters[key].tensor)] for key in trained)
    return AdapterRecord(name, tuple(targets), tuple(tied), norm_statistics(model), dict(about))


def _wrappers(
    model: nn.Module, layers: Iterable[nn.Module | ParameterLayer], results: ModelResults
) -> dict[int, AdaptedLayer]:
    """The wrapper of each target layer, in order, by the `id` of the module in its place in the tree."""
    adapted = {id(place.module.base): place.module for place in places(model) if isinstance(place.module, AdaptedLayer)}
    wrappers: dict[int, AdaptedLayer] = {}
    for layer in layers:
        wrapper = adapted.get(id(layer))
        wrappers[id(layer if wrapper is None else wrapper)] = wrap(layer, results) if wrapper is None else wrapper
    return wrappers


def _copies(
    model: nn.Module, parameters: dict[str, Slot], state: AdaptedModel, record: AdapterRecord
) -> list[tuple[Tied, Tensor]]:
    """The new adapter's own copy of everything it trains."""
    known = {tied.names: tied for tied in all_tied(model, state)}
    everything = {**slots(model, "_buffers"), **parameters}
    fresh = (
        known.get(names) or Tied(everything[name] for name in names) for names in (*record.trained, *record.statistics)
    )
    return [(tied, tied.new_copy()) for tied in fresh]
