"""The factored order: clusters of cores are absorbed into the layer's input, one after the other.

The network is contracted together with the input. A cluster is contracted to one tensor. Absorbing it into the input is
a matrix product over the channels' legs and, for the kernel axes whose legs it has, a sum over shifted copies. Either
the input is *gathered* (one shifted copy for each kernel entry, before the product), or the product is *scattered* (one
for each kernel entry, shifted and added up afterwards), whichever moves less data.

The best order is the shortest path from no core to all cores; an edge leads from a set of absorbed cores to that set
with one more cluster (Dijkstra over bit sets). If there are too many ways to try all, the search goes on only from the
best sets of each size.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from tnpeft.planning.bitsets import Bitsets, Graph
from tnpeft.planning.call import Call
from tnpeft.planning.candidates import Candidate, candidates
from tnpeft.planning.device_model import device_model

__all__ = ["WHOLE_WEIGHT", "Absorption", "find_chain"]

# Ways to try until only the best sets of absorbed cores are followed, so many of each size. The paper's ten cores take
# 1,700 ways, a ring of 40 takes 28,000; a complete graph of 14 would take millions.
WAYS = 30000
BEAM = 16
# And from the best alone once so many ways were tried: a star of 256 cores would try half a million, in 5 s.
BEAM_WAYS = 200_000
WHOLE_WEIGHT = "every order builds the whole weight first"


@dataclass(frozen=True)
class Absorption:
    """One step: the cores of a cluster, the kernel axes that it has, and the channel legs after it."""

    cores: tuple[int, ...]
    axes: tuple[int, ...]
    gather: bool
    legs: frozenset[str]
    multiplications: int


class _Input(NamedTuple):
    """The layer's input once the cores `done` are absorbed: its channels' legs, their elements, and its voxels.

    A leg of `awaits_one` is summed with the core that has it, one of `awaits_several` with the last of them.
    """

    done: int
    legs: int
    awaits_one: int
    awaits_several: int
    elements: float
    space: int


@lru_cache(maxsize=1024)
def find_chain(graph: Graph, call: Call) -> tuple[Absorption, ...] | str:
    """The fastest order found, or the reason why there is none."""
    search = _Search(graph, call)
    order = search.shortest()
    if not order and search.complete:
        return WHOLE_WEIGHT
    if not order:
        return f"the search for an order gave up: its {len(graph.cores)} cores can be joined in too many ways"
    steps, done = [], 0
    for cluster in order:
        steps.append(search.absorption(done, cluster))
        done |= cluster.cores
    return tuple(steps)


class _Search:
    """Sets of absorbed cores are reached by the ways in `_best`: the time to get there, and the cluster added last."""

    def __init__(self, graph: Graph, call: Call) -> None:
        self.call = call
        self.sets, self._whole = Bitsets(graph), graph.whole
        self.prices = device_model(call.device)
        self.sizes = dict(graph.sizes)
        # `complete`: nothing was left out so far.
        self.clusters, self.complete = candidates(self.sets, self.prices)
        self._best: dict[int, tuple[float, Candidate | None]] = {0: (0.0, None)}
        self._tried = 0

    def shortest(self) -> list[Candidate]:
        """The clusters in the order of the quickest way to absorb all cores; empty if none was found."""
        queue, closed = [(0.0, 0)], set[int]()
        while queue:
            cost, done = heapq.heappop(queue)
            if done in closed:
                continue
            if done == self.sets.everything:
                return self._order()
            if self._tried >= WAYS:
                self.complete = False
                self._follow_the_best(closed)
                return self._order()
            closed.add(done)
            for union, total in self._extended(done, cost):
                heapq.heappush(queue, (total, union))
        return []

    def _follow_the_best(self, closed: set[int]) -> None:
        """Go on from a few sets of each size, the smaller ones first."""
        levels: list[set[int]] = [set() for _ in range(self.sets.everything.bit_count() + 1)]
        for done in self._best:
            levels[done.bit_count()].add(done)
        for level in levels[:-1]:
            width = BEAM if self._tried < BEAM_WAYS else 1
            for done in heapq.nsmallest(width, level, key=lambda done: (self._best[done][0], done)):
                if done not in closed:
                    for union, _ in self._extended(done, self._best[done][0]):
                        levels[union.bit_count()].add(union)

    def _order(self) -> list[Candidate]:
        order, done = [], self.sets.everything
        while done in self._best and (cluster := self._best[done][1]) is not None:
            order.append(cluster)
            done ^= cluster.cores
        return order[::-1]

    def _extended(self, done: int, cost: float) -> Iterator[tuple[int, float]]:
        """The sets that one cluster more leads to, where no quicker way there is known, and the time to get there."""
        best = self._best
        for cluster, time in self._ways(done):
            union, total = done | cluster.cores, cost + time
            if total < (best[union][0] if union in best else math.inf):
                best[union] = (total, cluster)
                yield union, total

    def _ways(self, done: int) -> Iterator[tuple[Candidate, float]]:
        """Clusters that may come next: those that share a leg with the input, any where none does."""
        before, everything = self._input(done), self.sets.everything
        tensor = before.legs
        free = [cluster for cluster in self.clusters if not cluster.cores & done]
        touching = [cluster for cluster in free if cluster.legs & tensor] or free
        self._tried += len(touching)
        for cluster in touching:
            if self._whole or cluster.cores != everything:  # the whole weight
                yield cluster, cluster.time + min(self._times(before, cluster))

    def _input(self, done: int) -> _Input:
        sets = self.sets
        legs = sets.tensor(done)
        return _Input(done, legs, *sets.awaited(legs, done), sets.product(legs), self.space(done))

    def _times(self, before: _Input, cluster: Candidate) -> tuple[float, float]:
        """Of an absorption, gathered and scattered."""
        cores, _, legs, own, entries, axes = cluster
        done, tensor, awaits_one, awaits_several, elements, before_space = before
        sets, prices, batch = self.sets, self.prices, self.call.batch
        shared = legs & tensor
        after_space = self.space(done | cores) if axes else before_space
        joint = elements * (own / sets.product(shared))
        closed = shared & awaits_one
        if several := shared & awaits_several:
            closed |= sets.held_by(several, done | cores)
        summed = sets.product(closed)
        after = joint / summed
        rows = max(1.0, min(own / summed, summed))
        slow = 1 + prices.link_narrow / rows if rows < prices.link_narrow else 1.0
        moved = elements * before_space + after * after_space
        gather, scatter, started = moved, moved, prices.link
        if entries > 1:
            gather += self._copied(batch * entries * elements * after_space)
            scatter += self._copied(batch * entries * after * before_space)
            started *= 1 + 0.5 * len(axes)
        joint *= entries
        return (
            started + batch * (joint * after_space * prices.link_multiply * slow + prices.move * gather),
            started + batch * (joint * before_space * prices.link_multiply * slow + prices.move * scatter),
        )

    def _copied(self, elements: float) -> float:
        """What shifted copies count, written and read, for each entry of the batch."""
        return 2 * elements * self.prices.distance(elements) / self.call.batch

    def space(self, done: int) -> int:
        """Voxels of the input once the cores `done` are absorbed."""
        number = 1
        for axis, holders in zip(self.call.axes, self.sets.axes, strict=True):
            number *= axis.outputs if holders & done or not holders else axis.inputs
        return number

    def absorption(self, done: int, cluster: Candidate) -> Absorption:
        sets = self.sets
        before = self._input(done)
        gathered, scattered = self._times(before, cluster)
        gather = gathered <= scattered
        space = self.space(done | cluster.cores) if gather else before.space
        joint = sets.named(before.legs | cluster.legs | sets.opened(cluster.cores))
        multiplications = math.prod(self.sizes[leg] for leg in joint) * space * self.call.batch
        cores = tuple(core for core in range(sets.everything.bit_length()) if cluster.cores >> core & 1)
        legs = sets.named(sets.tensor(done | cluster.cores))
        return Absorption(cores, cluster.axes, gather, legs, multiplications)
