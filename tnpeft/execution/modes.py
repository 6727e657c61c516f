"""The modes of an adapted layer, functions of its site and an input.

`dense` calls the layer once with the summed weight. `factored` adds the factored chain's output to the base layer's.
`hybrid` computes as dense does, and takes the cores' gradients from the chain. Each mode is defined by its plain path,
which has only differentiable operations of torch; that of hybrid is dense's. `dispatch` chooses the path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tnpeft.adapters.adapter import Adapter
from tnpeft.adapters.factors import Light
from tnpeft.adapters.missing_values import without_values
from tnpeft.adapters.parked import own_weight
from tnpeft.execution.calls import Acting, Running
from tnpeft.execution.site import Site
from tnpeft.execution.torch_call import add_weight, as_autocast_has_it, chain_input
from tnpeft.program import (
    ChainProgram,
    ClusterGradients,
    ClusterProgram,
    Delta,
    HybridLinear,
    LayerClusters,
    Program,
    Starts,
    factored_update,
    needs_plain_ops,
)

__all__ = [
    "clusters_of",
    "dense",
    "fixed_weight",
    "plain_factored",
    "require_memory",
    "run",
    "sum_deltas",
    "summed_weight",
]


def run(site: Site, acting: Acting, running: Running, x: Tensor, *rest: Any) -> Tensor:
    """The output of a layer with one adapter, in the mode that was decided."""
    return _MODES[running.mode](site, acting, running, x, *rest)


def dense(site: Site, plain: bool, x: Tensor, *rest: Any) -> Tensor:
    """One call of the layer's own function with W + ΔW, or of the base layer itself if nothing acts on it.

    The faster gradients of adapted layers differ from torch's in the last bits. Training one adapter must not depend on
    which layers another, idle adapter is on.
    """
    if site.idle:
        output: Tensor = site.base.forward(x, *rest)
        return output
    return site.call_base(site.base, x, summed_weight(site, site.base.weight, plain), *rest)


def _dense(site: Site, _acting: Acting, _running: Running, x: Tensor, *rest: Any) -> Tensor:
    return dense(site, False, x, *rest)


def _factored(site: Site, acting: Acting, running: Running, x: Tensor, *rest: Any) -> Tensor:
    """base(x) + chain(x), or the base between inputs or outputs and their chain, on an adapter's `side`.

    The clusters come from the pass, contracted with other layers', where there is one.
    """
    assert running.chain is not None
    return _with_update(site, acting, running.chain, clusters_of(site, acting, running), x, *rest)


def plain_factored(
    site: Site, acting: Acting, chain: ChainProgram, clusters: ClusterProgram, x: Tensor, *rest: Any
) -> Tensor:
    """base(x) + chain(x), with clusters contracted for this call alone."""
    adapter = acting.adapter
    contracted = clusters.split(clusters.flat(adapter.core_tensors(), clusters.start(adapter.start_tensors())))
    return _with_update(site, acting, chain, contracted, x, *rest)


def _with_update(
    site: Site, acting: Acting, chain: ChainProgram, clusters: LayerClusters, x: Tensor, *rest: Any
) -> Tensor:
    require_memory(acting.adapter, clusters, x)
    x, weight = as_autocast_has_it(x), site.base.weight.detach()
    if acting.adapter.side == "input":
        return site.call_base(site.base, factored_update(x.clone(), x, chain, clusters), weight, *rest)
    output = site.call_base(site.base, x, weight, *rest)
    if acting.adapter.side == "output":
        return factored_update(output, _without_bias(site.base, output), chain, clusters)
    return factored_update(output, chain_input(site.base, x), chain, clusters)


def _without_bias(base: Any, output: Tensor) -> Tensor:
    """A tensor of its own: what the base layer's weight makes of the input."""
    bias: Tensor | None = base.bias
    if bias is None:
        return output.clone()
    return output - bias.to(output.dtype).reshape(-1, *[1] * len(getattr(base, "kernel_size", ())))


def _hybrid(site: Site, acting: Acting, running: Running, x: Tensor, *rest: Any) -> Tensor:
    """The output with W + ΔW, to which the chain's gradients hang.

    A Linear's backward pass makes W + ΔW again; a convolution saves it, as does who keeps it while accumulating.
    """
    clusters = clusters_of(site, acting, running)
    require_memory(acting.adapter, clusters, x)
    x = as_autocast_has_it(x)
    merge, weight = running.merge, site.base.weight
    assert merge is not None

    def summed(known: LayerClusters, stored: Tensor) -> Tensor:
        return add_weight(merge(known), stored, False)

    def make(_cores: Sequence[Tensor]) -> tuple[Tensor]:
        return (summed(clusters, weight.detach()),)

    (total,) = site.results.cache.get((merge, acting.adapter), (acting.adapter,), (weight,), (), make)
    if running.plan.remade and torch.is_grad_enabled() and not site.results.cache.opened:
        with torch.no_grad():
            output = site.call_base(site.base, x, total, *rest)
        turned = acting.adapter.network.layer.turned
        made: Tensor = HybridLinear.apply(  # type: ignore[no-untyped-call]
            output, x, site.base.bias, weight.detach(), running.chain, summed, turned, clusters.dual, *clusters.values
        )
        return made
    output = site.call_base(site.base, x, total, *rest)
    if not torch.is_grad_enabled():
        return output
    seen = chain_input(site.base, x.detach())
    updated: Tensor = ClusterGradients.apply(output, seen, running.chain, *clusters.values)  # type: ignore[no-untyped-call]
    return updated


_MODES: Mapping[str, Callable[..., Tensor]] = {"dense": _dense, "factored": _factored, "hybrid": _hybrid}


def clusters_of(site: Site, acting: Acting, running: Running) -> LayerClusters:
    """The clusters of the adapter's cores as they are now."""
    program, adapter, current = running.clusters, acting.adapter, site.results.current
    assert program is not None
    clusters = None if current is None else current.clusters(adapter, program)
    if clusters is not None:
        return clusters

    def contracted(cores: Sequence[Tensor]) -> Sequence[Tensor]:
        start = acting.calls.cluster_constants.get(program, adapter.start_tensors(), program.start)
        return program.flat(cores, start)

    cores = adapter.core_tensors() if adapter.factors is None else adapter.core_tensors(None, light_of(site, adapter))
    return program.split(site.results.cache.get((program, adapter), (adapter,), (), cores, contracted))


def require_memory(adapter: Adapter, clusters: LayerClusters, x: Tensor) -> None:
    """Raises ExecutionError where the clusters are on meta and the input is not."""
    if clusters.values[0].is_meta and not x.is_meta:
        raise without_values(adapter.layer_name, True)


def summed_weight(site: Site, weight: Tensor, plain: bool) -> Tensor:
    """W + Σ s ΔW in exactly W's strides and dtype, summed in fp32 (fp64) and rounded once.

    Gradients reach only the cores. Updates are computed from the base's own weight, which is not `weight` if an adapter
    trains the layer as a whole.
    """
    if not site.acting:
        return weight
    if site.alone is not None and not plain:
        current = site.results.current
        total = None if current is None else current.summed(site.alone.adapter, weight)
        if total is not None:
            return total
    base_weight = own_weight(site.base)
    constant = weight.detach() if weight.requires_grad else weight
    origin = constant if base_weight is weight else base_weight.detach()
    inputs = [
        acting.adapter.delta_inputs(origin)
        if acting.adapter.factors is None
        else acting.adapter.delta_inputs(origin, light_of(site, acting.adapter))
        for acting in site.acting
    ]
    if plain or not site.results.cache.opened:
        return add_weight(sum_deltas(site.acting, origin, inputs, plain), constant, plain)

    def summed(tensors: Sequence[Tensor]) -> tuple[Tensor]:
        remaining = iter(tensors)
        taken = [[next(remaining) for _ in each] for each in inputs]
        return (add_weight(sum_deltas(site.acting, origin, taken, False), constant, False),)

    adapters = [acting.adapter for acting in site.acting]
    flat = [tensor for each in inputs for tensor in each]
    return site.results.cache.get(("dense", *site.acting), adapters, (weight, base_weight), flat, summed)[0]


def fixed_weight(site: Site, weight: Tensor) -> Tensor:
    """The summed weight as a constant of its own: what a merged layer has, and one that keeps its sum."""
    with torch.inference_mode(False), torch.no_grad():  # a clone, for the sum may be a view into something larger
        return summed_weight(site, weight, needs_plain_ops(weight)).clone()


def light_of(site: Site, adapter: Adapter) -> Light:
    """The derived cores that a pass has computed for equal layers; None outside a pass."""
    current = site.results.current
    return None if current is None else current.light(adapter)


def sum_deltas(
    acting_here: Sequence[Acting], origin: Tensor, inputs: Sequence[Sequence[Tensor]], plain: bool
) -> Tensor:
    """Σ s ΔW, from the `delta_inputs` of each adapter; updates are made on the weight `origin`."""
    total: Tensor | None = None
    for acting, tensors in zip(acting_here, inputs, strict=True):
        adapter = acting.adapter
        program, start = _program_and_start(acting, origin)
        cores = tensors[: len(adapter.plan.network.cores)]
        if plain or needs_plain_ops(*cores):
            (delta,) = program.plain_deltas(cores, start)
        else:
            (delta,) = Delta.apply(program, start, *cores)  # type: ignore[no-untyped-call]
        delta = adapter.with_magnitude(delta, origin, tensors)
        if total is None:
            total = delta if acting.scale == 1.0 else delta * acting.scale
        else:
            total = total.add(delta, alpha=acting.scale)
    assert total is not None
    return total


def _program_and_start(acting: Acting, weight: Tensor) -> tuple[Program, Starts | None]:
    """The program that writes delta weights like `weight`, and what it needs of the frozen copies."""
    program, copies = acting.adapter.program_for(weight), acting.adapter.start_tensors(weight)
    if not copies or acting.adapter.network.reads_weight:  # the base weight may be written to unseen
        return program, program.start(copies)
    return program, acting.calls.delta_constants.get(program, copies, program.start)
