"""Adapted parameters: their owner reads W + ΔW under their names.

torch's parametrizations do the same, but rename the parameter in state dicts and cannot be pickled. Here the parameter
stays where it is, and the owner's class becomes a subclass in which the name reads the sum (`adapters.parked`). The
adapters are a module below the owner.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from tnpeft.adapters.distributed import refuse_distributed
from tnpeft.adapters.offload import wrapper_of
from tnpeft.adapters.parked import MANGLED, ParameterLayer, own_weight, read_through
from tnpeft.adapters.parked_states import forget_hook, make_again
from tnpeft.errors import ExecutionError, Problem
from tnpeft.execution.forward_pass import ModelResults
from tnpeft.execution.layers import AdaptedLayer, make_layer_again
from tnpeft.execution.modes import summed_weight
from tnpeft.execution.serving import read_weight, refuse_gradients
from tnpeft.execution.site import Site
from tnpeft.execution.torch_call import add_weight
from tnpeft.program import needs_plain_ops
from tnpeft.program.rows import delta_rows
from tnpeft.schedule.plans import obstacle

__all__ = ["AdaptedParameter"]


class AdaptedParameter(AdaptedLayer):
    """A parameter with named adapters. It has no forward pass: the parameter's owner reads the sum from it.

    Within a forward pass of the model, or a call of the owner, the sum is computed once, however often it is read.
    """

    __jit_unused_properties__: ClassVar[list[str]] = [*AdaptedLayer.__jit_unused_properties__, "key"]

    base: ParameterLayer

    def __init__(self, base: Any, results: ModelResults) -> None:
        super().__init__(base, results)

    def _take(self, base: Any) -> None:
        self.__dict__["_base"] = base
        self.register_load_state_dict_post_hook(make_layer_again)  # type: ignore[no-untyped-call]

    @property
    def key(self) -> str:
        """Its name among the submodules of the parameter's owner."""
        return f"{MANGLED}on_{self.base.key}"

    @property
    def place(self) -> tuple[nn.Module, str, str]:
        return self.base.owner, "_parameters", self.base.key

    @property
    def weight(self) -> Tensor:
        """The tensor that the owner reads."""
        weight: Tensor = getattr(self.base.owner, self.base.key)
        return weight

    @property
    def bias(self) -> None:
        return

    def hang(self) -> None:
        """Let the owner read the sum."""
        for holder in self._holders():
            holder._modules[self.key] = self
        make_again(self.base.owner, True)
        self._settle()

    def unwrap(self) -> None:
        """Leave the parameter to its owner."""
        owner = self.base.owner
        read_through(owner, self.base.key, None)
        for holder in self._holders():
            holder._modules.pop(self.key, None)  # an owner with several names comes here once for each
        forget_hook(self._load_state_dict_post_hooks, make_layer_again)
        make_again(owner, False)

    def _holders(self) -> tuple[nn.Module, ...]:
        """The owner and, where it is a layer that carries adapters too, what hangs in its place."""
        return self.base.owner, wrapper_of(self.base.owner)

    def effective(self, weight: Tensor) -> Tensor:
        """W + Σ s ΔW, for an acting parameter `weight`."""
        site = self.site
        if is_fx_symbolic_tracing():
            raise self._traced()
        if needs_plain_ops(weight):
            refuse_distributed(site.name, [weight])
            return summed_weight(site, weight, True)
        kept = read_weight(site)
        if kept is not None:
            return kept
        sums = site.results.sums
        if sums is None:
            return summed_weight(site, weight, False)
        adapters = [acting.adapter for acting in site.acting]
        return sums.once(self, adapters, weight, lambda: summed_weight(site, weight, False))

    def reading(self) -> AbstractContextManager[None]:
        """A context for a call of the owner."""
        if self.site.results.weights.opened:
            refuse_gradients(self.site)
        return nullcontext() if needs_plain_ops() else self.site.results.reading()

    def looked_up(self, rows: Tensor) -> Tensor | None:
        """What an embedding looks up: the rows of W and of ΔW; None if the whole sum is to be read.

        In `auto`, the whole sum is read for more rows than the weight has.
        """
        site, base = self.site, self.base
        embedding: Any = base.owner
        weight = base.weight
        if weight.shape[0] != embedding.num_embeddings:
            raise self._resized(weight.shape[0], embedding.num_embeddings)
        if needs_plain_ops(rows, weight) or site.results.is_opened or embedding.scale_grad_by_freq:
            return None
        for acting in site.acting:
            mode = acting.adapter.mode
            if mode in ("dense", "hybrid") or obstacle(acting.adapter.network) is not None:
                return None
            if mode == "auto" and rows.numel() >= embedding.num_embeddings:
                return None
        found = nn.functional.embedding(rows, weight.detach(), embedding.padding_idx)
        total = self._rows_of(site, rows.reshape(-1).long())
        if embedding.padding_idx is not None:  # no gradient comes from there
            total = torch.where((rows == embedding.padding_idx).reshape(-1, 1), total.detach(), total)
        return add_weight(total.reshape(found.shape), found, True)

    @staticmethod
    def _rows_of(site: Site, rows: Tensor) -> Tensor:
        """(rows, out): Σ s ΔW at some rows."""
        total: Tensor | None = None
        for acting in site.acting:
            adapter = acting.adapter
            delta = (
                delta_rows(adapter.plan.network, adapter.core_tensors(), adapter.start_tensors(), rows) * acting.scale
            )
            total = delta if total is None else total + delta
        assert total is not None
        return total

    def _settle(self) -> None:
        super()._settle()
        owner, acts = self.base.owner, bool(self.site.acting)
        if owner._modules.get(self.key) is self:
            read_through(owner, self.base.key, self.key if acts else None)

    def _traced(self) -> ExecutionError:
        fix = "Merge first (`tnpeft.merge`), or let the tracer take the module that holds it as a leaf."
        found = "`torch.fx.symbolic_trace`, whose graph would hold its values of now"
        return ExecutionError(Problem("an adapted parameter", "calls that read it", found, fix, where=self.where))

    def _resized(self, rows: int, wanted: int) -> ExecutionError:
        fix = f"Set `num_embeddings` back to {rows}, take the adapters off (`tnpeft.detach`), resize, and attach again."
        found = f"{rows}: what was written to the sum with its updates is lost"
        return ExecutionError(
            Problem("rows of its weight", f"the {wanted} of `num_embeddings`", found, fix, self.where)
        )

    @property
    def where(self) -> str | None:
        return f"parameter '{self.layer_name}'" if self.layer_name else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedParameter:
        self.results.weights.forget()
        nn.Module._apply(self, fn, recurse)  # type: ignore[no-untyped-call]
        weight = own_weight(self.base)
        if self.merged and fn(weight.new_empty(0)).dtype != weight.dtype:
            with torch.no_grad():  # before the owner's turn: the sum of the cast weight, not the cast sum
                weight.data = fn(weight.data)
            self.merge()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        nn.Module._load_from_state_dict(self, *args)
