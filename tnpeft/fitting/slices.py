"""A stack of layers, fitted slice by slice: slices have cores of their own, so their best fits are that of all."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tnpeft.adapters import Adapter
from tnpeft.network import Network

__all__ = ["fit_slices"]

FitSlice = Callable[[Adapter, Tensor, Tensor], tuple[float, str, int]]
"""Fits an adapter to an update of a weight; gives the relative error, what was done, and its sweeps."""


def fit_slices(adapter: Adapter, weight: Tensor, delta: Tensor, fit_slice: FitSlice) -> tuple[float, str, int]:
    """Fit the adapter of a stack in place; the error is that of all slices together."""
    network = adapter.network.slice_network
    assert network is not None
    lost, said, sweeps = 0.0, ["start"], 0
    for number in range(adapter.network.layer.slices):
        layer = nn.Module()
        layer.weight = nn.Parameter(weight[number].detach(), requires_grad=False)
        part = Adapter(network, layer, seed=adapter.seed, name=f"{adapter.layer_name}.{number}")
        places = _places(adapter, network, number)
        with torch.no_grad():
            for key, tensor in part.state_dict().items():
                tensor.copy_(places[key])
        error, how, turns = fit_slice(part, weight[number], delta[number])
        with torch.no_grad():
            for key, tensor in part.state_dict().items():
                places[key].copy_(tensor)
        lost += (error * float(torch.linalg.vector_norm(delta[number].double()))) ** 2
        said, sweeps = [how, *said], max(sweeps, turns)
    norm = float(torch.linalg.vector_norm(delta.double()))
    return math.sqrt(lost) / norm, max(said, key=lambda how: how != "start"), sweeps


def _places(adapter: Adapter, network: Network, number: int) -> dict[str, Tensor]:
    """What a slice has in the tensors of the stack, by key; what layers share is the same for all."""
    shared = {f"{kind}_{core.name}" for core in network.cores if core.shared for kind in ("core", "start")}
    own = {key: tensor for key, tensor in adapter.state_dict().items() if key not in shared}
    whole = {f"core_{name}": core for name, core in adapter.cores.items() if f"core_{name}" in shared}
    return {**{key: tensor[number] for key, tensor in own.items()}, **whole}
