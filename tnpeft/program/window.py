"""Kernel axes as shifted copies: one copy of the input for each kernel entry, or the sum of such copies.

A kernel entry joins positions of the input to positions of the output (`Axis.slices`), for plain and transposed
convolutions alike. `spread` makes a copy for each entry, `collect` adds them up; each is the other's adjoint with the
two sides exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tnpeft.plan import Axis

__all__ = ["Window", "Windows"]

Pair = tuple[slice, slice]


@dataclass(frozen=True)
class Window:
    """One kernel axis of a tensor (rows, outer voxels, the axis, inner voxels).

    `pairs` joins positions of the side that `spread` reads to those that it writes, entry by entry (None: nothing).
    `padding` are the zeros before and after with which every entry is a plain run of positions from one of the `starts`
    on; None where there is no such padding. `whole` is the entry that writes every position, if there is one.
    """

    kernel: int
    read: int
    written: int
    outer: int
    inner: int
    pairs: tuple[Pair | None, ...]
    padding: tuple[int, int] | None
    starts: tuple[int, ...]
    whole: int | None

    @property
    def numel(self) -> tuple[int, int]:
        """Voxels that `spread` reads, and those that it writes for one kernel entry."""
        around = self.outer * self.inner
        return around * self.read, around * self.written

    @classmethod
    def of(cls, axis: Axis, transposed: bool, outer: Sequence[int], inner: Sequence[int], backward: bool) -> Window:
        """`outer` and `inner` are the sizes of the axes around; `backward`: from the output's side to the input's."""
        found = [axis.slices(entry, transposed) for entry in range(axis.kernel)]
        pairs = tuple(None if pair is None else (pair[::-1] if backward else pair) for pair in found)
        read, written = (axis.outputs, axis.inputs) if backward else (axis.inputs, axis.outputs)
        padding: tuple[int, int] | None = None
        starts: tuple[int, ...] = ()
        if axis.stride == 1:
            sign = 1 if transposed is backward else -1
            offsets = [sign * (entry * axis.dilation - axis.before) for entry in range(axis.kernel)]
            padding = (max(0, -min(offsets)), max(0, written + max(offsets) - read))
            starts = tuple(offset + padding[0] for offset in offsets)
        full = (entry for entry, pair in enumerate(pairs) if pair and len(range(*pair[1].indices(written))) == written)
        return cls(
            axis.kernel, read, written, math.prod(outer), math.prod(inner), pairs, padding, starts, next(full, None)
        )

    def spread(self, tensor: Tensor) -> Tensor:
        """(rows, voxels) to (rows, kernel, voxels): one copy for each kernel entry, zero where it reads nothing."""
        seen = tensor.reshape(-1, self.outer, self.read, self.inner)
        if self.padding is not None:
            if self.padding != (0, 0):
                seen = torch.constant_pad_nd(seen, (0, 0, *self.padding))
            if self.kernel == 1:
                return seen.narrow(2, self.starts[0], self.written).contiguous()
            return torch.stack([seen.narrow(2, start, self.written) for start in self.starts], 1)
        found = seen.new_zeros(seen.shape[0], self.kernel, self.outer, self.written, self.inner)
        for entry, pair in enumerate(self.pairs):
            if pair is not None:
                found[:, entry, :, pair[1]] = seen[:, :, pair[0]]
        return found

    def collect(self, tensor: Tensor) -> Tensor:
        """(rows, kernel, voxels) to (rows, voxels): what `spread` would read is added to what it would write."""
        seen = tensor.reshape(-1, self.kernel, self.outer, self.read, self.inner)
        if self.whole is None:
            found = seen.new_zeros(seen.shape[0], self.outer, self.written, self.inner)
        else:
            pair = self.pairs[self.whole]
            assert pair is not None
            found = seen[:, self.whole, :, pair[0]].clone(memory_format=torch.contiguous_format)
        for entry, pair in enumerate(self.pairs):
            if pair is not None and entry != self.whole:
                found[:, :, pair[1]] += seen[:, entry, :, pair[0]]
        return found


# Up to so many entries of the matrix from voxels to their copies, one product with it is quicker than slices: for 4^3
# voxels and one axis it takes 14 us where padding and stacking take 60 (2-core EPYC).
MATRIX = 3 * 64 * 64


class Windows:
    """Some kernel axes, one after the other: `spread`, or `collect`, which takes the last axis first.

    With few voxels they are one product with a matrix of zeros and ones, which is exact.
    """

    def __init__(self, axes: Sequence[Window], collects: bool) -> None:
        self.axes, self.collects = tuple(axes), collects
        self.kernel = math.prod(window.kernel for window in axes)
        self._matrices: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        if axes:
            first, last = (axes[-1], axes[0]) if collects else (axes[0], axes[-1])
            self.read = first.numel[0] * (self.kernel if collects else 1)
            written = last.numel[1] * (1 if collects else self.kernel)
            self.small = self.read * written <= MATRIX

    def __call__(self, tensor: Tensor) -> Tensor:
        """(rows, voxels) to (rows, kernel entries, voxels), or back; shapes are arbitrary, memory is contiguous."""
        if not self.axes:
            return tensor
        if not self.small or torch.compiler.is_compiling():
            return self._moved(tensor)
        kind = tensor.dtype, tensor.device
        matrix = self._matrices.get(kind)
        if matrix is None:
            with torch.inference_mode(False), torch.no_grad():
                matrix = self._moved(torch.eye(self.read, dtype=kind[0], device=kind[1])).reshape(self.read, -1)
            self._matrices[kind] = matrix
        return torch.mm(tensor.reshape(-1, self.read), matrix)

    def _moved(self, tensor: Tensor) -> Tensor:
        if not self.collects:
            for window in self.axes:
                tensor = window.spread(tensor)
            return tensor
        for window in reversed(self.axes):
            tensor = window.collect(tensor)
        return tensor
