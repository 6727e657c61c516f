"""Derived cores, computed a second time in float64: products by sums over indices, maps by their definition.

Values can be differentiated: each map has a derivative by definition or, if a user registered it, by differences. Sizes
bound the effect of rounding: for a map f at x, whose argument has the size m, the size is |f(x)| + |f'(x)| m.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tnpeft.network import Network
from tnpeft.network.derived import BoundMap, BoundReference
from tnpeft.program.maps import map_function
from tnpeft.spec.maps import registered_map
from tnpeft.verify.differences import slope_by_differences
from tnpeft.verify.oracle_linear import Matrix, matrix_of
from tnpeft.verify.oracle_maps import oracle_map, oracle_slope
from tnpeft.verify.oracle_sums import Legged, sum_out

__all__ = ["Definition", "Derived", "definition_of", "derive", "factors_of", "size_of"]

PROBES = 4  # random signs under which a derivative is measured
SMALL = 1e-3  # of a value: no argument counts as smaller
STEP = 2e-6  # of a size: as far as rounding to fp32 may go


@dataclass(frozen=True)
class Definition:
    """A map on rows, x of (rest, *taken): its value, and a gradient of the result taken to one of x."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    matrix: Matrix | None = None  # of a built-in linear map


def definition_of(each: BoundMap, taken: tuple[int, ...], at: Tensor | None) -> Definition:
    """The oracle of a built-in map; of a registered one its own function in float64, and differences of it."""
    arguments: dict[str, Any] = dict(each.arguments)
    if registered_map(each.name) is not None:
        function = partial(map_function(each.name), shape=each.shape, **arguments)

        def value(x: Tensor) -> Tensor:
            with torch.no_grad():
                return function(x.unsqueeze(0)).squeeze(0)

        return Definition(value, partial(slope_by_differences, value))
    if at is not None:
        arguments["at"] = at.numpy()
    if each.linear:
        matrix = matrix_of(each.name, taken, each.shape, **arguments)
        return Definition(
            lambda x: torch.from_numpy(matrix(_flat(x))).reshape(len(x), *each.shape),
            lambda x, upstream: torch.from_numpy(matrix.transposed(_flat(upstream))).reshape(x.shape),
            matrix,
        )
    first, slope = oracle_map(each.name), oracle_slope(each.name)
    return Definition(
        lambda x: torch.from_numpy(first(x.numpy(), each.shape, **arguments)),
        lambda x, upstream: torch.from_numpy(slope(x.numpy(), upstream.numpy(), each.shape, **arguments)),
    )


def _flat(x: Tensor) -> Any:
    return x.reshape(len(x), -1).numpy()


class _Value(torch.autograd.Function):
    """A map's value on rows; backward by its slope."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, definition: Definition) -> Tensor:
        ctx.x, ctx.definition = x.detach(), definition
        return definition.value(x.detach().contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.definition.slope(ctx.x, upstream.contiguous()), None


class _Size(torch.autograd.Function):
    """The size of a map's value, from the size of x and x itself; the gradient is the size of the slope's.

    Derivatives of maps that are not linear are measured under a few random signs. To the slope's size comes how much
    it changes where rounding may take x, over a kink too.
    """

    @staticmethod
    def forward(ctx: Any, size: Tensor, x: Tensor, definition: Definition) -> Tensor:
        x, size = x.detach().contiguous(), size.detach().contiguous()
        ctx.x, ctx.size, ctx.definition = x, size, definition
        if definition.matrix is not None:
            matrix = definition.matrix.absolute()
            return torch.from_numpy(matrix(_flat(size))).reshape(definition.value(x).shape)
        total = definition.value(x).abs()
        for before, after, _ in _steps(x, size):
            total += (definition.value(after) - definition.value(before)).abs() / (2 * STEP)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        x, definition, upstream = ctx.x, ctx.definition, upstream.contiguous()
        if definition.matrix is not None:
            matrix = definition.matrix.absolute()
            return torch.from_numpy(matrix.transposed(_flat(upstream))).reshape(x.shape), None, None
        total = torch.zeros_like(x)
        for before, after, generator in _steps(x, ctx.size):
            signed = upstream * _signs(upstream, generator)
            total += definition.slope(x, signed).abs()
            total += (definition.slope(after, signed) - definition.slope(before, signed)).abs() / (2 * STEP)
        return total + _cancelled(x, definition.value(x), upstream), None, None


def size_of(size: Tensor, x: Tensor, definition: Definition) -> Tensor:
    """The size of a map's value at x, whose own size is given."""
    bound: Tensor = _Size.apply(size, x, definition)  # type: ignore[no-untyped-call]
    return bound


def _cancelled(x: Tensor, value: Tensor, upstream: Tensor) -> Tensor:
    """How large numbers may be that a slope takes from one another, as for a direction, by the sizes of rows."""
    rows, values = x.reshape(len(x), -1), value.reshape(len(x), -1)
    length = torch.maximum(rows.norm(dim=1), SMALL * values.norm(dim=1)).clamp_min(1e-300)
    size = (values.abs() * upstream.reshape(len(x), -1)).sum(1) / length
    return size.reshape(-1, *[1] * (x.ndim - 1)).expand(x.shape)


def _steps(x: Tensor, size: Tensor) -> Iterator[tuple[Tensor, Tensor, torch.Generator]]:
    """Points on both sides of x, as far from it as rounding may go."""
    generator = torch.Generator().manual_seed(x.numel())
    for _ in range(PROBES):
        step = STEP * size * _signs(size, generator)
        yield x - step, x + step, generator


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return 2.0 * torch.randint(2, like.shape, generator=generator, dtype=torch.float64) - 1


@dataclass(frozen=True)
class Derived:
    """Every core by name, stored ones too, and what each map acts on, by its core and number."""

    cores: dict[str, Tensor]
    inputs: dict[tuple[str, int], Tensor] = field(default_factory=dict)


def derive(
    network: Network, stored: Mapping[str, Tensor], values: Derived | None = None, first: Derived | None = None
) -> Derived:
    """The derived cores of stored ones; of sizes, where `values` has what they are the sizes of.

    To the sizes come those of `first`: tensors on the way to a difference are a frozen copy's and the change added up.
    """
    made = Derived({name: core if core.dtype == torch.int64 else core.double() for name, core in stored.items()})
    for derived in network.derived:
        total: Tensor | None = None
        for summand in derived.summands:
            product = sum_out([_under(made.cores[each.core], each) for each in summand.references], derived.before)
            product = (summand.scale if values is None else abs(summand.scale)) * product
            total = product if total is None else total + product
        assert total is not None
        tensor, legs = total, derived.before
        for number, each in enumerate(derived.maps):
            rest = tuple(leg for leg in legs if leg not in each.takes)
            moved = _ordered(tensor, legs, (*rest, *each.takes))
            others, taken = moved.shape[: len(rest)], tuple(moved.shape[len(rest) :])
            rows = moved.reshape((math.prod(others), *taken))
            made.inputs[derived.name, number] = rows.detach()
            definition = definition_of(each, taken, None if each.at is None else made.cores[each.at])
            if values is None:
                rows = _Value.apply(rows, definition)  # type: ignore[no-untyped-call]
            else:
                rows = size_of(rows, values.inputs[derived.name, number], definition)
            tensor, legs = rows.reshape((*others, *each.shape)), (*rest, *each.gives)
        value = _ordered(tensor, legs, derived.legs)
        made.cores[derived.name] = value if first is None else value + first.cores[derived.name].detach()
    return made


def factors_of(network: Network, derived: Derived) -> dict[str, Legged]:
    """What the terms of a network name: cores under the legs of references."""
    return {factor.label: _under(derived.cores[factor.reference.core], factor.reference) for factor in network.factors}


def _under(core: Tensor, reference: BoundReference) -> Legged:
    return core.reshape(reference.shape), reference.legs


def _ordered(tensor: Tensor, legs: Sequence[str], order: Sequence[str]) -> Tensor:
    return tensor.permute([legs.index(leg) for leg in order])
