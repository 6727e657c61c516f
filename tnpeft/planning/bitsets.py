"""A network for a search: sets of cores and of legs are bit sets, numbers of elements are floats.

A product of sizes above 2**53 loses its last digits, and beyond a float's range it is infinite. No order that makes
such a tensor is worth trying.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Bitsets", "Graph", "connected_sets"]


@dataclass(frozen=True)
class Graph:
    """Legs by core; the legs of the weight's axes; sizes."""

    cores: tuple[tuple[str, ...], ...]
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    kernel: tuple[tuple[str, ...], ...]
    sizes: tuple[tuple[str, int], ...]
    whole: bool = False  # a cluster of all cores may be absorbed as one


class Bitsets:
    """What a search needs to know of a network with the layer's input."""

    def __init__(self, graph: Graph) -> None:
        self.bit = {leg: 1 << place for place, (leg, _) in enumerate(graph.sizes)}
        self.legs = [self.of(legs) for legs in graph.cores]
        self.holders = {bit: self._holding(bit) for bit in self.bit.values()}
        self.kernel = self.of([leg for legs in graph.kernel for leg in legs])
        self.inputs, self.outputs = self.of(graph.inputs), self.of(graph.outputs)
        # For each kernel axis the cores that have a leg of it.
        self.axes = [self._holding(self.of(legs)) for legs in graph.kernel]
        self.everything = (1 << len(graph.cores)) - 1
        self.neighbours = [self._holding(legs) & ~(1 << core) for core, legs in enumerate(self.legs)]
        self._powers = [*self._powers_of(dict(graph.sizes))]
        self._products: dict[int, float] = {}

    def of(self, legs: Sequence[str]) -> int:
        return sum(self.bit[leg] for leg in set(legs))

    def named(self, legs: int) -> frozenset[str]:
        return frozenset(leg for leg, bit in self.bit.items() if legs & bit)

    def _holding(self, legs: int) -> int:
        """The cores that have any of these legs."""
        return sum(1 << core for core, own in enumerate(self.legs) if own & legs)

    def _powers_of(self, sizes: Mapping[str, int]) -> Iterator[tuple[int, list[float]]]:
        """The legs of each size, and the size's powers; they are multiplied, for `**` may raise or differ in a bit."""
        for size in dict.fromkeys(sizes.values()):
            alike = [leg for leg in sizes if sizes[leg] == size]
            yield self.of(alike), [*itertools.accumulate([1.0, *(float(size) for _ in alike)], operator.mul)]

    def product(self, legs: int) -> float:
        """The number of elements of a tensor with these legs."""
        found = self._products.get(legs)
        if found is None:
            found = 1.0
            for alike, powers in self._powers:
                found *= powers[(legs & alike).bit_count()]
            self._products[legs] = found
        return found

    def union(self, cores: int) -> int:
        """The legs of any of these cores."""
        legs = 0
        while cores:
            low = cores & -cores
            legs |= self.legs[low.bit_length() - 1]
            cores ^= low
        return legs

    def opened(self, cores: int) -> int:
        """The legs that a cluster keeps: those of the weight, and those that other cores have too."""
        weight = self.inputs | self.outputs | self.kernel
        return self.union(cores) & (weight | self.union(self.everything & ~cores))

    def tensor(self, done: int) -> int:
        """The channel legs of the input once the cores `done` are absorbed."""
        later = self.outputs | self.union(self.everything & ~done)
        return (self.union(done) | self.inputs) & ~self.kernel & later

    def awaited(self, tensor: int, done: int) -> tuple[int, int]:
        """The input's legs that will be summed: those that one remaining core has, and those that several have."""
        one = several = 0
        rest = tensor & ~self.outputs
        while rest:
            low = rest & -rest
            later = self.holders[low] & ~done
            if later & (later - 1):
                several |= low
            else:
                one |= low
            rest ^= low
        return one, several

    def held_by(self, legs: int, cores: int) -> int:
        """Those of `legs` that no core other than `cores` has."""
        found = 0
        while legs:
            low = legs & -legs
            if not self.holders[low] & ~cores:
                found |= low
            legs ^= low
        return found


def connected_sets(neighbours: Sequence[int], largest: int) -> Iterator[int]:
    """Connected sets of at most `largest` cores, each once; `neighbours` has those of each core.

    Those whose lowest core is `start` grow by one neighbour at a time; `banned` holds what an earlier branch has had
    already.
    """
    for start, border_of_start in enumerate(neighbours):
        stack = [(1 << start, border_of_start, (2 << start) - 1)]
        while stack:
            cores, border, banned = stack.pop()
            yield cores
            if cores.bit_count() == largest:
                continue
            free = border & ~banned
            while free:
                low = free & -free
                free ^= low
                banned |= low
                stack.append((cores | low, border | neighbours[low.bit_length() - 1], banned))
