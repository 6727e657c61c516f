"""Sums of products over labelled tensors, in float64 and in an order that is found once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import opt_einsum
import torch
from torch import Tensor

from tnpeft.planning.path import find_path

__all__ = ["Labels", "Operand", "contract"]

Labels = tuple[str, ...]
Operand = tuple[Tensor, Labels]


class _Step(NamedTuple):
    """One pairwise product: where its operands stand, and the labels of all three as small numbers."""

    left: int
    right: int
    first: tuple[int, ...]
    second: tuple[int, ...]
    result: tuple[int, ...]


def contract(operands: Sequence[Operand], output: Labels) -> Tensor:
    """One einsum over labelled operands, at least one, any number of which may share a label."""
    tensors, inputs = [tensor for tensor, _ in operands], tuple(labels for _, labels in operands)
    if len(tensors) == 1:
        axes = [inputs[0].index(label) for label in output]
        return tensors[0] if inputs[0] == output else torch.einsum(tensors[0], [*range(len(inputs[0]))], axes)
    sizes = {label: size for tensor, labels in operands for label, size in zip(labels, tensor.shape, strict=True)}
    for step in _steps(inputs, output, tuple(sizes.items())):
        right, left = tensors.pop(step.right), tensors.pop(step.left)
        tensors.append(torch.einsum(left, step.first, right, step.second, step.result))
    return tensors[0]


@lru_cache(maxsize=4096)
def _steps(inputs: tuple[Labels, ...], output: Labels, sizes: tuple[tuple[str, int], ...]) -> tuple[_Step, ...]:
    symbols = {label: opt_einsum.get_symbol(number) for number, (label, _) in enumerate(sizes)}
    words = tuple("".join(symbols[label] for label in labels) for labels in inputs)
    path = find_path(words, "".join(symbols[label] for label in output), tuple((symbols[a], b) for a, b in sizes))
    waiting = list(inputs)
    steps = []
    for left, right in path:
        second, first = waiting.pop(right), waiting.pop(left)
        needed = {*output, *(label for labels in waiting for label in labels)}
        both = dict.fromkeys((*first, *second))
        result = tuple(label for label in both if label in needed) if waiting else output
        numbers = {label: number for number, label in enumerate(both)}
        axes = (tuple(numbers[label] for label in labels) for labels in (first, second, result))
        steps.append(_Step(left, right, *axes))
        waiting.append(result)
    return tuple(steps)
