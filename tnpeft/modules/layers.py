"""Adapted layers: a base layer with named adapters on its weight, one class per call convention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tnpeft.modules.adapter import Adapter
from tnpeft.modules.calls import convolved
from tnpeft.modules.execution import execute, summed_weight
from tnpeft.modules.waiting import own_weight

__all__ = ["AdaptedConv", "AdaptedConvTranspose", "AdaptedLayer", "AdaptedLinear", "wrap"]

_TAKEN = frozenset(dir(nn.ModuleDict()))
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


class AdaptedLayer(nn.Module):
    """A frozen layer whose weight carries the updates of named adapters.

    `weight` and `bias` are the effective ones, other attributes (`stride`, `in_channels`, ...) are
    the base layer's. `scales` holds the active adapters. Nothing here writes into a base tensor.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self._modules["base"] = base
        self.adapters = nn.ModuleDict().train(base.training)
        self.scales: dict[str, float] = {}
        self.disabled = False
        self.register_buffer("_merged", None, persistent=False)
        self.register_load_state_dict_post_hook(_merge_again)  # type: ignore[no-untyped-call]
        self.training = base.training
        # Shared, not copied: hooks of the base layer run, can be removed, and outlive the adapter.
        for name in _HOOKS:
            setattr(self, name, getattr(base, name))

    @property
    def base(self) -> Any:
        """The layer that was wrapped, with its own class and parameters."""
        return self._modules["base"]  # not through `__getattr__`: every forward comes here

    @property
    def weight(self) -> Tensor:
        """The effective weight: the base weight's dtype and strides, differentiable in the active cores."""
        weight: Tensor = self.base.weight
        if self.disabled:
            return weight
        merged = self._buffers["_merged"]
        if merged is not None:
            return merged
        return summed_weight(weight, self.active, own_weight(self.base)) if self.scales else weight

    @property
    def bias(self) -> Tensor | None:
        """The effective bias: an adapter that trains it has its own installed in the base layer."""
        bias: Tensor | None = self.base.bias
        return bias

    @property
    def active(self) -> list[tuple[Adapter, float]]:
        """The active adapters with their scales."""
        return [(self.adapter(name), scale) for name, scale in self.scales.items()]

    @property
    def merged(self) -> bool:
        return self._buffers["_merged"] is not None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all adapters, in the order in which they were attached."""
        return tuple(key.removeprefix("_") for key in self.adapters)

    def adapter(self, name: str) -> Adapter:
        adapter = self._modules["adapters"]._modules[_key(name)]  # type: ignore[union-attr]
        assert isinstance(adapter, Adapter)
        return adapter

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        self.adapters[_key(name)] = adapter.train(self.training)

    def remove_adapter(self, name: str) -> None:
        del self.adapters[_key(name)]
        self.scales.pop(name, None)

    def merge(self) -> None:
        """Compute the effective weight once and keep it beside the base weight."""
        with torch.inference_mode(False), torch.no_grad():
            weight: Tensor = self.base.weight.detach()
            if self.scales:  # a clone, for the sum may be a view into something larger
                weight = summed_weight(weight, self.active, own_weight(self.base)).clone()
            self._buffers["_merged"] = weight

    def unmerge(self) -> None:
        self._buffers["_merged"] = None

    def keep_merged(self) -> None:
        """Give the base layer the merged weight as a new parameter; the old one is not written."""
        merged = self._buffers["_merged"]
        if merged is not None and self.scales:
            self.base._parameters["weight"] = nn.Parameter(merged, requires_grad=False)

    def unwrap(self) -> nn.Module:
        """The base layer, with the hooks that were registered here meanwhile."""
        base: nn.Module = self.base
        base._is_full_backward_hook = self._is_full_backward_hook
        return base

    def reset_parameters(self) -> None:
        """Draw the initial cores of every adapter; the base layer keeps its values."""
        for name in self.names:
            self.adapter(name).reset_parameters(own_weight(self.base))
        if self.merged:
            self.merge()

    def forward(self, input: Tensor, *rest: Any) -> Tensor:  # noqa: A002 - torch's name, may be a keyword
        return execute(self, input, *rest)

    def call_base(self, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        """The base layer's own function of an input, a weight and a bias."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        states = [f"{name}: {scale:g}" for name, scale in self.scales.items()]
        return f"active={{{', '.join(states)}}}" + ", merged" * self.merged + ", disabled" * self.disabled

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Not the properties, whose own mistakes would pass for the base weight, and nothing before unpickling.
            base = self.__dict__.get("_modules", {}).get("base")
            if base is None or name in ("weight", "bias") or name.startswith("__"):
                raise
        return getattr(base, name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLayer:
        before = self.base.weight.dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.merged and self.base.weight.dtype != before:
            self.merge()  # the sum of the cast weight, as unmerged layers compute it
        return self


class AdaptedLinear(AdaptedLayer):
    """An adapted `nn.Linear`."""

    def call_base(self, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        return functional.linear(x, weight, bias)


class AdaptedConv(AdaptedLayer):
    """An adapted `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`, with every option they have."""

    def call_base(self, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        found = convolved(self.base, x, weight, bias)
        output: Tensor = self.base._conv_forward(x, weight, bias) if found is None else found
        return output


_TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


class AdaptedConvTranspose(AdaptedLayer):
    """An adapted `nn.ConvTranspose1d`, `nn.ConvTranspose2d` or `nn.ConvTranspose3d`."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: A002
        return super().forward(input, output_size)

    def call_base(self, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        base = self.base
        (output_size,) = rest
        axes = len(base.kernel_size)
        padding = base._output_padding(x, output_size, base.stride, base.padding, base.kernel_size, axes, base.dilation)
        return _TRANSPOSED[axes](x, weight, bias, base.stride, base.padding, padding, base.groups, base.dilation)


def wrap(layer: nn.Module) -> AdaptedLayer:
    """The wrapper of a layer's call convention, without adapters yet."""
    if isinstance(layer, nn.Linear):
        return AdaptedLinear(layer)
    transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    return AdaptedConvTranspose(layer) if transposed else AdaptedConv(layer)


def _key(name: str) -> str:
    """An adapter's key in the ModuleDict, whose own methods (`keys`, `type`, `half`, ...) are no keys for it."""
    return f"_{name}" if name in _TAKEN else name


def _merge_again(layer: nn.Module, _incompatible: object) -> None:
    """After `load_state_dict` the cores are others, and so is the merged weight."""
    if isinstance(layer, AdaptedLayer) and layer.merged:
        layer.merge()
