"""What an adapter needs to run in another mode than dense: a plan for each call, and the clusters of its cores.

The clusters of layers of one signature are contracted together, once in each forward pass of the model: with many
layers of small cores, the number of operations to start is what they cost. A `Group` holds them while a pass is open; a
layer that is called on its own, or within activation checkpointing, which must see the same operations when it calls a
layer again, contracts its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tnpeft.modules.calls import call_of
from tnpeft.modules.keeping import Keeping, saved_tensors_are_hooked
from tnpeft.plan import Call, Plan, plan
from tnpeft.program import (
    ChainProgram,
    ClusterProgram,
    Completions,
    LayerClusters,
    StartValues,
    build_chain,
    build_clusters,
    build_completion,
)

if TYPE_CHECKING:
    from tnpeft.modules.adapter import Adapter

__all__ = ["Calling", "Group", "Running"]


class Running(NamedTuple):
    """How one call runs: the mode; if it is not dense, the factored plan and its programs."""

    mode: str
    plan: Plan
    call: Call | None = None
    chain: ChainProgram | None = None
    clusters: ClusterProgram | None = None
    completion: Completions | None = None


class Calling:
    """The calls of one adapter, and the group that it is in while a forward pass of its model is open."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.group: Group | None = None
        self.last: Running | None = None
        self.keeping: Keeping | None = None
        self._calls: dict[Any, Running] = {}
        self._starts = _Starts([adapter])

    def running(self, base: Any, x: Tensor, rest: Sequence[Any]) -> Running:
        """How a call with this input runs; the last one is remembered for the group."""
        key = (x.shape, x.device, tuple(rest[0]) if rest and rest[0] is not None else None, base.weight.stride())
        found = self._calls.get(key)
        if found is None:
            found = self._calls[key] = self._planned(base, x, rest)
        self.last = found
        return found

    def clusters(self, running: Running) -> LayerClusters:
        """The clusters of the adapter's cores as they are now."""
        if self.group is not None:
            found = self.group.clusters_of(self.adapter, running)
            if found is not None:
                return found
        assert running.clusters is not None
        return _contracted(running.clusters, [self.adapter], self._starts)[0]

    def _planned(self, base: Any, x: Tensor, rest: Sequence[Any]) -> Running:
        adapter = self.adapter
        call = call_of(base, adapter.network.layer, x.shape, rest[0] if rest else None, x.device.type)
        found = adapter.plan if call is None else plan(adapter.network, adapter.mode, call)
        if found.mode == "dense":
            return Running("dense", found, call)
        factored = found.chain or found
        completion = build_completion(factored, adapter.memory_order) if found.mode == "hybrid" else None
        return Running(found.mode, found, call, build_chain(factored), build_clusters(factored, 1), completion)


class Group:
    """Adapters of one signature and one kind of chain; their clusters are contracted together."""

    def __init__(self, adapters: Sequence[Adapter], running: Running) -> None:
        self.adapters = tuple(adapters)
        factored = running.plan.chain or running.plan
        self._program = build_clusters(factored, len(adapters))
        self._single = running.clusters
        self._places = {id(adapter): place for place, adapter in enumerate(adapters)}
        self._starts = _Starts(adapters)
        self._found: dict[bool, list[LayerClusters]] = {}
        self.is_open = False

    def open(self) -> None:
        self.is_open = True
        for adapter in self.adapters:
            adapter.calling.group = self

    def close(self) -> None:
        self.is_open = False
        self._found = {}

    def clusters_of(self, adapter: Adapter, running: Running) -> LayerClusters | None:
        """The clusters of one of the adapters; None where it must contract its own."""
        if not self.is_open or running.clusters is not self._single or saved_tensors_are_hooked():
            return None
        differentiable = torch.is_grad_enabled()
        if differentiable not in self._found:
            self._found[differentiable] = _contracted(self._program, self.adapters, self._starts)
        return self._found[differentiable][self._places[id(adapter)]]


class _Starts:
    """What the changes need of frozen copies, kept as long as these are the same tensors, and were not written to."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self._adapters = adapters
        self._program: ClusterProgram | None = None
        self._start: list[list[Tensor]] = []
        self._writes: tuple[int, ...] = ()
        self._values: StartValues = ()

    def of(self, program: ClusterProgram, start: list[list[Tensor]]) -> StartValues:
        writes = tuple(number for adapter in self._adapters for number in adapter.writes)
        # By identity, for `torch.func.functional_call` may pass other tensors.
        if program is self._program and writes == self._writes and _same(self._start, start):
            return self._values
        with torch.inference_mode(False):
            self._values = program.start_values(start)
        self._program, self._start, self._writes = program, start, writes
        return self._values


def _same(known: list[list[Tensor]], found: list[list[Tensor]]) -> bool:
    return all(
        one is other for ones, others in zip(known, found, strict=True) for one, other in zip(ones, others, strict=True)
    )


def _contracted(program: ClusterProgram, adapters: Sequence[Adapter], starts: _Starts) -> list[LayerClusters]:
    own = [adapter.core_tensors() for adapter in adapters]
    cores = [core for one in own for core in one]

    def made(cores: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if adapters[0].network.start == "zero":
            return program.flat(cores, None, ())
        start = [adapter.start_tensors() for adapter in adapters]
        return program.flat(cores, start, starts.of(program, start))

    keeping = adapters[0].keeping
    found = made(cores) if keeping is None else keeping.results((program, *adapters), adapters, (), cores, made)
    return program.split(found)
