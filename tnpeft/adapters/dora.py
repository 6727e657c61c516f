"""`compose: dora`: the direction of W + dW at a trained magnitude, for each output channel.

    W' = m * (W + dW) / ||W + dW||         (Liu et al., ICML 2024, arXiv:2402.09353, Eq. (5))

with m = ||W|| at the start. Its update W' - W is made of differences alone, so that it starts as an exact zero and
small updates keep their digits: with g = (m - m0) / m0 and d = ||W|| / ||W + dW|| - 1,

    W' - W = dW + (g + d + g d) (W + dW),    d = -<dW, 2 W + dW> / (n (||W|| + n)),    n = ||W + dW||.

Gradients are those of the formula: they flow through the norm too, which the paper holds fixed to save memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tnpeft.network import Layer

__all__ = ["composed", "magnitudes"]


def magnitudes(layer: Layer, weight: Tensor) -> Tensor:
    """The norm of each output channel of a stored weight, as a vector of out_channels; of a stack, (slices, out)."""
    channels, inner = _channels(layer, weight)
    norm = _norm(channels.double(), inner)  # squares that fp32 cannot hold
    return norm.reshape(*layer.stack, layer.out_channels).to(weight.dtype)


def composed(layer: Layer, weight: Tensor, delta: Tensor, magnitude: Tensor, start: Tensor) -> Tensor:
    """W' - W in the shape of the stored `weight`; `delta` is the network's update, `start` the first magnitude."""
    base, inner = _channels(layer, weight.detach().to(delta.dtype))
    change, _ = _channels(layer, delta)
    whole = base + change
    before, after = _norm(base, inner), _norm(whole, inner)
    grown = (change * (base + whole)).sum(inner, keepdim=True)
    # A channel of zeros has no direction to keep: its magnitude acts as a factor that starts as one.
    none = torch.finfo(torch.float32).tiny
    moves = (before > none) & (after > none)
    turned = torch.where(moves, -grown / torch.where(moves, after * (before + after), 1.0), 0.0)
    gain = ((magnitude - start) / torch.where(start > none, start, 1.0)).reshape(before.shape)
    update = change + (gain + turned + gain * turned) * whole
    return update.reshape(delta.shape)


def _norm(channels: Tensor, inner: tuple[int, ...]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(channels, dim=inner, keepdim=True)
    return norm


def _channels(layer: Layer, weight: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A stored weight with its output channels on axes of their own, and the numbers of all other axes."""
    if not layer.input_first:
        return weight, tuple(range(len(layer.stack) + 1, weight.ndim))
    # stored[g * a + i, o], a = in // groups: output channel g * b + o
    number, outputs, inputs, *kernel = layer.split_shape
    split = weight.reshape(number, inputs, outputs, *kernel)
    return split, (1, *range(3, split.ndim))
