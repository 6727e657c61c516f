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


class _Program(NamedTuple):
    steps: tuple[_Step, ...]
    last: tuple[tuple[int, ...], tuple[int, ...]]  # of the one tensor that is left, and of the output


def contract(operands: Sequence[Operand], output: Labels) -> Tensor:
    """One einsum over labelled operands, at least one, any number of which may share a label."""
    sizes = {label: size for tensor, labels in operands for label, size in zip(labels, tensor.shape, strict=True)}
    program = _program(tuple(labels for _, labels in operands), output, tuple(sizes.items()))
    tensors = [tensor for tensor, _ in operands]
    for step in program.steps:
        right, left = tensors.pop(step.right), tensors.pop(step.left)
        tensors.append(torch.einsum(left, step.first, right, step.second, step.result))
    if program.last[0] == program.last[1]:
        return tensors[0]
    return torch.einsum(tensors[0], *program.last)


@lru_cache(maxsize=4096)
def _program(inputs: tuple[Labels, ...], output: Labels, sizes: tuple[tuple[str, int], ...]) -> _Program:
    symbols = {label: opt_einsum.get_symbol(number) for number, (label, _) in enumerate(sizes)}
    words = tuple("".join(symbols[label] for label in labels) for labels in inputs)
    path = find_path(words, "".join(symbols[label] for label in output), tuple((symbols[a], b) for a, b in sizes))
    waiting = list(inputs)
    steps = []
    for left, right in path:
        second, first = waiting.pop(right), waiting.pop(left)
        needed = {*output, *(label for labels in waiting for label in labels)}
        result = output if not waiting else tuple(x for x in dict.fromkeys((*first, *second)) if x in needed)
        numbers = {label: number for number, label in enumerate(dict.fromkeys((*first, *second)))}
        places = (tuple(numbers[label] for label in labels) for labels in (first, second, result))
        steps.append(_Step(left, right, *places))
        waiting.append(result)
    numbers = {label: number for number, label in enumerate(waiting[0])}
    last = (tuple(range(len(numbers))), tuple(numbers[label] for label in output))
    return _Program(tuple(steps), last)
