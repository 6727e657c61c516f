"""Products of derived cores: einsums over named legs, where one factor may be as large as the layer's weight.

`torch.einsum` copies such a factor to the order in which it multiplies. A product of two is made of views here where
strides allow it, the smaller factor first: rows of few columns (W U) take several times as long as few rows (U^T W^T),
in the product and in its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from opt_einsum import get_symbol
from torch import Tensor

__all__ = ["LAYERS", "Factor", "contract"]

# The axis of layers, a leg that no file can name.
LAYERS = "layers."

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
    inputs, output = (
        ("".join(map(letters.__getitem__, of)) for _, of in factors),
        "".join(map(letters.__getitem__, legs)),
    )
    product: Tensor = torch.einsum(f"{','.join(inputs)}->{output}", *(tensor for tensor, _ in factors))
    return product


def _is_matrix_product(first: Sequence[str], second: Sequence[str], legs: Sequence[str]) -> bool:
    """Whether every leg is summed and common, or in the result; something is summed, and no factor has a leg twice."""
    common, once = set(first) & set(second), len({*first}) == len(first) and len({*second}) == len(second)
    return once and bool(common - set(legs)) and (set(first) ^ set(second)) <= set(legs)


def _multiplied(smaller: Factor, larger: Factor, legs: Sequence[str]) -> Tensor:
    """(batch, rows, summed) times (batch, summed, columns): the smaller factor has the rows, the larger the columns."""
    (left, left_legs), (right, right_legs) = smaller, larger
    sizes = dict(zip((*left_legs, *right_legs), (*left.shape, *right.shape), strict=True))
    # As they lie in memory, so that the larger factor is a view.
    stored = [leg for _, leg in sorted(zip(right.stride(), right_legs, strict=True), key=lambda pair: -pair[0])]
    batch = [leg for leg in legs if leg in left_legs and leg in right_legs]
    rows = [leg for leg in left_legs if leg not in right_legs]
    columns = [leg for leg in stored if leg not in left_legs]
    summed = [leg for leg in stored if leg in left_legs and leg not in batch]

    def matrices(factor: Factor, *groups: Sequence[str]) -> Tensor:
        tensor, of = factor
        moved = tensor.permute([of.index(leg) for group in groups for leg in group])
        return moved.reshape([math.prod(sizes[leg] for leg in group) for group in groups])

    product = torch.bmm(matrices(smaller, batch, rows, summed), matrices(larger, batch, summed, columns))
    order = [*batch, *rows, *columns]
    return product.reshape([sizes[leg] for leg in order]).permute([order.index(leg) for leg in legs])
