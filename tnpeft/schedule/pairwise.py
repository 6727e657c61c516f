"""One pairwise contraction, resolved before run time to a view of each operand and one matrix product.

Tensors are stored contiguously in a known order of legs, written as a string of index letters. A contraction of two of
them to a third is `mm` or `bmm` if the legs of each role (batch, rows, summed, columns) are neighbours there; otherwise
an operand or the result is copied. All ways to lower one are compared by a rough model of time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

__all__ = ["Lowered", "Sizes", "View", "copy_time", "lower", "lowering_time", "reordering"]

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
class Lowered:
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


class _Candidate(NamedTuple):
    """A way to lower a contraction: the legs of each role, and what it costs."""

    swapped: bool
    batch: str
    rows: str
    summed: str
    columns: str
    product: str
    made: str
    cost: float


def lower(left: str, right: str, output: str, sizes: Sizes) -> Lowered:
    """The fastest way to multiply tensors stored as `left` and `right` to a result stored as `output`."""
    return _lowered(*_signature(left, right, output, sizes))


def lowering_time(left: str, right: str, output: str, sizes: Sizes) -> float:
    """The predicted time of what `lower` gives, in ns."""
    return _quickest(*_signature(left, right, output, sizes)).cost


def reordering(stored: str, wanted: str, sizes: Sizes) -> View:
    """The view, to be copied, that puts a tensor stored as `stored` in the order `wanted`."""
    return _view(stored, _runs(wanted, (stored,)), sizes)


def copy_time(stored: str, wanted: str, sizes: Sizes) -> float:
    """The predicted time of a copy from one order of legs to another, in ns."""
    run = 1
    for leg, other in zip(reversed(stored), reversed(wanted), strict=False):
        if leg != other:
            break
        run *= sizes[leg]
    return START + (COPY_RUNS if run >= RUN else COPY) * math.prod(map(sizes.__getitem__, stored))


def _signature(left: str, right: str, output: str, sizes: Sizes) -> tuple[str, str, str, tuple[int, ...]]:
    """All that a contraction is lowered by: the legs longer than one, and the length of each where it stands."""
    lengths = tuple(map(sizes.__getitem__, left + right + output))
    if 1 not in lengths:
        return left, right, output, lengths
    left, right, output = ("".join([leg for leg in legs if sizes[leg] > 1]) for legs in (left, right, output))
    return left, right, output, tuple(map(sizes.__getitem__, left + right + output))


@lru_cache(maxsize=1 << 12)
def _lowered(left: str, right: str, output: str, lengths: tuple[int, ...]) -> Lowered:
    sizes = dict(zip(left + right + output, lengths, strict=True))
    found = _quickest(left, right, output, lengths)
    if found.product == "mul":
        return _elementwise(left, right, output, sizes)
    first, second = (right, left) if found.swapped else (left, right)
    batch, count = found.batch, math.prod(map(sizes.__getitem__, found.batch))
    in_first, in_second = bool(batch) and batch[0] in first, bool(batch) and batch[0] in second
    return Lowered(
        found.product,
        _view(first, [batch, found.rows, found.summed][0 if in_first else 1 :], sizes),
        _view(second, [batch, found.summed, found.columns][0 if in_second else 1 :], sizes),
        found.swapped,
        None if found.made == output else reordering(found.made, output, sizes),
        (count if batch and not in_first else 0, count if batch and not in_second else 0),
        math.prod(map(sizes.__getitem__, found.made)) >= DOUBLED * max(1, count) and found.product in ("mm", "bmm"),
        found.made,
    )


def _elementwise(left: str, right: str, output: str, sizes: Sizes) -> Lowered:
    """A product along shared and open legs alone: broadcasting writes it in any order."""
    runs = _runs(output, (left, right))
    first, second = (_view(legs, [run if run[0] in legs else "" for run in runs], sizes) for legs in (left, right))
    return Lowered("mul", first, second, False, None, (0, 0), False, output)


def _runs(output: str, operands: Sequence[str]) -> list[str]:
    """Pieces of `output` that each operand has as neighbours, or not at all."""
    runs: list[str] = []
    for leg in output:
        neighbours = bool(runs)
        for legs in operands if runs else ():
            before = runs[-1][-1]
            if before + leg not in legs and (before in legs or leg in legs):
                neighbours = False
        if neighbours:
            runs[-1] += leg
        else:
            runs.append(leg)
    return runs


def _view(legs: str, groups: Sequence[str], sizes: Sizes) -> View:
    """The tensor stored as `legs` with one axis for each group of them."""
    size, prod = sizes.__getitem__, math.prod
    runs = _runs("".join(groups), (legs,))
    places = [legs.index(run[0]) for run in runs]
    stored = sorted(range(len(runs)), key=places.__getitem__)
    permutation = tuple(map(stored.index, range(len(runs))))
    ordered = permutation == tuple(range(len(permutation)))
    pieces = groups if all(map(legs.__contains__, groups)) else runs
    return View(
        shape=tuple([prod(map(size, runs[run])) for run in stored]),
        permutation=None if ordered else permutation,
        final=tuple([prod(map(size, group)) for group in groups]),
        sizes=tuple([prod(map(size, piece)) for piece in pieces]),
        strides=tuple([prod(map(size, legs[legs.index(piece[-1]) + 1 :])) if piece else 1 for piece in pieces]),
    )


@lru_cache(maxsize=1 << 14)
def _quickest(left: str, right: str, output: str, lengths: tuple[int, ...]) -> _Candidate:
    """The first of the cheapest ways, over the batch, which factor comes first, and the orders of the other legs.

    The search is written without generators, and leaves what cannot be cheaper: attaching a spec runs it often.
    """
    sizes = dict(zip(left + right + output, lengths, strict=True))
    if set(left).intersection(right).issubset(output):
        cost = START + 4 * WRITE * math.prod(map(sizes.__getitem__, output))
        return _Candidate(False, "", "", "", "", "mul", output, cost)
    best = None
    for batch, fold in _batches(left, right, output):
        best = _cheaper(best, False, batch, fold, left, right, output, sizes)
        best = _cheaper(best, True, batch, fold, right, left, output, sizes)
    assert best is not None
    return best


def _cheaper(
    best: _Candidate | None, swapped: bool, batch: str, fold: bool, first: str, second: str, output: str, sizes: Sizes
) -> _Candidate | None:
    """The cheapest product with this batch and these factors, if it is cheaper than `best`; else that."""
    size, prod = sizes.__getitem__, math.prod
    of_rows, of_columns = set(first).difference(second, batch), set(second).difference(first, batch)
    of_sum = set(first).intersection(second).difference(output, batch)
    shape = (prod(map(size, of_rows)), prod(map(size, of_sum)), prod(map(size, of_columns)))
    product, time = _product_time(prod(map(size, batch)) if batch else 0, shape, fold)
    least = math.inf if best is None else best.cost
    if time >= least:
        return best
    # The legs as they follow each other in the result, and in the operand.
    in_rows, in_sum, in_columns = of_rows.__contains__, of_sum.__contains__, of_columns.__contains__
    for rows in dict.fromkeys(("".join(filter(in_rows, output)), "".join(filter(in_rows, first)))):
        for summed in dict.fromkeys(("".join(filter(in_sum, first)), "".join(filter(in_sum, second)))):
            for columns in dict.fromkeys(("".join(filter(in_columns, output)), "".join(filter(in_columns, second)))):
                made = rows + columns if fold else batch + rows + columns
                cost = copy_time(made, output, sizes) if made != output else 0.0
                if _needs_copy(first, batch, rows, summed):
                    wanted = "".join(filter(first.__contains__, batch + rows + summed))
                    cost += copy_time(first, wanted, sizes)
                if cost + time < least and _needs_copy(second, batch, summed, columns):
                    wanted = "".join(filter(second.__contains__, batch + summed + columns))
                    cost += copy_time(second, wanted, sizes)
                if cost + time < least:
                    least = cost + time
                    best = _Candidate(swapped, batch, rows, summed, columns, product, made, least)
    return best


def _batches(left: str, right: str, output: str) -> list[tuple[str, bool]]:
    """Candidates for the batch's legs, and whether they are summed afterwards."""
    shared = "".join(filter(set(left).intersection(right).__contains__, output))
    found = [(shared, False)]
    if shared:
        return found
    # A batch that one factor lacks: the result may then start and end with legs of the other one.
    for legs in (left, right):
        start = output[: len(output) - len(output.lstrip(legs))]
        if start and start != output:
            found.append((start, False))
    # A batch of summed legs, where both operands begin with them but end otherwise.
    equal = 0
    for leg, other in zip(left, right, strict=False):
        if leg != other:
            break
        equal += 1
    if equal:
        found.append((left[:equal], True))
    return found


@lru_cache(maxsize=1 << 12)
def _needs_copy(legs: str, batch: str, rows: str, columns: str) -> bool:
    """Whether a tensor stored as `legs` is no batch of matrices as it stands; their last axis may not be the batch."""
    if rows not in legs or columns not in legs:
        return True
    if not batch or batch[0] not in legs:
        return False
    return batch not in legs or (legs[-1] == batch[-1] and bool(rows or columns))


@lru_cache(maxsize=1 << 12)
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
