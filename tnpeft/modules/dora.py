"""`compose: dora`: the direction of W + dW at a trained magnitude, for each output channel.

    W' = m * (W + dW) / ||W + dW||         (Liu et al., ICML 2024, arXiv:2402.09353, Eq. (5))

with m = ||W|| at the start. Its update W' - W is made of differences alone, so that it starts as an exact zero and
small updates keep their digits: with g = (m - m0) / m0 and d = ||W|| / ||W + dW|| - 1,

    W' - W = dW + (g + d + g d) (W + dW),    d = -(2 <W, dW> + ||dW||^2) / (n (||W|| + n)),    n = ||W + dW||.

Gradients are those of the formula: they flow through the norm too, which the paper holds fixed to save memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tnpeft.network import Layer

__all__ = ["composed", "magnitudes"]


def magnitudes(layer: Layer, weight: Tensor) -> Tensor:
    """The norm of each output channel of a stored weight, as a vector of out_channels."""
    channels, inner = _channels(layer, weight)
    return channels.square().sum(inner).sqrt().flatten()


def composed(layer: Layer, weight: Tensor, delta: Tensor, magnitude: Tensor, start: Tensor) -> Tensor:
    """W' - W in the shape of the stored `weight`; `delta` is the network's update, `start` the first magnitude."""
    base, inner = _channels(layer, weight.detach().to(delta.dtype))
    change, _ = _channels(layer, delta)
    before = base.square().sum(inner, keepdim=True)
    grown = (2 * base * change + change.square()).sum(inner, keepdim=True)
    # A channel of zeros has no direction to keep: its magnitude acts as a factor that starts as one.
    moves = before > 0
    norm = torch.where(moves, before + grown, 1.0).clamp(min=torch.finfo(delta.dtype).tiny).sqrt()
    turned = torch.where(moves, -grown / (norm * (before.sqrt() + norm)), 0.0)
    gain = ((magnitude - start) / torch.where(start > 0, start, 1.0)).reshape(before.shape)
    update = change + (gain + turned + gain * turned) * (base + change)
    return update.reshape(delta.shape)


def _channels(layer: Layer, weight: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A stored weight with its output channels on axes of their own, and the numbers of all other axes."""
    if not layer.transposed:
        return weight, tuple(range(1, weight.ndim))
    # stored[g * a + i, o], a = in // groups: output channel g * b + o
    groups, kernel = layer.groups, layer.kernel_size
    split = weight.reshape(groups, layer.in_channels // groups, layer.out_channels // groups, *kernel)
    return split, (1, *range(3, split.ndim))
