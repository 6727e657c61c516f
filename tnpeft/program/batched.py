"""Trees of cores contracted for several layers at once: with small cores, what counts is how many operations start.

The cores of all layers come as one flat list: the first core of every layer, then the second of every layer. One copy
puts them side by side, one more into the order of legs in which they are contracted; their changes from a frozen copy
are one subtraction, and their gradients are made as one tensor, of which each core gets its piece.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from opt_einsum import get_symbol
from torch import Tensor

from tnpeft.network import Network
from tnpeft.planning import Step
from tnpeft.program.chain_legs import GROUP
from tnpeft.program.kernels import kept
from tnpeft.program.leg_order import Instruction, lay_out_steps
from tnpeft.program.tree import run_changes, run_gradients, run_values

__all__ = ["BatchedTree", "Changed", "Start", "Tree"]

# Up to so many elements of all cores, one pick by number reorders them: 10 us for 18,000 elements, where stacking and
# permuting every core by itself takes 15 us a core (2-core EPYC). Numbers take memory.
NUMBERED = 1 << 17


@dataclass(frozen=True)
class Tree:
    """Cores that are contracted to one tensor: all that decides how, whatever the legs are called.

    `legs` are those of each core as it is stored, `result` those of what is made of them, one letter each. Cores come
    before results in the numbers of the steps. `scale` is multiplied into the core `scaled`.
    """

    legs: tuple[str, ...]
    sizes: tuple[tuple[str, int], ...]
    frozen: tuple[bool, ...]
    steps: tuple[Step, ...]
    result: str
    scale: float
    scaled: int

    @classmethod
    def of(
        cls, network: Network, cores: Sequence[int], steps: Sequence[Step], result: str, sizes: Mapping[str, int]
    ) -> Tree:
        """Some cores of a network of one term, by number, and the steps that contract them; `result` in its letters."""
        own = [network.symbols_of(network.cores[core]) for core in cores]
        letters = {letter: get_symbol(place) for place, letter in enumerate(dict.fromkeys("".join(own)))}
        legs = {leg: letters[letter] for leg, letter in network.symbols.items() if letter in letters}
        numbers = {core: place for place, core in enumerate(cores)}
        numbers |= {step.number: len(cores) + place for place, step in enumerate(steps)}
        smallest = min(range(len(network.cores)), key=lambda core: network.cores[core].numel)
        return cls(
            legs=tuple("".join(letters[letter] for letter in one) for one in own),
            sizes=tuple((new, sizes[letter]) for letter, new in letters.items()),
            frozen=tuple(network.cores[core].frozen for core in cores),
            steps=tuple(_renamed(step, numbers, legs) for step in steps),
            result="".join(letters[letter] for letter in result),
            scale=network.scale if smallest in cores else 1.0,
            scaled=list(cores).index(smallest) if smallest in cores else 0,
        )


def _renamed(step: Step, numbers: Mapping[int, int], legs: Mapping[str, str]) -> Step:
    left, right = (numbers[number] for number in step.operands)
    first, second, made = (tuple(legs[leg] for leg in side) for side in (step.left, step.right, step.output))
    return Step(numbers[step.number], (left, right), first, second, made, step.flops, step.elements)


class Start(NamedTuple):
    """What the changes need of the frozen copies: the stacked cores, as one where they are, and all tensors, scaled."""

    flat: Tensor | None
    cores: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]


class Changed(NamedTuple):
    """Every tensor of a tree, cores first, and its change since the frozen copy (None: no change)."""

    tensors: list[Tensor]
    changes: list[Tensor | None]


class BatchedTree:
    """A tree for `count` layers.

    The cores of several are put side by side, in the order of legs that suits best. One layer's are taken as they
    stand, unless a core is all that there is: what is kept of them for the backward pass is then no copy. Tables of
    numbers die with it.
    """

    def __init__(self, tree: Tree, count: int) -> None:
        self.tree, self.count = tree, count
        self.copied = count > 1
        self.size = len(tree.legs)
        self.number = self.size + len(tree.steps) - 1
        sizes = {**dict(tree.sizes), GROUP: count}
        self.instructions, orders = _laid_out(tree, count)
        self._orders: list[Order | None] = [_permutation(legs, orders[core]) for core, legs in enumerate(tree.legs)]
        self._shapes = [(count, *(sizes[letter] for letter in legs)) for legs in tree.legs]
        self._pieces = [math.prod(shape) for shape in self._shapes]
        self._plain = all(order is None for order in self._orders)
        self._numbered = self.copied and not self._plain and sum(self._pieces) <= NUMBERED
        self._numbers: dict[Hashable, Tensor] = {}

    def start(self, cores: Sequence[Tensor]) -> Start:
        """What the changes need of the frozen copies of all layers."""
        with torch.no_grad():
            flat, stacked = self._stacked(cores)
            constants = run_values(self.instructions, self._scaled(stacked), ())
            return Start(flat, tuple(stacked), tuple(constants))

    def values(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """Every tensor of the tree."""
        return run_values(self.instructions, self._scaled(self._stacked(cores)[1]), ())

    def changed(self, cores: Sequence[Tensor], start: Start, last: bool) -> Changed:
        """Every tensor and its change; the last one's value only if it is wanted."""
        flat, stacked = self._stacked(cores)
        changes: list[Tensor | None]
        if flat is not None and start.flat is not None:
            changes = [*(flat - start.flat).split_with_sizes(self._pieces)]
        else:
            changes = [core - first for core, first in zip(stacked, start.cores, strict=True)]
        for core, fixed in enumerate(self.tree.frozen):
            if fixed:
                changes[core] = None
        change = changes[self.tree.scaled]
        if self.tree.scale != 1.0 and change is not None:
            changes[self.tree.scaled] = change * self.tree.scale
        return Changed(*run_changes(self.instructions, self._scaled(stacked), changes, start.constants, last))

    def again(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """Every tensor but the last; those that are None are made anew. Cores are there."""
        cores = [tensor for tensor in tensors[: self.size] if tensor is not None]
        return run_values(self.instructions[:-1], cores, tensors[self.size :])

    def gradients(
        self, tensors: Sequence[Tensor], gradient: Tensor, cores: Sequence[Tensor], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """Those of the cores that need one, in the same order, from that of the result of all layers."""
        found: list[Tensor | None] = [None] * (self.number + 1)
        found[self.number] = gradient
        own = [not fixed and any(self._of(needed, core)) for core, fixed in enumerate(self.tree.frozen)]
        run_gradients(self.instructions, tensors, found, list(own))
        scaled = found[self.tree.scaled]
        if self.tree.scale != 1.0 and scaled is not None:
            found[self.tree.scaled] = scaled * self.tree.scale
        made = iter(self._pieces_of(found, cores, own))
        return [next(made) if own[place // self.count] else None for place in range(len(cores))]

    def _of(self, values: Sequence[bool], core: int) -> Sequence[bool]:
        return values[core * self.count : (core + 1) * self.count]

    def _stacked(self, cores: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
        """Each core for all layers, in the order in which it is contracted; as one tensor, if they are made as one."""
        if not self.copied:
            ordered = zip(cores, self._orders, strict=True)
            return None, [(core if order is None else core.permute(order)).contiguous() for core, order in ordered]
        flat = torch._C._nn.flatten_dense_tensors(list(cores))
        if self._numbered:
            flat = flat.index_select(0, self._numbers_on(flat.device, range(self.size), back=False))
        pieces = [*flat.split_with_sizes(self._pieces)]
        if self._numbered or self._plain:
            return flat, pieces
        return None, [
            piece if order is None else _moved(piece.view(shape), order)
            for piece, shape, order in zip(pieces, self._shapes, self._orders, strict=True)
        ]

    def _scaled(self, stacked: list[Tensor]) -> list[Tensor]:
        if self.tree.scale == 1.0:
            return stacked
        scaled = list(stacked)
        scaled[self.tree.scaled] = stacked[self.tree.scaled] * self.tree.scale
        return scaled

    def _pieces_of(
        self, found: Sequence[Tensor | None], cores: Sequence[Tensor], own: Sequence[bool]
    ) -> Sequence[Tensor]:
        """Each layer's own, in the cores' orders of legs, of the gradients of stacked cores that there are."""
        wanted = [core for core in range(self.size) if own[core]]
        made = []
        for core in wanted:
            one, order = found[core], self._orders[core]
            assert one is not None
            if order is not None and not self._numbered:
                one = _moved(one.reshape(_permuted(self._shapes[core], order)), _inverse(order))
            made.append(one)
        if not self.copied:
            return [one.reshape(cores[core].shape) for one, core in zip(made, wanted, strict=True)]
        flat = torch.cat([one.reshape(-1) for one in made]) if len(made) > 1 else made[0].reshape(-1)
        if self._numbered:
            flat = flat.index_select(0, self._numbers_on(flat.device, wanted, back=True))
        like = [core for place, core in enumerate(cores) if own[place // self.count]]
        pieces: Sequence[Tensor] = torch._C._nn.unflatten_dense_tensors(flat, like)
        return pieces

    def _numbers_on(self, device: torch.device, cores: Sequence[int], back: bool) -> Tensor:
        """For every element of some cores in a row, the place that it is taken from; `back`: to the stored order."""
        key = (device, tuple(cores), back)
        return kept(self._numbers, key, lambda: self._found_numbers(cores, back).to(device))

    def _found_numbers(self, cores: Sequence[int], back: bool) -> Tensor:
        found, first = [], 0
        for core in cores:
            shape, order = self._shapes[core], self._orders[core]
            own = torch.arange(first, first + self._pieces[core], dtype=torch.int32)
            if order is not None:
                seen = own.view(_permuted(shape, order) if back else shape)
                own = _moved(seen, _inverse(order) if back else order).reshape(-1)
            found.append(own)
            first += self._pieces[core]
        return torch.cat(found)


@lru_cache(maxsize=4096)
def _laid_out(tree: Tree, count: int) -> tuple[tuple[Instruction, ...], Mapping[int, str]]:
    """The tree's instructions for so many layers, and the order of legs of each core: what takes long, cached."""
    given = {len(tree.legs) + len(tree.steps) - 1: tree.result}
    if count == 1 and tree.steps:
        given |= dict(enumerate(tree.legs))
    letters = {letter: letter for letter, _ in tree.sizes}
    sizes = {**dict(tree.sizes), GROUP: count}
    return lay_out_steps(tree.steps, given, letters, sizes, GROUP if count > 1 else "")


Order = tuple[int, ...]


def _permutation(legs: str, order: str) -> Order | None:
    """The axes of a core stored as `legs`, in another order; None where that is its own."""
    return None if legs == order else tuple(legs.index(letter) for letter in order)


def _inverse(order: Order) -> Order:
    return tuple(order.index(axis) for axis in range(len(order)))


def _permuted(shape: Sequence[int], order: Order) -> tuple[int, ...]:
    return (shape[0], *(shape[1 + axis] for axis in order))


def _moved(tensor: Tensor, order: Order) -> Tensor:
    """With the axes after the first in another order, contiguous."""
    return tensor.permute(0, *(1 + axis for axis in order)).contiguous()
