"""The maps of derived cores, on tensors.

Each is `function(x, shape, **arguments)`: x is (layers, rest, *taken), with the sizes of the legs that the map takes,
the result (layers, rest, *made), with made = shape; `rest` is all other legs as one axis. Elementwise maps take no
legs. All can be differentiated twice, run under `torch.func` and on meta tensors, and stay in x's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tnpeft.errors import ExecutionError, Problem, clip
from tnpeft.program.autocast import without_autocast
from tnpeft.program.linear_maps import antisymmetric, flattened, gather, pad, roll, scatter, skew, wavelet
from tnpeft.spec.factorize import times
from tnpeft.spec.maps import RegisteredMap, registered_map, unregistered_map

__all__ = ["Map", "map_change", "map_function"]

Shape = tuple[int, ...]
Map = Callable[..., Tensor]


def map_function(name: str) -> Map:
    """The built-in or registered function of a map; raises ExecutionError for one that nobody has registered."""
    function = _BUILT_IN.get(name)
    if function is not None:
        return function
    registered = registered_map(name)
    if registered is None:
        raise ExecutionError(unregistered_map(name))
    return _checked(name, registered)


def map_change(name: str) -> Map | None:
    """How a map's result changes, as a function of its first input and that one's change; None: it has no formula."""
    return _CHANGES.get(name)


def _checked(name: str, registered: RegisteredMap) -> Map:
    """A user's function whose mistakes have a place."""

    def run(x: Tensor, shape: Shape, **arguments: Any) -> Tensor:
        wanted = (*x.shape[:2], *shape)
        expected = f"a {str(x.dtype).removeprefix('torch.')} tensor of {times(wanted)}"
        try:
            result = registered.function(x, **arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise _mistake(name, expected, clip(f"{type(error).__name__}: {error}")[1:-1]) from error
        if not isinstance(result, Tensor):
            raise _mistake(name, expected, clip(result))
        if result.shape != wanted or result.dtype != x.dtype:
            found = f"a {str(result.dtype).removeprefix('torch.')} one of {times(result.shape) or 'no axes'}"
            raise _mistake(name, expected, found)
        return result

    return run


def _mistake(name: str, expected: str, found: str) -> ExecutionError:
    fix = "Mend the function that `tnpeft.register_map` was given."
    return ExecutionError(Problem(f"map `{name}`", expected, found, fix))


def _elementwise(function: Callable[[Tensor], Tensor]) -> Map:
    return lambda x, shape: function(x)


def topk_softmax(x: Tensor, shape: Shape, k: float) -> Tensor:
    """Softmax over the k largest entries, the first of equal ones; the others are 0."""
    flat = flattened(x)
    places = flat.detach().sort(dim=-1, descending=True, stable=True).indices[..., : int(k)]
    weights = flat.gather(-1, places).softmax(-1)  # (layers, rest, k)
    return torch.zeros_like(flat).scatter(-1, places, weights).reshape(x.shape)


def unit(x: Tensor, shape: Shape, floor: float | None = None) -> Tensor:
    """v / max(norm, floor). Without a floor, zeros stay zeros and have no slope."""
    flat = flattened(x)
    return (flat * _inverse(_floored(_length(flat), floor))).reshape(x.shape)


def unit_change(first: Tensor, change: Tensor, shape: Shape, floor: float | None = None) -> Tensor:
    """How `unit` changes from `first` on, no two directions subtracted.

    dv / max(l, l0) - (the shorter of v0 and v) (l - l0) / (l l0), with l - l0 = dv (v0 + v) / (l0 + l)
    """
    start, step = flattened(first), flattened(change)
    now = start + step
    lengths = _length(start), _length(now)
    before, after = (_floored(length, floor) for length in lengths)
    grown = (step * (start + now)).sum(-1, keepdim=True) * _inverse(lengths[0] + lengths[1])
    if floor is not None:
        longer = torch.minimum(*lengths) >= max(floor, torch.finfo(first.dtype).tiny)
        grown = torch.where(longer, grown, after - before)
    gone = after == 0  # it has no direction left, and no slope
    shorter = torch.where(gone | (before <= after), start, now)
    turned = torch.where(gone, 1.0, grown * _inverse(after)) * _inverse(before)
    slope = torch.where(gone, 0.0, _inverse(torch.maximum(before, after)))
    return torch.addcmul(step * slope, shorter, -turned).reshape(first.shape)


def _floored(length: Tensor, floor: float | None) -> Tensor:
    return length if floor is None else length.clamp(min=max(floor, torch.finfo(length.dtype).tiny))


def _inverse(length: Tensor) -> Tensor:
    """1 / length, 0 for none, with no slope there."""
    return torch.where(length > 0, 1 / torch.where(length > 0, length, 1.0), 0.0)


def norm(x: Tensor, shape: Shape) -> Tensor:
    """The length over all legs taken; its slope at zeros is 0."""
    return _length(flattened(x)).squeeze(-1)


def _length(flat: Tensor) -> Tensor:
    """(layers, rest, entries) -> (layers, rest, 1). The square root is never taken of 0, where it has no slope."""
    squares = flat.square().sum(-1, keepdim=True)
    return torch.where(squares > 0, torch.where(squares > 0, squares, 1.0).sqrt(), 0.0)


def qr(x: Tensor, shape: Shape) -> Tensor:
    """The orthonormal columns of torch's QR; the last leg counts columns, the others rows."""
    columns: Tensor = torch.linalg.qr(x.reshape(*x.shape[:2], math.prod(x.shape[2:-1]), x.shape[-1])).Q
    return columns.reshape(x.shape)


def cayley(x: Tensor, shape: Shape) -> Tensor:
    """(I + Q)(I - Q)^-1, in which the two commute."""
    identity = _identity(x)
    try:
        turn: Tensor = torch.linalg.solve(identity - x, identity + x)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # torch's stubs leave it out
        fix = "Put `antisymmetric` or `skew` before it: I - Q can be inverted for every skew Q of finite numbers."
        raise ExecutionError(Problem("map `cayley`", "I - Q that can be inverted", "a singular one", fix)) from error
    return turn


def expm(x: Tensor, shape: Shape) -> Tensor:
    """The exponential of each matrix: orthogonal where it is skew."""
    with without_autocast(x):
        exponential: Tensor = torch.linalg.matrix_exp(x)
    return exponential


def neumann(x: Tensor, shape: Shape, terms: float) -> Tensor:
    """I + 2Q + ... + 2Q^(terms - 2) + Q^(terms - 1), by Horner's rule; it tends to `cayley`."""
    identity = _identity(x)
    if terms < 3:
        return identity + x
    with without_autocast(x):
        total = 2 * identity + x
        for _ in range(int(terms) - 3):
            total = 2 * identity + x @ total
        return identity + x @ total


def reflections(x: Tensor, shape: Shape) -> Tensor:
    """T = (diagonal / 2 + strict upper triangle)^-1 of u^T u: I - u T u^T is the product of reflections at u's columns.

    A column of no length reflects nothing, and has no slope: its square is taken to be 1. Slopes have fourth powers of
    lengths, which are too small for float32 long before lengths are.
    """
    squares = x.diagonal(dim1=-2, dim2=-1).double()
    halves = torch.where(squares >= torch.finfo(x.dtype).tiny, squares, 1.0) / 2
    triangle = x.triu(1) + halves.diag_embed()
    with without_autocast(x):
        product: Tensor = torch.linalg.solve_triangular(triangle, _identity(triangle), upper=True)
    return product.to(x.dtype)


def _identity(x: Tensor) -> Tensor:
    """Of x's last two axes, for all of its matrices."""
    return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand(x.shape)


_BUILT_IN: dict[str, Map] = {
    "tanh": _elementwise(torch.tanh),
    "sin": _elementwise(torch.sin),
    "gelu": _elementwise(F.gelu),
    "silu": _elementwise(F.silu),
    "relu": _elementwise(torch.relu),
    "cos": _elementwise(torch.cos),
    "exp": _elementwise(torch.exp),
    "sigmoid": _elementwise(torch.sigmoid),
    "topk_softmax": topk_softmax,
    "unit": unit,
    "norm": norm,
    "qr": qr,
    "antisymmetric": antisymmetric,
    "skew": skew,
    "cayley": cayley,
    "expm": expm,
    "neumann": neumann,
    "reflections": reflections,
    "scatter": scatter,
    "gather": gather,
    "roll": roll,
    "pad": pad,
    "wavelet": wavelet,
}

# Where it saves what the plain way takes: both values in float64, subtracted.
_CHANGES: dict[str, Map] = {"unit": unit_change}
