"""Making one of several adapters part of the base, to which the others then add."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from tnpeft.errors import Problem
from tnpeft.execution import AdaptedLayer
from tnpeft.surgery.adapted_model import AdaptedModel
from tnpeft.surgery.switch import acting, merge_layers
from tnpeft.surgery.trained import Tied, all_tied
from tnpeft.surgery.tree import adapted_layers, places

__all__ = ["merge_into_base", "merging_problems"]


def merging_problems(root: nn.Module, state: AdaptedModel, name: str) -> Iterator[Problem]:
    """Why other adapters would compute other updates on a base with the update of `name`; one problem for each."""
    ties = all_tied(root, state)
    changed = {_place(slot.owner, slot.key) for tied in ties if name in tied.trainers for slot in tied.slots}
    told: set[str] = set()
    for place in places(root):
        layer = place.module
        if not isinstance(layer, AdaptedLayer) or not (name in layer.names or _place_of(layer) in changed):
            continue
        for other, why in _dependent(layer, ties):
            if other != name and other not in told:
                told.add(other)
                yield Problem(
                    f"merging '{name}' for good", "no other adapter that depends on the weight", f"'{other}', {why}",
                    f"Detach '{other}' first, or merge for a time: `tnpeft.merge(model, name='{name}')`.",
                    where=f"layer '{place.name}'",
                )  # fmt: skip


def _dependent(layer: AdaptedLayer, ties: list[Tied]) -> Iterator[tuple[str, str]]:
    """The adapters whose update depends on a layer's weight, and why."""
    for name in layer.names:
        network = layer.adapter(name).network
        if network.layer.opaque:
            yield name, f"which stands on an opaque layer ({type(layer.base).__name__})"
        elif network.reads_weight:
            yield name, f"whose update ({network.spec.name}) is made of it"
    for tied in ties:
        if any(_place(slot.owner, slot.key) == _place_of(layer) for slot in tied.slots):
            for name in tied.trainers:
                yield name, "which trains it as a whole"


def _place_of(layer: AdaptedLayer) -> tuple[int, str]:
    owner, _, key = layer.place
    return _place(owner, key)


def _place(owner: nn.Module, key: str) -> tuple[int, str]:
    return id(owner), key


def merge_into_base(root: nn.Module, state: AdaptedModel, name: str, dequantise: bool = False) -> None:
    """Add an adapter's update to the base, at its own scale. The adapter must then be taken off.

    All is computed first. If that fails nothing has changed, and what follows cannot fail.
    """
    others = {other: scale for other, scale in state.active.items() if other != name}
    layers = [layer for layer in adapted_layers(root) if name in layer.names]
    with acting(root, state, {name: state.scale_of(name)}):
        ties = [tied for tied in all_tied(root, state) if name in tied.trainers]
        with torch.inference_mode(False), torch.no_grad():
            moves = [move for tied in ties for move in tied.moved(name)]
        merge_layers(layers, dequantise)
    with torch.no_grad():
        for copy, values in moves:
            copy.copy_(values)
    for tied in ties:
        tied.merge_into_base(name)
    for layer in layers:
        layer.keep_merged()
    state.adapters[name] = replace(state.adapters[name], trained=(), statistics=())
    state.active = others
