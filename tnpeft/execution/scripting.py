"""Merged layers as `torch.jit.script` compiles them: their own function with the merged weight, without adapters.

In TorchScript each of torch's convolutions has a fixed number of axes; the function below, on which they are all based,
takes any number.
"""

from __future__ import annotations

from typing import Any, List, Optional  # noqa: UP035 - TorchScript reads them

import torch
from torch import Tensor, nn

from tnpeft.adapters.parked import MANGLED
from tnpeft.errors import ExecutionError, Problem

__all__ = ["convolution", "hidden_attributes", "margins", "missing_padding", "refuse_unmerged"]


def refuse_unmerged(layer: Any) -> None:
    """Raises ExecutionError if the layer's effective weight is not a single tensor in its table."""
    if layer.merged and not layer.disabled:
        return
    name = next((layer.adapter(name).layer_name for name in layer.names), "")
    state, fix = "an adapter that is not merged", "Call `tnpeft.merge(model)` first, or use `torch.jit.trace`."
    if layer.disabled:
        state, fix = "adapters disabled by `tnpeft.disabled`", "Leave the `disabled` context first."
    where = f"layer '{name}'" if name else None
    raise ExecutionError(Problem("torch.jit.script", "a merged adapter", state, fix, where=where))


def hidden_attributes(layer: nn.Module) -> list[str]:
    """Attributes of a layer to hide from TorchScript: its adapters, and tensors that are parked beside its own."""
    parked = [key for table in (layer._parameters, layer._buffers) for key in table if key.startswith(MANGLED)]
    return ["adapters", "results", "site", *parked]


def margins(base: nn.Conv3d) -> list[int]:
    """How much a convolution pads its input before its call, from the last axis to the first; none for zero padding."""
    if base.padding_mode == "zeros" and base.padding != "same":
        return []
    return list(base._reversed_padding_repeated_twice)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    stride: List[int],  # noqa: UP006
    padding: List[int],  # noqa: UP006
    dilation: List[int],  # noqa: UP006
    transposed: bool,
    output_padding: List[int],  # noqa: UP006
    groups: int,
) -> Tensor:
    """torch's convolution along any number of axes, of one input or a batch of them."""
    if x.dim() == weight.dim():
        return torch.convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
    batch = x.unsqueeze(0)
    return torch.convolution(
        batch, weight, bias, stride, padding, dilation, transposed, output_padding, groups
    ).squeeze(0)


def missing_padding(
    x: Tensor,
    output_size: List[int],  # noqa: UP006
    kernel_size: List[int],  # noqa: UP006
    stride: List[int],  # noqa: UP006
    padding: List[int],  # noqa: UP006
    dilation: List[int],  # noqa: UP006
) -> List[int]:  # noqa: UP006
    """How much a transposed convolution's output lacks of the wanted size along each axis."""
    axes = len(kernel_size)
    missing: List[int] = []  # noqa: UP006
    for axis in range(axes):
        size = (x.size(axis - axes) - 1) * stride[axis] - 2 * padding[axis] + dilation[axis] * (kernel_size[axis] - 1)
        missing.append(output_size[axis - axes] - size - 1)
    return missing
