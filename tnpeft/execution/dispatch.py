"""Which mode a call of an adapted layer runs in, and by which path.

The plain path is taken under observation: by a tracer, a compiler or `torch.func`, or with tensors that are not torch's
own. Layers run dense whatever their mode if they are merged or disabled, if several adapters act on them, or if one
acts at a scale other than 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tnpeft.adapters import Adapter
from tnpeft.adapters.distributed import is_split, refuse_distributed
from tnpeft.adapters.offload import wrapper_of
from tnpeft.adapters.strides import memory_order
from tnpeft.execution.autotune import can_be_timed, quickest
from tnpeft.execution.calls import Acting, Calls, Running
from tnpeft.execution.modes import dense, plain_factored, run
from tnpeft.execution.refusals import taken_away
from tnpeft.execution.site import Site
from tnpeft.execution.torch_call import call_of
from tnpeft.planning import Call
from tnpeft.program import (
    build_chain,
    build_cluster_merge,
    build_clusters,
    needs_plain_ops,
    records_sizes,
    saved_tensors_are_hooked,
    without_inference_gradients,
)
from tnpeft.schedule import Plan, best_plan, feasible_plans, plan

__all__ = ["execute", "execute_drawn", "is_looked_on", "running_of", "takes_gradients"]


def execute(site: Site, x: Tensor, *rest: Any) -> Tensor:
    """The layer's output in the mode that its adapter has, or chooses, for this call."""
    parameters = site.base._parameters  # not by its name, which `torch.fx` would record
    if "weight" not in parameters:
        raise taken_away(site.name, "weight")
    if needs_plain_ops(x, parameters["weight"]):
        return _plain(site, site, x, *rest)
    acting = site.alone
    if acting is None or acting.adapter.mode == "dense" or x.is_nested or x.layout is not torch.strided:
        return dense(site, False, x, *rest)
    if torch.is_inference_mode_enabled() and torch.is_grad_enabled():
        with without_inference_gradients():
            return run(site, acting, running_of(site, acting, x, rest), x, *rest)
    return run(site, acting, running_of(site, acting, x, rest), x, *rest)


def is_looked_on(site: Site, x: Tensor) -> bool:
    """Whether a call takes the plain path. Raises ExecutionError if the weight was taken away."""
    if "weight" not in site.base._parameters:
        raise taken_away(site.name, "weight")
    return needs_plain_ops(x, site.base._parameters["weight"])


def execute_drawn(site: Site, drawn: Site, plain: bool, x: Tensor, *rest: Any) -> Tensor:
    """As `execute`, for a site whose adapters have masks, in the mode that the site without masks has for this call."""
    if plain:
        return _plain(site, drawn, x, *rest)
    acting, masked = site.alone, drawn.alone
    with without_inference_gradients():
        if acting is None or masked is None or acting.adapter.mode == "dense" or x.is_nested:
            return dense(drawn, False, x, *rest)
        return run(drawn, masked, running_of(site, acting, x, rest), x, *rest)


def _plain(site: Site, drawn: Site, x: Tensor, *rest: Any) -> Tensor:
    """The output by plain operations, with what acts on `drawn`: the site itself, or with masks.

    Who records operations for inputs of other sizes gets the dense ones, which fit any size, as does a compiled graph
    whose sizes may vary.
    """
    if isinstance(x, torch.fx.Proxy):  # the graph has the layer as one node, as it has torch's layers
        path = x.tracer.path_of_module(wrapper_of(site.base))
        node: Tensor = x.tracer.create_proxy("call_module", path, (x, *rest), {})
        return node
    tensors = [x, *(tensor for tensor in site.base._parameters.values() if tensor is not None)]
    refuse_distributed(site.name, tensors)
    acting, masked = site.alone, drawn.alone
    if acting is None or masked is None or acting.adapter.mode in ("dense", "hybrid") or records_sizes():
        return dense(drawn, True, x, *rest)
    output_size = tuple(rest[0]) if rest and rest[0] is not None else None
    shape = tuple(x.shape)
    if not all(map(_is_static, (*shape, *(output_size or ())))):
        return dense(drawn, True, x, *rest)
    key = _plain_run(acting.adapter, site.base, acting.calls, shape, output_size, torch.is_grad_enabled())
    if key is None:
        return dense(drawn, True, x, *rest)
    return plain_factored(drawn, masked, *getattr(acting.calls, key), x, *rest)


def _is_static(size: int) -> bool:
    """Whether the size is a number, also for a compiler, to which sizes that may vary look like numbers too."""
    if torch.compiler.is_compiling():
        return torch.fx.experimental.symbolic_shapes.has_static_value(size)
    return type(size) is int


def _plain_run(
    adapter: Adapter,
    base: Any,
    calls: Calls,
    shape: tuple[int, ...],
    output_size: tuple[int, ...] | None,
    training: bool,
) -> str | None:
    """The attribute of `calls` with the chain and clusters of a plain call; None: it is dense, as those of hybrid are.

    `auto` does not choose hybrid here, nor what was timed as hybrid: it takes the better of the other two.
    Nothing is timed. Compilers do not trace it: they guard its arguments, and equal arguments give the same plan.
    """
    call = call_of(base, adapter.network.layer, shape, output_size, base.weight.device.type)
    if call is None or (adapter.side is not None and _pads_by_itself(base)):
        return None
    mode = adapter.mode if adapter.mode != "auto" else adapter.choices.get(_name_of(call, training), "auto")
    if adapter.mode == "auto" and mode in ("auto", "hybrid"):
        plans = feasible_plans(adapter.network, call, not training)
        planned = best_plan((feasible for feasible in plans if feasible.mode != "hybrid"), call, not training)
    else:
        planned = plan(adapter.network, mode, call)
    if planned.mode != "factored":
        return None
    return calls.keep_plain(build_chain(planned), build_clusters(planned))


# What `torch.compiler.assume_constant_result` does, which imports the whole compiler for it.
_plain_run._dynamo_marked_constant = True  # type: ignore[attr-defined]


def running_of(site: Site, acting: Acting, x: Tensor, rest: Sequence[Any]) -> Running:
    """How a call with this input runs; decided once, because activation checkpointing must get the same again."""
    adapter = acting.adapter
    training = adapter.mode != "auto" or (torch.is_grad_enabled() and takes_gradients(adapter))
    size = tuple(rest[0]) if rest and rest[0] is not None else None
    key = (x.shape, x.device, size, site.base.weight.stride(), training)
    return acting.calls.get(key, lambda: _planned(site, acting, x, rest, training))


def _planned(site: Site, acting: Acting, x: Tensor, rest: Sequence[Any], training: bool) -> Running:
    adapter, base = acting.adapter, site.base
    call = call_of(base, adapter.network.layer, x.shape, rest[0] if rest else None, x.device.type)
    if call is None or (adapter.side is not None and _pads_by_itself(base)):
        return Running("dense", adapter.plan)
    if adapter.mode != "auto":
        return _ready(plan(adapter.network, adapter.mode, call), call, base)
    name = _name_of(call, training)
    if name in adapter.choices:
        return _ready(plan(adapter.network, adapter.choices[name], call), call, base)
    plans = feasible_plans(adapter.network, call, not training)
    if not adapter.autotune or saved_tensors_are_hooked() or is_split(base, adapter) or not can_be_timed(x):
        return _ready(best_plan(plans, call, not training), call, base)
    options = [_ready(feasible, call, base) for feasible in plans]
    adapter.choices[name] = mode = quickest(site, options, x, rest, training)
    return next(option for option in options if option.mode == mode)


def _pads_by_itself(base: Any) -> bool:
    """Whether a convolution pads with more than zeros: a chain on its input's side knows nothing of that."""
    return getattr(base, "padding_mode", "zeros") != "zeros"


def _ready(planned: Plan, call: Call, base: Any) -> Running:
    """What runs a plan."""
    if planned.mode == "dense":
        return Running("dense", planned, call)
    factored = planned.chain or planned
    merge = build_cluster_merge(factored, memory_order(base.weight.stride())) if planned.mode == "hybrid" else None
    return Running(planned.mode, planned, call, build_chain(factored), build_clusters(factored), merge)


def _name_of(call: Call, training: bool) -> str:
    """A call in words, as `choices` know it."""
    return f"{call.device}, {call}" + ("" if training else ", inference")


def takes_gradients(adapter: Adapter) -> bool:
    """Whether something that it trains does; cores that are held elsewhere are looked at last, for it takes longer."""
    held = any(parameter.requires_grad for parameter in adapter._parameters.values() if parameter is not None)
    return held or any(core.requires_grad for core in adapter.cores.values())
