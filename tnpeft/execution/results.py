"""What is kept from one forward pass to the next, as long as the tensors that it was made of are as they were.

`StartConstants` are made of frozen copies, which hardly ever change. `KeptWeights` has the summed weights of layers
while `tnpeft.serving` is open, without gradients. A `ResultCache` has what is computed from the cores while
`tnpeft.accumulating` is open: the results, and the small graph that made them, on leaves of its own. Every forward pass
gets the results as new tensors from a new autograd node, whose backward pass runs that graph. So each micro-step has
the gradients that it would have without the cache. All threads that run the model share what is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from tnpeft.adapters import Adapter
from tnpeft.adapters.distributed import is_split
from tnpeft.errors import ExecutionError, Problem
from tnpeft.program import is_lasting, needs_plain_ops, saved_tensors_are_hooked, versions

__all__ = ["KeptWeight", "KeptWeights", "Make", "ResultCache", "StartConstants"]

Make = Callable[[Sequence[Tensor]], Sequence[Tensor]]
_Made = TypeVar("_Made")
_Table = Mapping[str, Tensor | None]
_Sources = tuple[Sequence[_Table], Sequence[Tensor]]


class StartConstants(Generic[_Made]):
    """The latest result from frozen copies, kept as long as these are the same tensors and are not written to."""

    def __init__(self) -> None:
        # One tuple, so that no thread sees a part of what another one leaves here.
        self._known: tuple[object, Sequence[Tensor], list[int], _Made] | None = None

    def get(self, code: object, start: Sequence[Tensor], make: Callable[[Sequence[Tensor]], _Made]) -> _Made:
        """The result of `make(start)`, computed anew for another `code`; never kept on the plain path."""
        if needs_plain_ops(*start):  # a graph holds no tensor made elsewhere
            return make(start)
        written = versions(start)
        if self._known is not None:
            known, tensors, before, constants = self._known
            # By identity, for `torch.func.functional_call` may pass other tensors.
            if known is code and before == written and _same_tensors(tensors, start):
                return constants
        with torch.inference_mode(False), torch.no_grad():
            constants = make(start)
        if is_lasting(constants):
            self._known = code, start, written, constants
        return constants


class KeptWeights:
    """W + Σ s ΔW of one model's layers, each made when it is first asked for; nothing is kept unless it is open."""

    def __init__(self) -> None:
        self.opened = 0  # contexts of any thread
        self.known: dict[object, KeptWeight] = {}  # by the base layer
        self._lock = threading.RLock()

    @property
    def bytes(self) -> int:
        """What all of them take."""
        return sum(known.total.untyped_storage().nbytes() for known in [*self.known.values()])

    def forget(self) -> None:
        with self._lock:
            self.known = {}

    def get(
        self,
        base: object,
        acting: Sequence[Any],
        owner: nn.Module,
        weights: Sequence[Tensor],
        make: Callable[[], Tensor | None],
    ) -> Tensor | None:
        """The sum for a base layer that `make` gives, kept from now on; None where there is none to keep.

        The `owner` holds `weights`, the base weight and what acts in its place. Where one is not in its tables, or of
        inference mode, whose writes nobody counts, no sum is kept.
        """
        with self._lock:  # others wait for what one of them makes
            if not self.opened:  # another thread has closed it since this one asked
                return None
            known = self.known.pop(base, None)
            if known is None or not known.is_current(acting):
                del known  # before there are two
                sources = _sources(owner, weights, [each.adapter for each in acting])
                total = None if sources is None else make()
                if sources is None or total is None or not is_lasting(total):
                    return total
                known = KeptWeight(total, acting, *sources)
            self.known[base] = known
            return known.total


class KeptWeight:
    """A sum, what acts in it, and what it was made of: tensors, and the tables of modules in which these stand."""

    def __init__(
        self, total: Tensor, acting: Sequence[Any], tables: Sequence[_Table], sources: Sequence[Tensor]
    ) -> None:
        self.total, self._acting = total, acting
        self._tables = [(table, [*map(id, table.values())]) for table in tables]
        self._tensors = [total, *sources]
        self._versions = versions(self._tensors)

    def is_current(self, acting: Sequence[Any]) -> bool:
        """Whether these act, and all tensors, the sum too, are where they were, and were not written to.

        Every call of a layer asks, when no cache of the processor holds its tensors any more: tables are compared as a
        whole, by addresses, and each tensor is looked at once.
        """
        if self._acting is not acting:
            if self._acting != acting:
                return False
            self._acting = acting
        for table, known in self._tables:
            if [*map(id, table.values())] != known:
                return False
        return [tensor._version for tensor in self._tensors] == self._versions


def _sources(owner: nn.Module, weights: Sequence[Tensor], adapters: Sequence[Adapter]) -> _Sources | None:
    """What a sum is made of, and where that stands; None if a write to some of it would not be seen."""
    sources = {id(tensor): tensor for tensor in weights}
    sources |= {id(tensor): tensor for adapter in adapters for tensor in adapter.stored}
    holders = dict.fromkeys(holder for adapter in adapters for holder in (adapter, *adapter.shared.values()))
    tables = [table for module in (owner, *holders) for table in (module._parameters, module._buffers)]
    tables = [table for table in tables if not sources.keys().isdisjoint(map(id, table.values()))]
    seen = sources.keys() <= {id(tensor) for table in tables for tensor in table.values()}
    if not seen or any(tensor.is_inference() for tensor in sources.values()):
        return None
    return tables, [*sources.values()]


class ResultCache:
    """The results of one model's layers, by a key that says what each is; nothing is kept unless it is open.

    Results are forgotten if an adapter gets new values other than by training, as when it is loaded.
    """

    def __init__(self) -> None:
        self.opened = 0  # contexts of any thread
        self._lock = threading.RLock()
        self.forget()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside, results are kept; contexts nest, and those of several threads overlap."""
        with self._lock:
            self.opened += 1
        try:
            yield
        finally:
            with self._lock:
                self.opened -= 1
                if not self.opened:
                    self.forget()

    def forget(self) -> None:
        with self._lock:
            self._results: dict[Hashable, _Kept] = {}
            self._writes: dict[Adapter, tuple[int, ...]] = {}
            self._versions: dict[Tensor, int] = {}

    def get(
        self, key: Hashable, adapters: Sequence[Adapter], others: Sequence[Tensor], inputs: Sequence[Tensor], make: Make
    ) -> tuple[Tensor, ...]:
        """The result of `make(inputs)`, computed once as long as the tensors of `adapters`, and `others`, are the same.

        Gradients reach `inputs`. Nobody else may write to the results. If there are hooks on saved tensors, as under
        activation checkpointing, results are computed anew and not kept: what is saved belongs to that forward pass.
        Raises ExecutionError if a tensor that trains, or one of `others`, has been written to since.
        """
        if not self.opened or needs_plain_ops() or torch.is_inference_mode_enabled() or is_split(*adapters):
            return tuple(make(inputs))
        sources = [*others, *(tensor for adapter in adapters for tensor in adapter.stored)]
        with self._lock:  # others wait for what one of them makes
            if not self.opened:  # another thread has closed it since this one asked
                return tuple(make(inputs))
            self._require_values(adapters, sources)
            if saved_tensors_are_hooked():
                return tuple(make(inputs))
            kept = self._results.get(key)
            if kept is None or not kept.is_current(sources, inputs):
                kept = self._results[key] = _Kept(sources, inputs, make)
        results: tuple[Tensor, ...] = _Again.apply(kept, *inputs)  # type: ignore[no-untyped-call]
        return results

    def _require_values(self, adapters: Sequence[Adapter], sources: Sequence[Tensor]) -> None:
        """Raises ExecutionError if a tensor has other values than it had when it was first seen.

        Buffers may be written to with the values that they have, as DistributedDataParallel does.
        """
        if any(self._writes.get(adapter, adapter.writes) != adapter.writes for adapter in adapters):
            self.forget()
        self._writes.update((adapter, adapter.writes) for adapter in adapters)
        trained = [tensor for tensor in sources if isinstance(tensor, nn.Parameter) or tensor.requires_grad]
        pairs = zip(trained, versions(trained), strict=True)
        if all(self._versions.setdefault(tensor, writes) == writes for tensor, writes in pairs):
            return
        name = adapters[0].layer_name
        raise ExecutionError(
            Problem(
                "weights inside `tnpeft.accumulating`",
                "the values of the first forward pass",
                "values that were written since, as by an optimiser step",
                "Step the optimiser after the context, and open one for each optimiser step.",
                where=f"layer '{name}'" if name else None,
            )
        )


class _Kept:
    """Results, the tensors that they were made of as these are stored, and the leaves and the graph of their making."""

    def __init__(self, sources: Sequence[Tensor], inputs: Sequence[Tensor], make: Make) -> None:
        self.sources = tuple(sources)
        self._wanted = _wanted(inputs)
        with torch.enable_grad():
            self.leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
            self.outputs = tuple(make(self.leaves))
        self._made = versions(self.outputs)

    def is_current(self, sources: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
        """Whether it may be used with these tensors; also not if somebody wrote to a result, `layer.weight` say."""
        return (
            _same_tensors(self.sources, sources)
            and self._wanted == _wanted(inputs)
            and self._made == versions(self.outputs)
        )

    def gradients(self, gradients: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
        """Those of the inputs that need one, from those of the results (None: zero)."""
        both = zip(self.outputs, gradients, strict=True)
        pairs = [(result, grad) for result, grad in both if grad is not None and result.requires_grad]
        leaves = [leaf for leaf, need in zip(self.leaves, needed, strict=True) if need]
        if not pairs or not leaves:
            return [None] * len(needed)
        results, result_grads = zip(*pairs, strict=True)
        grads = iter(torch.autograd.grad(results, leaves, result_grads, retain_graph=True, allow_unused=True))
        return [next(grads) if need else None for need in needed]


class _Again(torch.autograd.Function):
    """Kept results as tensors of a new node, which saves nothing."""

    @staticmethod
    def forward(ctx: Any, kept: _Kept, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.kept = kept
        results = tuple(tensor.detach() for tensor in kept.outputs)
        constant = [new for new, result in zip(results, kept.outputs, strict=True) if not result.requires_grad]
        ctx.mark_non_differentiable(*constant)
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # they would be constants, in silence
            what = "double backward through kept weights"
            fix = "Leave `tnpeft.accumulating` for second derivatives."
            raise ExecutionError(Problem(what, "gradients that are not differentiated", "`create_graph=True`", fix))
        return (None, *ctx.kept.gradients(gradients, ctx.needs_input_grad[1:]))


def _wanted(inputs: Sequence[Tensor]) -> list[bool]:
    return [tensor.requires_grad for tensor in inputs]


def _same_tensors(known: Sequence[Tensor], tensors: Sequence[Tensor]) -> bool:
    """Whether they are one by one the same, not only equal."""
    return [*map(id, known)] == [*map(id, tensors)]
