"""Layers of a model that contract their cores together, once in each forward pass of the model.

With many layers of small cores, the number of operations to start is what contracting them costs. Grouped are not
layers but what is contracted: the clusters of factored and hybrid layers, each with those that are alike, and the whole
delta weights of dense layers, as far as they are small. Groups know results only while a pass is open; a layer that is
called on its own, or within activation checkpointing, which must see the same operations when it calls a layer again,
contracts its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from tnpeft.modules.keeping import Make, same_tensors
from tnpeft.program import (
    Cluster,
    ClusterProgram,
    LayerClusters,
    Weight,
    build_cluster,
    build_delta,
    is_lasting,
    needs_plain_ops,
    saved_tensors_are_hooked,
    writes_of,
)

if TYPE_CHECKING:
    from tnpeft.modules.adapter import Adapter
    from tnpeft.modules.layers import AdaptedLayer

__all__ = ["Groups", "Member", "Seat", "Starts", "add_weight"]

# Elements of the weights whose delta weights are contracted together, at most: beyond, starting operations is not what
# they cost, and a group's weights and their gradients are alive together.
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
        self._key: object = None
        self._start: list[Tensor] = []
        self._writes: list[tuple[int, ...]] = []
        self._made: _Made | None = None

    def of(
        self, key: object, adapters: Iterable[Adapter], start: list[Tensor], make: Callable[[list[Tensor]], _Made]
    ) -> _Made:
        """`make(start)`, anew if it is another `key`."""
        writes = [adapter.writes for adapter in adapters]
        # By identity, for `torch.func.functional_call` may pass other tensors.
        known = key is self._key and writes == self._writes and same_tensors(self._start, start)
        if not known or self._made is None:
            with torch.inference_mode(False):
                made = make(start)
            if not is_lasting(made):
                return made
            self._key, self._start, self._writes, self._made = key, start, writes, made
        return self._made


class Seat:
    """The place of a layer in the groups of an open pass: in one for each cluster, or in that of its delta weight."""

    def __init__(self, groups: Groups, member: Member) -> None:
        self._groups = groups
        self._program, self._adapter = member.program, member.adapter
        self.places: dict[int, tuple[_Group, int]] = {}

    def clusters(self, program: ClusterProgram) -> LayerClusters | None:
        """The clusters of its adapter; None where it must contract its own."""
        if program is not self._program or not self._groups.serve:
            return None
        found = []
        for number in range(len(program.clusters)):
            group, place = self.places[number]
            made = group.results()
            if made is None:
                return None
            found.append(made[place])
        if not self._groups.stands(self._adapter):
            return None
        return LayerClusters(tuple(own[0] for own in found), tuple(own[1] for own in found if len(own) > 1))

    def summed(self, weight: Tensor) -> Tensor | None:
        """W + ΔW of a layer whose base weight is `weight`; None where it must contract its own."""
        if not isinstance(self._program, Weight) or not self.places or not self._groups.serve:
            return None
        group, place = self.places[0]
        assert isinstance(group, _Deltas)
        return group.summed(place, weight)


class Groups:
    """The groups of some layers of a model, for its forward passes."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        self.is_open = False
        self.groups: list[_Group] = []
        self.cores: dict[Adapter, list[Tensor]] = {}
        self._made_of: dict[Adapter, tuple[list[int], list[int]]] = {}
        self._seats = [Seat(self, member) for member in members]
        clusters: dict[Hashable, list[_ClusterOf]] = {}
        deltas: dict[Hashable, list[tuple[Member, Seat]]] = {}
        for member, seat in zip(members, self._seats, strict=True):
            if isinstance(member.program, Weight):
                deltas.setdefault((member.program, member.kind), []).append((member, seat))
                continue
            for number, (cluster, cores) in enumerate(member.program.clusters):
                own = _ClusterOf(cluster, member.adapter, cores, seat, number)
                clusters.setdefault((cluster, member.kind), []).append(own)
        self.groups += [_Clusters(self, found) for found in clusters.values()]
        self.groups += [_Deltas(self, found) for found in deltas.values() if len(found) > 1]

    @property
    def serve(self) -> bool:
        """Whether results may be had: not where activation checkpointing, a tracer or a compiler looks on."""
        return self.is_open and not saved_tensors_are_hooked() and not needs_plain_ops()

    def open(self) -> None:
        self._forget()  # an interrupt may have left the last pass open
        self.is_open = True
        for member, seat in zip(self.members, self._seats, strict=True):
            member.adapter.calling.seat = seat

    def close(self) -> None:
        self.is_open = False
        self._forget()
        # A seat holds all the layers: one of them may outlive the model.
        for member, seat in zip(self.members, self._seats, strict=True):
            if member.adapter.calling.seat is seat:
                member.adapter.calling.seat = None

    def cores_of(self, adapter: Adapter) -> list[Tensor]:
        found = self.cores.get(adapter)
        if found is None:
            found = self.cores[adapter] = adapter.core_tensors()
            self._made_of[adapter] = _sources(adapter.stored)
        return found

    def stands(self, adapter: Adapter) -> bool:
        """Whether its cores are what they were when they were contracted."""
        return self._made_of.get(adapter) == _sources(adapter.stored)

    def _forget(self) -> None:
        self.cores, self._made_of = {}, {}
        for group in self.groups:
            group.known = {}


class _Group:
    """Results of some adapters, by whether gradients reach their cores."""

    def __init__(self, groups: Groups, adapters: Sequence[Adapter], cores: Sequence[Sequence[int]]) -> None:
        self.groups, self.adapters = groups, tuple(adapters)
        self._each = tuple(dict.fromkeys(adapters))
        # The first core of every adapter, then the second of every adapter.
        self._cores = [
            (adapter, own[place])
            for place in range(len(cores[0]))
            for adapter, own in zip(adapters, cores, strict=True)
        ]
        self._starts: Starts[Any] = Starts()
        self.known: dict[tuple[bool, bool], Any] = {}

    def results(self) -> Any:
        """Of all members, made when the first of them asks; None where their tensors do not lie together.

        Those of a layer may be on its device only while it is called, as when weights are offloaded.
        """
        key = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        if key not in self.known:
            own = {adapter: self.groups.cores_of(adapter) for adapter in self._each}
            cores, others = [own[adapter][core] for adapter, core in self._cores], self._others()
            self.known[key] = None if needs_plain_ops(*cores, *others) else self._made(cores, others)
        return self.known[key]

    def _others(self) -> list[Tensor]:
        """What results are made of beside the cores."""
        return []

    def _made(self, cores: Sequence[Tensor], others: Sequence[Tensor]) -> Any:
        raise NotImplementedError

    def _contracted(self, code: Any, cores: Sequence[Tensor], others: Sequence[Tensor], made: Make) -> Sequence[Tensor]:
        """`made` of the cores, kept from pass to pass where that is wanted; it is made of `others` too."""
        keeping = self.adapters[0].keeping
        return (
            made(cores) if keeping is None else keeping.results((code, *self._cores), self._each, others, cores, made)
        )

    def _start(self, code: Any) -> Any:
        """What the code needs of the frozen copies."""
        if self.adapters[0].network.start == "zero":
            return None
        start = {adapter: adapter.start_tensors() for adapter in self._each}
        return self._starts.of(code, self._each, [start[adapter][core] for adapter, core in self._cores], code.start)


class _ClusterOf(NamedTuple):
    """A cluster of an adapter, its number among all: its cores, by their number in the network."""

    cluster: Cluster
    adapter: Adapter
    cores: tuple[int, ...]
    seat: Seat
    number: int


class _Clusters(_Group):
    """One cluster of each member: its values, and its paired form if it has one."""

    def __init__(self, groups: Groups, members: Sequence[_ClusterOf]) -> None:
        super().__init__(groups, [member.adapter for member in members], [member.cores for member in members])
        self._code = build_cluster(members[0].cluster, len(members))
        for place, member in enumerate(members):
            member.seat.places[member.number] = (self, place)

    def _made(self, cores: Sequence[Tensor], others: Sequence[Tensor]) -> Sequence[tuple[Tensor, ...]]:
        found = self._contracted(self._code, cores, others, lambda cores: self._code(cores, self._start(self._code)))
        count = self._code.count
        return [tuple(found[place::count]) for place in range(count)]


class _Sum(NamedTuple):
    """W + ΔW of a layer, the base weight that is in it, and how often the two were written to."""

    total: Tensor
    weight: Tensor
    writes: tuple[list[int], list[int]]


class _Deltas(_Group):
    """W + ΔW of each member."""

    def __init__(self, groups: Groups, members: Sequence[tuple[Member, Seat]]) -> None:
        first, _ = members[0]
        cores = range(len(first.adapter.network.cores))
        super().__init__(groups, [member.adapter for member, _ in members], [cores] * len(members))
        self._layers = [member.layer for member, _ in members]
        assert isinstance(first.program, Weight)
        self._code = build_delta(first.program, len(members))
        for place, (_, seat) in enumerate(members):
            seat.places[0] = (self, place)

    def summed(self, place: int, weight: Tensor) -> Tensor | None:
        """That of one layer; None where it is not made of what the layer has now, or was written to."""
        made: list[_Sum] | None = self.results()
        if made is None:
            return None
        found = made[place]
        stands = found.writes == _sources((found.total, weight)) and self.groups.stands(self.adapters[place])
        return found.total if stands else None

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
    return [*map(id, tensors)], writes_of(tensors)


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
