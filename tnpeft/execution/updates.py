"""What adapters add to the output of a base layer: chains of an input, and one product with the other updates.

    y = base(x) + sum of s chain(x) + (sum of s dW) x

There are chains for the adapters that run factored, and one dW for all others. The base weight W is not used: that of
an opaque layer cannot be read, and elsewhere the update may read another input than the base, or only some of its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tnpeft.adapters import Adapter
from tnpeft.adapters.base_weight import base_weight
from tnpeft.errors import ExecutionError, Problem
from tnpeft.execution.base_call import BaseCall, geometry_of
from tnpeft.execution.calls import Acting, Calls, Running
from tnpeft.execution.modes import clusters_of, light_of, require_memory, sum_deltas
from tnpeft.execution.site import Site
from tnpeft.execution.torch_call import as_autocast_has_it, call_of, chain_input
from tnpeft.network import Layer, Network
from tnpeft.program import (
    ChainProgram,
    LayerClusters,
    build_chain,
    build_clusters,
    chain_dtype,
    factored_update,
    needs_plain_ops,
    records_sizes,
    without_autocast,
    without_inference_gradients,
)
from tnpeft.schedule import plan

__all__ = ["with_updates"]

_CONV: dict[int, Callable[..., Tensor]] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}


def with_updates(site: Site, layer: Layer, called: BaseCall, output: Tensor) -> Tensor:
    """The output plus all acting updates, rounded once for each; a plain layer's `output` may be overwritten."""
    plain = needs_plain_ops(called.x)
    with nullcontext() if plain else without_inference_gradients():
        return _with_updates(site, layer, called, output, plain)


def _with_updates(site: Site, layer: Layer, called: BaseCall, output: Tensor, plain: bool) -> Tensor:
    x = as_autocast_has_it(called.x)
    left = []
    for acting in site.acting:
        chain = None if x.is_nested or x.layout is not torch.strided else _chain(acting, layer, called, plain)
        if chain is None:
            left.append(acting)
            continue
        program, clusters = _programs(site, acting, chain, plain)
        require_memory(acting.adapter, clusters, x)
        seen = chain_input(geometry_of(called.how, layer), x)
        if not layer.opaque and acting.scale == 1.0 and output.dtype == chain_dtype(x):
            output = factored_update(output, seen, program, clusters)
            continue
        zeros = torch.zeros(_shape(layer, x, program), dtype=chain_dtype(x), device=x.device)
        update = factored_update(zeros, seen, program, clusters)
        output = _added(site, layer, output, update if acting.scale == 1.0 else update * acting.scale)
    if left:
        output = _added(site, layer, output, _product(layer, called, x, _delta(site, left, plain)))
    return output


def _added(site: Site, layer: Layer, output: Tensor, update: Tensor) -> Tensor:
    if update.shape != output.shape and not output.is_nested:
        where = f"layer '{site.name}'" if site.name else None
        found = f"{tuple(output.shape)}"
        problem = Problem(
            "output", f"the shape {tuple(update.shape)} of {layer}", found, "Match other layers.", where=where
        )
        raise ExecutionError(problem)
    return (output + update).to(output.dtype)


def _chain(acting: Acting, layer: Layer, called: BaseCall, plain: bool) -> str | Running | None:
    """How the chain of a call runs, or on the plain path the attribute of `calls` that says so; None: not at all."""
    adapter, x, how = acting.adapter, called.x, called.how
    if adapter.mode in ("dense", "hybrid") or adapter.network.reads_weight:
        return None
    axes = len(layer.kernel_size)
    size = tuple(called.output.shape[-axes:]) if layer.transposed else None
    shape = tuple(x.shape)
    if plain:
        if records_sizes() or not all(map(_is_static, (*shape, *(size or ())))):
            return None
        return _plain_run(adapter.network, layer, acting.calls, shape, how, size, x.device.type)
    running = acting.calls.get((shape, how, size, x.device), lambda: _planned(adapter, layer, called, size))
    return running if running.mode == "factored" else None


def _is_static(size: int) -> bool:
    if torch.compiler.is_compiling():
        return torch.fx.experimental.symbolic_shapes.has_static_value(size)
    return type(size) is int


def _planned(adapter: Adapter, layer: Layer, called: BaseCall, size: tuple[int, ...] | None) -> Running:
    call = call_of(geometry_of(called.how, layer), layer, called.x.shape, size, called.x.device.type)
    if call is None:
        return Running("dense", adapter.plan)
    planned = plan(adapter.network, "factored", call)
    if planned.mode != "factored":
        return Running("dense", planned, call)
    return Running("factored", planned, call, build_chain(planned), build_clusters(planned))


def _plain_run(
    network: Network,
    layer: Layer,
    calls: Calls,
    shape: tuple[int, ...],
    how: tuple[Any, ...] | None,
    size: tuple[int, ...] | None,
    device: str,
) -> str | None:
    """The attribute of `calls` with the chain and clusters of a plain call; None where there is no chain.

    Compilers do not trace it: they guard its arguments, and equal arguments give the same plan.
    """
    call = call_of(geometry_of(how, layer), layer, shape, size, device)
    planned = None if call is None else plan(network, "factored", call)
    if planned is None or planned.mode != "factored":
        return None
    return calls.keep_plain(build_chain(planned), build_clusters(planned))


# What `torch.compiler.assume_constant_result` does, which imports the whole compiler for it.
_plain_run._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _programs(site: Site, acting: Acting, chain: str | Running, plain: bool) -> tuple[ChainProgram, LayerClusters]:
    if isinstance(chain, Running):
        assert chain.chain is not None
        return chain.chain, clusters_of(site, acting, chain)
    program, clusters = getattr(acting.calls, chain)
    adapter = acting.adapter
    contracted = clusters.flat(adapter.core_tensors(), clusters.start(adapter.start_tensors()))
    return program, clusters.split(contracted)


def _shape(layer: Layer, x: Tensor, program: ChainProgram) -> tuple[int, ...]:
    """The shape of the update that a chain makes of an input."""
    if not layer.kernel_size:
        return (*x.shape[:-1], layer.out_channels)
    batch = x.shape[: -len(layer.kernel_size) - 1]
    return (*batch, layer.out_channels, *program.output_space)


def _delta(site: Site, left: Sequence[Acting], plain: bool) -> Tensor:
    """Σ s ΔW of the adapters that have no chain, kept while accumulating; base weights are read where ΔW needs them."""
    network = next((acting.adapter.network for acting in left if acting.adapter.network.reads_weight), None)
    origin = base_weight(site.base, network or left[0].adapter.network).detach()
    inputs = [acting.adapter.delta_inputs(origin, None if plain else light_of(site, acting.adapter)) for acting in left]
    if plain or network is not None or not site.results.cache.opened:
        return sum_deltas(left, origin, inputs, plain)

    def summed(tensors: Sequence[Tensor]) -> tuple[Tensor]:
        remaining = iter(tensors)
        return (sum_deltas(left, origin, [[next(remaining) for _ in each] for each in inputs], False),)

    adapters = [acting.adapter for acting in left]
    flat = [tensor for each in inputs for tensor in each]
    return site.results.cache.get(("opaque", *left), adapters, (), flat, summed)[0]


def _product(layer: Layer, called: BaseCall, x: Tensor, delta: Tensor) -> Tensor:
    """One call of torch's function of the layer's kind with ΔW, outside autocast, in the dtype of a chain."""
    dtype = chain_dtype(x)
    how: Any = geometry_of(called.how, layer)
    with without_autocast(x):
        x, delta = chain_input(how, x.to(dtype)), delta.to(dtype)
        if how is None:
            return functional.linear(x, delta.T if layer.turned else delta)
        axes = len(layer.kernel_size)
        padding: Any = how.padding if how.padding_mode == "zeros" else 0
        if not layer.transposed:
            return _CONV[axes](x, delta, None, how.stride, padding, how.dilation, layer.groups)
        numbers = called.output.shape[-axes:], x.shape[-axes:], how.stride, padding, how.dilation, layer.kernel_size
        left = [
            out - (size - 1) * step + 2 * pad - gap * (k - 1) - 1
            for out, size, step, pad, gap, k in zip(*numbers, strict=True)
        ]
        return _TRANSPOSED[axes](x, delta, None, how.stride, padding, left, layer.groups, how.dilation)
