"""What the layers of a model contract together: equal clusters and equal delta weights, in one computation.

With many layers of small cores, the cost of contracting them is that of launching operations. A batch has the equal
clusters of factored and hybrid layers, of one layer or more, or small delta weights of two or more dense layers.
Batches say what belongs together, for all threads; results belong to a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from tnpeft.adapters import Adapter
from tnpeft.execution.results import Make, ResultCache, StartConstants
from tnpeft.execution.torch_call import add_weight
from tnpeft.program import BatchedCluster, Cluster, ClusterProgram, Program, Weight, needs_plain_ops, versions

__all__ = ["Batch", "Batches", "Member", "Sources", "sources_of"]

# Elements of the weights whose delta weights are contracted together, at most: beyond, starting operations is not what
# they cost, and a batch's weights and their gradients are alive together.
SMALL = 1 << 17
# On other devices starting operations is nearly all that it costs.
SMALL_ELSEWHERE = 1 << 24

Sources = tuple[list[int], list[int]]
"""Which tensors something is made of, by their `id`, and how often each was written to."""


def sources_of(tensors: Sequence[Tensor]) -> Sources:
    return [*map(id, tensors)], versions(tensors)


class Member(NamedTuple):
    """A base layer with one adapter, and what its cores are contracted to: clusters, or a delta weight."""

    base: Any
    adapter: Adapter
    program: ClusterProgram | Weight

    @property
    def kind(self) -> Hashable:
        """What members of one batch have in common besides the program."""
        weight = self.base.weight
        return weight.device, weight.dtype == torch.float64

    @classmethod
    def dense(cls, base: Any, adapter: Adapter) -> Member | None:
        """Of a layer that runs dense; None if it is to contract its own."""
        weight, network = base.weight, adapter.network
        small = SMALL if weight.device.type == "cpu" else SMALL_ELSEWHERE
        if network.layer.numel > small or network.plain.reads_weight:
            return None
        return cls(base, adapter, adapter.program_for(weight).weight)


TensorsOf: TypeAlias = "Callable[[Adapter], list[Tensor]]"


class _Places(NamedTuple):
    """The places of a layer in batches: in one for each of its clusters, or in that of its delta weight."""

    program: ClusterProgram | Weight
    places: tuple[tuple[Batch, int], ...]


class Batches:
    """The batches of some layers of a model. They never change, except for what is kept of frozen copies."""

    def __init__(self, members: Sequence[Member], cache: ResultCache) -> None:
        places: dict[Adapter, dict[int, tuple[Batch, int]]] = {member.adapter: {} for member in members}
        clusters: dict[Hashable, list[_ClusterOf]] = {}
        deltas: dict[Hashable, list[Member]] = {}
        for member in members:
            if isinstance(member.program, Weight):
                deltas.setdefault((member.program, member.kind), []).append(member)
                continue
            for number, (cluster, cores) in enumerate(member.program.clusters):
                part = _ClusterOf(cluster, member.adapter, cores, number)
                clusters.setdefault((cluster, member.kind), []).append(part)
        for alike in clusters.values():
            batch = _Clusters(alike, cache)
            for place, part in enumerate(alike):
                places[part.adapter][part.number] = batch, place
        for equal in deltas.values():
            if len(equal) > 1:
                whole = _Deltas(equal, cache)
                for place, member in enumerate(equal):
                    places[member.adapter][0] = whole, place
        self.places_of: Mapping[Adapter, _Places] = {
            member.adapter: _Places(member.program, tuple(place for _, place in sorted(places[member.adapter].items())))
            for member in members
            if places[member.adapter]
        }


class Batch:
    """Adapters that contract something together, with one `code` for all."""

    def __init__(
        self, code: Any, adapters: Sequence[Adapter], cores: Sequence[Sequence[int]], cache: ResultCache
    ) -> None:
        self.adapters = tuple(adapters)
        self._code, self._cache = code, cache
        self._each = tuple(dict.fromkeys(adapters))
        # The first core of every adapter, then the second of every adapter.
        self._cores = [
            (adapter, numbers[place])
            for place in range(len(cores[0]))
            for adapter, numbers in zip(adapters, cores, strict=True)
        ]
        self._constants: StartConstants[Any] = StartConstants()

    def results(self, cores_of: TensorsOf, starts_of: TensorsOf) -> Any:
        """The results of all members, from their cores and frozen copies; None on the plain path."""
        cores = {adapter: cores_of(adapter) for adapter in self._each}
        return self._contracted([cores[adapter][core] for adapter, core in self._cores], starts_of)

    def _contracted(self, cores: Sequence[Tensor], starts_of: TensorsOf) -> Any:
        raise NotImplementedError

    def _kept(self, cores: Sequence[Tensor], weights: Sequence[Tensor], make: Make) -> Sequence[Tensor]:
        """`make(cores)`, kept from pass to pass while accumulating; it is made of `weights` too."""
        return self._cache.get((self._code, *self._cores), self._each, weights, cores, make)

    def _start(self, starts_of: TensorsOf) -> Any:
        """What the code needs of the frozen copies."""
        if self.adapters[0].network.start == "zero":
            return None
        copies = {adapter: starts_of(adapter) for adapter in self._each}
        start = [copies[adapter][core] for adapter, core in self._cores]
        return self._constants.get(self._code, start, self._code.start)


class _ClusterOf(NamedTuple):
    """A cluster of an adapter, its number among all: its cores, by their number in the network."""

    cluster: Cluster
    adapter: Adapter
    cores: tuple[int, ...]
    number: int


class _Clusters(Batch):
    """One cluster of each member: its values, and its dual form if it has one."""

    def __init__(self, members: Sequence[_ClusterOf], cache: ResultCache) -> None:
        code = BatchedCluster(members[0].cluster, len(members))
        super().__init__(code, [member.adapter for member in members], [member.cores for member in members], cache)

    def _contracted(self, cores: Sequence[Tensor], starts_of: TensorsOf) -> Sequence[tuple[Tensor, ...]] | None:
        if needs_plain_ops(*cores):
            return None
        count = len(self.adapters)
        clusters = self._kept(cores, (), lambda cores: self._code(cores, self._start(starts_of)))
        return [tuple(clusters[place::count]) for place in range(count)]


class _Sum(NamedTuple):
    """W + ΔW of a layer, the base weight that is in it, and what the two were when it was made."""

    total: Tensor
    weight: Tensor
    sources: Sources


class _Deltas(Batch):
    """W + ΔW of each member."""

    def __init__(self, members: Sequence[Member], cache: ResultCache) -> None:
        first = members[0]
        assert isinstance(first.program, Weight)
        cores = range(len(first.adapter.plan.network.cores))
        code = Program(first.program, len(members))
        super().__init__(code, [member.adapter for member in members], [cores] * len(members), cache)
        self._bases = [member.base for member in members]

    def _contracted(self, cores: Sequence[Tensor], starts_of: TensorsOf) -> list[_Sum] | None:
        weights = [base.weight for base in self._bases]
        if needs_plain_ops(*cores, *weights):
            return None
        constants = [weight.detach() for weight in weights]

        def summed(cores: Sequence[Tensor]) -> Sequence[Tensor]:
            deltas = self._code.deltas(cores, self._start(starts_of))
            return tuple([add_weight(delta, weight, False) for delta, weight in zip(deltas, constants, strict=True)])

        totals = self._kept(cores, weights, summed)
        return [_Sum(*pair, sources_of(pair)) for pair in zip(totals, weights, strict=True)]
