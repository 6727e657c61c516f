"""A path for networks too big for dynamic programming: greedy, then improved subtree by subtree.

Everything is deterministic: noise has fixed seeds, no order is taken from a set of strings, and what bounds the work
is a count, not a clock.
"""

from __future__ import annotations

import itertools
import math
import operator
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from opt_einsum.paths import DynamicProgramming, linear_to_ssa

from tnpeft.planning.last_step_cost import LARGEST

__all__ = ["Legs", "Search", "Tree", "heuristic_tree", "path_of_tree", "tree_of_path"]

Legs = frozenset[str]

Tree: TypeAlias = "int | tuple[Tree, Tree]"
"""The number of a core, or the contraction of two trees."""

# Subtrees of seven take dynamic programming 1-2 ms; larger ones found little more on chains, grids and cubic graphs.
SUBTREE_LEAVES = 7
IMPROVEMENT_ROUNDS = 6
# Tries without a better tree after which no more are made.
PATIENCE = 5
# Subtrees to plan again, of all tries together: eight tries of 40 cores need 1,900, one of 256 cores 1,300.
REPLANNED = 2000


def heuristic_tree(inputs: Sequence[Legs], output: Legs, sizes: Mapping[str, int], tries: int) -> Tree:
    """A contraction tree of `inputs`, cheap but not always the cheapest: the best of several greedy ones, improved."""
    search = Search(inputs, output, sizes)
    best, found_at = search.improved_until_best(search.greedy(None)), 0
    for number in range(1, tries):
        if number - found_at > PATIENCE or not search.left_to_do:
            break
        part = search.improved_until_best(search.greedy(random.Random(number)))
        if part.cost < best.cost:
            best, found_at = part, number
    return best.tree


def path_of_tree(tree: Tree, cores: int) -> list[tuple[int, int]]:
    """The tree's contractions, operands first, in single-assignment form: the first result has the number `cores`."""
    path: list[tuple[int, int]] = []

    def number(node: Tree) -> int:
        if isinstance(node, int):
            return node
        pair = (number(node[0]), number(node[1]))
        path.append(pair)
        return cores + len(path) - 1

    number(tree)
    return path


def tree_of_path(path: Sequence[Sequence[int]], parts: Sequence[Tree]) -> Tree:
    """The tree that a path in single-assignment form makes of `parts`."""
    trees = list(parts)
    for left, right in path:
        trees.append((trees[left], trees[right]))
    return trees[-1]


class Part(NamedTuple):
    """Cores (a bit mask) contracted to one tensor: its legs (a bit mask), how, and the multiplications that took."""

    cores: int
    legs: int
    tree: Tree
    cost: int = 0
    operands: tuple[Part, Part] | None = None


class Search:
    """One network; sets of cores and sets of legs are bit masks, which makes 256 cores of thousands of legs quick."""

    def __init__(self, inputs: Sequence[Legs], output: Legs, sizes: Mapping[str, int]) -> None:
        names = sorted(output.union(*inputs))
        bits = {name: 1 << place for place, name in enumerate(names)}
        self._output = sum(bits[leg] for leg in output)
        self._parts = [Part(1 << core, sum(bits[leg] for leg in legs), core) for core, legs in enumerate(inputs)]
        self._all_legs = (1 << len(names)) - 1
        self._holders = dict.fromkeys(bits.values(), 0)  # of each leg, the cores that have it
        for part, legs in zip(self._parts, inputs, strict=True):
            for leg in legs:
                self._holders[bits[leg]] |= part.cores
        self._powers = [*_powers([sizes[name] for name in names])]
        self._sizes: dict[int, int] = {}
        self.left_to_do = REPLANNED

    def _size(self, legs: int) -> int:
        size = self._sizes.get(legs)
        if size is None:
            size = 1
            for alike, powers in self._powers:
                size *= powers[(legs & alike).bit_count()]
            self._sizes[legs] = size
        return size

    def _joint_legs(self, left: Part, right: Part) -> int:
        """The legs of two parts contracted: those of the output and those that other cores have too."""
        cores, legs = left.cores | right.cores, left.legs | right.legs
        shared = left.legs & right.legs & ~self._output
        while shared:
            leg = shared & -shared
            shared ^= leg
            if not self._holders[leg] & ~cores:
                legs ^= leg
        return legs

    def _joined(self, left: Part, right: Part) -> Part:
        cost = left.cost + right.cost + self._size(left.legs | right.legs)
        legs = self._joint_legs(left, right)
        return Part(left.cores | right.cores, legs, (left.tree, right.tree), cost, (left, right))

    def greedy(self, noise: random.Random | None) -> Part:
        """Always contract the pair that frees the most memory; ties go to fewer operations, then to the first pair.

        With `noise`, which must be seeded, a pair that frees somewhat less may go first.
        """
        parts = dict(enumerate(self._parts))
        pairs = {(a, b): self._freed(parts[a], parts[b]) for b in parts for a in range(b)}
        for number in range(len(parts), 2 * len(parts) - 1):
            if noise is None:
                first, second = min(pairs, key=pairs.__getitem__)
            else:
                first, second = min(pairs, key=lambda pair: _with_noise(*pairs[pair], noise))
            del pairs[first, second]
            joined = self._joined(parts.pop(first), parts.pop(second))
            for other, part in parts.items():
                del pairs[min(first, other), max(first, other)], pairs[min(second, other), max(second, other)]
                pairs[other, number] = self._freed(part, joined)
            parts[number] = joined
        (whole,) = parts.values()
        return whole

    def _freed(self, left: Part, right: Part) -> tuple[int, int]:
        """By how much memory grows when two parts are contracted, and what that takes."""
        joint = self._size(self._joint_legs(left, right))
        return joint - self._size(left.legs) - self._size(right.legs), self._size(left.legs | right.legs)

    def improved_until_best(self, part: Part) -> Part:
        """The contraction improved until that saves no more, or for so many rounds."""
        for _ in range(IMPROVEMENT_ROUNDS):
            better = self.improved(part)
            if better.cost >= part.cost:
                break
            part = better
        return part

    def improved(self, part: Part) -> Part:
        """With each subtree of a few parts, from the root down, replanned where that saves operations."""
        if part.operands is None or not self.left_to_do or part.cost >= LARGEST:
            return part  # no machine would live to see the end of the last kind
        below = self._below(part)
        if len(below) > 2:
            again = self._replanned(below, part.legs, part.cost - sum(other.cost for other in below))
            part = again if again.cost < part.cost else part
        assert part.operands is not None  # several parts make a pair
        left, right = part.operands
        return self._joined(self.improved(left), self.improved(right))

    def _below(self, part: Part) -> list[Part]:
        """The subtree's largest parts: SUBTREE_LEAVES of them where it has as many leaves."""
        parts = [part]
        while len(parts) < SUBTREE_LEAVES:
            places = [place for place, other in enumerate(parts) if other.operands is not None]
            if not places:
                break
            largest = max(places, key=lambda place: self._size(parts[place].legs))
            parts[largest : largest + 1] = parts[largest].operands or ()
        return parts

    def _replanned(self, parts: list[Part], output: int, bound: int) -> Part:
        """The best contraction of `parts`, of which one that takes `bound` multiplications is known.

        Parallel legs go in as one: opt_einsum walks sets of legs, and a complete graph of 40 cores has hundreds.
        """
        self.left_to_do -= 1
        masks = [*(part.legs for part in parts), output]
        bundles = [self._all_legs]
        for mask in masks:
            bundles = [half for legs in bundles for half in (legs & mask, legs & ~mask) if half]
        bundles.sort(key=lambda legs: legs & -legs)
        names = [frozenset(str(number) for number, legs in enumerate(bundles) if legs & mask) for mask in masks]
        sizes = {str(number): self._size(legs) for number, legs in enumerate(bundles)}
        search = DynamicProgramming(minimize="flops", cost_cap=bound)
        tree = tree_of_path(linear_to_ssa(search(names[:-1], names[-1], sizes)), range(len(parts)))
        return self._made(tree, parts)

    def _made(self, tree: Tree, parts: Sequence[Part]) -> Part:
        if isinstance(tree, int):
            return parts[tree]
        return self._joined(self._made(tree[0], parts), self._made(tree[1], parts))


def _with_noise(freed: int, cost: int, noise: random.Random) -> tuple[float, int]:
    """Gumbel noise on a logarithmic scale, as opt_einsum's random greedy path has it."""
    size = abs(freed)
    scale = math.log1p(size) if size < LARGEST else math.log(size)
    return math.copysign(scale, (freed > 0) - (freed < 0)) - math.log(-math.log(noise.random() or 0.5)), cost


def _powers(sizes: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """The legs of each size, as a bit mask, and the size's powers."""
    for size in dict.fromkeys(sizes):
        alike = [place for place, other in enumerate(sizes) if other == size]
        mask = sum(1 << place for place in alike)
        yield mask, [*itertools.accumulate([1, *(size for _ in alike)], operator.mul)]
