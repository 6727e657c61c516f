"""Products of derived cores: einsums over named legs, where one factor may be as large as the layer's weight.

`torch.einsum` copies such a factor to the order in which it multiplies. A product of two is made of views here where
strides allow it, the smaller factor first: rows of few columns (W U) take several times as long as few rows (U^T W^T),
in the product and in its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from opt_einsum import get_symbol
from torch import Tensor

from tnpeft.errors import ExecutionError, Problem
from tnpeft.program.kernels import versions
from tnpeft.program.observers import needs_plain_ops

__all__ = ["LAYERS", "Factor", "contract", "contract_with_start"]

# Legs that no file can name: the axis of layers, and that of a start and a change.
LAYERS, PAIR = "layers.", "pair."

# Without gradients, a factor of so many rows at most and one of so many elements at least are multiplied in blocks of
# the larger one's rows as they lie, where these are long: the processor's library copies what has more rows into an
# order of its own first. 8 to 16 rows with a 256 x 6912 weight take 0.7 ms for 1.1, on one thread of an Intel Xeon.
FEW, LARGE, BLOCK = 32, 1 << 18, 16

Factor: TypeAlias = "tuple[Tensor, tuple[str, ...]]"
"""A tensor and its legs."""


def contract(factors: Sequence[Factor], legs: Sequence[str]) -> Tensor:
    """einsum: the factors, summed over the legs that are not in `legs`."""
    if len(factors) == 2:
        smaller, larger = sorted(factors, key=lambda factor: factor[0].numel())
        if _is_matrix_product(smaller[1], larger[1], legs):
            return _multiplied(smaller, larger, legs)
    every = dict.fromkeys(leg for _, of in factors for leg in of)
    letters = {leg: get_symbol(number) for number, leg in enumerate(every)}
    # Lists, for Dynamo hands no generator on.
    inputs = ["".join([letters[leg] for leg in of]) for _, of in factors]
    output = "".join([letters[leg] for leg in legs])
    product: Tensor = torch.einsum(f"{','.join(inputs)}->{output}", *[tensor for tensor, _ in factors])
    return product


def contract_with_start(
    constant: Factor, first: Tensor, now: Factor, changed: bool, legs: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """einsum(constant, first) and einsum(constant, now - first), for which the constant factor is read once.

    `first` has the legs of `now`, which alone has a gradient; with `changed` that is the difference already. Its graph
    may be walked back any number of times.
    """
    (fixed, fixed_legs), (moving, moving_legs) = constant, now
    arguments = fixed, first, moving, changed, fixed_legs, moving_legs, tuple(legs)
    both: tuple[Tensor, Tensor] = _WithStart.apply(*arguments)  # type: ignore[no-untyped-call]
    return both


class _WithStart(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        constant: Tensor,
        first: Tensor,
        now: Tensor,
        changed: bool,
        constant_legs: tuple[str, ...],
        change_legs: tuple[str, ...],
        legs: tuple[str, ...],
    ) -> tuple[Tensor, Tensor]:
        change = now if changed else now - first
        stored = _as_stored((change, change_legs))
        order = [change_legs.index(leg) for leg in stored]
        # After the legs that are summed, or before all where one of these lies last: a matrix as it lies.
        place = max((number + 1 for number, leg in enumerate(stored) if leg not in legs), default=0) % len(stored)
        both = torch.stack((first.permute(order), change.permute(order)), place)
        pair = both, (*stored[:place], PAIR, *stored[place:])
        start, moved = contract([(constant, constant_legs), pair], (PAIR, *legs)).unbind(0)
        ctx.constant, ctx.writes, ctx.legs = constant, versions([constant]), (constant_legs, change_legs, legs)
        ctx.mark_non_differentiable(start)
        return start, moved

    @staticmethod
    def backward(ctx: Any, _: Tensor | None, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if versions([ctx.constant]) != ctx.writes:
            raise ExecutionError(
                Problem(
                    "a base weight of which derived cores are made",
                    "its values of the forward pass",
                    "values that were written since",
                    "Write to base weights after the backward pass.",
                )
            )
        constant_legs, change_legs, legs = ctx.legs
        return None, None, contract([(ctx.constant, constant_legs), (gradient, legs)], change_legs), *[None] * 4


def _is_matrix_product(first: Sequence[str], second: Sequence[str], legs: Sequence[str]) -> bool:
    """Whether every leg is summed and common, or in the result; something is summed, and no factor has a leg twice."""
    common, once = set(first) & set(second), len({*first}) == len(first) and len({*second}) == len(second)
    return once and bool(common - set(legs)) and (set(first) ^ set(second)) <= set(legs)


def _as_stored(factor: Factor) -> list[str]:
    """The legs as they lie in memory, the slowest first."""
    tensor, legs = factor
    return [leg for _, leg in sorted(zip(tensor.stride(), legs, strict=True), key=lambda pair: -pair[0])]


def _multiplied(smaller: Factor, larger: Factor, legs: Sequence[str]) -> Tensor:
    """(batch, rows, summed) times (batch, summed, columns): the smaller factor has the rows, the larger the columns."""
    (left, left_legs), (right, right_legs) = smaller, larger
    sizes = dict(zip((*left_legs, *right_legs), (*left.shape, *right.shape), strict=True))
    stored = _as_stored(larger)  # so that the larger factor is a view
    batch = [leg for leg in legs if leg in left_legs and leg in right_legs]
    rows = [leg for leg in left_legs if leg not in right_legs]
    columns = [leg for leg in stored if leg not in left_legs]
    summed = [leg for leg in stored if leg in left_legs and leg not in batch]

    def matrices(factor: Factor, *groups: Sequence[str]) -> Tensor:
        tensor, of = factor
        moved = tensor.permute([of.index(leg) for group in groups for leg in group])
        return moved.reshape([math.prod([sizes[leg] for leg in group]) for group in groups])

    product = _product(matrices(smaller, batch, rows, summed), matrices(larger, batch, summed, columns))
    order = [*batch, *rows, *columns]
    return product.reshape([sizes[leg] for leg in order]).permute([order.index(leg) for leg in legs])


def _product(left: Tensor, right: Tensor) -> Tensor:
    """(batch, rows, summed) times (batch, summed, columns)."""
    few = left.shape[1] <= FEW and right.device.type == "cpu" and right.dtype in (torch.float32, torch.float64)
    if not few or torch.is_grad_enabled() or needs_plain_ops(left, right):
        return torch.bmm(left, right)
    _, summed, columns = right.shape
    by_sum = right.stride(2) == 1
    if right.numel() < LARGE or (summed > columns) == by_sum:
        return torch.bmm(left, right)
    if by_sum:
        blocks = zip(torch.split(left, BLOCK, 2), torch.split(right, BLOCK, 1), strict=True)
        total = torch.bmm(*next(blocks))
        for rows, block in blocks:
            total.baddbmm_(rows, block)
        return total
    turned = left.mT.contiguous()
    return torch.cat([torch.bmm(block, turned) for block in torch.split(right.mT, BLOCK, 1)], 1).mT
