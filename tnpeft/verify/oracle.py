"""What an adapter must compute, computed a second time in float64 from its definition.

Nothing here uses plans or programs: sums are taken index by index. `dense_delta` builds the whole update and can be
differentiated; `entry` follows the index formula of a single entry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tnpeft.network import BoundTerm, Layer, Network
from tnpeft.verify.oracle_derived import derive, factors_of
from tnpeft.verify.oracle_sums import Legged, sum_out

__all__ = ["canonical", "composed", "dense_delta", "dense_weight", "entry", "stored", "sum_out", "term_weight"]


def dense_weight(
    network: Network,
    cores: Mapping[str, Tensor],
    magnitude: bool = False,
    values: Mapping[str, Tensor] | None = None,
    first: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The sum of all terms in float64, in the shape of the layer's weight; without the adapter's scale.

    `cores` has every stored core by name, those that are the base weight too. With `magnitude` the scales count by
    size, and `values` are the cores themselves, which maps of derived cores need beside their sizes. `first` are those
    of a frozen copy that is subtracted, whose derived cores may be the larger ones.
    """
    named = _factors(network, cores, magnitude, values, first)
    total: Tensor | None = None
    for term in network.terms:
        value = term_weight(network, term, [named[name] for name in term.cores])
        value = (abs(term.scale) if magnitude else term.scale) * value
        total = value if total is None else total + value
    assert total is not None
    return stored(total, network.layer)


def _factors(
    network: Network,
    cores: Mapping[str, Tensor],
    magnitude: bool = False,
    values: Mapping[str, Tensor] | None = None,
    first: Mapping[str, Tensor] | None = None,
) -> dict[str, Legged]:
    """What the terms name: the cores as they are stored, or factors."""
    if not network.factors:
        return {core.name: (cores[core.name].double(), core.legs) for core in network.cores}
    assert values is not None or not magnitude
    known = derive(network, values) if magnitude and values is not None else None
    copy = None if first is None else derive(network, _sizes(first), derive(network, first))
    return factors_of(network, derive(network, cores, known, copy))


def _sizes(cores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of cores; places stay what they are."""
    return {name: core.abs() if core.is_floating_point() else core for name, core in cores.items()}


def term_weight(network: Network, term: BoundTerm, operands: Sequence[Legged], batch: Sequence[str] = ()) -> Tensor:
    """One term without its scale: the legs of `batch`, then the axes of the canonical weight, cropped to its sizes."""
    value = sum_out(operands, [*batch, *(leg for axis in term.weight for leg in axis)])
    first = value.shape[: len(batch)]
    value = value.reshape(*first, *(math.prod(network.sizes[leg] for leg in axis) for axis in term.weight))
    return value[tuple(map(slice, (*first, *network.layer.weight_shape)))]


def dense_delta(
    network: Network,
    cores: Mapping[str, Tensor],
    start: Mapping[str, Tensor] | None,
    magnitude: bool = False,
    values: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """scale * (T(cores) - T(start)), or scale * T(cores).

    With `magnitude` it is |scale| * (T(cores) + T(start)) of sizes; `values` are then those of `cores`, and `start` has
    values where the network has derived cores.
    """
    if magnitude and start is not None:
        sized = _sizes(start)
        copy = start if network.factors else None
        delta = dense_weight(network, cores, True, values, copy) + dense_weight(network, sized, True, copy)
    else:
        delta = dense_weight(network, cores, magnitude, values)
        delta = delta if start is None else delta - dense_weight(network, start)
    return (abs(network.scale) if magnitude else network.scale) * delta


def stored(weight: Tensor, layer: Layer) -> Tensor:
    """The canonical weight (out, in // groups, k...) as torch stores it: transposed convolutions input side first."""
    if not layer.input_first:
        return weight
    if layer.slices:
        return weight.transpose(1, 2)
    return torch.cat([block.transpose(0, 1) for block in weight.chunk(layer.groups)])


def canonical(weight: Tensor, layer: Layer) -> Tensor:
    """The way back from `stored`: swapping the two sides of every group is its own inverse."""
    return stored(weight, layer)


def composed(weight: Tensor, magnitude: Tensor, layer: Layer, size: Tensor | None = None) -> Tensor:
    """DoRA's magnitude * (W + dW) / ||W + dW||, with `weight` the stored W + dW, norms over each output channel.

    With `size`, the magnitudes of what `weight` was added up from: a bound of the result whose gradients bound the
    result's. Its second part is the gradient's way through the norm.
    """
    rows = canonical(weight, layer).flatten(1)
    norm = rows.norm(dim=1, keepdim=True).clamp_min(1e-300)
    factor = magnitude.reshape(-1, 1)
    if size is None:
        made = factor * rows / norm
    else:
        large, norm = canonical(size, layer).flatten(1), norm.detach()
        through = large.detach() * (large.detach() * large).sum(1, keepdim=True) / norm**3
        # A norm that is left over from larger numbers has lost digits, and all that is divided by it has.
        lost = 1 + (large.detach().norm(dim=1, keepdim=True) / norm) ** 2
        made = lost * factor * (large / norm + through)
    return stored(made.reshape(layer.weight_shape), layer)


def entry(network: Network, cores: Mapping[str, Tensor], position: Sequence[int]) -> float:
    """One number of T(cores), at a position of the stored weight, from the index formula."""
    named = _factors(network, cores)
    total = 0.0
    for term in network.terms:
        digits: dict[str, int] = {}
        for number, axis in zip(_canonical_position(network.layer, position), term.weight, strict=True):
            for leg in reversed(axis):  # row-major: the last leg varies fastest
                number, digits[leg] = divmod(number, network.sizes[leg])
        taken = [_slice(*named[name], digits) for name in term.cores]
        total += term.scale * float(sum_out(taken, ()))
    return total


def _canonical_position(layer: Layer, position: Sequence[int]) -> tuple[int, ...]:
    """stored[g*a + i, o] = canonical[g*b + o, i], with a = in // groups and b = out // groups."""
    if not layer.input_first:
        return tuple(position)
    group, inner = divmod(position[0], layer.in_channels // layer.groups)
    return (group * (layer.out_channels // layer.groups) + position[1], inner, *position[2:])


def _slice(core: Tensor, legs: tuple[str, ...], digits: Mapping[str, int]) -> Legged:
    """The core at these values of its open legs."""
    chosen = core[tuple(digits.get(leg, slice(None)) for leg in legs)]
    return chosen, tuple(leg for leg in legs if leg not in digits)
