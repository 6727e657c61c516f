"""An adapted model computed a second time in float64, with `oracle` in place of the compiler.

Every value has a magnitude, too: the same sums over absolute values, which bound the effect of rounding.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tnpeft.execution import AdaptedLayer
from tnpeft.verify.model_under_test import adapted_layers
from tnpeft.verify.oracle import canonical, composed, dense_delta, dense_weight

__all__ = ["Exact"]

Leaves = dict[int, Tensor]


class Exact:
    """The values of a model with an adapter in float64; `leaves` has a twin of every core that can be differentiated.

    With `magnitude` every number in it is positive and every difference a sum; `values` are then those without.
    """

    def __init__(self, model: nn.Module, magnitude: bool = False, name: str = "default") -> None:
        self.layers = list(adapted_layers(model))
        self.magnitude, self.name = magnitude, name
        self.leaves: Leaves = {}
        self.values = Exact(model, name=name) if magnitude else None
        self._twins = {id(layer): self._twin(layer) for layer in self.layers}

    def _twin(self, layer: AdaptedLayer) -> dict[str, Tensor]:
        """A layer's stored cores in float64, the base weight among them; a tensor that layers share has one leaf."""
        adapter = layer.adapter(self.name)
        network, start = adapter.network, adapter.start
        base = self._sized(canonical(_base_weight(layer), network.layer))
        twins = {core.name: base.reshape(core.shape) for core in network.cores if core.origin == "weight"}
        for name, core in adapter.cores.items():
            if core.dtype == torch.int64:  # places
                twins[name] = core.detach()
                continue
            twin = self._sized(core.detach().double())
            if self.magnitude and name in start:  # tensors on the way are start and change added up
                twin = twin + start[name].double().abs()
            twins[name] = self._leaf(core, twin)
        return twins

    def _leaf(self, tensor: Tensor, twin: Tensor) -> Tensor:
        return self.leaves.setdefault(id(tensor), twin.requires_grad_()) if isinstance(tensor, nn.Parameter) else twin

    def _sized(self, tensor: Tensor) -> Tensor:
        return tensor.abs() if self.magnitude else tensor

    def cores(self, layer: AdaptedLayer) -> dict[str, Tensor]:
        """Every stored core of a layer by name."""
        return self._twins[id(layer)]

    def _values(self, layer: AdaptedLayer) -> dict[str, Tensor] | None:
        return None if self.values is None else self.values.cores(layer)

    def network_weight(self, layer: AdaptedLayer) -> Tensor:
        """T(θ) of one layer."""
        network = layer.adapter(self.name).network
        return dense_weight(network, self.cores(layer), self.magnitude, self._values(layer))

    def delta(self, layer: AdaptedLayer) -> Tensor:
        """The update of one layer's weight."""
        if layer.adapter(self.name).magnitude is None:
            return self._network_delta(layer)
        base = _base_weight(layer)
        return self.weight(layer) + (base.abs() if self.magnitude else -base)

    def _network_delta(self, layer: AdaptedLayer) -> Tensor:
        adapter = layer.adapter(self.name)
        network, twins, values = adapter.network, self.cores(layer), self._values(layer)
        if network.start == "zero":
            return dense_delta(network, twins, None, self.magnitude, values)
        now = twins if values is None else values
        start = {**now, **{name: core.double() for name, core in adapter.start.items()}}
        return dense_delta(network, twins, start, self.magnitude, values)

    def weight(self, layer: AdaptedLayer) -> Tensor:
        """The effective weight of one layer."""
        adapter = layer.adapter(self.name)
        magnitude = adapter.magnitude
        summed = self._sized(_base_weight(layer)) + self._network_delta(layer)
        if magnitude is None:
            return summed
        factor = self._leaf(magnitude, self._sized(magnitude.detach().double()))
        if not self.magnitude:
            return composed(summed, factor, adapter.network.layer)
        assert self.values is not None
        actual = _base_weight(layer) + self.values._network_delta(layer).detach()
        return composed(actual, factor, adapter.network.layer, summed)

    def output(self, x: Tensor) -> Tensor:
        """What the model computes, all its layers on one input."""
        return torch.stack([self._call(layer, x) for layer in self.layers])

    def _call(self, layer: AdaptedLayer, x: Tensor) -> Tensor:
        base = _base(layer)
        tensors: Mapping[str, Tensor] = {"weight": self.weight(layer)}
        if layer.base.bias is not None:
            tensors = {**tensors, "bias": self._sized(layer.base.bias.detach().double())}
        output: Tensor = torch.func.functional_call(base, dict(tensors), (x,))
        return output


def _base(layer: AdaptedLayer) -> nn.Module:
    base: nn.Module = layer.base
    return base


def _base_weight(layer: AdaptedLayer) -> Tensor:
    weight: Tensor = layer.base.weight
    return weight.detach().double()
