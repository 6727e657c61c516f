"""An adapted model computed a second time in float64, with `oracle` in place of the compiler.

Beside every value goes its magnitude: the same sums over absolute values, which bound what rounding can do.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tnpeft.modules import AdaptedLayer, Adapter
from tnpeft.verify.oracle import dense_delta, dense_weight
from tnpeft.verify.subject import adapted_layers

__all__ = ["Exact"]

Leaves = dict[int, Tensor]


class Exact:
    """The values of an adapted model in float64; `leaves` has a twin that can be differentiated for every core.

    With `magnitude` every number in it is positive and every difference a sum.
    """

    def __init__(self, model: nn.Module, magnitude: bool = False) -> None:
        self.layers = list(adapted_layers(model))
        self.magnitude = magnitude
        self.leaves: Leaves = {}
        self._twins = {id(layer): self._twin(layer.adapter("default")) for layer in self.layers}

    def _twin(self, adapter: Adapter) -> dict[str, Tensor]:
        """A layer's cores in float64; one that several layers share has one leaf."""
        twins: dict[str, Tensor] = {}
        for name, core in adapter.cores.items():
            twin = self._sized(core.detach().double())
            if self.magnitude and name in adapter.start:  # tensors on the way are start and change added up
                twin = twin + adapter.start[name].double().abs()
            if isinstance(core, nn.Parameter):
                twin = self.leaves.setdefault(id(core), twin.requires_grad_())
            twins[name] = twin
        return twins

    def _sized(self, tensor: Tensor) -> Tensor:
        return tensor.abs() if self.magnitude else tensor

    def cores(self, layer: AdaptedLayer) -> dict[str, Tensor]:
        """Every core of a layer by name."""
        return self._twins[id(layer)]

    def network_weight(self, layer: AdaptedLayer) -> Tensor:
        """T(θ) of one layer."""
        return dense_weight(layer.adapter("default").network, self.cores(layer), self.magnitude)

    def delta(self, layer: AdaptedLayer) -> Tensor:
        """The update of one layer's weight."""
        adapter = layer.adapter("default")
        twins = self.cores(layer)
        start = None
        if adapter.network.start == "frozen_copy":
            start = {**twins, **{name: self._sized(core.double()) for name, core in adapter.start.items()}}
        return dense_delta(layer.adapter("default").network, twins, start, self.magnitude)

    def weight(self, layer: AdaptedLayer) -> Tensor:
        """The effective weight of one layer."""
        return self._sized(_base(layer).weight.detach().double()) + self.delta(layer)

    def output(self, x: Tensor) -> Tensor:
        """What the model computes, all its layers on one input."""
        return torch.stack([self._call(layer, x) for layer in self.layers])

    def _call(self, layer: AdaptedLayer, x: Tensor) -> Tensor:
        base = _base(layer)
        tensors: Mapping[str, Tensor] = {"weight": self.weight(layer)}
        if base.bias is not None:
            tensors = {**tensors, "bias": self._sized(base.bias.detach().double())}
        output: Tensor = torch.func.functional_call(base, dict(tensors), (x,))
        return output


def _base(layer: AdaptedLayer) -> nn.Module:
    base: nn.Module = layer.base
    return base
