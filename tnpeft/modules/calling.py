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
from tnpeft.modules.tuning import can_be_timed, quickest
from tnpeft.plan import Call, Plan, best_plan, feasible_plans, plan
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
    from tnpeft.modules.layers import AdaptedLayer

__all__ = ["Calling", "Group", "Running"]

# Calls that an adapter remembers, those of the most recent sizes: sequences may have any length. A call that was
# forgotten is planned as before, for plans are deterministic, and what was timed is in the adapter's `choices`.
CALLS = 64


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
        self._last: dict[bool, Running] = {}
        self.keeping: Keeping | None = None
        self._calls: dict[Any, Running] = {}
        self._starts = _Starts([adapter])

    def running(self, layer: AdaptedLayer, x: Tensor, rest: Sequence[Any]) -> Running:
        """How a call with this input runs; the last one is remembered."""
        adapter, base = self.adapter, layer.base
        training = adapter.mode != "auto" or (torch.is_grad_enabled() and _takes_gradients(adapter))
        size = tuple(rest[0]) if rest and rest[0] is not None else None
        key = (x.shape, x.device, size, base.weight.stride(), training)
        found = self._calls.pop(key, None) or self._planned(layer, x, rest, training)
        self._calls[key] = found
        if len(self._calls) > CALLS:
            self._calls.pop(next(iter(self._calls)), None)
        self._last[torch.is_grad_enabled()] = found
        return found

    @property
    def last(self) -> Running | None:
        """How the last call ran, with gradients or without as is the case now; failing that, the other."""
        differentiable = torch.is_grad_enabled()
        return self._last.get(differentiable) or self._last.get(not differentiable)

    @property
    def mode(self) -> str | None:
        """The mode of the last call with gradients or, if there was none, of the last one."""
        found = self._last.get(True) or self._last.get(False)
        return None if found is None else found.mode

    def clusters(self, running: Running) -> LayerClusters:
        """The clusters of the adapter's cores as they are now."""
        if self.group is not None:
            found = self.group.clusters_of(self.adapter, running)
            if found is not None:
                return found
        assert running.clusters is not None
        return _contracted(running.clusters, [self.adapter], self._starts)[0]

    def _planned(self, layer: AdaptedLayer, x: Tensor, rest: Sequence[Any], training: bool) -> Running:
        """Decided once: activation checkpointing, for one, must find the same when it calls again."""
        adapter, base = self.adapter, layer.base
        call = call_of(base, adapter.network.layer, x.shape, rest[0] if rest else None, x.device.type)
        if call is None:
            return Running("dense", adapter.plan)
        if adapter.mode != "auto":
            return self._ready(plan(adapter.network, adapter.mode, call), call)
        name = f"{call.device}, {call}" + ("" if training else ", inference")
        if name in adapter.choices:
            return self._ready(plan(adapter.network, adapter.choices[name], call), call)
        plans = feasible_plans(adapter.network, call, not training)
        if not adapter.autotune or saved_tensors_are_hooked() or not can_be_timed(x):
            return self._ready(best_plan(plans, call, not training), call)
        options = [self._ready(one, call) for one in plans]
        adapter.choices[name] = mode = quickest(layer, options, x, rest, training)
        return next(option for option in options if option.mode == mode)

    def _ready(self, found: Plan, call: Call) -> Running:
        """What runs a plan."""
        if found.mode == "dense":
            return Running("dense", found, call)
        factored = found.chain or found
        completion = build_completion(factored, self.adapter.memory_order) if found.mode == "hybrid" else None
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
        self._found = {}  # an interrupt may have left the last pass open
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
            return program.flat(cores, ())
        return program.flat(cores, starts.of(program, [adapter.start_tensors() for adapter in adapters]))

    keeping = adapters[0].keeping
    found = made(cores) if keeping is None else keeping.results((program, *adapters), adapters, (), cores, made)
    return program.split(found)


def _takes_gradients(adapter: Adapter) -> bool:
    """Whether something that it trains does; cores that are held elsewhere are looked at last, for it takes longer."""
    own = any(parameter.requires_grad for parameter in adapter._parameters.values() if parameter is not None)
    return own or any(core.requires_grad for core in adapter.cores.values())
