"""Kernel axes as shifted copies: one copy of the input for each kernel entry, or the sum of such copies.

A kernel entry joins positions of the input to positions of the output (`Axis.slices`), for plain and transposed
convolutions alike. `spread` makes a copy for each entry, `collect` adds them up; each is the other's adjoint with the
two sides exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tnpeft.plan import Axis

__all__ = ["Window", "Windows"]

Pair = tuple[slice, slice]


@dataclass(frozen=True)
class Window:
    """One kernel axis of a tensor (rows, outer voxels, the axis, inner voxels, more rows, columns).

    The kernel's place is after the rows before the voxels (`first`), or after those that follow them. `pairs` joins
    positions of the side that `spread` reads to those that it writes, entry by entry (None: nothing). `padding` are the
    zeros before and after with which every entry is a plain run of positions from one of the `starts` on; None where
    there is no such padding. `whole` is the entry that writes every position, if there is one.
    """

    kernel: int
    read: int
    written: int
    outer: int
    inner: int
    rows: tuple[int, int]
    first: bool
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
    def of(
        cls,
        axis: Axis,
        transposed: bool,
        outer: Sequence[int],
        inner: Sequence[int],
        backward: bool,
        place: tuple[int, int] | None,
    ) -> Window:
        """`outer` and `inner` are the sizes of the axes around; `backward`: from the output's side to the input's.

        `place` has the rows before the voxels and those between voxels and kernel; None if all stand before the kernel,
        and that before the voxels.
        """
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
            kernel=axis.kernel,
            read=read,
            written=written,
            outer=math.prod(outer),
            inner=math.prod(inner),
            rows=(-1, 1) if place is None else place,
            first=place is None,
            pairs=pairs,
            padding=padding,
            starts=starts,
            whole=next(full, None),
        )

    def spread(self, tensor: Tensor) -> Tensor:
        """One copy for each kernel entry, at the kernel's place; zero where an entry reads nothing."""
        rows, more = self.rows
        seen = tensor.reshape(rows, self.outer, self.read, self.inner * more, 1 if self.first else -1)
        place = 1 if self.first else 4
        if self.padding is not None:
            if self.padding != (0, 0):
                seen = torch.constant_pad_nd(seen, (0, 0, 0, 0, *self.padding))
            if self.kernel == 1:
                return seen.narrow(2, self.starts[0], self.written).contiguous()
            return torch.stack([seen.narrow(2, start, self.written) for start in self.starts], place)
        shape = [seen.shape[0], self.outer, self.written, *seen.shape[3:]]
        shape.insert(place, self.kernel)
        found = seen.new_zeros(shape)
        for entry, pair in enumerate(self.pairs):
            if pair is not None:
                found.select(place, entry)[:, :, pair[1]] = seen[:, :, pair[0]]
        return found

    def collect(self, tensor: Tensor) -> Tensor:
        """What `spread` would read is added to what it would write, and the kernel's place is gone."""
        rows, more = self.rows
        if self.first:
            entries = tensor.reshape(-1, self.kernel, self.outer, self.read, self.inner).unbind(1)
        else:
            entries = tensor.reshape(rows, self.outer, self.read, self.inner * more, self.kernel, -1).unbind(4)
        if self.whole is None:
            shape = entries[0].shape
            found = tensor.new_zeros(*shape[:2], self.written, *shape[3:])
        else:
            pair = self.pairs[self.whole]
            assert pair is not None
            found = entries[self.whole][:, :, pair[0]].clone(memory_format=torch.contiguous_format)
        for entry, pair in enumerate(self.pairs):
            if pair is not None and entry != self.whole:
                found[:, :, pair[1]] += entries[entry][:, :, pair[0]]
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
        self._matrices: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._small = False
        if axes:
            kernel = math.prod(window.kernel for window in axes)
            first, last = (axes[-1], axes[0]) if collects else (axes[0], axes[-1])
            self._read = first.numel[0] * (kernel if collects else 1)
            written = last.numel[1] * (1 if collects else kernel)
            # Legs between the voxels and the kernel's place would stand in the matrix' way.
            self._small = self._read * written <= MATRIX and axes[0].rows[1] == 1

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor with shifted copies or without them; its shape is arbitrary, its memory contiguous."""
        if not self.axes:
            return tensor
        if not self._small or torch.compiler.is_compiling():
            return self._moved(tensor, self.axes)
        matrix = self._matrix(tensor)
        if self.axes[0].first:
            return torch.mm(tensor.reshape(-1, self._read), matrix)
        batch = self.axes[0].rows[0]
        seen = tensor.reshape(batch, self._read, -1)
        if batch == 1:
            return torch.mm(matrix, seen[0])
        return torch.bmm(matrix.expand(batch, *matrix.shape), seen)

    def _matrix(self, like: Tensor) -> Tensor:
        kind = like.dtype, like.device
        found = self._matrices.get(kind)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                voxels = torch.eye(self._read, dtype=kind[0], device=kind[1])
                # For a batch of one, whose columns are the entries read; or whose rows are, where voxels stand last.
                axes = [replace(axis, rows=(1, axis.rows[1])) if not axis.first else axis for axis in self.axes]
                found = self._moved(voxels, axes)
                found = found.reshape(self._read, -1) if self.axes[0].first else found.reshape(-1, self._read)
            self._matrices[kind] = found
        return found

    def _moved(self, tensor: Tensor, axes: Sequence[Window]) -> Tensor:
        for window in reversed(axes) if self.collects else axes:
            tensor = window.collect(tensor) if self.collects else window.spread(tensor)
        return tensor
