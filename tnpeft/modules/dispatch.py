"""What an adapter needs to be called: a plan for each call, and the clusters of its cores."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tnpeft.modules.autotune import can_be_timed, quickest
from tnpeft.modules.forward_pass import Starts, open_pass
from tnpeft.modules.results import ResultCache
from tnpeft.modules.torch_call import call_of
from tnpeft.planning import Call, Plan, best_plan, feasible_plans, plan
from tnpeft.program import (
    ChainProgram,
    ClusterMerge,
    ClusterProgram,
    LayerClusters,
    build_chain,
    build_cluster_merge,
    build_clusters,
    needs_plain_ops,
    saved_tensors_are_hooked,
)

if TYPE_CHECKING:
    from tnpeft.modules.adapter import Adapter
    from tnpeft.modules.layers import AdaptedLayer

__all__ = ["Calling", "Running", "needs_plain_ops"]

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
    merge: ClusterMerge | None = None


class Calling:
    """The calls of one adapter."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self._last: dict[bool, Running] = {}
        self.cache: ResultCache | None = None
        self._calls: dict[Any, Running] = {}
        self._planning = threading.Lock()
        self._starts: Starts[Any] = Starts()

    def running(self, layer: AdaptedLayer, x: Tensor, rest: Sequence[Any]) -> Running:
        """How a call with this input runs; the last one is remembered."""
        adapter, base = self.adapter, layer.base
        training = adapter.mode != "auto" or (torch.is_grad_enabled() and _takes_gradients(adapter))
        size = tuple(rest[0]) if rest and rest[0] is not None else None
        key = (x.shape, x.device, size, base.weight.stride(), training)
        with self._planning:  # once for all threads: modes that are timed twice may not agree
            found = self._calls.pop(key, None) or self._planned(layer, x, rest, training)
            self._calls[key] = found
            if len(self._calls) > CALLS:
                del self._calls[next(iter(self._calls))]
        self._last[torch.is_grad_enabled()] = found
        return found

    def plain_run(
        self, layer: AdaptedLayer, shape: tuple[int, ...], output_size: tuple[int, ...] | None, training: bool
    ) -> str | None:
        """The attribute with the chain and clusters of a call whose operations somebody looks on at; None: it is dense.

        Dense operations are those of hybrid too. Nothing is timed. A compiler guards single attributes by themselves,
        but tables as a whole.
        """
        adapter = self.adapter
        call = call_of(layer.base, adapter.network.layer, shape, output_size, layer.base.weight.device.type)
        if call is None:
            return None
        mode = adapter.mode if adapter.mode != "auto" else adapter.choices.get(_name_of(call, training), "auto")
        found = plan(adapter.network, mode, call, inference=not training)
        if found.mode != "factored":
            return None
        run = build_chain(found), build_clusters(found)
        run[1].lone()  # building it is nothing to trace
        key = f"_plain_{id(run[0])}_{id(run[1])}"
        if key not in self.__dict__:
            known = [name for name in list(self.__dict__) if name.startswith("_plain_")]
            for name in known[: len(known) + 1 - CALLS]:
                self.__dict__.pop(name, None)
            self.__dict__[key] = run
        return key

    def plain_clusters(self, program: ClusterProgram) -> LayerClusters:
        """The clusters as `plain_run` has them, made by plain operations."""
        adapter = self.adapter
        start = [] if adapter.network.start == "zero" else adapter.start_tensors()
        return program.split(program.flat(adapter.core_tensors(), program.start(start)))

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
        program, adapter = running.clusters, self.adapter
        assert program is not None
        current = open_pass()
        found = None if current is None else current.clusters(adapter, program)
        if found is not None:
            return found

        def made(cores: Sequence[Tensor]) -> Sequence[Tensor]:
            start = [] if adapter.network.start == "zero" else adapter.start_tensors()
            return program.flat(cores, self._starts.of(program, start, program.start))

        cores, cache = adapter.core_tensors(), adapter.cache
        return program.split(
            made(cores) if cache is None else cache.get((program, adapter), [adapter], (), cores, made)
        )

    def summed(self, weight: Tensor) -> Tensor | None:
        """W + ΔW as its group made it; None where the layer must make its own."""
        current = open_pass()
        return None if current is None else current.summed(self.adapter, weight)

    def _planned(self, layer: AdaptedLayer, x: Tensor, rest: Sequence[Any], training: bool) -> Running:
        """Decided once: activation checkpointing, for one, must find the same when it calls again."""
        adapter, base = self.adapter, layer.base
        call = call_of(base, adapter.network.layer, x.shape, rest[0] if rest else None, x.device.type)
        if call is None:
            return Running("dense", adapter.plan)
        if adapter.mode != "auto":
            return self._ready(plan(adapter.network, adapter.mode, call), call)
        name = _name_of(call, training)
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
        merge = build_cluster_merge(factored, self.adapter.memory_order) if found.mode == "hybrid" else None
        return Running(found.mode, found, call, build_chain(factored), build_clusters(factored), merge)


def _name_of(call: Call, training: bool) -> str:
    """A call in words, as `choices` know it."""
    return f"{call.device}, {call}" + ("" if training else ", inference")


def _takes_gradients(adapter: Adapter) -> bool:
    """Whether something that it trains does; cores that are held elsewhere are looked at last, for it takes longer."""
    own = any(parameter.requires_grad for parameter in adapter._parameters.values() if parameter is not None)
    return own or any(core.requires_grad for core in adapter.cores.values())
