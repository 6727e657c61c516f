"""What each built-in map must compute, worked out a second time in float64 numpy from its definition.

Each is `function(x, shape, **arguments)` as in `tnpeft.program.maps`, but for one layer: x is (rest, *taken), the
result (rest, *made), `at` has the index core's legs. Dense matrices and loops, one row of `rest` at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnpeft.spec.wavelets import wavelet_filters

__all__ = ["oracle_map"]

Array = NDArray[np.float64]
Places = NDArray[np.int64]
Shape = tuple[int, ...]


def oracle_map(name: str) -> Callable[..., Array]:
    """The definition of a built-in map; KeyError for others."""
    row = _ROWS[name]

    def run(x: Array, shape: Shape, **arguments: Any) -> Array:
        rows = [row(np.asarray(values, dtype=np.float64), shape, **arguments) for values in x]
        return np.stack(rows).reshape(len(x), *shape)

    return run


def _entrywise(function: Callable[[float], float]) -> Callable[..., Array]:
    return lambda x, shape: np.array(function(float(x)))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _gelu(x: float) -> float:
    """x times the normal distribution's share below x."""
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


_SCALARS: dict[str, Callable[..., Array]] = {
    "tanh": _entrywise(math.tanh),
    "sin": _entrywise(math.sin),
    "gelu": _entrywise(_gelu),
    "silu": _entrywise(lambda x: x * _sigmoid(x)),
    "relu": _entrywise(lambda x: max(x, 0.0)),
    "cos": _entrywise(math.cos),
    "sigmoid": _entrywise(_sigmoid),
}


def _topk_softmax(x: Array, shape: Shape, k: float) -> Array:
    flat = [float(value) for value in x.flat]
    chosen = sorted(range(len(flat)), key=lambda place: (-flat[place], place))[: int(k)]
    powers = {place: math.exp(flat[place] - flat[chosen[0]]) for place in chosen}
    return np.array([powers.get(place, 0.0) / sum(powers.values()) for place in range(len(flat))])


def _unit(x: Array, shape: Shape, floor: float = 0.0) -> Array:
    length = max(float(_norm(x, ())), floor)
    return x / length if length else x


def _norm(x: Array, shape: Shape) -> Array:
    return np.array(math.hypot(*(float(value) for value in x.flat)))


def _qr(x: Array, shape: Shape) -> Array:
    """Householder's reflections, each of which sends a column to -sign(first) times its length, as LAPACK does."""
    triangle = x.reshape(-1, x.shape[-1]).copy()
    rows, columns = triangle.shape
    product = np.eye(rows)
    for column in range(columns):
        below = np.zeros(rows)
        below[column:] = triangle[column:, column]
        if not below[column + 1 :].any():
            continue
        below[column] += math.copysign(math.hypot(*below), below[column])
        reflection = np.eye(rows) - 2 * np.outer(below, below) / (below @ below)
        triangle, product = reflection @ triangle, product @ reflection
    return product[:, :columns]


def _antisymmetric(x: Array, shape: Shape) -> Array:
    return x - x.T


def _skew(x: Array, shape: Shape) -> Array:
    matrix = np.zeros(shape)
    for value, (row, column) in zip(x, itertools.combinations(range(shape[0]), 2), strict=True):
        matrix[row, column], matrix[column, row] = value, -value
    return matrix


def _cayley(x: Array, shape: Shape) -> Array:
    return (np.eye(len(x)) + x) @ np.linalg.inv(np.eye(len(x)) - x)


def _neumann(x: Array, shape: Shape, terms: float) -> Array:
    last = int(terms) - 1
    factors = [1, *[2] * (last - 1), 1]
    return sum((factor * np.linalg.matrix_power(x, power) for power, factor in enumerate(factors)), np.zeros(shape))


def _reflections(x: Array, shape: Shape) -> Array:
    """One more reflection at a time: (I - U T U^T)(I - 2 u u^T) has the column -2 T U^T u beside T, and 2 below it."""
    product = np.zeros(shape)
    for column in range(len(x)):
        product[:column, column] = -2 * product[:column, :column] @ x[:column, column]
        product[column, column] = 2
    return product


def _scatter(x: Array, shape: Shape, at: Places) -> Array:
    made = np.zeros(math.prod(shape))
    for value, place in zip(x.flat, at.flat, strict=True):
        made[place] = value
    return made


def _gather(x: Array, shape: Shape, at: Places) -> Array:
    return np.array([x.flat[place] for place in at.flat])


def _roll(x: Array, shape: Shape) -> Array:
    rows, columns = shape
    matrix = np.broadcast_to(x, shape)  # a vector stands in every row
    return np.array([[matrix[r, (c - r) % columns] for c in range(columns)] for r in range(rows)])


def _pad(x: Array, shape: Shape) -> Array:
    made = np.zeros(math.prod(shape))
    start = (len(made) - len(x)) // 2
    made[start : start + len(x)] = x
    return made


def _wavelet(x: Array, shape: Shape, family: str) -> Array:
    """Each coefficient puts its filter two places further; the ends go, and half of what is too long at each side."""
    length = len(wavelet_filters(family)[0])
    made = np.zeros(2 * (x.shape[1] - 1) + length)
    for band, taps in zip(x, wavelet_filters(family), strict=True):
        for place, tap in itertools.product(range(len(band)), range(length)):
            made[2 * place + tap] += band[place] * taps[tap]
    whole = made[length - 2 : len(made) - (length - 2)]
    start = (len(whole) - shape[0]) // 2
    return whole[start : start + shape[0]]


_ROWS: dict[str, Callable[..., Array]] = {
    **_SCALARS,
    "topk_softmax": _topk_softmax,
    "unit": _unit,
    "norm": _norm,
    "qr": _qr,
    "antisymmetric": _antisymmetric,
    "skew": _skew,
    "cayley": _cayley,
    "neumann": _neumann,
    "reflections": _reflections,
    "scatter": _scatter,
    "gather": _gather,
    "roll": _roll,
    "pad": _pad,
    "wavelet": _wavelet,
}
