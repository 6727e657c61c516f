"""A path for networks too big for dynamic programming: greedy, then improved subtree by subtree.

Everything is deterministic: noise has fixed seeds, and no order is taken from a set of strings.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from opt_einsum.paths import DynamicProgramming, linear_to_ssa

__all__ = ["Legs", "Search", "Tree", "heuristic_tree", "path_of_tree", "tree_of_path"]

Legs = frozenset[str]

Tree: TypeAlias = "int | tuple[Tree, Tree]"
"""The number of a core, or the contraction of two trees."""

# Subtrees of seven take dynamic programming 1-2 ms; larger ones found little more on chains, grids and cubic graphs.
SUBTREE_LEAVES = 7
IMPROVEMENT_ROUNDS = 6
# Tries without a better tree after which no more are made.
PATIENCE = 5


def heuristic_tree(inputs: Sequence[Legs], output: Legs, sizes: Mapping[str, int], tries: int) -> Tree:
    """A contraction tree of `inputs`, cheap but not always the cheapest: the best of several greedy ones, improved."""
    search = Search(inputs, output, sizes)
    best, found_at = search.improved_until_best(search.greedy(None)), 0
    for number in range(1, tries):
        if number - found_at > PATIENCE:
            break
        tree = search.improved_until_best(search.greedy(random.Random(number)))
        if search.cost(tree) < search.cost(best):
            best, found_at = tree, number
    return best


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


class Search:
    """One network; sets of cores and sets of legs are bit masks, which makes 40 cores of 40 legs quick."""

    def __init__(self, inputs: Sequence[Legs], output: Legs, sizes: Mapping[str, int]) -> None:
        names = sorted(output.union(*inputs))
        self._names = names
        self._bits = {name: 1 << place for place, name in enumerate(names)}
        self._numbers = [sizes[name] for name in names]
        self._inputs = [self._mask(legs) for legs in inputs]
        self._output = self._mask(output)
        self._open: dict[int, int] = {}
        self._sizes: dict[int, int] = {}

    def _mask(self, legs: Legs) -> int:
        return sum(self._bits[leg] for leg in legs)

    def _size(self, legs: int) -> int:
        if legs not in self._sizes:
            size, rest = 1, legs
            while rest:
                lowest = rest & -rest
                size *= self._numbers[lowest.bit_length() - 1]
                rest ^= lowest
            self._sizes[legs] = size
        return self._sizes[legs]

    def _open_legs(self, cores: int) -> int:
        """The legs of the contracted `cores`: those of the output and those that other cores have too."""
        if cores not in self._open:
            inside, outside = 0, self._output
            for core, legs in enumerate(self._inputs):
                if cores >> core & 1:
                    inside |= legs
                else:
                    outside |= legs
            self._open[cores] = inside & outside
        return self._open[cores]

    def _tree_legs(self, tree: Tree) -> int:
        return self._open_legs(sum(1 << core for core in _leaves(tree)))

    def cost(self, tree: Tree) -> int:
        """Multiplications of the whole tree."""
        if isinstance(tree, int):
            return 0
        own = self._size(self._tree_legs(tree[0]) | self._tree_legs(tree[1]))
        return own + self.cost(tree[0]) + self.cost(tree[1])

    def greedy(self, noise: random.Random | None) -> Tree:
        """Always contract the pair that frees the most memory; ties go to fewer operations, then to the first pair.

        With `noise`, which must be seeded, a pair that frees somewhat less may go first.
        """
        parts: list[tuple[Tree, int]] = [(core, 1 << core) for core in range(len(self._inputs))]
        while len(parts) > 1:
            pairs = ((a, b) for b in range(len(parts)) for a in range(b))
            first, second = min(pairs, key=lambda pair: self._greedy_cost(parts[pair[0]][1], parts[pair[1]][1], noise))
            right, left = parts.pop(second), parts.pop(first)
            parts.append(((left[0], right[0]), left[1] | right[1]))
        return parts[0][0]

    def _greedy_cost(self, left: int, right: int, noise: random.Random | None) -> tuple[float, int]:
        a, b = self._open_legs(left), self._open_legs(right)
        cost: float = self._size(self._open_legs(left | right)) - self._size(a) - self._size(b)
        if noise is not None:
            # Gumbel noise on a logarithmic scale, as opt_einsum's random greedy path has it.
            cost = math.copysign(math.log1p(abs(cost)), cost) - math.log(-math.log(noise.random() or 0.5))
        return cost, self._size(a | b)

    def improved_until_best(self, tree: Tree) -> Tree:
        """The tree improved until that saves no more, or for so many rounds."""
        for _ in range(IMPROVEMENT_ROUNDS):
            better = self.improved(tree)
            if self.cost(better) >= self.cost(tree):
                break
            tree = better
        return tree

    def improved(self, tree: Tree) -> Tree:
        """The tree with each subtree of a few parts, from the root down, replanned where that saves operations."""
        if isinstance(tree, int):
            return tree
        parts = self._parts(tree)
        if len(parts) > 2:
            own = self.cost(tree) - sum(map(self.cost, parts))
            tree = min(tree, self._replanned(parts, self._tree_legs(tree), own), key=self.cost)
        assert not isinstance(tree, int)  # several parts make a pair
        left, right = tree
        return (self.improved(left), self.improved(right))

    def _parts(self, tree: Tree) -> list[Tree]:
        """The subtree's largest parts: SUBTREE_LEAVES of them where it has as many leaves."""
        parts = [tree]
        while len(parts) < SUBTREE_LEAVES:
            places = [place for place, part in enumerate(parts) if not isinstance(part, int)]
            if not places:
                break
            largest = max(places, key=lambda place: self._size(self._tree_legs(parts[place])))
            node = parts[largest]
            assert not isinstance(node, int)
            parts[largest : largest + 1] = node
        return parts

    def _replanned(self, parts: list[Tree], output: int, bound: int) -> Tree:
        """The best contraction of `parts`, of which one that takes `bound` multiplications is known.

        Parallel legs go in as one: opt_einsum walks sets of legs, and a complete graph of 40 cores has hundreds.
        """
        masks = [self._tree_legs(part) for part in parts]
        bundles: dict[tuple[bool, ...], int] = {}
        for bit in self._bits.values():
            where = tuple(bool(mask & bit) for mask in (*masks, output))
            bundles[where] = bundles.get(where, 0) | bit
        legs = [
            frozenset(str(mask) for where, mask in bundles.items() if where[place]) for place in range(len(masks) + 1)
        ]
        sizes = {str(mask): self._size(mask) for mask in bundles.values()}
        search = DynamicProgramming(minimize="flops", cost_cap=bound)
        return tree_of_path(linear_to_ssa(search(legs[:-1], legs[-1], sizes)), parts)


def _leaves(tree: Tree) -> Iterator[int]:
    if isinstance(tree, int):
        yield tree
    else:
        yield from _leaves(tree[0])
        yield from _leaves(tree[1])
