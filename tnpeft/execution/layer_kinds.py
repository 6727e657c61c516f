"""The classes of adapted layers: one for each call convention of torch's layers."""

from __future__ import annotations

from typing import Any, ClassVar, List, Optional  # noqa: UP035 - TorchScript reads them

import torch
from torch import Tensor, nn
from torch.nn import functional

from tnpeft.adapters.parked import ParameterLayer
from tnpeft.execution.forward_pass import ModelResults
from tnpeft.execution.layers import AdaptedLayer
from tnpeft.execution.opaque import AdaptedOpaque
from tnpeft.execution.parameters import AdaptedParameter
from tnpeft.execution.scripting import convolution, margins, missing_padding
from tnpeft.execution.torch_call import convolved
from tnpeft.network.look_alikes import conv1d_of
from tnpeft.network.signature import is_opaque_layer

__all__ = ["AdaptedConv", "AdaptedConv1D", "AdaptedConvTranspose", "AdaptedLinear", "wrap"]


class AdaptedLinear(AdaptedLayer):
    """An adapted `nn.Linear`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name, may be a keyword
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return functional.linear(input, self.weight, self.bias)
        else:
            return self.site.way(self.site, input)

    @staticmethod
    def _call_base(base: Any, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        return functional.linear(x, weight, base.bias)


class AdaptedConv1D(AdaptedLayer):
    """An adapted `Conv1D` of transformers: a linear layer whose weight is stored as (in, out)."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            rows = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)  # type: ignore[arg-type]
            return rows.view(x.size()[:-1] + (self.weight.size(1),))  # noqa: RUF005 - TorchScript reads it
        else:
            return self.site.way(self.site, x)

    @staticmethod
    def _call_base(base: Any, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        return torch.addmm(base.bias, x.view(-1, x.size(-1)), weight).view(*x.size()[:-1], weight.size(1))


class AdaptedConv(AdaptedLayer):
    """An adapted `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`, with every option they have."""

    __constants__: ClassVar[list[str]] = ["stride", "zeros", "dilation", "groups", "padding_mode", "margins"]

    @property
    def margins(self) -> list[int]:
        """For scripts: what the input is padded with first."""
        return margins(self.base)

    @property
    def zeros(self) -> list[int]:
        """For scripts: the zeros along each axis that the convolution itself puts around its input."""
        axes = len(self.base.kernel_size)
        return [0] * axes if self.margins or isinstance(self.base.padding, str) else list(self.base.padding)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            padded = functional.pad(input, self.margins, mode) if len(self.margins) > 0 else input
            return convolution(
                padded, self.weight, self.bias, self.stride, self.zeros, self.dilation, False, self.zeros, self.groups
            )
        else:
            return self.site.way(self.site, input)

    @staticmethod
    def _call_base(base: Any, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        quick = convolved(base, x, weight, base.bias)
        output: Tensor = base._conv_forward(x, weight, base.bias) if quick is None else quick
        return output


_TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


class AdaptedConvTranspose(AdaptedLayer):
    """An adapted `nn.ConvTranspose1d`, `nn.ConvTranspose2d` or `nn.ConvTranspose3d`."""

    __constants__: ClassVar[list[str]] = ["kernel_size", "stride", "padding", "dilation", "output_padding", "groups"]

    def forward(self, input: Tensor, output_size: Optional[List[int]] = None) -> Tensor:  # noqa: A002, UP006, UP045
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            extra: List[int] = list(self.output_padding)  # noqa: UP006
            if output_size is not None:
                extra = missing_padding(input, output_size, self.kernel_size, self.stride, self.padding, self.dilation)
            return convolution(
                input, self.weight, self.bias, self.stride, self.padding, self.dilation, True, extra, self.groups
            )
        else:
            return self.site.way(self.site, input, output_size)

    @staticmethod
    def _call_base(base: Any, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        (output_size,) = rest
        axes = len(base.kernel_size)
        padding = base._output_padding(x, output_size, base.stride, base.padding, base.kernel_size, axes, base.dilation)
        return _TRANSPOSED[axes](x, weight, base.bias, base.stride, base.padding, padding, base.groups, base.dilation)


def wrap(layer: nn.Module | ParameterLayer, results: ModelResults | None = None) -> AdaptedLayer:
    """The wrapper of a layer's call convention, without adapters yet; `results` are its model's."""
    kind: type[AdaptedLayer] = AdaptedConv
    if isinstance(layer, ParameterLayer):
        return AdaptedParameter(layer, results or ModelResults())
    if is_opaque_layer(layer):
        kind = AdaptedOpaque
    elif isinstance(layer, nn.Linear):
        kind = AdaptedLinear
    elif conv1d_of(type(layer)) is not None:
        kind = AdaptedConv1D
    elif isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        kind = AdaptedConvTranspose
    return kind(layer, results or ModelResults())
