"""The factored order: clusters of cores are absorbed into the layer's input, one after the other.

The network is contracted with the input in it. A cluster is contracted to one tensor; where it joins the input, it is a
matrix product over the channels' legs and, for the kernel axes whose legs it has, a sum over shifted copies. The input
is either *gathered* (one shifted copy for each kernel entry, before the product) or the product is *scattered* (one for
each kernel entry, shifted and added up afterwards), whichever moves less.

The best order is the shortest way from no core to all cores, where one way leads from a set of absorbed cores to that
set and a cluster more (Dijkstra over bit masks).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from tnpeft.plan.call import Call

__all__ = ["Absorption", "Graph", "find_chain"]

# Time of what one absorption does, in ns on one core: to start its operations, to multiply and add once, to write or
# read an element. Only ratios matter here.
START = 60000.0
START_CLUSTER = 10000.0
MOVE_CLUSTER = 1.0
MULTIPLY = 1 / 40
NARROW = 8.0
MOVE = 0.35
# Copies of more elements than caches hold take this many times as long.
CACHED, FAR = 1 << 22, 4.0
# Clusters considered, and sets of absorbed cores looked at, at most; beyond, clusters are kept small and sets few.
CLUSTERS = 800
STATES = 4000


@dataclass(frozen=True)
class Graph:
    """A network as a search sees it: legs by core; the legs of the weight's axes; sizes."""

    cores: tuple[tuple[str, ...], ...]
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    kernel: tuple[tuple[str, ...], ...]
    sizes: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Absorption:
    """One step: the cores of a cluster, the kernel axes that it has, and the channels' legs after it."""

    cores: tuple[int, ...]
    axes: tuple[int, ...]
    gather: bool
    legs: frozenset[str]
    multiplications: int


@lru_cache(maxsize=1024)
def find_chain(graph: Graph, call: Call) -> tuple[Absorption, ...]:
    """The quickest order found; empty where every order must build the whole weight first."""
    search = _Search(graph, call)
    steps, done = [], 0
    for cluster in search.shortest():
        steps.append(search.absorption(done, cluster))
        done |= cluster
    return tuple(steps)


class _Search:
    """Sets of cores and of legs are bit masks."""

    def __init__(self, graph: Graph, call: Call) -> None:
        self.graph, self.call = graph, call
        self.size = dict(graph.sizes)
        names = [leg for leg, _ in graph.sizes]
        self.bit = {leg: 1 << place for place, leg in enumerate(names)}
        self.names = names
        self.legs = [self._mask(legs) for legs in graph.cores]
        self.holders = {
            bit: sum(1 << core for core, legs in enumerate(self.legs) if legs & bit) for bit in self.bit.values()
        }
        self.axis_legs = [self._mask(legs) for legs in graph.kernel]
        self.kernel = self._mask([leg for legs in graph.kernel for leg in legs])
        self.inputs, self.outputs = self._mask(graph.inputs), self._mask(graph.outputs)
        self.axis_holders = [
            sum(1 << core for core, legs in enumerate(self.legs) if legs & axis) for axis in self.axis_legs
        ]
        self.everything = (1 << len(graph.cores)) - 1
        self._products: dict[int, int] = {0: 1}
        self._tensors: dict[int, int] = {}

    def _mask(self, legs: Sequence[str]) -> int:
        return sum(self.bit[leg] for leg in set(legs))

    def product(self, legs: int) -> int:
        """The number of elements of a tensor with these legs."""
        found = self._products.get(legs)
        if found is None:
            low = legs & -legs
            found = self._products[legs] = self.size[self.names[low.bit_length() - 1]] * self.product(legs ^ low)
        return found

    def union(self, cores: int) -> int:
        legs = 0
        while cores:
            low = cores & -cores
            legs |= self.legs[low.bit_length() - 1]
            cores ^= low
        return legs

    def opened(self, cores: int) -> int:
        """The legs that a cluster keeps: those of the weight, and those that other cores have too."""
        legs, kept = self.union(cores), 0
        weight = self.inputs | self.outputs | self.kernel
        while legs:
            low = legs & -legs
            if low & weight or self.holders[low] & ~cores:
                kept |= low
            legs ^= low
        return kept

    def tensor(self, done: int) -> int:
        """The channels' legs of the input once the cores `done` are absorbed."""
        found = self._tensors.get(done)
        if found is None:
            found = 0
            legs = (self.union(done) | self.inputs) & ~self.kernel
            while legs:
                low = legs & -legs
                if low & self.outputs or self.holders[low] & ~done:
                    found |= low
                legs ^= low
            self._tensors[done] = found
        return found

    @cached_property
    def neighbours(self) -> list[int]:
        return [
            sum(1 << other for other, more in enumerate(self.legs) if other != core and more & legs)
            for core, legs in enumerate(self.legs)
        ]

    def connected(self, largest: int) -> Iterator[int]:
        """Connected sets of at most `largest` cores, each once."""
        for start in range(len(self.legs)):
            stack = [(1 << start, self.neighbours[start], (2 << start) - 1)]
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
                    stack.append((cores | low, border | self.neighbours[low.bit_length() - 1], banned))

    @cached_property
    def clusters(self) -> list[tuple[int, float, int, int, tuple[int, ...]]]:
        """The clusters that may join the input: cores, time to contract them, legs, kernel entries, kernel axes.

        A cluster has all cores of each kernel axis that it touches, or the axis could not be summed when it joins.
        """
        largest, found = 0, [0]
        while len(found) < CLUSTERS and largest < len(self.legs):
            largest += 1
            wider = []
            for number, cores in enumerate(self.connected(largest)):
                if number > CLUSTERS:
                    break
                wider.append(cores)
            if len(wider) > CLUSTERS:
                break
            found = wider
        times = self._contraction_times(sorted(found, key=lambda cores: (cores.bit_count(), cores)))
        whole = []
        for cores, time in times.items():
            axes = tuple(axis for axis, holders in enumerate(self.axis_holders) if holders & cores)
            if all(not self.axis_holders[axis] & ~cores for axis in axes):
                legs = self.opened(cores)
                whole.append((cores, time, legs & ~self.kernel, self.product(legs & self.kernel), axes))
        return whole

    def _contraction_times(self, clusters: Sequence[int]) -> dict[int, float]:
        """The least time to contract each cluster, from those of the two parts that its last step joins."""
        times: dict[int, float] = {}
        opened = {cores: self.opened(cores) for cores in clusters}
        for cores in clusters:
            if not cores & (cores - 1):
                times[cores] = 0.0
                continue
            best = math.inf
            for part in _parts(cores, times):
                other = cores ^ part
                if part in times and other in times:
                    joint = self.product(opened[part] | opened[other])
                    own = START_CLUSTER + MULTIPLY * joint + MOVE_CLUSTER * self.product(opened[cores])
                    best = min(best, times[part] + times[other] + own)
            if best < math.inf:
                times[cores] = best
        return times

    def shortest(self) -> list[int]:
        """The clusters in the order of the quickest way to absorb all cores."""
        best: dict[int, tuple[float, int]] = {0: (0.0, 0)}
        queue, closed = [(0.0, 0)], set[int]()
        while queue and len(closed) < STATES:
            cost, done = heapq.heappop(queue)
            if done in closed:
                continue
            if done == self.everything:
                return self._way(best, done)
            closed.add(done)
            for cluster, time in self._next(done):
                union = done | cluster
                total = cost + time
                if union not in best or total < best[union][0]:
                    best[union] = (total, cluster)
                    heapq.heappush(queue, (total, union))
        return []

    def _way(self, best: dict[int, tuple[float, int]], done: int) -> list[int]:
        way = []
        while done:
            way.append(best[done][1])
            done ^= best[done][1]
        return way[::-1]

    def _next(self, done: int) -> Iterator[tuple[int, float]]:
        """Clusters that may come next: those that share a leg with the input, any where none does."""
        tensor = self.tensor(done)
        free = [entry for entry in self.clusters if not entry[0] & done]
        touching = [entry for entry in free if entry[2] & tensor] or free
        for cluster, time, legs, entries, axes in touching:
            if cluster == self.everything:  # the whole weight
                continue
            yield cluster, time + min(self._times(done, cluster, legs, entries, axes))

    def _times(self, done: int, cluster: int, legs: int, entries: int, axes: tuple[int, ...]) -> tuple[float, float]:
        """Of an absorption, gathered and scattered."""
        tensor, after = self.tensor(done), self.tensor(done | cluster)
        batch, before_space, after_space = self.call.batch, self.space(done), self.space(done | cluster)
        joint = self.product(tensor | legs) * entries
        read = self.product(tensor) * before_space
        written = self.product(after) * after_space
        rows = max(1, min(self.product(after & legs), self.product(legs & tensor & ~after)))
        slow = 1 + NARROW / rows if rows < NARROW else 1.0
        copied = 0 if entries == 1 else 1
        copies = [
            copied * batch * entries * side
            for side in (self.product(tensor) * after_space, self.product(after) * before_space)
        ]
        gather, scatter = (2 * copy * (FAR if copy > CACHED else 1.0) / batch for copy in copies)
        gathered = joint * after_space * MULTIPLY * slow + MOVE * (read + written + gather)
        scattered = joint * before_space * MULTIPLY * slow + MOVE * (read + written + scatter)
        start = START * (1 + 0.5 * copied * len(axes))
        return start + batch * gathered, start + batch * scattered

    def space(self, done: int) -> int:
        """Voxels of the input once the cores `done` are absorbed."""
        number = 1
        for axis, holders in zip(self.call.axes, self.axis_holders, strict=True):
            number *= axis.outputs if holders & done or not holders else axis.inputs
        return number

    def absorption(self, done: int, cluster: int) -> Absorption:
        _, _, legs, entries, axes = next(entry for entry in self.clusters if entry[0] == cluster)
        gathered, scattered = self._times(done, cluster, legs, entries, axes)
        after = self.tensor(done | cluster)
        gather = gathered <= scattered
        space = self.space(done | cluster) if gather else self.space(done)
        joint = self.product(self.tensor(done) | legs) * entries * space * self.call.batch
        cores = tuple(core for core in range(len(self.legs)) if cluster >> core & 1)
        named = frozenset(leg for leg, bit in self.bit.items() if after & bit)
        return Absorption(cores, axes, gather, named, joint)


def _parts(cores: int, known: Collection[int]) -> Iterator[int]:
    """The larger numbers of the pairs that make up `cores`; of large sets those that are known, which are fewer."""
    if 1 << (cores.bit_count() - 1) > len(known):
        yield from (part for part in known if not part & ~cores and part > cores ^ part)
        return
    part = (cores - 1) & cores
    while part > cores ^ part:
        yield part
        part = (part - 1) & cores
