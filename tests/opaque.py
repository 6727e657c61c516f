"""Layers whose weight cannot be read or replaced, as the tests make them, and what they compute with an adapter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional


class PackedQuantLinear(nn.Module):
    """A linear layer as GPTQ's kernels have it: eight 4-bit numbers in each int32, scales and zeros by groups.

    Written for the tests, for those of GPTQ need CUDA: what surgery sees of both are the sizes, and tables of integers.
    """

    def __init__(self, linear: nn.Linear, group: int = 8) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group = linear.in_features, linear.out_features, group
        weight = linear.weight.detach().T.reshape(-1, group, linear.out_features)
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        scales = (high - low).clamp_min(1e-6) / 15
        codes = ((weight - low) / scales).round().to(torch.int32).reshape(-1, 8, linear.out_features)
        packed = torch.zeros(codes.shape[0], linear.out_features, dtype=torch.int32)
        for place in range(8):
            packed |= codes[:, place] << (4 * place)
        self.register_buffer("qweight", packed)
        self.register_buffer("scales", scales)
        self.register_buffer("lows", low)
        self.register_buffer("bias", linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.stack([(self.qweight >> (4 * place)) & 15 for place in range(8)], 1)
        weight = codes.reshape(-1, self.group, self.out_features) * self.scales + self.lows
        return x @ weight.reshape(self.in_features, self.out_features).to(x.dtype) + self.bias.to(x.dtype)


class Doubled(nn.Linear):
    """A Linear with a `forward` and arguments of its own."""

    def forward(self, hidden_states: Tensor, scale: float = 2.0) -> Tensor:
        return scale * super().forward(hidden_states)


class PaddedConv2d(nn.Conv2d):
    """A convolution that pads more on one side, as timm's Conv2dSame does."""

    def forward(self, x: Tensor) -> Tensor:
        padded = functional.pad(x, (0, 1, 2, 0))
        return functional.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class CausalConv3d(nn.Conv3d):
    """A convolution that sees nothing later than its output, as those of video models."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.pad(x, (1, 1, 1, 1, 2, 0)))


class TwiceConv1d(nn.Conv1d):
    """A convolution that uses its weight twice."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(-x)


def plain_update(layer: nn.Module, x: Tensor, delta: Tensor) -> Tensor:
    """What the base layer's convolution (or product) makes of its input with a weight of `delta`; written for each."""
    if isinstance(layer, PaddedConv2d):
        return functional.conv2d(functional.pad(x, (0, 1, 2, 0)), delta, None, layer.stride, 0, layer.dilation)
    if isinstance(layer, CausalConv3d):
        return functional.conv3d(functional.pad(x, (1, 1, 1, 1, 2, 0)), delta, None, layer.stride)
    if isinstance(layer, nn.ConvTranspose2d):
        return functional.conv_transpose2d(x, delta, None, layer.stride, layer.padding, layer.output_padding)
    if isinstance(layer, nn.Conv2d):
        padded = functional.pad(x, layer._reversed_padding_repeated_twice, "reflect")
        return functional.conv2d(padded, delta, None, layer.stride, 0, layer.dilation, layer.groups)
    return functional.linear(x, delta)


def expected(layer: nn.Module, x: Tensor, deltas: Mapping[Tensor, float], differentiable: bool = True) -> Tensor:
    """base(x) + the sum of s dW of x, in the dtype of the updates; gradients reach x through a base that has some."""
    total = layer.forward(x if differentiable else x.detach())
    for delta, scale in deltas.items():
        total = total + scale * plain_update(layer, x.to(delta.dtype), delta)
    return total
