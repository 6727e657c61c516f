"""How an adapted layer computes: dense, factored or hybrid, and which of them for a call.

`dense` calls the layer once with the summed weight. `factored` adds the update of the base layer's output, made by the
factored chain. `hybrid` computes as dense does, and takes the cores' gradients from the chain. Layers run dense
whatever their mode if they are merged or disabled, if several adapters act on them or one at another scale than 1, and
inside a compiled graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tnpeft.modules.distributed import refuse_distributed
from tnpeft.modules.forward_pass import add_weight
from tnpeft.modules.refusals import taken_away, without_values
from tnpeft.modules.torch_call import as_autocast_has_it, chain_input
from tnpeft.program import ClusterGradients, LayerClusters, factored_update, needs_plain_ops, records_sizes

if TYPE_CHECKING:
    from tnpeft.modules.adapter import Adapter
    from tnpeft.modules.dispatch import Calling, Running
    from tnpeft.modules.layers import AdaptedLayer

__all__ = ["dense", "execute", "run", "summed_weight"]


def execute(layer: AdaptedLayer, x: Tensor, *rest: Any) -> Tensor:
    """The layer's output in the mode that its adapter has, or chooses, for this call."""
    parameters = layer.base._parameters  # not by its name, which `torch.fx` would record
    if "weight" not in parameters:
        raise taken_away(layer.where, "weight")
    if needs_plain_ops(x, parameters["weight"]):
        return _plain(layer, x, *rest)
    if len(layer.scales) != 1 or layer.disabled or layer.merged or x.is_nested or x.layout is not torch.strided:
        return dense(layer, x, *rest)
    ((adapter, scale),) = layer.active
    if adapter.mode == "dense" or scale != 1.0:
        return dense(layer, x, *rest)
    if torch.is_inference_mode_enabled() and torch.is_grad_enabled():  # autograd functions may save nothing there
        with torch.no_grad():
            return execute(layer, x, *rest)
    calling = adapter.calling
    return run(layer, calling, calling.running(layer, x, rest), x, *rest)


def _plain(layer: AdaptedLayer, x: Tensor, *rest: Any) -> Tensor:
    """The output where somebody looks on. Graphs of `torch.fx` have the layer as one node, as they have torch's layers.

    Who records operations for inputs of other sizes gets the dense ones, which fit any size, as does a compiled graph
    whose sizes may vary.
    """
    if isinstance(x, torch.fx.Proxy):
        node: Tensor = x.tracer.create_proxy("call_module", x.tracer.path_of_module(layer), (x, *rest), {})
        return node
    tensors = [x, *(tensor for tensor in layer.base._parameters.values() if tensor is not None)]
    refuse_distributed(layer.layer_name, tensors)
    if len(layer.scales) != 1 or layer.disabled or layer.merged or records_sizes():
        return dense(layer, x, *rest)
    ((adapter, scale),) = layer.active
    output_size = tuple(rest[0]) if rest and rest[0] is not None else None
    shape = tuple(x.shape)
    if adapter.mode in ("dense", "hybrid") or scale != 1.0 or not all(map(_is_static, (*shape, *(output_size or ())))):
        return dense(layer, x, *rest)
    key = _plain_run(layer, adapter, shape, output_size, torch.is_grad_enabled())
    if key is None:
        return dense(layer, x, *rest)
    calling = adapter.calling
    chain, clusters = getattr(calling, key)
    x = as_autocast_has_it(x)
    out = layer.call_base(x, layer.base.weight.detach(), layer.bias, *rest)
    values = calling.plain_clusters(clusters)
    _require_memory(adapter, values.values[0], x)
    return factored_update(out, chain_input(layer.base, x), chain, values)


def _is_static(size: int) -> bool:
    """Whether the size is a number, also for a compiler, to which sizes that may vary look like numbers too."""
    if torch.compiler.is_compiling():
        return torch.fx.experimental.symbolic_shapes.has_static_value(size)
    return type(size) is int


def _plain_run(
    layer: AdaptedLayer, adapter: Adapter, shape: tuple[int, ...], output_size: tuple[int, ...] | None, training: bool
) -> str | None:
    """`Calling.plain_run`, which is nothing to trace: its arguments are guarded, and the same give the same plan."""
    return adapter.calling.plain_run(layer, shape, output_size, training)


# What `torch.compiler.assume_constant_result` does, which imports the whole compiler for it.
_plain_run._dynamo_marked_constant = True  # type: ignore[attr-defined]


def run(layer: AdaptedLayer, calling: Calling, running: Running, x: Tensor, *rest: Any) -> Tensor:
    """The output of a layer with one adapter, as it was decided."""
    if running.mode == "dense":
        return dense(layer, x, *rest)
    clusters = calling.clusters(running)
    _require_memory(calling.adapter, clusters.values[0], x)
    return _RUNS[running.mode](layer, clusters, running, x, *rest)


def _require_memory(adapter: Adapter, cluster: Tensor, x: Tensor) -> None:
    """Raises ExecutionError where the clusters are on meta and the input is not."""
    if cluster.is_meta and not x.is_meta:
        raise without_values(adapter.layer_name, True)


def dense(layer: AdaptedLayer, x: Tensor, *rest: Any) -> Tensor:
    """One call of the layer's own function with W + ΔW; of the base layer itself where nothing acts on it.

    The quicker gradients that adapted layers have differ from torch's in the last bits: training one adapter
    must not depend on which layers another, idle one stands.
    """
    if layer.disabled or not layer.scales:
        plain: Tensor = layer.base.forward(x, *rest)
        return plain
    return layer.call_base(x, layer.weight, layer.bias, *rest)


def _factored(layer: AdaptedLayer, clusters: LayerClusters, running: Running, x: Tensor, *rest: Any) -> Tensor:
    x = as_autocast_has_it(x)
    out = layer.call_base(x, layer.base.weight.detach(), layer.bias, *rest)
    seen = chain_input(layer.base, x)
    assert running.chain is not None
    return factored_update(out, seen, running.chain, clusters)


def _hybrid(layer: AdaptedLayer, clusters: LayerClusters, running: Running, x: Tensor, *rest: Any) -> Tensor:
    x = as_autocast_has_it(x)
    out = layer.call_base(x, _completed(layer, clusters, running), layer.bias, *rest)
    if not torch.is_grad_enabled():
        return out
    seen = chain_input(layer.base, x.detach())
    updated: Tensor = ClusterGradients.apply(out, seen, running.chain, *clusters.values)  # type: ignore[no-untyped-call]
    return updated


def _completed(layer: AdaptedLayer, clusters: LayerClusters, running: Running) -> Tensor:
    """A hybrid layer's W + ΔW, without gradients."""
    merge, weight = running.merge, layer.base.weight
    assert merge is not None

    def made(_cores: Sequence[Tensor]) -> tuple[Tensor]:
        return (add_weight(merge(clusters), weight.detach()),)

    ((adapter, _),) = layer.active
    cache = adapter.cache
    if cache is None:
        return made(())[0]
    return cache.get((merge, adapter), (adapter,), (weight,), (), made)[0]


_RUNS: Mapping[str, Callable[..., Tensor]] = {"factored": _factored, "hybrid": _hybrid}


def summed_weight(weight: Tensor, active: Sequence[tuple[Adapter, float]], own: Tensor) -> Tensor:
    """W + Σ s ΔW in exactly W's strides and dtype, summed in fp32 (fp64) and rounded once.

    Gradients reach the cores alone. `own` is the base's own weight, of which updates are made: another than `weight`
    where an adapter trains the layer as a whole.
    """
    (adapter, scale), *others = active
    if not others and scale == 1.0 and not needs_plain_ops(weight):
        found = adapter.calling.summed(weight)
        if found is not None:
            return found
    constant = weight.detach() if weight.requires_grad else weight
    origin = constant if own is weight else own.detach()
    cache = active[0][0].cache
    if cache is None:
        return _summed(constant, [(adapter.delta_for(origin), scale) for adapter, scale in active])
    adapters = [adapter for adapter, _ in active]
    inputs = [adapter.delta_inputs(origin) for adapter in adapters]

    def made(tensors: Sequence[Tensor]) -> tuple[Tensor]:
        left = iter(tensors)
        each = [[next(left) for _ in one] for one in inputs]
        deltas = [adapter.delta_for(origin, one) for adapter, one in zip(adapters, each, strict=True)]
        return (_summed(constant, [(delta, scale) for delta, (_, scale) in zip(deltas, active, strict=True)]),)

    flat = [tensor for one in inputs for tensor in one]
    return cache.get(("dense", *active), adapters, (weight, own), flat, made)[0]


def _summed(weight: Tensor, updates: Sequence[tuple[Tensor, float]]) -> Tensor:
    total, scale = updates[0]
    if scale != 1.0:
        total = total * scale
    for delta, scale in updates[1:]:
        total = total.add(delta, alpha=scale)
    return add_weight(total, weight)
