"""What the layers of a model compute from their cores, and its lifetime: one forward pass, or while accumulating.

A pass belongs to the thread that opens it, and its results end with it. A layer that is called outside a pass of its
thread contracts its own cores. So does a layer within activation checkpointing, which must see the same operations when
it calls the layer again.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tnpeft.adapters import Adapter
from tnpeft.adapters.distributed import DISTRIBUTED, is_split
from tnpeft.adapters.factors import Light
from tnpeft.adapters.parked import ParameterLayer
from tnpeft.execution.batch_rows import Rows
from tnpeft.execution.batches import Batch, Batches, Member, Sources, sources_of
from tnpeft.execution.calls import Acting
from tnpeft.execution.derived_batches import DerivedBatch, DerivedResults, derived_batches
from tnpeft.execution.results import KeptWeights, ResultCache
from tnpeft.program import ClusterProgram, LayerClusters, Weight, saved_tensor_hooks, saved_tensors_are_hooked

__all__ = ["Batching", "ForwardPass", "ModelResults", "Sums"]


class _Cores(NamedTuple):
    """The cores of an adapter as a pass contracted them, and what they were made of."""

    tensors: list[Tensor]
    sources: Sources


class _Sum(NamedTuple):
    """A parameter's sum with its updates, and what it was made of."""

    total: Tensor
    sources: Sources


class Sums:
    """The sums that reading adapted parameters gives, during a forward pass of the model or a call of their owner."""

    def __init__(self) -> None:
        self._sums: dict[tuple[Any, bool, bool], _Sum] = {}
        self._hooks = saved_tensor_hooks()

    @property
    def is_open(self) -> bool:
        """Whether hooks on saved tensors are as at its start: what checkpointing calls again makes its own sums."""
        return self._hooks == saved_tensor_hooks()

    def once(self, key: Any, adapters: Sequence[Adapter], weight: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """The sum of `weight` and updates of `adapters`, computed once as long as none of them changes."""
        asked = key, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        stored = [weight, *(tensor for adapter in adapters for tensor in adapter.stored)]
        known = self._sums.get(asked)
        if known is not None and known.sources == sources_of([known.total, *stored]):
            return known.total
        total = make()
        self._sums[asked] = _Sum(total, sources_of([total, *stored]))
        return total


class ForwardPass:
    """What the layers of a model contract together while a thread runs its forward pass."""

    def __init__(self, batches: Batches, derived: Mapping[Adapter, DerivedBatch]) -> None:
        self._batches, self._derived = batches, derived
        self._light: dict[tuple[DerivedBatch, bool, bool], dict[Adapter, DerivedResults] | None] = {}
        self.sums = Sums()
        self._results: dict[tuple[bool, bool], dict[Batch, Any]] = {}
        self._cores: dict[tuple[Adapter, bool, bool], _Cores] = {}
        self._starts: dict[tuple[Adapter, bool, bool], list[Tensor]] = {}

    def clusters(self, adapter: Adapter, program: ClusterProgram) -> LayerClusters | None:
        """The clusters of an adapter; None where it must contract its own."""
        member = self._batches.places_of.get(adapter)
        if member is None or program is not member.program:
            return None
        clusters = []
        for batch, place in member.places:
            results = self.results(batch)
            if results is None:
                return None
            clusters.append(results[place])
        if not self.is_current(adapter):
            return None
        return LayerClusters(
            tuple([cluster[0] for cluster in clusters]), tuple([cluster[1] for cluster in clusters if len(cluster) > 1])
        )

    def summed(self, adapter: Adapter, weight: Tensor) -> Tensor | None:
        """W + ΔW of a layer whose base weight is `weight`; None where it must contract its own."""
        member = self._batches.places_of.get(adapter)
        if member is None or not isinstance(member.program, Weight) or not member.places:
            return None
        batch, place = member.places[0]
        sums = self.results(batch)
        if sums is None:
            return None
        total: Tensor = sums[place].total
        current = sums[place].sources == sources_of((total, weight)) and self.is_current(adapter)
        return total if current else None

    def results(self, batch: Batch) -> Any:
        """The results of all members of a batch, computed when the first asks; None on the plain path.

        With offloaded weights a layer's tensors are on its device only while it is called.
        """
        key = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        known = self._results.get(key)
        if known is None:
            known = self._results[key] = {}
        if batch not in known:
            known[batch] = batch.results(self.cores_of, self.starts_of)
        return known[batch]

    def cores_of(self, adapter: Adapter) -> list[Tensor]:
        """The cores that an adapter had when they were first asked for."""
        key = adapter, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        known = self._cores.get(key)
        if known is None:
            light = None if adapter.factors is None else self.light(adapter)
            cores = adapter.core_tensors(light=light)
            known = self._cores[key] = _Cores(cores, sources_of(adapter.stored))
        return known.tensors

    def starts_of(self, adapter: Adapter) -> list[Tensor]:
        """The frozen copies of its cores, and what else its derived cores had at the start."""
        key = adapter, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        if key not in self._starts:
            self._starts[key] = adapter.start_tensors()
        return self._starts[key]

    def light(self, adapter: Adapter) -> Light:
        """The derived cores that it shares with equal layers, computed for all of them when the first asks."""
        batch = self._derived.get(adapter)
        if batch is None:
            return None
        key = batch, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        if key not in self._light:
            self._light[key] = batch.results()
        results = self._light[key]
        if results is None or results[adapter].sources != sources_of(adapter.stored):
            return None
        return results[adapter].cores

    def is_current(self, adapter: Adapter) -> bool:
        """Whether its cores are what they were when they were contracted."""
        known = self._cores.get((adapter, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return known is not None and known.sources == sources_of(adapter.stored)


class _Thread(threading.local):
    """The pass of a model that a thread has open, its innermost call of an owner of adapted parameters, its rows."""

    current: ForwardPass | None = None
    sums: Sums | None = None
    rows: Rows | None = None


class _Anew:
    """What copies and pickles of a model begin without."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class ModelResults(_Anew):
    """The results of one model's layers: in a thread's open pass; for all threads while `accumulating` or `serving`.

    All layers of a model have the same object.
    """

    def __init__(self) -> None:
        self.cache = ResultCache()
        self.weights = KeptWeights()
        self.rows_opened = 0  # contexts of any thread in which rows have adapters of their own
        self.lock = threading.RLock()  # for who opens or closes one, or one that keeps weights
        self._thread = _Thread()

    def forget(self) -> None:
        """Drop all results, after a change of the layers, their adapters or scales."""
        self.cache.forget()
        self.weights.forget()
        self._thread.current = None

    def open_pass(self, opened: ForwardPass | None) -> None:
        """Begin a pass of this thread; one that an interrupt has left open is forgotten."""
        self._thread.current = opened

    def close_pass(self) -> None:
        self._thread.current = None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, which is a call of an owner of adapted parameters, each of their sums is made once."""
        before, self._thread.sums = self._thread.sums, Sums()
        try:
            yield
        finally:
            self._thread.sums = before

    @property
    def is_opened(self) -> bool:
        """Whether a context is open in which something is kept from pass to pass."""
        return bool(self.cache.opened or self.weights.opened)

    @property
    def is_serving(self) -> bool:
        """Whether this thread's calls use kept weights, and share nothing that a pass would make."""
        return bool(self.weights.opened) and self.rows is None

    @property
    def sums(self) -> Sums | None:
        """Where sums are kept now: in the pass of this thread or, within checkpointing, in the owner's call."""
        current = self.current
        sums = self._thread.sums if current is None else current.sums
        return sums if sums is not None and sums.is_open else None

    @property
    def current(self) -> ForwardPass | None:
        """The pass that is open in this thread, for layers on their fast path; None within activation checkpointing."""
        current = self._thread.current
        return None if current is None or saved_tensors_are_hooked() else current

    @property
    def rows(self) -> Rows | None:
        """The adapters of the rows of this thread's batches; None if all rows have what acts."""
        return self._thread.rows

    @rows.setter
    def rows(self, rows: Rows | None) -> None:
        self._thread.rows = rows


class Batching(_Anew):
    """The batches of a model's layers. It belongs to the model: a layer must not keep the others alive."""

    def __init__(self) -> None:
        self._layers: Sequence[tuple[Any, Acting]] | None = None
        self._batches: Batches | None = None
        self._derived: Mapping[Adapter, DerivedBatch] = {}
        self._made_for: list[Any] = []
        self._reads = False

    def new_pass(self, layers: Callable[[], Sequence[tuple[Any, Acting]]], results: ModelResults) -> ForwardPass | None:
        """A pass in which layers run in the mode that they were given, or in that of their last call.

        `layers` finds the base layers on which one adapter acts at scale 1, each with it. None if no batch has any of
        them, and no adapted parameter is read.
        """
        if self._layers is None:
            self._layers = layers()
        if DISTRIBUTED in sys.modules and any(is_split(base, acting.adapter) for base, acting in self._layers):
            return None  # their tensors are whole while the layer runs, and no longer
        made_for: list[Any] = []
        for base, acting in self._layers:  # a loop with few calls, for every pass goes through all layers
            adapter, weight = acting.adapter, base.weight
            last = None if adapter.mode == "dense" else acting.calls.last
            made_for.append((last, adapter.changes, weight.device, weight.dtype, weight.stride()))
        batches = self._batches
        if batches is None or made_for != self._made_for:
            members = [_member(base, acting) for base, acting in self._layers]
            self._batches = batches = Batches([member for member in members if member is not None], results.cache)
            self._derived = derived_batches([acting.adapter for _, acting in self._layers])
            self._made_for = made_for
            self._reads = any(type(base) is ParameterLayer for base, _ in self._layers)
        return ForwardPass(batches, self._derived) if batches.places_of or self._reads or self._derived else None


def _member(base: Any, acting: Acting) -> Member | None:
    """What a layer is to contract; None of layers that contract their own. All but `dense` is known from a call."""
    adapter = acting.adapter
    if not adapter.has_values:
        return None
    if adapter.mode == "dense":
        return Member.dense(base, adapter)
    last = acting.calls.last
    if last is None or last.clusters is None:
        return None if last is None else Member.dense(base, adapter)
    return Member(base, adapter, last.clusters)
