"""One pairwise contraction, resolved before run time to a view of each operand and one matrix product.

Tensors are stored contiguously in a known order of legs. A contraction of two of them to a third is `mm` or `bmm` if
the legs of each role (batch, rows, summed, columns) are neighbours there; otherwise an operand or the result is copied.
All ways to lower one are compared by a rough model of time, in ns. Torch is not needed here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

__all__ = ["Contraction", "Legs", "Sizes", "View", "lower", "lower_copy", "reordering"]

Legs = tuple[str, ...]
Sizes = Mapping[str, int]

# The model's constants, from single operations on a 2-core Xeon: time to start an operation (Python and dispatch), to
# copy one element across strides, to multiply and add once in a matrix product, to start one product of a batch.
START = 4000.0
COPY = 1.0
SUM = 0.3
MULTIPLY = 1 / 15
BATCH = 60.0


@dataclass(frozen=True)
class View:
    """How a contiguous tensor is seen: reshape to `shape`, permute, reshape to `final` (a copy where it must be)."""

    shape: tuple[int, ...]
    permutation: tuple[int, ...] | None = None
    final: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Contraction:
    """The product of two stored tensors.

    `product` is `mm`, `bmm` or `mul`. `swapped`: the right operand is the first factor. `expand` holds the number of
    copies of a factor that has no batch legs (0: none). `fold` > 0: the batch is summed in the end, that many at a
    time. `result` reorders the product's elements to the order asked for (None: they are in it already).
    """

    product: str
    first: View
    second: View
    swapped: bool
    result: View | None
    expand: tuple[int, int] = (0, 0)
    fold: bool = False
    cost: float = 0.0


def lower(left: Legs, right: Legs, output: Legs, sizes: Sizes) -> Contraction:
    """The quickest product of tensors stored as `left` and `right` whose result is stored as `output`."""
    left, right, output = (tuple(leg for leg in legs if sizes[leg] > 1) for legs in (left, right, output))
    summed = tuple(leg for leg in left if leg in right and leg not in output)
    if not summed:
        return _elementwise(left, right, output, sizes)
    return min(_matrix_products(left, right, output, sizes), key=lambda found: found.cost)


def lower_copy(elements: int) -> float:
    """The model's time for a copy across strides, in ns."""
    return START + COPY * elements


def _elementwise(left: Legs, right: Legs, output: Legs, sizes: Sizes) -> Contraction:
    """A product along shared and open legs alone: broadcasting writes it in any order."""
    runs = _runs(output, (left, right))
    views = [_broadcast_view(legs, runs, sizes) for legs in (left, right)]
    cost = START + math.prod(sizes[leg] for leg in output)
    return Contraction("mul", views[0], views[1], False, None, cost=cost)


def _runs(output: Legs, operands: Sequence[Legs]) -> list[Legs]:
    """Pieces of `output` that each operand has as neighbours, or not at all."""
    runs: list[Legs] = []
    for leg in output:
        if runs and all(_follows(legs, runs[-1][-1], leg) for legs in operands):
            runs[-1] = (*runs[-1], leg)
        else:
            runs.append((leg,))
    return runs


def _follows(legs: Legs, before: str, leg: str) -> bool:
    if before not in legs or leg not in legs:
        return before not in legs and leg not in legs
    return legs.index(leg) == legs.index(before) + 1


def _broadcast_view(legs: Legs, runs: Sequence[Legs], sizes: Sizes) -> View:
    own = [run for run in runs if run[0] in legs]
    stored = sorted(own, key=lambda run: legs.index(run[0]))
    shape = tuple(_size(run, sizes) for run in stored)
    permutation = tuple(stored.index(run) for run in own)
    final = tuple(_size(run, sizes) if run[0] in legs else 1 for run in runs)
    return _view(shape, permutation, final)


def _view(shape: tuple[int, ...], permutation: tuple[int, ...], final: tuple[int, ...]) -> View:
    permuted = tuple(shape[place] for place in permutation)
    ordered = permutation == tuple(range(len(permutation)))
    if ordered:
        return View(final)
    return View(shape, permutation, None if final == permuted else final)


def _size(legs: Sequence[str], sizes: Sizes) -> int:
    return math.prod(sizes[leg] for leg in legs)


def _matrix_products(left: Legs, right: Legs, output: Legs, sizes: Sizes) -> Iterator[Contraction]:
    """All ways considered: which legs are the batch, which factor comes first, which order the summed legs have."""
    for batch, fold in _batches(left, right, output):
        for swapped in (False, True):
            first, second = (right, left) if swapped else (left, right)
            rows = tuple(leg for leg in output if leg in first and leg not in batch and leg not in second)
            columns = tuple(leg for leg in output if leg in second and leg not in batch and leg not in first)
            for order in (first, second):
                summed = tuple(leg for leg in order if leg in first and leg in second and leg not in (*output, *batch))
                groups = (batch, rows, summed, columns)
                yield replace(_matrix_product(first, second, groups, output, fold, sizes), swapped=swapped)


def _batches(left: Legs, right: Legs, output: Legs) -> Iterator[tuple[Legs, bool]]:
    """Candidates for the batch's legs, and whether they are summed afterwards."""
    shared = tuple(leg for leg in output if leg in left and leg in right)
    yield shared, False
    if shared:
        return
    # A batch that one factor lacks: the result may then start and end with legs of the other one.
    for legs in (left, right):
        start = 0
        while start < len(output) and output[start] in legs:
            start += 1
        if 0 < start < len(output):
            yield output[:start], False
    # A batch of summed legs, where both operands begin with them but end otherwise.
    start = 0
    while start < min(len(left), len(right)) and left[start] == right[start]:
        start += 1
    if start:
        yield left[:start], True


def _matrix_product(
    first: Legs, second: Legs, groups: tuple[Legs, Legs, Legs, Legs], output: Legs, fold: bool, sizes: Sizes
) -> Contraction:
    batch, rows, summed, columns = groups
    count = _size(batch, sizes)
    product = "bmm" if batch else "mm"
    views, expand, cost = [], [], START
    for legs, matrix in ((first, (rows, summed)), (second, (summed, columns))):
        batched = bool(batch) and batch[0] in legs
        view, copied = _matrix_view(legs, (batch, *matrix) if batched else matrix, batched, sizes)
        views.append(view)
        expand.append(count if batch and not batched else 0)
        cost += lower_copy(_size(legs, sizes)) if copied else 0.0
    made = (*rows, *columns) if fold else (*batch, *rows, *columns)
    elements = count * _size((*rows, *columns), sizes)
    cost += elements * _size(summed, sizes) * MULTIPLY + BATCH * count
    cost += START + SUM * elements if fold else 0.0
    result = None if made == output else reordering(made, output, sizes)
    cost += lower_copy(_size(output, sizes)) if result else 0.0
    return Contraction(product, views[0], views[1], False, result, (expand[0], expand[1]), fold, cost)


def _matrix_view(legs: Legs, groups: Sequence[Legs], batched: bool, sizes: Sizes) -> tuple[View, bool]:
    """The tensor with one axis for each group, and whether that takes a copy.

    Matrix products take either axis of a matrix innermost, but not the batch.
    """
    runs = _runs(tuple(leg for group in groups for leg in group), (legs,))
    filled = [group for group in groups if group]
    final = tuple(_size(group, sizes) for group in groups)
    stored = sorted(runs, key=lambda run: legs.index(run[0]))
    permutation = tuple(stored.index(run) for run in runs)
    shape = tuple(_size(run, sizes) for run in stored)
    whole = all(_follows(legs, *pair) for group in filled for pair in itertools.pairwise(group))
    copied = not whole or (batched and len(filled) > 1 and legs[-1] in groups[0])
    return _view(shape, permutation, final), copied


def reordering(stored: Legs, wanted: Legs, sizes: Sizes) -> View:
    """The view, to be copied, that puts a tensor stored as `stored` in the order `wanted`."""
    runs = _runs(wanted, (stored,))
    pieces = sorted(runs, key=lambda run: stored.index(run[0]))
    shape = tuple(_size(run, sizes) for run in pieces)
    return View(shape, tuple(pieces.index(run) for run in runs))
