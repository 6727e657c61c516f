"""Networks that turn a layer's inputs, or its outputs: the base weight as a core, and others on one side of it alone.

    dW = W (A - A0) on the input side:    y = base(x + (A - A0) x)
    dW = (A - A0) W on the output side:   y = base(x) + (A - A0) (base(x) - bias)

The weight is met once, by the layer itself, and the rest is the chain of a smaller network, with one entry of a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

from tnpeft.network.layer import Layer
from tnpeft.network.model import BoundCore, BoundTerm, Network
from tnpeft.planning.call import Axis, Call

__all__ = ["Side", "side_of"]


@dataclass(frozen=True)
class Side:
    """The side of the base weight on which a network acts, and the network there: its cores but the weight."""

    name: str  # `input` or `output`
    network: Network

    def call(self, call: Call) -> Call:
        """What the smaller network sees in a call of the layer."""
        sizes = [axis.inputs if self.name == "input" else axis.outputs for axis in call.axes]
        return Call(call.batch, tuple(Axis(size, size, 1) for size in sizes), device=call.device)


@lru_cache(maxsize=1024)
def side_of(network: Network) -> Side | None:
    """The side on which a plain network acts; None where it is no such network."""
    layer = network.layer
    if layer.groups > 1 or layer.slices or network.compose is not None:
        return None
    for name, channels in (("input", layer.in_channels), ("output", layer.out_channels)):
        terms = [_on_side(network, term, name, channels) for term in network.terms]
        if None not in terms:
            kind = layer.kind.replace("Transpose", "")
            small = Layer(kind, channels, channels, (1,) * len(layer.kernel_size))
            found = tuple(term for term in terms if term is not None)
            return Side(name, replace(network, layer=small, terms=found, formula="", slice_network=None))
    return None


def _on_side(network: Network, term: BoundTerm, name: str, channels: int) -> BoundTerm | None:
    """A term without the base weight; None where that is not one core, whose other side nothing else touches."""
    cores = {core.name: core for core in network.cores}
    weights = [core for core in map(cores.__getitem__, term.cores) if core.origin == "weight"]
    others = tuple(core for core in term.cores if cores[core].origin != "weight")
    if len(weights) != 1 or not others:
        return None
    outputs, inputs, *kernel = term.weight
    spatial = tuple(leg for axis in kernel for leg in axis)
    weight, kept = weights[0], (outputs, spatial) if name == "input" else ((), (*inputs, *spatial))
    inner = _between(weight, *kept)
    touched = {leg for core in others for leg in cores[core].legs}
    if inner is None or touched & {*kept[0], *kept[1]} or prod(network.sizes[leg] for leg in inner) != channels:
        return None
    axes = (inner, inputs) if name == "input" else (outputs, inner)
    # A leg that no other core has would pass through as it is, which no chain does.
    if any(prod(network.sizes[leg] for leg in axis) != channels or not touched.issuperset(axis) for axis in axes):
        return None
    return BoundTerm(others, (*axes, *((),) * len(kernel)), term.scale)


def _between(weight: BoundCore, first: tuple[str, ...], last: tuple[str, ...]) -> tuple[str, ...] | None:
    """The legs of the base weight between others, which it has as they are; None where it has not."""
    end = len(weight.legs) - len(last)
    if weight.legs[: len(first)] != first or weight.legs[end:] != last or end <= len(first):
        return None
    return weight.legs[len(first) : end]
