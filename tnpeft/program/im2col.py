"""Kernel axes as shifted copies: one copy of the input for each kernel entry, or the sum of such copies.

A kernel entry joins positions of the input to positions of the output (`Axis.slices`), for plain and transposed
convolutions alike. `im2col` makes a copy for each entry, `col2im` adds them up; each is the other's adjoint with the
two sides exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from tnpeft.planning import Axis
from tnpeft.program.kernels import kept

__all__ = ["AxisIm2col", "Im2col", "Positions"]

Pair = tuple[slice, slice]


@dataclass(frozen=True)
class AxisIm2col:
    """One kernel axis of a tensor (rows, outer voxels, the axis, inner voxels, more rows, columns)."""

    kernel: int  # entries
    read: int  # positions of the side that `im2col` reads
    written: int  # and of the side that it writes
    outer: int
    inner: int
    rows: tuple[int, int]  # those before the voxels, and those between them and the kernel
    first: bool  # the kernel stands before the voxels; else after the rows that follow them
    pairs: tuple[Pair | None, ...]  # for each entry the positions read and written; None: it reads nothing
    padding: tuple[int, int] | None  # zeros before and after, with which every entry reads a run; None: none would do
    starts: tuple[int, ...]  # where these runs begin
    whole: int | None  # the entry that writes every position
    picked: tuple[int, ...]  # for every entry and position written the position read; `read`: none
    summed: tuple[int, ...]  # the same of all entries in a row, each with one position more

    @property
    def numel(self) -> tuple[int, int]:
        """Voxels that `im2col` reads, and those that it writes for one kernel entry."""
        around = self.outer * self.inner
        return around * self.read, around * self.written

    @property
    def ends(self) -> tuple[int, int, tuple[int, ...]]:
        """Positions of the side read and of the side written, and for each entry and position written that read."""
        return self.read, self.written, self.picked

    @classmethod
    def of(
        cls,
        axis: Axis,
        transposed: bool,
        outer: Sequence[int],
        inner: Sequence[int],
        backward: bool,
        place: tuple[int, int] | None,
    ) -> AxisIm2col:
        """One axis between others.

        `outer` and `inner` are the sizes of the voxels' axes around it. `backward` leads from the output's side to the
        input's. `place` has the rows before the voxels and those between voxels and kernel; with None the tensor is
        (rows, kernel, voxels).
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
            picked=_places(pairs, read, written, 0),
            summed=_places(pairs, read, written, read + 1),
        )

    def im2col(self, tensor: Tensor) -> Tensor:
        """One copy for each kernel entry, at the kernel's place; zero where an entry reads nothing."""
        seen = self._seen(tensor)
        place = 1 if self.first else 4
        if self.padding is not None:
            if self.padding != (0, 0):
                seen = torch.constant_pad_nd(seen, (0, 0, 0, 0, *self.padding))
            if self.kernel == 1:
                return seen.narrow(2, self.starts[0], self.written).contiguous()
            return torch.stack([seen.narrow(2, start, self.written) for start in self.starts], place)
        shape = [seen.shape[0], self.outer, self.written, *seen.shape[3:]]
        shape.insert(place, self.kernel)
        columns = seen.new_zeros(shape)
        for entry, pair in enumerate(self.pairs):
            if pair is not None:
                columns.select(place, entry)[:, :, pair[1]] = seen[:, :, pair[0]]
        return columns

    def col2im(self, tensor: Tensor) -> Tensor:
        """What `im2col` would read is added to what it would write, and the kernel's place is gone."""
        rows, more = self.rows
        if self.first:
            entries = tensor.reshape(-1, self.kernel, self.outer, self.read, self.inner).unbind(1)
        else:
            entries = tensor.reshape(rows, self.outer, self.read, self.inner * more, self.kernel, -1).unbind(4)
        if self.whole is None:
            shape = entries[0].shape
            image = tensor.new_zeros(*shape[:2], self.written, *shape[3:])
        else:
            pair = self.pairs[self.whole]
            assert pair is not None
            image = entries[self.whole][:, :, pair[0]].clone(memory_format=torch.contiguous_format)
        for entry, pair in enumerate(self.pairs):
            if pair is not None and entry != self.whole:
                image[:, :, pair[1]] += entries[entry][:, :, pair[0]]
        return image

    def im2col_plainly(self, tensor: Tensor) -> Tensor:
        """`im2col` by operations that whoever looks on can follow; its shape is arbitrary."""
        places = torch.tensor(self.picked, device=tensor.device)
        copies = self._by_entry(_with_zero(self._seen(tensor), 2).index_select(2, places))
        return copies.movedim(2, 1 if self.first else 4)

    def col2im_plainly(self, tensor: Tensor) -> Tensor:
        """`col2im` by operations that whoever looks on can follow."""
        rows, more = self.rows
        if self.first:
            copies = tensor.reshape(-1, self.kernel, self.outer, self.read, self.inner, 1).movedim(1, 2)
        else:
            copies = tensor.reshape(rows, self.outer, self.read, self.inner * more, self.kernel, -1).movedim(4, 2)
        places = torch.tensor(self.summed, device=tensor.device)
        return self._by_entry(_with_zero(copies, 3).flatten(2, 3).index_select(2, places)).sum(2)

    def _seen(self, tensor: Tensor) -> Tensor:
        rows, more = self.rows
        return tensor.reshape(rows, self.outer, self.read, self.inner * more, 1 if self.first else -1)

    def _by_entry(self, picked: Tensor) -> Tensor:
        """What was picked for all entries in a row, with an axis for these."""
        return picked.reshape(*picked.shape[:2], self.kernel, self.written, *picked.shape[3:])


def _with_zero(tensor: Tensor, axis: int) -> Tensor:
    """With one position of zeros more along an axis."""
    return torch.constant_pad_nd(tensor, (0, 0) * (tensor.dim() - 1 - axis) + (0, 1))


def _places(pairs: Sequence[Pair | None], read: int, written: int, step: int) -> tuple[int, ...]:
    """For every entry and position written, the position read (past the last: none); `step` from entry to entry."""
    places: list[int] = []
    for entry, pair in enumerate(pairs):
        first = entry * step
        row = [first + read] * written
        if pair is not None:
            row[pair[1]] = range(first, first + read)[pair[0]]
        places += row
    return tuple(places)


# Up to so many entries of the matrix from voxels to their copies, one product with it is quicker than slices: for 4^3
# voxels and one axis it takes 14 us where padding and stacking take 60 (2-core EPYC).
MATRIX = 3 * 64 * 64
# Rows of channels are picked by number where these are so few; numbers take memory. At 8^3 voxels of 32 channels and
# one axis that takes 28 us where stacking slices takes 66, adding up by number 51 where slices take 82 (2-core EPYC).
NUMBERED = 1 << 19
# Up to so many rows adding up by number is quicker than slices.
ADDED = 1 << 12


class Im2col:
    """Some kernel axes, one after the other: `im2col`, or `col2im`, which takes the last axis first.

    Where channels stand before the voxels and these are few, that is a product with a matrix of zeros and ones, which
    is exact. Where channels stand last, rows of them are picked, or added up, by number.
    """

    def __init__(self, axes: Sequence[AxisIm2col], adjoint: bool, positions: Positions | None = None) -> None:
        self.axes, self.adjoint = tuple(axes), adjoint
        self._tables: dict[Hashable, Tensor] = {}
        self._move: Callable[[Tensor], Tensor] = self._moved
        if not axes:
            return
        kernel = math.prod(axis.kernel for axis in axes)
        first, last = (axes[-1], axes[0]) if adjoint else (axes[0], axes[-1])
        self._read = first.numel[0] * (kernel if adjoint else 1)
        written = last.numel[1] * (1 if adjoint else kernel)
        if axes[0].first:
            if self._read * written <= MATRIX:
                self._move = self._multiplied
        elif positions is not None:
            self._positions = positions
            if adjoint and positions.rows(written=True) <= ADDED:
                self._move = self._added
            elif not adjoint and positions.rows(written=True) * kernel <= NUMBERED:
                self._move = self._picked

    def __call__(self, tensor: Tensor, plain: bool) -> Tensor:
        """The tensor with shifted copies or without them, in any shape; its memory is contiguous unless `plain`."""
        if not self.axes:
            return tensor
        return self._moved_plainly(tensor) if plain else self._move(tensor)

    def _multiplied(self, tensor: Tensor) -> Tensor:
        dtype, device = tensor.dtype, tensor.device

        def made() -> Tensor:
            return self._moved(torch.eye(self._read, dtype=dtype, device=device)).reshape(self._read, -1)

        return torch.mm(tensor.reshape(-1, self._read), kept(self._tables, (dtype, device), made))

    def _picked(self, tensor: Tensor) -> Tensor:
        rows = self._positions.rows(written=False)
        return _with_zeros(tensor.reshape(rows, -1)).index_select(0, self._numbers(tensor.device))

    def _added(self, tensor: Tensor) -> Tensor:
        numbers = self._numbers(tensor.device)
        rows = self._positions.rows(written=False) * self._positions.kernel
        return embedding_bag(numbers, _with_zeros(tensor.reshape(rows, -1)), mode="sum")

    def _moved_plainly(self, tensor: Tensor) -> Tensor:
        for axis in reversed(self.axes) if self.adjoint else self.axes:
            tensor = axis.col2im_plainly(tensor) if self.adjoint else axis.im2col_plainly(tensor)
        return tensor

    def _numbers(self, device: torch.device) -> Tensor:
        return kept(self._tables, device, lambda: self._positions.numbers(self.adjoint).to(device))

    def _moved(self, tensor: Tensor) -> Tensor:
        for axis in reversed(self.axes) if self.adjoint else self.axes:
            tensor = axis.col2im(tensor) if self.adjoint else axis.im2col(tensor)
        return tensor


def _with_zeros(rows: Tensor) -> Tensor:
    """The rows, and one of zeros for entries that read nothing."""
    return torch.cat((rows, rows.new_zeros(1, rows.shape[1])))


@dataclass(frozen=True)
class Positions:
    """Where the rows of channels stand: (batch, voxels along each axis, more rows); kernel axes in their order.

    For each axis its size on the side read and on the side written, and if it is a kernel axis `AxisIm2col.picked`.
    """

    batch: int
    axes: tuple[tuple[int, int, tuple[int, ...] | None], ...]
    more: int

    @property
    def kernel(self) -> int:
        return math.prod(len(picked) // written for _, written, picked in self.axes if picked is not None)

    def rows(self, written: bool) -> int:
        """Rows of the side written or read, without kernel entries."""
        return self.batch * math.prod(after if written else before for before, after, _ in self.axes) * self.more

    def numbers(self, adjoint: bool) -> Tensor:
        """For every row written, and every kernel entry, the row read; one past the last where there is none.

        To `col2im`, the rows read have kernel entries themselves, and the result has one line for each row written.
        """
        found, entries = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.bool)
        for read, written, picked in self.axes:
            # (written, entries): the position read, past the last where there is none
            own = torch.arange(read)[:, None] if picked is None else torch.tensor(picked).reshape(-1, written).T
            nothing = own == read
            # (voxels, entries) of the axes so far with those of this one
            found = (found[:, None, :, None] * read + own[None, :, None, :]).flatten(2).flatten(0, 1)
            entries = (entries[:, None, :, None] | nothing[None, :, None, :]).flatten(2).flatten(0, 1)
        voxels, kernel = math.prod(axis[0] for axis in self.axes), self.kernel
        batch, more = torch.arange(self.batch), torch.arange(self.more)
        rows = (batch[:, None, None, None] * voxels + found[None, :, None, :]) * self.more + more[None, None, :, None]
        past = self.rows(written=False)
        if adjoint:
            rows, past = rows * kernel + torch.arange(kernel), past * kernel
        rows = rows.masked_fill(entries[None, :, None, :], past)
        return rows.reshape(-1, kernel) if adjoint else rows.reshape(-1)
