"""The order of contraction: dynamic programming (opt_einsum) where it is quick, cotengra's search elsewhere.

Paths are deterministic, in every process: an adapter file reproduces its bits only if the same products are summed in
the same order. opt_einsum's own heuristics draw from a random state or walk sets of strings, whose order changes with
PYTHONHASHSEED.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import lru_cache

from opt_einsum.paths import DynamicProgramming, linear_to_ssa, ssa_to_linear

from tnpeft.planning.bitsets import connected_sets
from tnpeft.planning.heuristic import Legs, Tree, heuristic_tree, path_of_tree, tree_of_path
from tnpeft.planning.last_step_cost import cost_of_paths

__all__ = ["Path", "find_path"]

Path = tuple[tuple[int, int], ...]
"""Pairs of positions in opt_einsum's linear format: both operands leave the list, the result joins its end."""

# Dynamic programming compares every two connected subsets of cores; the paper's ten cores have 307 and 373 and take
# 13 and 15 ms, a complete graph of ten has 1,013 and takes 150 ms (2-core Xeon). 40-core cubic graphs have millions.
SUBSETS_BOUND = 500
# Up to here all subsets are few, and outer products and products along kept indices are searched too.
OUTER_BOUND = 6
# Searches from other greedy paths, fewer where there are many legs: 40 cores of a cubic graph take 0.25 s.
TRIES = 8
TRIES_TIMES_LEGS = 1000


@lru_cache(maxsize=1024)
def find_path(inputs: tuple[str, ...], output: str, sizes: tuple[tuple[str, int], ...]) -> Path:
    """The path of fewest multiplications found, or one with up to `last_step_cost.SLACK` more for a quicker last step.

    `inputs` has a string of index letters for each core, `output` those of the weight in memory order.
    """
    legs, kept, size = [frozenset(term) for term in inputs], frozenset(output), dict(sizes)
    if len(legs) == 1:
        return ()
    joined = _neighbours(legs, kept)
    quick = _is_connected(joined) and count_connected_subsets(joined, SUBSETS_BOUND) <= SUBSETS_BOUND
    if quick or len(legs) <= OUTER_BOUND:
        tree = _programmed_tree(legs, output, size)
    else:
        # Also for parts that no sum joins: dynamic programming would not plan their product.
        tries = max(1, min(TRIES, TRIES_TIMES_LEGS // max(1, sum(map(len, legs)))))
        tree = heuristic_tree(legs, kept, size, tries)
    return tuple((min(pair), max(pair)) for pair in ssa_to_linear(path_of_tree(tree, len(legs))))


def _neighbours(inputs: Sequence[Legs], output: Legs) -> list[int]:
    """For each core the bit mask of those that share an index with it that is summed."""
    summed = [legs - output for legs in inputs]
    return [
        sum(1 << other for other, more in enumerate(summed) if other != core and more & legs)
        for core, legs in enumerate(summed)
    ]


def _is_connected(neighbours: Sequence[int]) -> bool:
    reached, border = 1, neighbours[0]
    while border & ~reached:
        core = (border & ~reached).bit_length() - 1
        reached |= 1 << core
        border |= neighbours[core]
    return reached == (1 << len(neighbours)) - 1


def count_connected_subsets(neighbours: Sequence[int], bound: int) -> int:
    """The number of connected subsets of two or more cores, counted up to `bound` + 1."""
    cores = len(neighbours)
    subsets = itertools.islice(connected_sets(neighbours, cores), bound + 1 + cores)  # each core is one by itself
    return min(bound + 1, len([subset for subset in subsets if subset & (subset - 1)]))


def _programmed_tree(inputs: Sequence[Legs], output: str, sizes: Mapping[str, int]) -> Tree:
    cost = cost_of_paths(inputs, output, sizes)
    search = DynamicProgramming(minimize=cost, search_outer=len(inputs) <= OUTER_BOUND)
    path = search(list(inputs), frozenset(output), dict(sizes))
    return tree_of_path(linear_to_ssa(path), range(len(inputs)))
