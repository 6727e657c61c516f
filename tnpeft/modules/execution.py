"""How an adapted layer computes: one function per execution mode.

`dense` convolves once with the summed weight. A further mode is one more entry in `EXECUTIONS`: it
gets the wrapper and the call's arguments, and everything it needs is there (`layer.base`,
`layer.active`, `layer.call_base`). Layers that are merged or disabled, or that several adapters
share, run dense whatever their mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from tnpeft.modules.adapter import Adapter

if TYPE_CHECKING:
    from tnpeft.modules.layers import AdaptedLayer

__all__ = ["EXECUTIONS", "Execution", "dense", "summed_weight"]


class Execution(Protocol):
    """Computes an adapted layer's output from its input and the call's other arguments."""

    def __call__(self, layer: AdaptedLayer, x: Tensor, *rest: Any) -> Tensor: ...


def dense(layer: AdaptedLayer, x: Tensor, *rest: Any) -> Tensor:
    """One call of the layer's own function with W + ΔW."""
    return layer.call_base(x, layer.weight, layer.bias, *rest)


EXECUTIONS: dict[str, Execution] = {"dense": dense}


def summed_weight(weight: Tensor, active: Sequence[tuple[Adapter, float]]) -> Tensor:
    """W + Σ s ΔW in exactly W's strides and dtype, summed in fp32 (fp64) and rounded once.

    Gradients reach the cores alone.
    """
    if weight.requires_grad:
        weight = weight.detach()
    adapter, scale = active[0]
    total = adapter.delta_for(weight)
    if scale != 1.0:
        total = total * scale
    for adapter, scale in active[1:]:
        total = total.add(adapter.delta_for(weight), alpha=scale)
    if torch.compiler.is_compiling():
        total = weight + total
    else:
        # In place and unseen by autograd, for which W is a constant: the delta weight is ours alone, no backward reads
        # it, and another tensor of its size costs more than contracting it (12 of 38 ms for a 512 -> 256 Conv3d).
        total.data.add_(weight)
    if total.dtype == weight.dtype and total.stride() == weight.stride():
        return total
    # Another dtype, or unit axes whose strides say which memory format the weight has: both steer the kernels.
    return torch.empty_like(weight).copy_(total)
