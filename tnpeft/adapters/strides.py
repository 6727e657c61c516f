"""How tensors lie in memory: the order of a weight's axes, and cores that keep theirs when a model is moved."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["memory_order", "moved", "widened"]


def memory_order(strides: tuple[int, ...]) -> tuple[int, ...]:
    """The axes from slowest to fastest varying; equal strides keep their order."""
    return tuple(sorted(range(len(strides)), key=lambda axis: -strides[axis]))


def widened(tensor: Tensor) -> Tensor:
    """At least fp32; whole numbers as int64."""
    if not tensor.is_floating_point():
        return tensor.long()
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """`fn(tensor)`, but never narrower than `tensor`, and with its strides."""
    # As a vector, for a model's memory format is none of cores: torch refuses `channels_last_3d` for four axes.
    flat = tensor.flatten() if tensor.ndim in (4, 5) else tensor
    after = fn(flat)
    if tensor.is_floating_point() and after.dtype.itemsize < tensor.dtype.itemsize:
        after = flat.to(after.device)
    return tensor if after is flat and tensor.is_contiguous() else after.contiguous().view(tensor.shape)
