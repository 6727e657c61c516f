"""The delta weights of several layers of one signature, contracted together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tnpeft.errors import ExecutionError, Problem
from tnpeft.planning import Plan
from tnpeft.program.batched import BatchedTree, Start, Tree
from tnpeft.program.clusters import together
from tnpeft.program.kernels import versions
from tnpeft.program.total import without_autocast
from tnpeft.program.weight_layout import WeightLayout

__all__ = ["BatchedDelta", "Weight", "weight_of"]


@dataclass(frozen=True)
class Weight:
    """All that decides how a delta weight is contracted."""

    tree: Tree
    layout: WeightLayout  # how the tree's result becomes the stored weight
    kept: tuple[bool, ...]  # for each result but the last: the backward pass reads it, instead of computing it anew
    copies: bool  # there is a frozen copy


def weight_of(plan: Plan, memory_order: tuple[int, ...]) -> Weight | None:
    """What the delta weights of a dense plan are made by; None of a sum of several terms."""
    network = plan.network
    if plan.terms or len(network.terms) > 1 or network.terms[0].scale != 1.0:
        return None
    layout = WeightLayout.of(network, memory_order)
    sizes = {letter: network.sizes[leg] for leg, letter in network.symbols.items()}
    tree = Tree.of(network, range(len(network.cores)), plan.steps, layout.legs, sizes)
    kept = tuple(2 * step.elements < network.layer.numel for step in plan.steps[:-1])
    return Weight(tree, layout, kept, network.start == "frozen_copy")


class BatchedDelta:
    """The delta weights of `count` layers at once."""

    def __init__(self, weight: Weight, count: int) -> None:
        self.weight, self.count = weight, count
        self.tree = BatchedTree(weight.tree, count)

    def start(self, cores: Sequence[Tensor]) -> Start | None:
        """What the changes need of the frozen copies of all layers."""
        if not self.weight.copies:
            return None
        with without_autocast(cores[0]):
            return self.tree.start(cores)

    def __call__(self, cores: Sequence[Tensor], start: Start | None) -> tuple[Tensor, ...]:
        """ΔW of each layer, a tensor that nothing else writes to; `cores` as in `batched`."""
        deltas: tuple[Tensor, ...] = Deltas.apply(self, start, *cores)  # type: ignore[no-untyped-call]
        return deltas

    def contracted(self, cores: Sequence[Tensor], start: Start | None) -> tuple[Sequence[Tensor], list[Tensor | None]]:
        """The delta weights, and the tensors that the backward pass reads (None: it computes them anew)."""
        if start is None:
            *tensors, result = self.tree.values(cores)
            tensors = tensors or [result]
        else:
            tensors, changes = self.tree.changed(cores, start, False)
            change = changes[-1]
            result = self._zero(cores[0]) if change is None else change
        known = [True] * self.tree.size + list(self.weight.kept)
        kept = [tensor if keep else None for tensor, keep in zip(tensors, known, strict=True)]
        deltas = self.weight.layout.apply_all(result, self.count)
        # Tensors that know nothing of each other: writing to one is no change of the others.
        return [delta.data for delta in deltas], kept

    def gradients(
        self,
        kept: Sequence[Tensor | None],
        gradients: Sequence[Tensor | None],
        cores: Sequence[Tensor],
        needed: Sequence[bool],
    ) -> list[Tensor | None]:
        """Those of the cores, from those of the delta weights (None: the layer was not called)."""
        called = [gradient is not None for gradient in gradients]
        # Where the gradient is to be differentiated, the results must hang on the cores: none that was kept does.
        tensors = self.tree.values(cores) if torch.is_grad_enabled() else self.tree.again(kept)
        undo = self.weight.layout.undo
        of_results = together([None if gradient is None else undo(gradient).reshape(-1) for gradient in gradients])
        grads = self.tree.gradients(tensors, of_results, cores, needed)
        return [grad if called[place % self.count] else None for place, grad in enumerate(grads)]

    def _zero(self, like: Tensor) -> Tensor:
        return like.new_zeros(self.count, *self.weight.layout.padded)


class Deltas(torch.autograd.Function):
    """The delta weights of some layers; differentiable again."""

    @staticmethod
    def forward(ctx: Any, code: BatchedDelta, start: Start | None, *cores: Tensor) -> tuple[Tensor, ...]:
        with without_autocast(cores[0]):
            deltas, kept = code.contracted(cores, start)
        ctx.set_materialize_grads(False)
        # Nothing is freed with the graph of one layer: others may have a backward pass of their own.
        ctx.code, ctx.kept, ctx.cores = code, kept, cores
        ctx.writes = versions(cores)
        return tuple(deltas)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        code: BatchedDelta = ctx.code
        if all(gradient is None for gradient in gradients):
            return (None, None, *(None for _ in ctx.cores))
        if torch.is_grad_enabled() and ctx.writes != versions(ctx.cores):
            what, wrong = "double backward through delta weights", "values that were written since"
            fix = "Step the optimiser after the last backward pass."
            raise ExecutionError(Problem(what, "the cores of the forward pass", wrong, fix))
        with without_autocast(ctx.cores[0]):
            grads = code.gradients(ctx.kept, gradients, ctx.cores, ctx.needs_input_grad[2:])
        return (None, None, *grads)
