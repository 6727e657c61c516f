"""A convolution whose gradients are made by oneDNN where torch itself would take its slow kernels.

For one volume of few channels and rows (channels x depth x height up to 20,480) torch's CPU backend multiplies copied
windows. For two volumes it takes oneDNN, which is up to four times quicker: 3.8 -> 1.1 ms for the input's gradient of
Conv3d(32, 32, 3) at 16^3, 8.6 -> 2.8 ms for Conv3d(64, 64, 3) there (2-core Xeon with AVX-512). So the volume is cut in
two along its depth, and the halves are a batch. The forward pass stays torch's own, bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tnpeft.program.observers import needs_plain_ops

__all__ = ["Geometry", "convolve"]

# Output voxels and multiplications from which on cutting pays: below, starting the copies takes longer than they save.
VOXELS = 128
FEW_VOXELS, MULTIPLICATIONS = 64, 80_000_000
_AXES = 3


class Geometry(NamedTuple):
    """Stride, zeros before and after, and dilation along each axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor | None:
    """The convolution of one group; None where torch's own gradients are as quick, or nothing looks for any."""
    if not _pays(x, weight, bias, geometry):
        return None
    output: Tensor = _Convolved.apply(x, weight, bias, geometry)  # type: ignore[no-untyped-call]
    return output


def _pays(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> bool:
    if weight.dim() != _AXES + 2 or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    if x.dim() not in (_AXES + 1, _AXES + 2) or x.shape[-_AXES - 1] != weight.shape[1]:
        return False  # torch says what is wrong
    if x.dim() == _AXES + 2 and x.shape[0] != 1:
        return False
    if x.device.type != "cpu" or not (x.requires_grad or weight.requires_grad) or not torch.is_grad_enabled():
        return False
    if not torch.backends.mkldnn.enabled or not torch._C._has_mkldnn:
        return False
    voxels = math.prod(_outputs(x, weight, geometry))
    depth = _outputs(x, weight, geometry)[0]
    if depth < 2 or not (voxels >= VOXELS or (voxels >= FEW_VOXELS and voxels * weight.numel() >= MULTIPLICATIONS)):
        return False
    return not torch.is_autocast_enabled("cpu") and _is_slow(x, weight, bias, geometry)


def _is_slow(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> bool:
    """Whether torch takes its own kernels for this call; False where it does not tell."""
    select = getattr(torch._C, "_select_conv_backend", None)
    backends = getattr(torch._C, "_ConvBackend", None)
    if select is None or backends is None:
        return False
    batched = x if x.dim() == _AXES + 2 else x.unsqueeze(0)
    found = select(batched, weight, bias, *geometry, False, (0,) * _AXES, 1)
    return found in (backends.Slow3d, backends.SlowDilated3d)


def _outputs(x: Tensor, weight: Tensor, geometry: Geometry) -> list[int]:
    sizes = zip(x.shape[-_AXES:], weight.shape[2:], *geometry, strict=True)
    return [(size + 2 * pad - step * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, pad, step in sizes]


class _Convolved(torch.autograd.Function):
    """torch's convolution; keeps the input only for a weight that needs a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.geometry, ctx.shape = geometry, x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return functional.conv3d(x, weight, bias, geometry.stride, geometry.padding, geometry.dilation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or needs_plain_ops(gradient):
            return (*_differentiable(x, ctx.shape, weight, gradient, ctx.geometry, wanted), None)
        input_grad, weight_grad = None, None
        if wanted[0] or wanted[1]:
            input_grad, weight_grad = _in_halves(x, ctx.shape, weight, gradient, ctx.geometry, wanted)
        bias_grad = gradient.sum([axis for axis in range(gradient.dim()) if axis != gradient.dim() - _AXES - 1])
        return input_grad, weight_grad, bias_grad if wanted[2] else None, None


def _differentiable(
    x: Tensor | None, shape: torch.Size, weight: Tensor, gradient: Tensor, geometry: Geometry, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """torch's own gradients, for those who differentiate them again; without the weight's, no value of `x` is read."""
    read = gradient.new_zeros(()).expand(shape) if x is None else x
    lead = () if read.dim() == _AXES + 2 else (None,)
    bias = [weight.shape[0]] if wanted[2] else None
    input_grad, weight_grad, bias_grad = torch.ops.aten.convolution_backward(
        gradient[lead], read[lead], weight, bias, *geometry, False, (0,) * _AXES, 1, list(wanted)
    )
    return [input_grad.reshape(shape) if wanted[0] else None, weight_grad, bias_grad]


class _Halves(NamedTuple):
    """The depth's two halves: `planes` of the output each, of which `repeated` are in both, and what they read.

    Each reads `length` planes; the first from `-before` on, the second from `start - before` on.
    """

    planes: int
    repeated: int
    before: int
    length: int
    start: int


def _halves(depth: int, outputs: int, kernel: int, geometry: Geometry) -> _Halves:
    (stride, *_), (before, *_), (dilation, *_) = geometry
    count = (outputs + 1) // 2
    length = (count - 1) * stride + dilation * (kernel - 1) + 1
    return _Halves(count, 2 * count - outputs, before, length, (outputs - count) * stride)


def _in_halves(
    x: Tensor | None, shape: torch.Size, weight: Tensor, gradient: Tensor, geometry: Geometry, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the input and of the weight."""
    channels, depth, *plane = shape[-_AXES - 1 :]
    planes = gradient.reshape(gradient.shape[-_AXES - 1 :])
    cut = _halves(depth, planes.shape[1], weight.shape[2], geometry)
    pair = torch.stack((planes[:, : cut.planes], planes[:, planes.shape[1] - cut.planes :]))
    if cut.repeated:  # of an odd number of planes the middle one is in both
        pair[1, :, : cut.repeated] = 0
    if x is None:
        read = gradient.new_empty(()).expand(2, channels, cut.length, *plane)  # its sizes alone are looked at
    else:
        read = _cut(x.reshape(shape[-_AXES - 1 :]), cut)
    padding = (0, *geometry.padding[1:])
    input_grad, weight_grad, _ = torch.ops.aten.convolution_backward(
        pair, read, weight, None, geometry.stride, padding, geometry.dilation, False, (0,) * _AXES, 1,
        [wanted[0], wanted[1], False],
    )  # fmt: skip
    return _joined(input_grad, depth, cut).reshape(shape) if wanted[0] else None, weight_grad


def _cut(x: Tensor, cut: _Halves) -> Tensor:
    """What the halves read of an input (channels, depth, ...), and zeros around it."""
    halves = x.new_empty(2, x.shape[0], cut.length, *x.shape[2:])
    for half, first in zip(halves.unbind(0), (-cut.before, cut.start - cut.before), strict=True):
        low = max(0, first)
        high = max(low, min(x.shape[1], first + cut.length))
        half[:, : low - first] = 0
        half[:, low - first : high - first] = x[:, low:high]
        half[:, high - first :] = 0
    return halves


def _joined(pair: Tensor, depth: int, cut: _Halves) -> Tensor:
    """The sum of what belongs to the same planes of the input; zeros where neither half reads.

    The first half reads the input's planes up to `middle`, the second those from `low` to `high`.
    """
    first_half, second_half = pair.unbind(0)
    first = cut.start - cut.before
    middle = min(max(0, cut.length - cut.before), depth)
    low, high = max(0, first), min(depth, first + cut.length)
    joined = pair.new_empty(first_half.shape[0], depth, *first_half.shape[2:])
    joined[:, :middle] = first_half[:, cut.before : cut.before + middle]
    shared = min(middle, high)
    if low < shared:
        joined[:, low:shared] += second_half[:, low - first : shared - first]
    joined[:, middle : max(low, middle)] = 0
    if max(low, middle) < high:
        joined[:, max(low, middle) : high] = second_half[:, max(low, middle) - first : high - first]
    joined[:, max(middle, high) :] = 0
    return joined
