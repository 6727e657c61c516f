"""New values for an attached adapter, written into its tensors, which stay the same objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tnpeft.adapters import Adapter
from tnpeft.adapters.distributed import write
from tnpeft.adapters.parked import remake
from tnpeft.errors import AttachError, Problem, listed
from tnpeft.surgery.adapted_model import AdaptedModel, adapted, known_adapter
from tnpeft.surgery.queries import adapters_of, layers_of, statistics_of, trained_of
from tnpeft.surgery.switch import refuse_disabled, refuse_merged
from tnpeft.surgery.trained import all_tied

__all__ = ["make_sums_again", "refill"]


def refill(
    model: nn.Module,
    name: str,
    targets: Mapping[str, Adapter],
    trained: Mapping[str, Tensor],
    statistics: Mapping[str, Tensor],
    about: Mapping[str, Any],
) -> None:
    """Give the attached adapter `name` the values of other adapters of the same specs, params and layers.

    `trained` and `statistics` are the values of what trains beside the cores, `about` replaces the record's.
    Optimisers, compiled graphs and what acts stay as they are; a layer keeps its own execution mode. If processes hold
    parts of the tensors, each takes its part of the values.

    Raises AttachError where anything but a value differs; the model is then as it was.
    """
    root, state = adapted(model)
    record = known_adapter(state, name)
    refuse_disabled(state)
    refuse_merged(state)
    attached = adapters_of(root, name)
    copies = {**trained_of(root, name), **statistics_of(root, name)}
    values = {**trained, **statistics}
    problems = [*_layer_problems(name, attached, targets), *_beside_problems(name, copies, values)]
    if problems:
        raise AttachError(*problems)
    for layer in record.targets:
        attached[layer].take(targets[layer])
    with torch.no_grad():
        for key, copy in copies.items():
            write(copy, values[key])
    state.adapters[name] = replace(record, about=dict(about))
    make_sums_again(root, state, name)


def _layer_problems(name: str, here: Mapping[str, Adapter], there: Mapping[str, Adapter]) -> Iterator[Problem]:
    """Why the adapters of some layers cannot take the values of others."""
    expected = f"the layers that '{name}' adapts"
    fix = f"Detach '{name}' first, or load the file under another name."
    for found, names in (
        ("also {}", [layer for layer in there if layer not in here]),
        ("none for {}", [layer for layer in here if layer not in there]),
    ):
        if names:
            yield Problem("layers of the adapter", expected, found.format(listed(names)), fix)
    for layer, adapter in here.items():
        if layer in there and there[layer].network.layer != adapter.network.layer:
            ours, theirs = str(adapter.network.layer), str(there[layer].network.layer)
            yield Problem("the layer its adapter is for", ours, theirs, f"Detach '{name}' first.", layers=(layer,))
        elif layer in there and (difference := _difference(adapter, there[layer])):
            yield Problem(*difference, fix, layers=(layer,))


def _difference(here: Adapter, there: Adapter) -> tuple[str, str, str] | None:
    """What two adapters of one layer differ in: what it is, how it is here, and there."""
    ours, theirs = here.network, there.network
    if ours.spec != theirs.spec:
        another = "another one called " * (ours.spec.name == theirs.spec.name)
        return "spec of its adapter", f"'{ours.spec.name}'", f"{another}'{theirs.spec.name}'"
    if ours.params != theirs.params:
        return "params of its adapter", _in_words(ours.params), _in_words(theirs.params)
    for key, own in here.cores.items():
        other = there.cores[key]
        if own.is_meta or own.shape != other.shape:
            found = "none (it is on the meta device)" if own.is_meta else "a part, as each process of several holds it"
            return f"core '{key}'", "one with all of its values", found
        if torch.promote_types(own.dtype, other.dtype) != own.dtype:
            return f"core '{key}'", _dtype(own), _dtype(other)
    if here.captured != there.captured:
        return "scopes of its shared cores", str(dict(here.captured)), str(dict(there.captured))
    return None


def _in_words(params: Mapping[str, float]) -> str:
    return ", ".join(f"{key}={value:g}" for key, value in params.items())


def _dtype(core: Tensor) -> str:
    return str(core.dtype).removeprefix("torch.")


def _beside_problems(name: str, here: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> Iterator[Problem]:
    """Why the tensors that train beside the cores are not those that there are values for."""
    odd = [key for key in there if key not in here or here[key].shape != there[key].shape]
    missing = [key for key in here if key not in there]
    for found, names in (("also {}", odd), ("none for {}", missing)):
        if names:
            fix = f"Detach '{name}' first, or load the file under another name."
            yield Problem("trained beside the cores", f"what '{name}' trains", found.format(listed(names)), fix)


def make_sums_again(root: nn.Module, state: AdaptedModel, name: str) -> None:
    """Compute sums of base and adapters anew, and drop kept results: they have the values of before."""
    state.results.forget()
    for layer in layers_of(root, name).values():
        remake(layer.place[0])
    for tied in all_tied(root, state):
        if name in tied.trainers:
            for slot in tied.slots:
                remake(slot.owner)
