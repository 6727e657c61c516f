"""Sums of products over labelled tensors, in a contraction order that is found once and cached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import opt_einsum
from torch import Tensor

from tnpeft.planning.path import find_path

__all__ = ["Labels", "Operand", "contract"]

Labels = tuple[str, ...]
Operand = tuple[Tensor, Labels]


def contract(operands: Sequence[Operand], output: Labels) -> Tensor:
    """One einsum over labelled operands, at least one, any number of which may share a label."""
    inputs = tuple(labels for _, labels in operands)
    shapes = tuple(tuple(tensor.shape) for tensor, _ in operands)
    return _expression(inputs, output, shapes)(*(tensor for tensor, _ in operands))


@lru_cache(maxsize=4096)
def _expression(
    inputs: tuple[Labels, ...], output: Labels, shapes: tuple[tuple[int, ...], ...]
) -> Callable[..., Tensor]:
    sizes: dict[str, int] = {}
    for labels, shape in zip(inputs, shapes, strict=True):
        sizes |= zip(labels, shape, strict=True)
    symbols = {label: opt_einsum.get_symbol(number) for number, label in enumerate(sizes)}
    words = tuple("".join(symbols[label] for label in labels) for labels in (*inputs, output))
    path = find_path(words[:-1], words[-1], tuple((symbols[label], size) for label, size in sizes.items()))
    equation = f"{','.join(words[:-1])}->{words[-1]}"
    expression: Callable[..., Tensor] = opt_einsum.contract_expression(equation, *shapes, optimize=path or ((0,),))
    return expression
