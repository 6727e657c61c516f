"""Calls with a summed weight that is kept from one to the next, while `tnpeft.serving` is open.

    y = the layer's own function (x, W + Σ s ΔW)

The sum is that of a merged layer, and so is the call, to the bit. Layers that cannot keep one, and calls that somebody
looks on at, run as they do outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tnpeft.adapters.distributed import is_split
from tnpeft.adapters.offload import is_taken_away
from tnpeft.adapters.parked import ParameterLayer, own_weight
from tnpeft.errors import ExecutionError, Problem
from tnpeft.execution.base_call import BaseCall
from tnpeft.execution.dispatch import execute, takes_gradients
from tnpeft.execution.dropout import drops
from tnpeft.execution.forward_pass import ModelResults
from tnpeft.execution.modes import fixed_weight
from tnpeft.execution.site import Site
from tnpeft.network import Layer
from tnpeft.program import needs_plain_ops

__all__ = ["execute_serving", "read_weight", "refuse_gradients", "updates_serving"]


def execute_serving(site: Site, x: Tensor, *rest: Any) -> Tensor:
    """The output with the kept weight, in whatever mode its adapters are; the usual one where none can be kept."""
    usual: Site = site.usual
    if torch.is_grad_enabled() or usual.way is not execute:
        _refuse_training(site, x)
    rows = site.results.rows if usual.every else None
    weight = None if rows is not None or needs_plain_ops(x) else _kept_weight(site)
    if weight is not None and weight.device == x.device:
        return site.call_base(site.base, x, weight, *rest)
    output: Tensor = usual.way(usual, x, *rest)
    return output


def updates_serving(site: Site, layer: Layer, called: BaseCall, output: Tensor) -> Tensor:
    """The output of an opaque layer, whose weight nobody can sum: the usual one."""
    usual: Site = site.usual
    _refuse_training(site, called.x)
    updated: Tensor = usual.way(usual, layer, called, output)
    return updated


def read_weight(site: Site) -> Tensor | None:
    """The kept sum for who reads it without a call of the layer; None where none is kept, or gradients reach it."""
    if not site.results.weights.opened or not site.acting or (torch.is_grad_enabled() and _trains(site)):
        return None
    return _kept_weight(site)


def _kept_weight(site: Site) -> Tensor | None:
    """W + Σ s ΔW of a layer; None where that is not kept."""
    weights, base = site.results.weights, site.base
    known = weights.known.get(base)
    if known is not None and known.is_current(site.acting):
        return known.total
    owner, key = (base.owner, base.key) if isinstance(base, ParameterLayer) else (base, "weight")
    if key not in owner._parameters:  # it was taken away, as calls say
        return None
    weight: Tensor = base.weight
    return weights.get(base, site.acting, owner, (weight, own_weight(base)), lambda: _made(site, owner, weight))


def _made(site: Site, owner: nn.Module, weight: Tensor) -> Tensor | None:
    """The sum; None where a weight is there only while its layer runs, or somebody looks on."""
    split = is_split(site.base, *(acting.adapter for acting in site.acting))
    if split or is_taken_away(owner) or needs_plain_ops(weight):
        return None
    # By itself, as merging makes it: in a pass, layers alike share products, which round otherwise.
    return fixed_weight(site._replace(results=ModelResults()), weight)


def _refuse_training(site: Site, x: Tensor) -> None:
    refuse_gradients(site, x)
    if site.usual.way is not execute and drops(site):
        found = "a layer in training mode, whose adapter has dropout"
        raise _refused(site, "calls that leave nothing out", found, "Call `model.eval()` first.")


def refuse_gradients(site: Site, x: Tensor | None = None) -> None:
    """Raises ExecutionError where autograd records a call: its input or something that acts trains."""
    if not torch.is_grad_enabled() or isinstance(x, torch.fx.Proxy):
        return
    if (x is not None and x.requires_grad) or _trains(site):
        fix = "Use `torch.no_grad()` or `torch.inference_mode()`."
        raise _refused(site, "calls without gradients", "one that autograd records", fix)


def _trains(site: Site) -> bool:
    """Whether a layer's adapters, or what trains beside their cores, take gradients."""
    beside = [tensor for tensor in site.base._parameters.values() if tensor is not None]
    return any(takes_gradients(acting.adapter) for acting in site.acting) or any(t.requires_grad for t in beside)


def _refused(site: Site, expected: str, found: str, fix: str) -> ExecutionError:
    kind = "parameter" if isinstance(site.base, ParameterLayer) else "layer"
    where = f"{kind} '{site.name}'" if site.name else None
    return ExecutionError(Problem("a call inside `tnpeft.serving`", expected, found, fix, where=where))
