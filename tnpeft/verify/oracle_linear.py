"""Linear maps by their definition: the entries, other than zero, of the matrix that takes one row to another.

A map is `function(taken, made, **arguments) -> entries`: triples (place in the result, place in x, factor), places
counted in row-major order over the legs taken and made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tnpeft.spec.wavelets import wavelet_filters

__all__ = ["LINEAR", "Matrix", "matrix_of"]

Array = NDArray[np.float64]
Places = NDArray[np.int64]
Shape = tuple[int, ...]
Entry = tuple[int, int, float]


class Matrix(NamedTuple):
    """Made x taken entries, by place and factor."""

    rows: Places
    columns: Places
    factors: Array
    shape: tuple[int, int]

    def __call__(self, x: Array) -> Array:
        """(rest, taken entries) -> (rest, made entries)."""
        return self._summed(x, self.columns, self.rows, self.shape[0])

    def transposed(self, y: Array) -> Array:
        return self._summed(y, self.rows, self.columns, self.shape[1])

    def dense(self) -> Array:
        return self(np.eye(self.shape[1])).T

    def _summed(self, x: Array, source: Places, target: Places, size: int) -> Array:
        made = np.zeros((size, len(x)))
        np.add.at(made, target, x.T[source] * self.factors[:, None])
        return made.T

    def absolute(self) -> Matrix:
        return self._replace(factors=np.abs(self.factors))


def matrix_of(name: str, taken: Shape, made: Shape, **arguments: Any) -> Matrix:
    """The matrix of a built-in linear map; KeyError for others."""
    entries = [*LINEAR[name](taken, made, **arguments)]
    rows, columns, factors = zip(*entries, strict=True) if entries else ((), (), ())
    shape = math.prod(made), math.prod(taken)
    return Matrix(np.array(rows, np.int64), np.array(columns, np.int64), np.array(factors, np.float64), shape)


def _antisymmetric(taken: Shape, made: Shape) -> Iterator[Entry]:
    side = taken[0]
    for row, column in itertools.product(range(side), repeat=2):
        if row != column:
            yield row * side + column, row * side + column, 1.0
            yield row * side + column, column * side + row, -1.0


def _skew(taken: Shape, made: Shape) -> Iterator[Entry]:
    side = made[0]
    for place, (row, column) in enumerate(itertools.combinations(range(side), 2)):
        yield row * side + column, place, 1.0
        yield column * side + row, place, -1.0


def _scatter(taken: Shape, made: Shape, at: Places) -> Iterator[Entry]:
    return ((int(place), number, 1.0) for number, place in enumerate(at.flat))


def _gather(taken: Shape, made: Shape, at: Places) -> Iterator[Entry]:
    return ((number, int(place), 1.0) for number, place in enumerate(at.flat))


def _roll(taken: Shape, made: Shape) -> Iterator[Entry]:
    """A vector stands in every row."""
    rows, columns = made
    for row, column in itertools.product(range(rows), range(columns)):
        start = 0 if len(taken) == 1 else row * columns
        yield row * columns + column, start + (column - row) % columns, 1.0


def _pad(taken: Shape, made: Shape) -> Iterator[Entry]:
    before = (math.prod(made) - taken[0]) // 2
    return ((before + place, place, 1.0) for place in range(taken[0]))


def _wavelet(taken: Shape, made: Shape, family: str) -> Iterator[Entry]:
    """Each coefficient puts its filter two places further; the ends go, and half of what is too long at each side."""
    filters, band = wavelet_filters(family), taken[1]
    length, size = len(filters[0]), made[0]
    cut = length - 2
    start = cut + (2 * (band - 1) + length - 2 * cut - size) // 2
    for half, place, tap in itertools.product(range(2), range(band), range(length)):
        target = 2 * place + tap - start
        if 0 <= target < size:
            yield target, half * band + place, float(filters[half][tap])


LINEAR: dict[str, Callable[..., Iterator[Entry]]] = {
    "antisymmetric": _antisymmetric,
    "skew": _skew,
    "scatter": _scatter,
    "gather": _gather,
    "roll": _roll,
    "pad": _pad,
    "wavelet": _wavelet,
}
