"""Operations whose graph may be walked back more than once: what several calls of a forward pass share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tnpeft.program.observers import needs_plain_ops, saved_tensors_are_hooked

__all__ = ["repeatable"]

Make = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def repeatable(make: Make, inputs: Sequence[Tensor], differentiated: Make | None = None) -> list[Tensor]:
    """`make(inputs)`; each of its results may have a backward pass of its own, and frees nothing for the others.

    `differentiated` is another function with the same gradients, which takes less to walk back. Where somebody looks
    on, or at what autograd saves, they are plain operations.
    """
    if not torch.is_grad_enabled() or needs_plain_ops(*inputs) or saved_tensors_are_hooked():
        return [*make(inputs)]
    if not any(tensor.requires_grad for tensor in inputs):
        return [*make(inputs)]
    return [*_Repeatable.apply(make, differentiated, *inputs)]  # type: ignore[no-untyped-call]


class _Repeatable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, make: Make, differentiated: Make | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        outputs = None if differentiated is None else tuple(result.detach() for result in make(inputs))
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
            results = [*(differentiated or make)(leaves)]
        ctx.make, ctx.leaves, ctx.results = differentiated or make, leaves, results
        ctx.save_for_backward(*inputs)
        outputs = outputs or tuple(result.detach() for result in results)
        ctx.mark_non_differentiable(
            *(output for output, result in zip(outputs, results, strict=True) if not result.requires_grad)
        )
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        leaves, results, again = ctx.leaves, ctx.results, torch.is_grad_enabled()
        if again:  # the gradients are differentiated: they must hang on the inputs themselves
            leaves = ctx.saved_tensors
            results = [*ctx.make(leaves)]
        needed = ctx.needs_input_grad[2:]
        both = zip(results, gradients, strict=True)
        pairs = [(result, grad) for result, grad in both if grad is not None and result.requires_grad]
        wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
        if not pairs or not wanted:
            return (None,) * (2 + len(needed))
        outputs, grads = zip(*pairs, strict=True)
        found = iter(
            torch.autograd.grad(outputs, wanted, grads, retain_graph=True, create_graph=again, allow_unused=True)
        )
        return (None, None, *(next(found) if need else None for need in needed))
