"""Contraction trees, evaluated for several layers at once: with small cores, launching operations is the cost.

Cores come as one flat list, the first core of every layer, then the second of every layer. `stack` concatenates them to
one vector and brings each core to (layers, legs in the order of contraction). The changes since the frozen copies are
one subtraction of two such vectors, and the gradients of all cores are one vector that is split.

With A = A0 + dA for every tensor, d(A B) = dA B0 + A dB: the difference of two networks close to each other is made
of differences all the way, never by subtraction of large values. The A0 are constants. The VJP is that of the plain
network, for d(T - T0)/d(cores) = dT/d(cores).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from opt_einsum import get_symbol
from torch import Tensor

from tnpeft.network import Network
from tnpeft.planning import Step
from tnpeft.program.kernels import contract, contract_difference, kept, reorder, specialised
from tnpeft.schedule.chain_legs import GROUP
from tnpeft.schedule.leg_order import Instruction, lay_out_steps

__all__ = ["BatchedTree", "Changed", "Start", "Tree", "together"]

# Up to so many elements of all cores, one pick by number reorders them: 10 us for 18,000 elements, where stacking and
# permuting every core by itself takes 15 us a core (2-core EPYC). Numbers take memory.
NUMBERED = 1 << 17


@dataclass(frozen=True)
class Tree:
    """The contraction of some cores to one tensor: result[legs] = scale * einsum(cores).

    Letters are counted anew, so that trees of equal shape are equal, whatever their legs are called.
    """

    legs: tuple[str, ...]  # of each core, as it is stored
    sizes: tuple[tuple[str, int], ...]  # by letter
    frozen: tuple[bool, ...]  # for each core
    changes: tuple[bool, ...]  # for each core: it is given as its change since the start
    steps: tuple[Step, ...]  # tensors by number: cores first, then results
    result: str  # its legs
    scale: float
    scaled: int  # the core into which the scale is multiplied

    @classmethod
    def of(
        cls, network: Network, cores: Sequence[int], steps: Sequence[Step], result: str, sizes: Mapping[str, int]
    ) -> Tree:
        """Some cores of a network of one term, by number, and the steps that contract them; `result` in its letters."""
        core_legs = [network.symbols_of(network.cores[core]) for core in cores]
        letters = {letter: get_symbol(place) for place, letter in enumerate(dict.fromkeys("".join(core_legs)))}
        legs = {leg: letters[letter] for leg, letter in network.symbols.items() if letter in letters}
        numbers = {core: place for place, core in enumerate(cores)}
        numbers |= {step.number: len(cores) + place for place, step in enumerate(steps)}
        # Of those with legs: the tangent of a number times a number of no axes is fp64 in `torch.func.jvp`.
        smallest = min(
            range(len(network.cores)), key=lambda core: (not network.cores[core].legs, network.cores[core].numel)
        )
        return cls(
            legs=tuple("".join(letters[letter] for letter in legs_of_core) for legs_of_core in core_legs),
            sizes=tuple((new, sizes[letter]) for letter, new in letters.items()),
            frozen=tuple(network.cores[core].frozen for core in cores),
            changes=tuple(network.cores[core].changes for core in cores),
            steps=tuple(_renamed(step, numbers, legs) for step in steps),
            result="".join(letters[letter] for letter in result),
            scale=network.scale if smallest in cores else 1.0,
            scaled=list(cores).index(smallest) if smallest in cores else 0,
        )


def _renamed(step: Step, numbers: Mapping[int, int], legs: Mapping[str, str]) -> Step:
    left, right = (numbers[number] for number in step.operands)
    first, second, output = (tuple(legs[leg] for leg in side) for side in (step.left, step.right, step.output))
    return Step(numbers[step.number], (left, right), first, second, output, step.flops, step.elements)


class Start(NamedTuple):
    """What the changes need of the frozen copies."""

    flat: Tensor | None  # all stacked copies as one vector; None where they are not one, or a core is given as a change
    cores: tuple[Tensor, ...]  # each (layers, legs)
    constants: tuple[Tensor, ...]  # the tensors of the tree, scaled


class Changed(NamedTuple):
    """A tree's value and its change since the frozen copy, as a JVP carries both."""

    tensors: list[Tensor]  # cores first, then results
    changes: list[Tensor | None]  # of each; None: zero


class BatchedTree:
    """A tree for `count` layers.

    The cores of several layers are copied, to the order of legs that suits best. Those of one layer are used as they
    are stored, so that nothing is copied for the backward pass, unless the tree is one core. Index tables die with it.
    `plain`: differentiable operations alone, which autograd records one by one, or somebody looks on.
    """

    def __init__(self, tree: Tree, count: int) -> None:
        self.tree, self.count = tree, count
        self.copied = count > 1
        self.size = len(tree.legs)
        sizes = {**dict(tree.sizes), GROUP: count}
        self.instructions, orders = _laid_out(tree, count)
        self._orders: list[Order | None] = [_permutation(legs, orders[core]) for core, legs in enumerate(tree.legs)]
        self._shapes = [(count, *(sizes[letter] for letter in legs)) for legs in tree.legs]
        self._pieces = [math.prod(shape) for shape in self._shapes]
        self._plain = all(order is None for order in self._orders)
        self._numbered = self.copied and not self._plain and sum(self._pieces) <= NUMBERED
        self._numbers: dict[Hashable, Tensor] = {}
        self._given = any(tree.changes)  # some cores are given as changes since the start

    @cached_property
    def _products(self) -> list[Callable[[Tensor, Tensor], Tensor]]:
        """Each instruction as a function of its operands, where it need not be plain."""
        return [specialised(step.forward) for step in self.instructions]

    def start(self, cores: Sequence[Tensor], last: bool, plain: bool) -> Start:
        """What the changes need of the frozen copies of all layers; their result only with `last`."""
        flat, stacked = self.stack(cores)
        return Start(
            None if self._given else flat, tuple(stacked), tuple(self.run(self._scaled(stacked), (), last, plain))
        )

    def scaled(self, cores: Sequence[Tensor], start: Start | None = None) -> list[Tensor]:
        """Each core as (layers, legs in the order of contraction), with the tree's scale in one of them."""
        stacked = self.stack(cores)[1]
        return self._scaled(stacked if start is None or not self._given else self._values(stacked, start))

    def _values(self, stacked: list[Tensor], start: Start) -> list[Tensor]:
        """The cores themselves, where some are given as changes since the start."""
        both = zip(stacked, start.cores, self.tree.changes, strict=True)
        return [first + core if changes else core for core, first, changes in both]

    def run(self, cores: Sequence[Tensor], known: Sequence[Tensor | None], last: bool, plain: bool) -> list[Tensor]:
        """The cores, as `scaled` has them, and every result; those `known` are not computed, the last only if asked."""
        tensors = list(cores)
        for place, step in enumerate(self.instructions if last else self.instructions[:-1]):
            result = known[place] if known else None
            if result is None:
                left, right = tensors[step.left], tensors[step.right]
                result = contract(step.forward, left, right, True) if plain else self._products[place](left, right)
            tensors.append(result)
        return tensors

    def changed(self, cores: Sequence[Tensor], start: Start, last: bool, plain: bool) -> Changed:
        """The JVP of the tree along cores - start; the value of the result only with `last`."""
        flat, stacked = self.stack(cores)
        changes: list[Tensor | None]
        if flat is not None and start.flat is not None:
            changes = [*(flat - start.flat).split_with_sizes(self._pieces)]
            for core, fixed in enumerate(self.tree.frozen):
                if fixed:
                    changes[core] = None
        else:
            given = zip(stacked, start.cores, self.tree.frozen, self.tree.changes, strict=True)
            changes = [None if fixed else core if change else core - first for core, first, fixed, change in given]
        change = changes[self.tree.scaled]
        if self.tree.scale != 1.0 and change is not None:
            changes[self.tree.scaled] = change * self.tree.scale
        values = self._values(stacked, start) if self._given else stacked
        tensors, constants = list(self._scaled(values)), start.constants
        for step in self.instructions:
            left, right = step.left, step.right
            whole, first = (tensors[left], changes[left]), (constants[right], changes[right])
            change = contract_difference(step.forward, whole, first, plain)
            changes.append(change)
            if last or step is not self.instructions[-1]:
                constant = constants[step.number]
                tensors.append(constant if change is None else constant + change)
        return Changed(tensors, changes)

    def change(self, cores: Sequence[Tensor], start: Start, plain: bool) -> tuple[Tensor, list[Tensor]]:
        """The change of the result, and the value of every tensor but that."""
        tensors, changes = self.changed(cores, start, False, plain)
        change = changes[-1]
        if change is None:  # every core is frozen
            sizes = dict(self.tree.sizes)
            change = cores[0].new_zeros(self.count, *(sizes[letter] for letter in self.tree.result))
        elif not self.instructions and self.tree.changes[0]:
            change = change.clone()  # never the core itself: the next term is added in place
        return change, tensors

    def gradients(
        self, tensors: Sequence[Tensor], gradient: Tensor, cores: Sequence[Tensor], needed: Sequence[bool], plain: bool
    ) -> list[Tensor | None]:
        """The VJP: gradients of the cores that need one, from `gradient` of the result (layers, legs); else None.

        `cores` as they are stored. Plain operations where autograd looks on, and so differentiable again.
        """
        grads: list[Tensor | None] = [None] * (self.size + len(self.instructions))
        grads[-1] = gradient
        count = self.count
        trained = [any(needed[core * count : (core + 1) * count]) for core in range(self.size)] if count > 1 else needed
        wanted = list(trained)
        for step in self.instructions:
            wanted.append(wanted[step.left] or wanted[step.right])
        for step in reversed(self.instructions):
            grad = grads[step.number]
            if grad is None:
                continue
            if step.back is not None:
                grad = reorder(grad, step.back, plain)
            if wanted[step.left]:
                grads[step.left] = contract(step.to_left, grad, tensors[step.right], plain)
            if wanted[step.right]:
                grads[step.right] = contract(step.to_right, grad, tensors[step.left], plain)
        scaled = grads[self.tree.scaled]
        if self.tree.scale != 1.0 and scaled is not None:
            grads[self.tree.scaled] = scaled * self.tree.scale
        if not self.copied:
            return self._stored(grads, cores, trained)
        pieces = iter(self._split(grads, cores, trained))
        return [next(pieces) if trained[place // count] else None for place in range(len(cores))]

    def stack(self, cores: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
        """Each core as (layers, legs in the order of contraction); before that all as one vector, if they are one."""
        if not self.copied:
            stacked = []
            for core, order in zip(cores, self._orders, strict=True):
                stacked.append((core if order is None else core.permute(order)).contiguous())
            return None, stacked
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

    def _stored(
        self, grads: Sequence[Tensor | None], cores: Sequence[Tensor], trained: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradients of one layer's cores as these are stored."""
        stored: list[Tensor | None] = []
        for core, shape, order, grad, wanted in zip(cores, self._shapes, self._orders, grads, trained, strict=False):
            if grad is None or not wanted:
                stored.append(None)
                continue
            if order is not None:
                grad = _moved(grad.reshape(_permuted(shape, order)), _inverse(order))
            stored.append(grad.reshape(core.shape))
        return stored

    def _split(
        self, grads: Sequence[Tensor | None], cores: Sequence[Tensor], trained: Sequence[bool]
    ) -> Sequence[Tensor]:
        """The gradients of stacked cores (layers, legs) as one tensor for each core of each layer, in stored order."""
        wanted = [core for core in range(self.size) if trained[core]]
        stacked = []
        for core in wanted:
            grad, order = grads[core], self._orders[core]
            assert grad is not None
            if order is not None and not self._numbered:
                grad = _moved(grad.reshape(_permuted(self._shapes[core], order)), _inverse(order))
            stacked.append(grad)
        flat = torch.cat([grad.reshape(-1) for grad in stacked]) if len(stacked) > 1 else stacked[0].reshape(-1)
        if self._numbered:
            flat = flat.index_select(0, self._numbers_on(flat.device, wanted, back=True))
        like = [core for place, core in enumerate(cores) if trained[place // self.count]]
        pieces: Sequence[Tensor] = torch._C._nn.unflatten_dense_tensors(flat, like)
        return pieces

    def _numbers_on(self, device: torch.device, cores: Sequence[int], back: bool) -> Tensor:
        """(elements,): where each element of some concatenated cores comes from; `back`: to the stored order."""
        key = (device, tuple(cores), back)
        return kept(self._numbers, key, lambda: self._positions(cores, back).to(device))

    def _positions(self, cores: Sequence[int], back: bool) -> Tensor:
        positions, first = [], 0
        for core in cores:
            shape, order = self._shapes[core], self._orders[core]
            of_core = torch.arange(first, first + self._pieces[core], dtype=torch.int32)
            if order is not None:
                stored = of_core.view(_permuted(shape, order) if back else shape)
                of_core = _moved(stored, _inverse(order) if back else order).reshape(-1)
            positions.append(of_core)
            first += self._pieces[core]
        return torch.cat(positions)


@lru_cache(maxsize=4096)
def _laid_out(tree: Tree, count: int) -> tuple[tuple[Instruction, ...], Mapping[int, str]]:
    """The tree's instructions for so many layers, and the order of legs of each core: what takes long, cached."""
    given = {len(tree.legs) + len(tree.steps) - 1: tree.result}
    if count == 1 and tree.steps:
        given |= dict(enumerate(tree.legs))
    sizes = {**dict(tree.sizes), GROUP: count}
    return lay_out_steps(tree.steps, given, sizes, GROUP if count > 1 else "")


def together(gradients: Sequence[Tensor | None]) -> Tensor:
    """Those of all layers as one; zero where there is none."""
    known = [gradient for gradient in gradients if gradient is not None]
    if len(gradients) == 1:
        return known[0].contiguous()
    zero = torch.zeros_like(known[0]) if len(known) < len(gradients) else known[0]
    return torch.stack([zero if gradient is None else gradient for gradient in gradients])


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
