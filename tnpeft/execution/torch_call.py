"""A torch layer with another weight: its call as the planner knows it, and as it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tnpeft.network import Layer
from tnpeft.planning import Axis, Call
from tnpeft.program import Geometry, autocast_dtype, convolve, needs_plain_ops

__all__ = ["add_weight", "as_autocast_has_it", "call_of", "chain_input", "convolved"]


def call_of(base: Any, layer: Layer, shape: Sequence[int], output_size: Any, device: str) -> Call | None:
    """The call of `base` with an input of this shape; None if the input has no elements or does not fit.

    Convolutions with a padding mode other than zeros are called unpadded, on their padded input.
    """
    if not shape or math.prod(shape) == 0:
        return None
    if not layer.kernel_size:
        return Call(math.prod(shape[:-1]), device=device) if shape[-1] == layer.in_channels else None
    axes = len(layer.kernel_size)
    if len(shape) not in (axes + 1, axes + 2) or shape[-axes - 1] != layer.in_channels:
        return None
    batch = shape[0] if len(shape) == axes + 2 else 1
    along = _transposed_axes(base, shape, output_size) if layer.transposed else _axes(base, shape)
    if any(axis.outputs < 1 for axis in along):
        return None
    return Call(batch, along, layer.transposed, device)


def chain_input(base: Any, x: Tensor) -> Tensor:
    """What the chain of a convolution reads: its input, padded if the padding mode is not zeros."""
    if getattr(base, "padding_mode", "zeros") == "zeros":
        return x
    return functional.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)


def as_autocast_has_it(x: Tensor) -> Tensor:
    """A layer's input in the bf16 in which autocast calls the layer, so that one copy of it is saved and no wider one.

    Where that is fp16 the chain reads fp32.
    """
    return x.to(torch.bfloat16) if autocast_dtype(x) == torch.bfloat16 else x


def convolved(base: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The output of a convolution with gradients faster than torch's; None if torch's own are to be taken."""
    if not torch.is_grad_enabled() or needs_plain_ops(x, weight) or base.groups != 1 or base.padding_mode != "zeros":
        return None
    befores = []
    for place, (step, kernel) in enumerate(zip(base.dilation, base.kernel_size, strict=True)):
        before, both = _padding(base, place, step * (kernel - 1))
        if both != 2 * before:
            return None
        befores.append(before)
    return convolve(x, weight, bias, Geometry(base.stride, tuple(befores), base.dilation))


def _axes(base: nn.Conv3d, shape: Sequence[int]) -> tuple[Axis, ...]:
    calls = []
    kernel, stride, dilation = base.kernel_size, base.stride, base.dilation
    for place, size in enumerate(shape[-len(kernel) :]):
        span = dilation[place] * (kernel[place] - 1)
        before, both = _padding(base, place, span)
        if base.padding_mode != "zeros":
            size, before, both = size + both, 0, 0  # the chain reads the padded input
        outputs = (size + both - span - 1) // stride[place] + 1
        calls.append(Axis(size, outputs, kernel[place], stride[place], dilation[place], before))
    return tuple(calls)


def _padding(base: nn.Conv3d, place: int, span: int) -> tuple[int, int]:
    """The padding before an axis, and before and after it together; `same` puts the odd one after."""
    if isinstance(base.padding, str):
        return (span // 2, span) if base.padding == "same" else (0, 0)
    return int(base.padding[place]), 2 * int(base.padding[place])


def _transposed_axes(base: nn.ConvTranspose3d, shape: Sequence[int], output_size: Any) -> tuple[Axis, ...]:
    kernel = base.kernel_size
    axes = len(kernel)
    calls = []
    for place, size in enumerate(shape[-axes:]):
        stride, dilation, before = base.stride[place], base.dilation[place], int(base.padding[place])
        outputs = (size - 1) * stride - 2 * before + dilation * (kernel[place] - 1) + 1
        if output_size is None:
            outputs += base.output_padding[place]
        else:
            outputs = int(output_size[-axes:][place])
        calls.append(Axis(size, outputs, kernel[place], stride, dilation, before))
    return tuple(calls)


def add_weight(total: Tensor, weight: Tensor, plain: bool) -> Tensor:
    """W + ΔW in W's strides and dtype; ΔW, which nobody else holds, is used up unless the operations must be plain."""
    if plain or total.is_meta:
        return (weight + total).to(weight.dtype)
    # In place and unseen by autograd, for which W is a constant: the delta weight is ours alone, no backward reads
    # it, and another tensor of its size costs more than contracting it (12 of 38 ms for a 512 -> 256 Conv3d).
    total.data.add_(weight)
    if total.dtype == weight.dtype and total.stride() == weight.stride():
        return total
    # Another dtype, or unit axes whose strides say which memory format the weight has: both steer the kernels.
    return torch.empty_like(weight).copy_(total)
