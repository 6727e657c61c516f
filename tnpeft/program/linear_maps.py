"""Maps that only move, add and subtract entries: f(a + b) = f(a) + f(b).

Shapes are those of `maps`. Index tensors `at` are (layers, legs...); one layer of either stands for all.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tnpeft.program.autocast import without_autocast
from tnpeft.spec.wavelets import wavelet_filters

__all__ = ["antisymmetric", "flattened", "gather", "pad", "roll", "scatter", "skew", "wavelet"]

Shape = tuple[int, ...]


def flattened(x: Tensor) -> Tensor:
    """(layers, rest, *taken) -> (layers, rest, entries); one entry where no leg is taken."""
    return x.reshape(*x.shape[:2], math.prod(x.shape[2:]))


def antisymmetric(x: Tensor, shape: Shape) -> Tensor:
    """X - X^T."""
    return x - x.mT


def skew(x: Tensor, shape: Shape) -> Tensor:
    """The skew matrix whose strict upper triangle, row by row, is x."""
    side = shape[0]
    rows, columns = torch.triu_indices(side, side, 1, device=x.device)
    upper = x.new_zeros(*x.shape[:2], side * side).index_copy(-1, rows * side + columns, x)
    matrix = upper.reshape(*x.shape[:2], *shape)  # (layers, rest, side, side)
    return matrix - matrix.mT


def scatter(x: Tensor, shape: Shape, at: Tensor) -> Tensor:
    """The entries of x at flat places of a tensor of zeros; no place stands twice in `at`."""
    flat, places = _aligned(flattened(x), at)
    zeros = flat.new_zeros(*flat.shape[:2], math.prod(shape))
    return zeros.scatter(-1, places, flat).reshape(*flat.shape[:2], *shape)


def gather(x: Tensor, shape: Shape, at: Tensor) -> Tensor:
    """The entries of x at flat places, in the order of `at`: the same one as often as it stands there."""
    flat, places = _aligned(flattened(x), at)
    return flat.gather(-1, places).reshape(*flat.shape[:2], *shape)


def _aligned(flat: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Entries (layers, rest, entries) and places (layers, rest, places), of as many layers."""
    layers = max(flat.shape[0], at.shape[0])
    places = at.to(torch.int64).flatten(1).unsqueeze(1)
    return flat.expand(layers, -1, -1), places.expand(layers, flat.shape[1], -1)


def roll(x: Tensor, shape: Shape) -> Tensor:
    """out[x, y] = v[(y - x) mod Y] of a vector v, or v[x, (y - x) mod Y] of a matrix."""
    rows, columns = shape
    steps = torch.arange(columns, device=x.device) - torch.arange(rows, device=x.device).unsqueeze(1)
    places = steps.remainder(columns)  # (rows, columns)
    if x.ndim == 3:  # a vector
        return x.index_select(-1, places.flatten()).reshape(*x.shape[:2], *shape)
    return x.gather(-1, places.expand(x.shape))


def pad(x: Tensor, shape: Shape) -> Tensor:
    """Zeros on both sides, fewer before than after."""
    missing = math.prod(shape) - x.shape[-1]
    before = missing // 2
    return F.pad(x, (before, missing - before)).reshape(*x.shape[:2], *shape)


def wavelet(x: Tensor, shape: Shape, family: str) -> Tensor:
    """One level of synthesis of a low and a high band, (layers, rest, 2, band), cut in the middle to `shape`.

    y[k + 2m] = sum_m low[k] x[0, m] + high[k] x[1, m], without the (length - 2) entries of each side that miss a tap.
    """
    low, high = wavelet_filters(family)
    cut = len(low) - 2
    (size,) = shape
    entries = 2 * x.shape[-1] - len(low) + 2
    start = cut + (entries - size) // 2
    filters = torch.tensor([low, high], dtype=x.dtype, device=x.device).unsqueeze(1)  # (2, 1, length)
    with without_autocast(x):
        full = F.conv_transpose1d(x.flatten(0, 1), filters, stride=2)  # (layers * rest, 1, 2 * band + length - 2)
    return full[..., start : start + size].reshape(*x.shape[:2], size)
