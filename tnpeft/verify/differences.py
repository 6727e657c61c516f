"""Finite differences: the gradient of a function whose derivative is not known."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["slope_by_differences"]

STEPS = tuple(1e-2 / 4**number for number in range(8))
STENCIL = ((1, 3 / 4), (2, -3 / 20), (3, 1 / 60))  # of sixth order
AT_ONCE = 2**20  # numbers


def slope_by_differences(function: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> Tensor:
    """The gradient of (function(x) * upstream).sum() for x of (rest, *taken); the function must keep rows apart.

    Of several step sizes each entry takes the one whose difference agrees best with the next: long steps round least,
    and only short ones stay on one side of a kink.
    """
    rest, taken = len(x), x.shape[1:]
    numel = math.prod(taken)
    weights = upstream.reshape(rest, -1)
    units = torch.eye(numel, dtype=torch.float64).reshape(numel, 1, *taken)
    chunk = max(1, AT_ONCE // max(1, x.numel()))
    parts = [_differences(function, x, units[start : start + chunk], weights) for start in range(0, numel, chunk)]
    estimates = torch.cat(parts, 1)  # (steps, taken, rest)
    gaps = (estimates[1:] - estimates[:-1]).abs()
    best = gaps.argmin(0, keepdim=True) + 1
    return estimates.gather(0, best).squeeze(0).T.reshape(x.shape)


def _differences(function: Callable[[Tensor], Tensor], x: Tensor, units: Tensor, weights: Tensor) -> Tensor:
    """(steps, units, rest)"""
    count, rest = len(units), len(x)

    def summed(step: float) -> Tensor:
        points = (x + step * units).reshape(count * rest, *x.shape[1:])
        return (function(points).reshape(count, rest, -1) * weights).sum(-1)

    rows = []
    for step in STEPS:
        parts = (factor * (summed(times * step) - summed(-times * step)) for times, factor in STENCIL)
        rows.append(sum(parts, torch.zeros(count, rest, dtype=torch.float64)) / step)
    return torch.stack(rows)
