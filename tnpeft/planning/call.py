"""A call of a layer: how many voxels go in and come out, and how they are related along each kernel axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tnpeft.network.layer import Layer

__all__ = ["Axis", "Call", "nominal_call"]

# What a plan assumes of a call that it was not told: a Linear sees so many rows, a convolution so many voxels a side.
NOMINAL_ROWS = 64
NOMINAL_SIDE = 16


@dataclass(frozen=True)
class Axis:
    """One kernel axis of a call.

    For the kernel's entry `k`, a convolution's output at `b` reads its input at `b * stride + k * dilation - before`. A
    transposed convolution reads its input at `a` and adds to its output at `a * stride + k * dilation - before`.
    """

    inputs: int
    outputs: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    before: int = 0

    def slices(self, entry: int, transposed: bool) -> tuple[slice, slice] | None:
        """The positions of input and output that one kernel entry joins, as two slices; None if there are none."""
        offset = entry * self.dilation - self.before
        # `strided = dense * stride + offset`, with both within their axis.
        dense, strided = (self.inputs, self.outputs) if transposed else (self.outputs, self.inputs)
        first = max(0, -(offset // self.stride))
        last = min(dense - 1, (strided - 1 - offset) // self.stride)
        if last < first:
            return None
        one = slice(first, last + 1)
        start = first * self.stride + offset
        other = slice(start, last * self.stride + offset + 1, self.stride)
        return (one, other) if transposed else (other, one)

    @property
    def plain(self) -> bool:
        """Whether input and output are the same positions: a kernel of one entry that moves nothing."""
        return self.kernel == 1 and self.stride == 1 and self.before == 0 and self.inputs == self.outputs


@dataclass(frozen=True)
class Call:
    """One call: the batch's size (all rows of a Linear), the kernel axes, and the kind of device it runs on."""

    batch: int
    axes: tuple[Axis, ...] = ()
    transposed: bool = False
    device: str = "cpu"

    @property
    def inputs(self) -> int:
        """Voxels of one input channel, without the batch."""
        return math.prod(axis.inputs for axis in self.axes)

    @property
    def outputs(self) -> int:
        return math.prod(axis.outputs for axis in self.axes)

    def __str__(self) -> str:
        if not self.axes:
            return f"{self.batch} rows"
        sizes = ("x".join(str(getattr(axis, side)) for axis in self.axes) for side in ("inputs", "outputs"))
        return f"batch {self.batch}, {' -> '.join(sizes)}"


def nominal_call(layer: Layer, batch: int | None = None, space: Sequence[int] | None = None) -> Call:
    """A call with stride 1 and an output as large as the input; without a size, of the size that plans assume.

    `batch` counts all rows of a Linear, `space` are the voxels along each kernel axis.
    """
    if not layer.kernel_size:
        return Call(NOMINAL_ROWS if batch is None else batch)
    sides = space or (NOMINAL_SIDE,) * len(layer.kernel_size)
    pairs = zip(sides, layer.kernel_size, strict=True)
    axes = tuple(Axis(side, side, size, before=(size - 1) // 2) for side, size in pairs)
    return Call(batch or 1, axes, layer.transposed)
