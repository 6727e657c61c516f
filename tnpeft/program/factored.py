"""Factored and hybrid layers: the update of a layer's output, the summed weight, and the gradients of the clusters."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from tnpeft.errors import ExecutionError, Problem
from tnpeft.planning.steps import Contraction
from tnpeft.program import counts
from tnpeft.program.autocast import autocast_dtype, without_autocast
from tnpeft.program.chain import Chain, lower_chain
from tnpeft.program.clusters import LayerClusters
from tnpeft.program.kernels import contract
from tnpeft.program.observers import is_recorded, needs_plain_ops
from tnpeft.program.weight_layout import WeightLayout
from tnpeft.schedule import Plan
from tnpeft.schedule.chain_legs import ChainLayout, chain_layouts, merge_steps
from tnpeft.schedule.leg_order import lay_out_steps

__all__ = [
    "ChainProgram",
    "ClusterGradients",
    "ClusterMerge",
    "FactoredUpdate",
    "HybridLinear",
    "build_chain",
    "build_cluster_merge",
    "chain_dtype",
    "factored_update",
]


class _Term(NamedTuple):
    """One term's chain, its clusters' place among all, and its channels: of the layer, and padded."""

    chain: Chain
    clusters: slice
    inputs: tuple[int, int]
    outputs: tuple[int, int]


class ChainProgram:
    """The chains of a network's terms for one call.

    The layer's input comes as (batch, in_channels, voxels...), a Linear's as (rows, in_features).
    """

    def __init__(self, plan: Plan) -> None:
        network, call = plan.network, plan.call
        assert call is not None
        self.space = tuple(axis.inputs for axis in call.axes)
        self.output_space = tuple(axis.outputs for axis in call.axes)
        self.terms: list[_Term] = []
        self.clusters = 0
        for part, layout in chain_layouts(plan):
            place = slice(self.clusters, self.clusters + len(layout.links))
            self.clusters = place.stop
            outputs, inputs, *_ = part.network.padded_shape
            channels = (network.layer.in_channels, inputs), (network.layer.out_channels, outputs)
            self.terms.append(_Term(lower_chain(part, layout), place, *channels))

    def updates(self, x: Tensor, clusters: Sequence[Tensor], dual: bool) -> Iterator[Tensor]:
        """Every term's update of the layer's output, (batch, out_channels, voxels...)."""
        for term in self.terms:
            update = term.chain.output(_padded(x, term.inputs), clusters[term.clusters], dual)
            narrow, wide = term.outputs
            shaped = update.reshape(-1, wide, *self.output_space)
            yield shaped[:, :narrow] if narrow < wide else shaped

    def add_output(self, out: Tensor, x: Tensor, clusters: Sequence[Tensor], dual: bool) -> None:
        """Add every term's update to `out`, (batch, out_channels, voxels...) in any memory order."""
        for update in self.updates(x, clusters, dual):
            out.add_(update)

    def gradients(
        self, x: Tensor, values: Sequence[Tensor], dual: Sequence[Tensor], gradient: Tensor, wanted: Sequence[bool]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Those of the update: the input's, (batch, in_channels, voxels...), and the clusters'; `wanted` says which."""
        cluster_grads: list[Tensor | None] = []
        total: Tensor | None = None
        for term in self.terms:
            input_grad, term_grads = term.chain.gradients(
                _padded(x, term.inputs),
                values[term.clusters],
                dual[term.clusters],
                _padded(gradient, term.outputs),
                (wanted[0], *wanted[1:][term.clusters]),
            )
            cluster_grads += term_grads
            if input_grad is not None:
                narrow, wide = term.inputs
                shaped = input_grad.reshape(-1, wide, *self.space)[:, :narrow]
                total = shaped if total is None else total + shaped
        return total, cluster_grads


_CHAINS: WeakValueDictionary[Plan, ChainProgram] = WeakValueDictionary()


def build_chain(plan: Plan) -> ChainProgram:
    """The chains of a factored plan, shared as long as anybody holds them: tables for a call's size die with them."""
    known = _CHAINS.get(plan)
    return _CHAINS.setdefault(plan, ChainProgram(plan)) if known is None else known


class _TermMerge:
    """One term: the contraction of its clusters, two or more, in dual form where there is one, to the stored weight."""

    def __init__(self, plan: Contraction, layout: ChainLayout, memory_order: tuple[int, ...]) -> None:
        self.weight_layout = WeightLayout.of(plan.network, memory_order)
        self.clusters = len(layout.links)
        orders, steps = merge_steps(layout, plan.copies, self.weight_layout.legs)
        given = dict(enumerate(orders)) | {steps[-1].number: self.weight_layout.legs}
        self.instructions, _ = lay_out_steps(steps, given, layout.sizes)

    def __call__(self, tensors: list[Tensor]) -> Tensor:
        """The delta weight in its memory order, a tensor of its own, from the clusters, which are added to."""
        plain = is_recorded()
        for step in self.instructions:
            tensors.append(contract(step.forward, tensors[step.left], tensors[step.right], plain))
        return self.weight_layout.apply(tensors[-1])


class ClusterMerge:
    """From the clusters of all terms to the delta weight."""

    def __init__(self, plan: Plan, memory_order: tuple[int, ...]) -> None:
        self.terms = [_TermMerge(part, layout, memory_order) for part, layout in chain_layouts(plan)]

    def __call__(self, clusters: LayerClusters) -> Tensor:
        """ΔW in its memory order, a tensor that nothing else holds; it carries no gradient."""
        known = clusters.dual or clusters.values
        with torch.no_grad(), without_autocast(known[0]):
            total: Tensor | None = None
            left = iter(known)
            for term in self.terms:
                weight = term(list(itertools.islice(left, term.clusters)))
                total = weight if total is None else total.add_(weight)
        assert total is not None
        if counts.OPEN:
            counts.note("merges", 1)
        return total


@lru_cache(maxsize=1024)
def build_cluster_merge(plan: Plan, memory_order: tuple[int, ...]) -> ClusterMerge:
    """How the clusters of a factored plan become its delta weight, cached."""
    return ClusterMerge(plan, memory_order)


def _padded(tensor: Tensor, channels: tuple[int, int]) -> Tensor:
    """The tensor, contiguous, with channels of zeros added."""
    narrow, wide = channels
    if wide == narrow:
        return tensor.contiguous()
    return torch.constant_pad_nd(tensor, (0, 0) * (tensor.dim() - 2) + (0, wide - narrow)).contiguous()


def chain_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the input meets the clusters: autocast's or the input's.

    Never fp16: values would overflow whose difference is still zero.
    """
    dtype = autocast_dtype(x)
    return torch.float32 if dtype == torch.float16 else dtype


def factored_update(out: Tensor, x: Tensor, program: ChainProgram, clusters: LayerClusters) -> Tensor:
    """A factored layer's output, from that of its base layer: `out`, which no backward pass reads, is used up.

    Whoever looks on sees plain operations, and gradients flow through dual forms.
    """
    values, dual = clusters
    if not needs_plain_ops(x, out, *values):
        updated: Tensor = FactoredUpdate.apply(out, x, program, dual, *values)  # type: ignore[no-untyped-call]
        return updated
    dtype = chain_dtype(x)
    with without_autocast(out):
        flat, total = _flat(x, program.space).to(dtype), _flat(out, program.output_space)
        for update in program.updates(flat, _cast(dual or values, dtype), bool(dual)):
            total = total + update.to(total.dtype)
    return total.reshape(out.shape)


class FactoredUpdate(torch.autograd.Function):
    """Adds the update of a factored layer to its base layer's output; keeps the input and the clusters."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, x: Tensor, program: ChainProgram, dual: tuple[Tensor, ...], *values: Tensor
    ) -> Tensor:
        """`out` is the base layer's, a tensor that no backward pass reads; it is written to."""
        ctx.dtype = chain_dtype(x)
        out = out.detach()
        with without_autocast(out):
            flat = _flat(x, program.space).to(ctx.dtype)
            program.add_output(_flat(out, program.output_space), flat, _cast(dual or values, ctx.dtype), bool(dual))
        ctx.save_for_backward(x, *values, *dual)
        ctx.program = program
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        _refuse_double_backward("factored")
        needs = ctx.needs_input_grad
        input_grad, grads = _gradients(ctx, gradient, (needs[1], *needs[4:]))
        return (gradient if needs[0] else None, input_grad, None, None, *grads)


class ClusterGradients(torch.autograd.Function):
    """Leaves a hybrid layer's output as it is; its backward pass makes the clusters' gradients from the input."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, program: ChainProgram, *values: Tensor) -> Tensor:
        ctx.save_for_backward(x, *values)
        ctx.program, ctx.dtype = program, chain_dtype(x)
        return out.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        _refuse_double_backward("hybrid")
        needs = ctx.needs_input_grad
        _, grads = _gradients(ctx, gradient, (False, *needs[3:]))
        return (gradient if needs[0] else None, None, None, *grads)


class HybridLinear(torch.autograd.Function):
    """A hybrid Linear's output: `out`, made with W + ΔW, which is not saved, for the backward pass makes it again.

    einsum: dx = dy (W + ΔW), and the clusters' gradients by the chain
    """

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        x: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        program: ChainProgram,
        summed: Callable[[LayerClusters, Tensor], Tensor],
        turned: bool,
        dual: tuple[Tensor, ...],
        *values: Tensor,
    ) -> Tensor:
        """`summed` makes W + ΔW as the layer stores it, (out, in) or `turned`, from the clusters and W."""
        ctx.save_for_backward(x, weight, *values, *dual)
        ctx.program, ctx.summed, ctx.dtype = program, summed, chain_dtype(x)
        ctx.turned, ctx.bias = turned, None if bias is None else bias.dtype
        return out.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        _refuse_double_backward("hybrid")
        _, input_needed, bias_needed, *_ = needs = ctx.needs_input_grad
        x, weight, *clusters = ctx.saved_tensors
        input_grad = bias_grad = None
        if input_needed:
            count = ctx.program.clusters
            total = ctx.summed(LayerClusters(tuple(clusters[:count]), tuple(clusters[count:])), weight)
            total = (total.T if ctx.turned else total).to(gradient.dtype)
            with without_autocast(gradient):
                input_grad = (gradient @ total).to(x.dtype)
            del total  # what follows takes memory of its own
        if bias_needed:
            bias_grad = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(ctx.bias)
        _, grads = _chain_gradients(ctx, x, clusters, gradient, (False, *needs[8:]))
        return (None, input_grad, bias_grad, None, None, None, None, None, *grads)


def _gradients(ctx: Any, gradient: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, list[Tensor | None]]:
    """The VJP of a chain on what a function saved: of the input, then of the clusters' values; `wanted` says which."""
    x, *clusters = ctx.saved_tensors  # once: activation checkpointing unpacks no tensor twice
    return _chain_gradients(ctx, x, clusters, gradient, wanted)


def _chain_gradients(
    ctx: Any, x: Tensor, clusters: Sequence[Tensor], gradient: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    program: ChainProgram = ctx.program
    with without_autocast(gradient):
        input_grad, grads = program.gradients(
            _flat(x, program.space).to(ctx.dtype),
            _cast(clusters[: program.clusters], ctx.dtype),
            _cast(clusters[program.clusters :], ctx.dtype),
            _flat(gradient, program.output_space).to(ctx.dtype),
            wanted,
        )
    return None if input_grad is None else input_grad.to(x.dtype).reshape(x.shape), _like(grads, clusters)


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """Tensors of one dtype in another one."""
    if not tensors or tensors[0].dtype == dtype:
        return tensors
    return [tensor.to(dtype) for tensor in tensors]


def _like(grads: Sequence[Tensor | None], clusters: Sequence[Tensor]) -> list[Tensor | None]:
    """The clusters' gradients in the clusters' shapes and dtypes."""
    pairs = zip(grads, clusters, strict=False)
    return [None if grad is None else grad.to(cluster.dtype).view(cluster.shape) for grad, cluster in pairs]


def _flat(tensor: Tensor, space: tuple[int, ...]) -> Tensor:
    """With one batch axis: unbatched inputs of convolutions get one, the leading axes of a Linear's become one."""
    if not space:
        return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
    return tensor if tensor.dim() == len(space) + 2 else tensor.unsqueeze(0)


def _refuse_double_backward(mode: str) -> None:
    """Autograd would take the gradients for constants, in silence. Raises ExecutionError where it looks on."""
    if torch.is_grad_enabled():
        what = f"double backward through a layer in {mode} mode"
        fix = 'Attach the adapter with `mode="dense"` for second derivatives.'
        raise ExecutionError(Problem(what, "gradients that are not differentiated", "`create_graph=True`", fix))
