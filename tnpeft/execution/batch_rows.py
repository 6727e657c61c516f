"""Which adapter each row of a batch has; how a layer's rows are split by adapter and joined again."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Part", "Rows", "Split"]


class Part(NamedTuple):
    """The rows of one adapter (None: of the base alone) among those of a layer's input."""

    name: str | None
    start: int
    length: int
    numbers: Tensor | None  # None: `length` rows from `start` on

    def of(self, tensor: Tensor) -> Tensor:
        """These rows of a tensor; a view if they are consecutive."""
        if self.numbers is None:
            return tensor if self.length == tensor.shape[0] else tensor.narrow(0, self.start, self.length)
        return tensor.index_select(0, self.numbers)


class Split(NamedTuple):
    """All rows of a layer's input, in parts; `back` restores their order (None if it is unchanged)."""

    parts: tuple[Part, ...]
    back: Tensor | None

    def together(self, tensors: Sequence[Tensor]) -> Tensor:
        """The results of the parts as one tensor."""
        if len(tensors) == 1:
            return tensors[0]
        joined = torch.cat([*tensors])
        return joined if self.back is None else joined.index_select(0, self.back)


class Rows:
    """The adapter of each row of a batch: a name, or None for the base alone."""

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = tuple(names)
        self._splits: dict[tuple[tuple[str | None, ...], int, torch.device], Split] = {}

    def split(self, known: Collection[str], each: int, device: torch.device) -> Split:
        """Split the rows of a layer with the adapters `known`: `each` consecutive ones belong to a row of the batch."""
        names = tuple([name if name in known else None for name in self.names])
        if torch.compiler.is_compiling():  # a graph makes its own
            return _split(names, each, device)
        key = (names, each, device)
        if key not in self._splits:
            with torch.inference_mode(False):
                self._splits[key] = _split(names, each, device)
        return self._splits[key]


def _split(names: Sequence[str | None], each: int, device: torch.device) -> Split:
    parts: list[Part] = []
    order: list[int] = []
    for name in dict.fromkeys(names):
        rows = [row for row, has in enumerate(names) if has == name]
        own = [row * each + place for row in rows for place in range(each)]
        numbers = None if _follow_each_other(rows) else torch.tensor(own, device=device)
        parts.append(Part(name, rows[0] * each, len(own), numbers))
        order += own
    back = sorted(range(len(order)), key=order.__getitem__)
    return Split(tuple(parts), None if _follow_each_other(back) else torch.tensor(back, device=device))


def _follow_each_other(numbers: Sequence[int]) -> bool:
    return all(after - before == 1 for before, after in itertools.pairwise(numbers))
