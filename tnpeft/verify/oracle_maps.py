"""What each built-in map must compute, computed a second time in float64 numpy from its definition, with its slope.

Each is `function(x, shape, **arguments)` as in `tnpeft.program.maps`, but for one layer: x is (rest, *taken), the
result (rest, *made), `at` has the index core's legs. A slope is the map's derivative, transposed:
`slope(x, upstream, shape, **arguments)` takes a gradient of the result to one of x.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnpeft.verify.oracle_linear import LINEAR, matrix_of

__all__ = ["oracle_map", "oracle_slope"]

Array = NDArray[np.float64]
Shape = tuple[int, ...]
Scalar = Callable[[float], float]


def oracle_map(name: str) -> Callable[..., Array]:
    """The definition of a built-in map; KeyError for others."""
    if name in LINEAR:

        def moved(x: Array, shape: Shape, **arguments: Any) -> Array:
            matrix = matrix_of(name, x.shape[1:], shape, **arguments)
            return matrix(np.asarray(x, np.float64).reshape(len(x), -1)).reshape(len(x), *shape)

        return moved
    if name in _SCALARS:
        return _entrywise(_SCALARS[name][0])
    row = _ROWS[name][0]

    def run(x: Array, shape: Shape, **arguments: Any) -> Array:
        rows = [row(np.asarray(values, dtype=np.float64), shape, **arguments) for values in x]
        return np.stack(rows).reshape(len(x), *shape)

    return run


def oracle_slope(name: str) -> Callable[..., Array]:
    """The transposed derivative of a built-in map; KeyError for others."""
    if name in LINEAR:

        def moved(x: Array, upstream: Array, shape: Shape, **arguments: Any) -> Array:
            matrix = matrix_of(name, x.shape[1:], shape, **arguments)
            return matrix.transposed(upstream.reshape(len(x), -1)).reshape(x.shape)

        return moved
    if name in _SCALARS:
        derivative = _entrywise(_SCALARS[name][1])
        return lambda x, upstream, shape: upstream * derivative(x, shape)
    row = _ROWS[name][1]

    def run(x: Array, upstream: Array, shape: Shape, **arguments: Any) -> Array:
        pairs = zip(x, upstream, strict=True)
        return np.stack([row(values, gradient, **arguments) for values, gradient in pairs]).reshape(x.shape)

    return run


def _entrywise(function: Scalar) -> Callable[..., Array]:
    each = np.frompyfunc(function, 1, 1)
    return lambda x, shape: np.asarray(each(np.asarray(x, np.float64)), np.float64)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _below(x: float) -> float:
    """The share of the normal distribution below x."""
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def _gelu_slope(x: float) -> float:
    return _below(x) + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _silu_slope(x: float) -> float:
    return _sigmoid(x) * (1 + x * (1 - _sigmoid(x)))


_SCALARS: dict[str, tuple[Scalar, Scalar]] = {
    "tanh": (math.tanh, lambda x: 1 - math.tanh(x) ** 2),
    "sin": (math.sin, math.cos),
    "gelu": (lambda x: x * _below(x), _gelu_slope),
    "silu": (lambda x: x * _sigmoid(x), _silu_slope),
    "relu": (lambda x: max(x, 0.0), lambda x: float(x > 0)),
    "cos": (math.cos, lambda x: -math.sin(x)),
    "exp": (_exp, _exp),
    "sigmoid": (_sigmoid, lambda x: _sigmoid(x) * _sigmoid(-x)),
}


def _topk_softmax(x: Array, shape: Shape, k: float) -> Array:
    flat = [float(value) for value in x.flat]
    chosen = sorted(range(len(flat)), key=lambda place: (-flat[place], place))[: int(k)]
    powers = {place: math.exp(flat[place] - flat[chosen[0]]) for place in chosen}
    return np.array([powers.get(place, 0.0) / sum(powers.values()) for place in range(len(flat))])


def _topk_softmax_slope(x: Array, upstream: Array, k: float) -> Array:
    shares = _topk_softmax(x, x.shape, k)
    return shares * (upstream.ravel() - shares @ upstream.ravel())


def _unit(x: Array, shape: Shape, floor: float = 0.0) -> Array:
    length = max(float(_norm(x, ())), floor)
    return x / length if length else x


def _unit_slope(x: Array, upstream: Array, floor: float = 0.0) -> Array:
    length = float(_norm(x, ()))
    if length <= floor:
        return upstream / floor if floor else np.zeros_like(x)
    return (upstream - x * (x.ravel() @ upstream.ravel()) / length**2) / length


def _norm(x: Array, shape: Shape) -> Array:
    return np.array(np.sqrt(np.square(x).sum()))


def _norm_slope(x: Array, upstream: Array) -> Array:
    length = float(_norm(x, ()))
    return x * upstream / length if length else np.zeros_like(x)


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
        scaled = 2 * below / (below @ below)
        triangle = triangle - np.outer(scaled, below @ triangle)
        product = product - np.outer(product @ scaled, below)
    return product[:, :columns]


def _qr_slope(x: Array, upstream: Array) -> Array:
    """dQ = (I - Q Q^T) dA R^-1 + Q S, with S skew and equal to Q^T dA R^-1 below its diagonal."""
    flat, gradient = x.reshape(-1, x.shape[-1]), upstream.reshape(-1, x.shape[-1])
    vectors = _qr(x, ()).reshape(flat.shape)
    inside = vectors.T @ gradient
    below = np.tril(inside - inside.T, -1)
    return (gradient - vectors @ inside + vectors @ below) @ np.linalg.inv(vectors.T @ flat).T


def _cayley(x: Array, shape: Shape) -> Array:
    return (np.eye(len(x)) + x) @ np.linalg.inv(np.eye(len(x)) - x)


def _cayley_slope(x: Array, upstream: Array) -> Array:
    """d = (I + C) dQ (I - Q)^-1."""
    return (np.eye(len(x)) + _cayley(x, ())).T @ upstream @ np.linalg.inv(np.eye(len(x)) - x).T


def _expm(x: Array, shape: Shape) -> Array:
    """Taylor's series of x / 2^n, small, squared n times."""
    halvings = max(0, math.ceil(math.log2(float(np.abs(x).sum(1).max(initial=0)) + 1e-300)) + 3)
    small, power = x / 2.0**halvings, np.eye(len(x))
    total = power
    for order in range(1, 19):
        power = power @ small / order
        total = total + power
    for _ in range(halvings):
        total = total @ total
    return total


def _expm_slope(x: Array, upstream: Array) -> Array:
    """The derivative stands in the upper right of the exponential of [[x, d], [0, x]]."""
    both = np.block([[x.T, upstream], [np.zeros(x.shape), x.T]])
    return _expm(both, ())[: len(x), len(x) :]


def _series(terms: float) -> list[int]:
    """The factors of the powers 0, 1, ... of Neumann's series."""
    return [1, *[2] * (int(terms) - 2), 1]


def _neumann(x: Array, shape: Shape, terms: float) -> Array:
    powers = enumerate(_series(terms))
    return sum((factor * np.linalg.matrix_power(x, power) for power, factor in powers), np.zeros(shape))


def _neumann_slope(x: Array, upstream: Array, terms: float) -> Array:
    """d(Q^p) = sum of Q^a dQ Q^(p - 1 - a)."""
    raised = [np.linalg.matrix_power(x.T, power) for power in range(int(terms))]
    pairs = ((power, first) for power in range(int(terms)) for first in range(power))
    parts = (_series(terms)[power] * raised[first] @ upstream @ raised[power - 1 - first] for power, first in pairs)
    return sum(parts, np.zeros_like(x))


def _reflections(x: Array, shape: Shape) -> Array:
    """One more reflection at a time: (I - U T U^T)(I - t u u^T) has the column -t T U^T u beside T, and t below it.

    t = 2 / |u|^2
    """
    product = np.zeros(x.shape)
    for column, square in enumerate(np.diagonal(x)):
        twice = 2 / square if square > 0 else 2
        product[:column, column] = -twice * product[:column, :column] @ x[:column, column]
        product[column, column] = twice
    return product


def _reflections_slope(x: Array, upstream: Array) -> Array:
    """dT = -T dU T, of half the diagonal where a column has a length, and of what is above it."""
    product = _reflections(x, ())
    slope = -product.T @ upstream @ product.T
    halves: Array = np.where(np.diagonal(x) > 0, np.diagonal(slope) / 2, 0)
    return np.triu(slope, 1) + np.diag(halves)


_ROWS: dict[str, tuple[Callable[..., Array], Callable[..., Array]]] = {
    "topk_softmax": (_topk_softmax, _topk_softmax_slope),
    "unit": (_unit, _unit_slope),
    "norm": (_norm, _norm_slope),
    "qr": (_qr, _qr_slope),
    "cayley": (_cayley, _cayley_slope),
    "expm": (_expm, _expm_slope),
    "neumann": (_neumann, _neumann_slope),
    "reflections": (_reflections, _reflections_slope),
}
