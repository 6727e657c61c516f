"""One pairwise contraction, resolved before run time to a view of each operand and one matrix product.

Tensors are stored contiguously in a known order of legs, written as a string of index letters. A contraction of two of
them to a third is `mm` or `bmm` if the legs of each role (batch, rows, summed, columns) are neighbours there; otherwise
an operand or the result is copied. All ways to lower one are compared by a rough model of time. No torch here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Contraction", "Sizes", "View", "copy_time", "lower", "lowering_time", "reordering"]

Sizes = Mapping[str, int]

# The model's constants, in ns, from single operations on one core of a 2-core Xeon with AVX-512: to start an operation
# (Python and dispatch); to write an element; to copy one across strides, alone and in runs of RUN or more; to multiply
# and add once in a large product (fewer than NARROW rows or columns slow it down); to start one product of a batch.
# `addbmm` sums a batch without a tensor for all products, but takes longer to start each (1.3 against 2.9 ms for 256
# times (1536, 9) (9, 16)). Time changes by 2 % where one of these changes by a third.
START = 4500.0
WRITE = 0.25
COPY = 1.2
COPY_RUNS = 0.4
RUN = 8
MULTIPLY = 1 / 80
NARROW = 9.0
SLOWEST = 10.0
BATCH = 60.0
ADD_BATCH = 1200.0
ADD = 0.02
# Elements of a result, or of each in a batch, from which on writing it once is worth copying both operands for a
# doubled bond.
DOUBLED = 1 << 16


@dataclass(frozen=True)
class View:
    """How a contiguous tensor is seen: reshape to `shape`, permute, reshape to `final` (a copy where it must be).

    `sizes` and `strides` say the same to `as_strided`, which takes one operation: they make `final`, or where that is a
    copy the tensor to reshape to it.
    """

    shape: tuple[int, ...]
    permutation: tuple[int, ...] | None
    final: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Contraction:
    """The product of two stored tensors.

    `product` is `mm`, `bmm`, `mul` (broadcasting), or one that sums the batch: `addbmm`, `bmm_sum`. `swapped`: the
    right operand is the first factor. `expand` is the number of times that a factor without batch legs is used (0: it
    has them). `double`: a sum of two such products is made as one, over twice the summed legs. `result` reorders the
    product's elements from the order `made`, of legs longer than one, to that asked for (None: they are in it already).
    """

    product: str
    first: View
    second: View
    swapped: bool
    result: View | None
    expand: tuple[int, int]
    double: bool
    made: str


@dataclass(frozen=True)
class _Candidate:
    """A way to lower a contraction: the legs of each role, and what it costs."""

    swapped: bool
    batch: str
    rows: str
    summed: str
    columns: str
    product: str
    made: str
    cost: float


def lower(left: str, right: str, output: str, sizes: Sizes) -> Contraction:
    """The quickest product of tensors stored as `left` and `right` whose result is stored as `output`."""
    left, right, output = (_without_units(legs, sizes) for legs in (left, right, output))
    if all(leg in output for leg in left if leg in right):
        return _elementwise(left, right, output, sizes)
    found = min(_candidates(left, right, output, sizes), key=lambda candidate: candidate.cost)
    first, second = (right, left) if found.swapped else (left, right)
    batch, count = found.batch, _size(found.batch, sizes)
    in_first, in_second = (bool(batch) and batch[0] in legs for legs in (first, second))
    result = None if found.made == output else reordering(found.made, output, sizes)
    return Contraction(
        found.product,
        _view(first, [batch, found.rows, found.summed][0 if in_first else 1 :], sizes),
        _view(second, [batch, found.summed, found.columns][0 if in_second else 1 :], sizes),
        found.swapped,
        result,
        (count if batch and not in_first else 0, count if batch and not in_second else 0),
        _size(found.made, sizes) >= DOUBLED * max(1, count) and found.product in ("mm", "bmm"),
        found.made,
    )


def lowering_time(left: str, right: str, output: str, sizes: Sizes) -> float:
    """What `lower` would find to be the quickest, in ns."""
    left, right, output = (_without_units(legs, sizes) for legs in (left, right, output))
    if all(leg in output for leg in left if leg in right):
        return START + 4 * WRITE * _size(output, sizes)
    return min(candidate.cost for candidate in _candidates(left, right, output, sizes))


def reordering(stored: str, wanted: str, sizes: Sizes) -> View:
    """The view, to be copied, that puts a tensor stored as `stored` in the order `wanted`."""
    return _view(stored, _runs(wanted, (stored,)), sizes)


def copy_time(stored: str, wanted: str, sizes: Sizes) -> float:
    """Of a copy from one order of legs to another, in ns."""
    kept = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(reversed(stored), reversed(wanted), strict=False))
    run = math.prod(sizes[leg] for leg, _ in kept)
    return START + (COPY_RUNS if run >= RUN else COPY) * _size(stored, sizes)


def _size(legs: str, sizes: Sizes) -> int:
    return math.prod([sizes[leg] for leg in legs])


def _without_units(legs: str, sizes: Sizes) -> str:
    return "".join([leg for leg in legs if sizes[leg] > 1])


def _elementwise(left: str, right: str, output: str, sizes: Sizes) -> Contraction:
    """A product along shared and open legs alone: broadcasting writes it in any order."""
    runs = _runs(output, (left, right))
    first, second = (_view(legs, [run if run[0] in legs else "" for run in runs], sizes) for legs in (left, right))
    return Contraction("mul", first, second, False, None, (0, 0), False, output)


def _runs(output: str, operands: Sequence[str]) -> list[str]:
    """Pieces of `output` that each operand has as neighbours, or not at all."""
    runs: list[str] = []
    for leg in output:
        if runs and all(_together(runs[-1][-1] + leg, legs) for legs in operands):
            runs[-1] += leg
        else:
            runs.append(leg)
    return runs


def _together(pair: str, legs: str) -> bool:
    return pair in legs or not (pair[0] in legs or pair[1] in legs)


def _view(legs: str, groups: Sequence[str], sizes: Sizes) -> View:
    """The tensor stored as `legs` with one axis for each group of them."""
    runs = _runs("".join(groups), (legs,))
    stored = sorted(runs, key=lambda run: legs.index(run[0]))
    permutation = tuple(stored.index(run) for run in runs)
    ordered = permutation == tuple(range(len(permutation)))
    pieces = groups if all(group in legs for group in groups) else runs
    return View(
        shape=tuple(_size(run, sizes) for run in stored),
        permutation=None if ordered else permutation,
        final=tuple(_size(group, sizes) for group in groups),
        sizes=tuple(_size(piece, sizes) for piece in pieces),
        strides=tuple(_size(legs[legs.index(piece[-1]) + 1 :], sizes) if piece else 1 for piece in pieces),
    )


def _candidates(left: str, right: str, output: str, sizes: Sizes) -> Iterator[_Candidate]:
    """All ways considered: the batch, which factor comes first, and the orders of rows, columns and summed legs."""
    for batch, fold in _batches(left, right, output):
        for swapped in (False, True):
            first, second = (right, left) if swapped else (left, right)
            shared = {leg for leg in first if leg in second and leg not in output and leg not in batch}
            for rows, summed, columns in itertools.product(
                _orders(set(first).difference(second, batch), (output, first)),
                _orders(shared, (first, second)),
                _orders(set(second).difference(first, batch), (output, second)),
            ):
                made = rows + columns if fold else batch + rows + columns
                cost = copy_time(made, output, sizes) if made != output else 0.0
                for legs, groups in ((first, (batch, rows, summed)), (second, (batch, summed, columns))):
                    if _needs_copy(legs, groups):
                        cost += copy_time(legs, "".join(leg for leg in "".join(groups) if leg in legs), sizes)
                shape = (_size(rows, sizes), _size(summed, sizes), _size(columns, sizes))
                product, time = _product_time(_size(batch, sizes) if batch else 0, shape, fold)
                yield _Candidate(swapped, batch, rows, summed, columns, product, made, cost + time)


def _orders(legs: set[str], orders: Iterable[str]) -> list[str]:
    """The legs as they follow each other in each of `orders`."""
    return list(dict.fromkeys("".join(leg for leg in order if leg in legs) for order in orders))


def _batches(left: str, right: str, output: str) -> Iterator[tuple[str, bool]]:
    """Candidates for the batch's legs, and whether they are summed afterwards."""
    shared = "".join(leg for leg in output if leg in left and leg in right)
    yield shared, False
    if shared:
        return
    # A batch that one factor lacks: the result may then start and end with legs of the other one.
    for legs in (left, right):
        start = output[: next((place for place, leg in enumerate(output) if leg not in legs), len(output))]
        if start and start != output:
            yield start, False
    # A batch of summed legs, where both operands begin with them but end otherwise.
    equal = itertools.takewhile(lambda place: left[place] == right[place], range(min(len(left), len(right))))
    start = left[: len(list(equal))]
    if start:
        yield start, True


def _needs_copy(legs: str, groups: tuple[str, str, str]) -> bool:
    """Whether a tensor stored as `legs` is no batch of matrices as it stands; their last axis may not be the batch."""
    batch, rows, columns = groups
    batched = batch and batch[0] in legs
    if rows not in legs or columns not in legs:
        return True
    return bool(batched) and (batch not in legs or (legs[-1] == batch[-1] and bool(rows or columns)))


def _product_time(count: int, shape: tuple[int, int, int], fold: bool) -> tuple[str, float]:
    """The operation for `count` products of matrices (0: no batch), and its time."""
    height, depth, width = shape
    slowdown = min(1 + (NARROW / min(height, width)) ** 2, SLOWEST)
    arithmetic = START + max(count, 1) * height * depth * width * MULTIPLY * slowdown
    written = WRITE * max(count, 1) * height * width
    if not count:
        return "mm", arithmetic + written
    separate = arithmetic + written + BATCH * count
    if not fold:
        return "bmm", separate
    added = arithmetic + count * (ADD_BATCH + ADD * height * width)
    summed = separate + START + written
    return ("addbmm", added) if added < summed else ("bmm_sum", summed)
