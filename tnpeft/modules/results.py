"""What is made of the cores alone, kept from one forward pass to the next while `tnpeft.accumulating` is open.

Kept are results and the small graph that made them, on leaves of its own. Every forward pass gets the results as new
tensors from a new node of autograd, whose backward pass runs that graph: each micro-step has gradients of its own,
those that it would have without. All threads that run the model share what is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tnpeft.errors import ExecutionError, Problem
from tnpeft.program import saved_tensors_are_hooked, versions

if TYPE_CHECKING:
    from tnpeft.modules.adapter import Adapter

__all__ = ["Make", "ResultCache", "same_tensors"]

Make = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class ResultCache:
    """The results of one model's layers, by a key that says what each is.

    Results of adapters that got other values than by training, as when they are loaded, are forgotten.
    """

    def __init__(self) -> None:
        self.is_open = True
        self._lock = threading.RLock()
        self.forget()

    def close(self) -> None:
        """Keep nothing from here on."""
        with self._lock:
            self.is_open = False
            self.forget()

    def forget(self) -> None:
        with self._lock:
            self._found: dict[Hashable, _Kept] = {}
            self._writes: dict[Adapter, tuple[int, ...]] = {}
            self._versions: dict[Tensor, int] = {}

    def get(
        self, key: Hashable, adapters: Sequence[Adapter], others: Sequence[Tensor], inputs: Sequence[Tensor], make: Make
    ) -> tuple[Tensor, ...]:
        """`make(inputs)`, made once as long as it is made of the same tensors: those of `adapters`, and `others`.

        Gradients reach `inputs`. Nobody else may write to the results. Where hooks are around saved tensors, as under
        activation checkpointing, results are made anew and not kept: what is saved belongs to that forward pass.
        Raises ExecutionError if a tensor that trains, or one of `others`, has been written to since.
        """
        sources = [*others, *(tensor for adapter in adapters for tensor in adapter.stored)]
        with self._lock:  # others wait for what one of them makes
            if not self.is_open:  # another thread has closed it since this one asked
                return tuple(make(inputs))
            self._require_values(adapters, sources)
            if saved_tensors_are_hooked():
                return tuple(make(inputs))
            kept = self._found.get(key)
            if kept is None or not kept.is_current(sources, inputs):
                kept = self._found[key] = _Kept(sources, inputs, make)
        found: tuple[Tensor, ...] = _Again.apply(kept, *inputs)  # type: ignore[no-untyped-call]
        return found

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
            same_tensors(self.sources, sources)
            and self._wanted == _wanted(inputs)
            and self._made == versions(self.outputs)
        )

    def gradients(self, gradients: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
        """Those of the inputs that need one, from those of the results (None: zero)."""
        both = zip(self.outputs, gradients, strict=True)
        pairs = [(made, own) for made, own in both if own is not None and made.requires_grad]
        leaves = [leaf for leaf, need in zip(self.leaves, needed, strict=True) if need]
        if not pairs or not leaves:
            return [None] * len(needed)
        made, own = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(made, leaves, own, retain_graph=True, allow_unused=True))
        return [next(found) if need else None for need in needed]


class _Again(torch.autograd.Function):
    """Kept results as tensors of a new node, which saves nothing."""

    @staticmethod
    def forward(ctx: Any, kept: _Kept, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.kept = kept
        found = tuple(tensor.detach() for tensor in kept.outputs)
        constant = [one for one, made in zip(found, kept.outputs, strict=True) if not made.requires_grad]
        ctx.mark_non_differentiable(*constant)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # they would be constants, in silence
            what = "double backward through kept weights"
            fix = "Leave `tnpeft.accumulating` for second derivatives."
            raise ExecutionError(Problem(what, "gradients that are not differentiated", "`create_graph=True`", fix))
        return (None, *ctx.kept.gradients(gradients, ctx.needs_input_grad[1:]))


def _wanted(inputs: Sequence[Tensor]) -> list[bool]:
    return [tensor.requires_grad for tensor in inputs]


def same_tensors(known: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    """Whether they are one by one the same, not only equal."""
    return len(known) == len(found) and all(one is other for one, other in zip(known, found, strict=True))
