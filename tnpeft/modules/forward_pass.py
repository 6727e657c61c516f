"""Layers of a model that contract their cores together, once in each forward pass of the model.

With many layers of small cores, the number of operations to start is what contracting them costs. Grouped are not
layers but what is contracted: the clusters of factored and hybrid layers, each with those that are alike, and the whole
delta weights of dense layers, as far as they are small. Batches say what is contracted together, for all threads;
results belong to a pass, which its thread owns. A layer that is called outside of a pass of its thread, or within
activation checkpointing, which must see the same operations when it calls a layer again, contracts its own.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from tnpeft.modules.results import Make, same_tensors
from tnpeft.program import (
    BatchedCluster,
    BatchedDelta,
    Cluster,
    ClusterProgram,
    LayerClusters,
    Weight,
    is_lasting,
    needs_plain_ops,
    saved_tensors_are_hooked,
    versions,
)

if TYPE_CHECKING:
    from tnpeft.modules.adapter import Adapter
    from tnpeft.modules.layers import AdaptedLayer

__all__ = ["Batches", "ForwardPass", "Member", "Starts", "add_weight", "open_pass"]

# Elements of the weights whose delta weights are contracted together, at most: beyond, starting operations is not what
# they cost, and a batch's weights and their gradients are alive together.
SMALL = 1 << 17
# On other devices starting operations is nearly all that it costs.
SMALL_ELSEWHERE = 1 << 24

_Made = TypeVar("_Made")


class Member(NamedTuple):
    """A layer with one adapter, and what its cores are contracted to: clusters or a delta weight."""

    layer: AdaptedLayer
    adapter: Adapter
    program: ClusterProgram | Weight
    kind: Hashable

    @classmethod
    def of(cls, layer: AdaptedLayer, adapter: Adapter, program: ClusterProgram | Weight) -> Member:
        weight = layer.base.weight
        return cls(layer, adapter, program, (weight.device, weight.dtype == torch.float64))

    @classmethod
    def dense(cls, layer: AdaptedLayer, adapter: Adapter) -> Member | None:
        """Of a layer that runs dense; None if it is to contract its own."""
        base, network = layer.base.weight, adapter.network
        small = SMALL if base.device.type == "cpu" else SMALL_ELSEWHERE
        if network.layer.numel > small or network.reads_weight:
            return None
        weight = adapter.batched_for(base)
        return None if weight is None else cls.of(layer, adapter, weight)


class Starts(Generic[_Made]):
    """What is made of frozen copies, kept as long as these are the same tensors, and were not written to."""

    def __init__(self) -> None:
        # One tuple, so that no thread sees a part of what another one leaves here.
        self._known: tuple[object, list[Tensor], list[int], _Made] | None = None

    def of(self, key: object, start: list[Tensor], make: Callable[[list[Tensor]], _Made]) -> _Made:
        """`make(start)`, anew if it is another `key`."""
        writes = versions(start)
        if self._known is not None:
            known, tensors, written, made = self._known
            # By identity, for `torch.func.functional_call` may pass other tensors.
            if known is key and written == writes and same_tensors(tensors, start):
                return made
        with torch.inference_mode(False):
            made = make(start)
        if is_lasting(made):
            self._known = key, start, writes, made
        return made


class _Places(NamedTuple):
    """The places of a layer in batches: in one for each of its clusters, or in that of its delta weight."""

    program: ClusterProgram | Weight
    places: tuple[tuple[_Batch, int], ...]


class Batches:
    """The batches of some layers of a model. Once made they change no more, but for what is kept of frozen copies."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        places: dict[Adapter, dict[int, tuple[_Batch, int]]] = {member.adapter: {} for member in members}
        clusters: dict[Hashable, list[_ClusterOf]] = {}
        deltas: dict[Hashable, list[Member]] = {}
        for member in members:
            if isinstance(member.program, Weight):
                deltas.setdefault((member.program, member.kind), []).append(member)
                continue
            for number, (cluster, cores) in enumerate(member.program.clusters):
                one = _ClusterOf(cluster, member.adapter, cores, number)
                clusters.setdefault((cluster, member.kind), []).append(one)
        for alike in clusters.values():
            batch = _Clusters(alike)
            for place, one in enumerate(alike):
                places[one.adapter][one.number] = batch, place
        for equal in deltas.values():
            if len(equal) > 1:
                whole = _Deltas(equal)
                for place, member in enumerate(equal):
                    places[member.adapter][0] = whole, place
        self.places_of = {
            member.adapter: _Places(member.program, tuple(own for _, own in sorted(places[member.adapter].items())))
            for member in members
        }


class _Cores(NamedTuple):
    """The cores of an adapter as a pass contracted them, and what they were made of."""

    tensors: list[Tensor]
    sources: tuple[list[int], list[int]]


class ForwardPass:
    """What the layers of a model contract together while a thread runs its forward pass.

    It is open in that thread alone, from when it is made until it is closed or nobody holds it. In a pass that is run
    inside of another one's, layers of the outer model contract their own.
    """

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._results: dict[tuple[bool, bool], dict[_Batch, Any]] = {}
        self._cores: dict[Adapter, _Cores] = {}
        self._outer = _THREAD.current
        _THREAD.current = weakref.ref(self)

    def close(self) -> None:
        _THREAD.current = self._outer

    def clusters(self, adapter: Adapter, program: ClusterProgram) -> LayerClusters | None:
        """The clusters of an adapter; None where it must contract its own."""
        member = self._batches.places_of.get(adapter)
        if member is None or program is not member.program:
            return None
        found = []
        for batch, place in member.places:
            made = self.results(batch)
            if made is None:
                return None
            found.append(made[place])
        if not self.is_current(adapter):
            return None
        return LayerClusters(tuple(own[0] for own in found), tuple(own[1] for own in found if len(own) > 1))

    def summed(self, adapter: Adapter, weight: Tensor) -> Tensor | None:
        """W + ΔW of a layer whose base weight is `weight`; None where it must contract its own."""
        member = self._batches.places_of.get(adapter)
        if member is None or not isinstance(member.program, Weight) or not member.places:
            return None
        batch, place = member.places[0]
        sums: list[_Sum] | None = self.results(batch)
        if sums is None:
            return None
        total = sums[place].total
        current = sums[place].writes == _sources((total, weight)) and self.is_current(adapter)
        return total if current else None

    def results(self, batch: _Batch) -> Any:
        """Of all members of a batch, made when the first of them asks; None where their tensors do not lie together.

        Those of a layer may be on its device only while it is called, as when weights are offloaded.
        """
        key = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        known = self._results.get(key)
        if known is None:
            known = self._results[key] = {}
        if batch not in known:
            known[batch] = batch.results(self.cores_of)
        return known[batch]

    def cores_of(self, adapter: Adapter) -> list[Tensor]:
        """The cores that an adapter had when they were first asked for."""
        known = self._cores.get(adapter)
        if known is None:
            known = self._cores[adapter] = _Cores(adapter.core_tensors(), _sources(adapter.stored))
        return known.tensors

    def is_current(self, adapter: Adapter) -> bool:
        """Whether its cores are what they were when they were contracted."""
        known = self._cores.get(adapter)
        return known is not None and known.sources == _sources(adapter.stored)


class _Thread(threading.local):
    """The innermost pass that is open in a thread; its model holds it, so that it dies with the model."""

    current: weakref.ref[ForwardPass] | None = None


_THREAD = _Thread()


def open_pass() -> ForwardPass | None:
    """The pass that is open in this thread; None where activation checkpointing, a tracer or a compiler looks on."""
    current = None if _THREAD.current is None else _THREAD.current()
    return None if current is None or saved_tensors_are_hooked() or needs_plain_ops() else current


class _Batch:
    """Adapters that contract something together."""

    def __init__(self, adapters: Sequence[Adapter], cores: Sequence[Sequence[int]]) -> None:
        self.adapters = tuple(adapters)
        self._each = tuple(dict.fromkeys(adapters))
        # The first core of every adapter, then the second of every adapter.
        self._cores = [
            (adapter, own[place])
            for place in range(len(cores[0]))
            for adapter, own in zip(adapters, cores, strict=True)
        ]
        self._starts: Starts[Any] = Starts()

    def results(self, cores_of: Callable[[Adapter], list[Tensor]]) -> Any:
        """Of all members; None where their tensors do not lie together, or somebody looks on."""
        own = {adapter: cores_of(adapter) for adapter in self._each}
        cores, others = [own[adapter][core] for adapter, core in self._cores], self._others()
        return None if needs_plain_ops(*cores, *others) else self._made(cores, others)

    def _others(self) -> list[Tensor]:
        """What results are made of beside the cores."""
        return []

    def _made(self, cores: Sequence[Tensor], others: Sequence[Tensor]) -> Any:
        raise NotImplementedError

    def _contracted(self, code: Any, cores: Sequence[Tensor], others: Sequence[Tensor], made: Make) -> Sequence[Tensor]:
        """`made` of the cores, kept from pass to pass where that is wanted; it is made of `others` too."""
        cache = self.adapters[0].cache
        return made(cores) if cache is None else cache.get((code, *self._cores), self._each, others, cores, made)

    def _start(self, code: Any) -> Any:
        """What the code needs of the frozen copies."""
        if self.adapters[0].network.start == "zero":
            return None
        start = {adapter: adapter.start_tensors() for adapter in self._each}
        return self._starts.of(code, [start[adapter][core] for adapter, core in self._cores], code.start)


class _ClusterOf(NamedTuple):
    """A cluster of an adapter, its number among all: its cores, by their number in the network."""

    cluster: Cluster
    adapter: Adapter
    cores: tuple[int, ...]
    number: int


class _Clusters(_Batch):
    """One cluster of each member: its values, and its dual form if it has one."""

    def __init__(self, members: Sequence[_ClusterOf]) -> None:
        super().__init__([member.adapter for member in members], [member.cores for member in members])
        self._code = BatchedCluster(members[0].cluster, len(members))

    def _made(self, cores: Sequence[Tensor], others: Sequence[Tensor]) -> Sequence[tuple[Tensor, ...]]:
        found = self._contracted(self._code, cores, others, lambda cores: self._code(cores, self._start(self._code)))
        count = self._code.count
        return [tuple(found[place::count]) for place in range(count)]


class _Sum(NamedTuple):
    """W + ΔW of a layer, the base weight that is in it, and how often the two were written to."""

    total: Tensor
    weight: Tensor
    writes: tuple[list[int], list[int]]


class _Deltas(_Batch):
    """W + ΔW of each member."""

    def __init__(self, members: Sequence[Member]) -> None:
        first = members[0]
        cores = range(len(first.adapter.network.cores))
        super().__init__([member.adapter for member in members], [cores] * len(members))
        self._layers = [member.layer for member in members]
        assert isinstance(first.program, Weight)
        self._code = BatchedDelta(first.program, len(members))

    def _others(self) -> list[Tensor]:
        return [layer.base.weight for layer in self._layers]

    def _made(self, cores: Sequence[Tensor], others: Sequence[Tensor]) -> list[_Sum]:
        constants = [weight.detach() for weight in others]

        def made(cores: Sequence[Tensor]) -> Sequence[Tensor]:
            deltas = self._code(cores, self._start(self._code))
            return tuple(add_weight(delta, weight) for delta, weight in zip(deltas, constants, strict=True))

        found = self._contracted(self._code, cores, others, made)
        return [_Sum(*pair, _sources(pair)) for pair in zip(found, others, strict=True)]


def _sources(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Which tensors something is made of, and how often they were written to."""
    return [*map(id, tensors)], versions(tensors)


def add_weight(total: Tensor, weight: Tensor) -> Tensor:
    """W + ΔW in W's strides and dtype; ΔW, which nobody else holds, is used up."""
    if needs_plain_ops(total, weight):
        return (weight + total).to(weight.dtype)
    # In place and unseen by autograd, for which W is a constant: the delta weight is ours alone, no backward reads
    # it, and another tensor of its size costs more than contracting it (12 of 38 ms for a 512 -> 256 Conv3d).
    total.data.add_(weight)
    if total.dtype == weight.dtype and total.stride() == weight.stride():
        return total
    # Another dtype, or unit axes whose strides say which memory format the weight has: both steer the kernels.
    return torch.empty_like(weight).copy_(total)
