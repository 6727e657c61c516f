"""A call of a base layer: its output, and the input of its weight, for which opaque layers are watched.

The update of a convolution reads the input of the layer's convolution, which the layer's own `forward` may have padded.
So each call is watched. A Linear is assumed to read its input.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tnpeft.adapters.base_weight import dequantised, described, is_packed_for_inference
from tnpeft.errors import ExecutionError, Problem
from tnpeft.network import Layer
from tnpeft.network.signature import torch_kind

__all__ = ["BaseCall", "call_opaque", "geometry_of", "pads_itself", "passing_gradients", "plain_call"]

_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED_NAMES = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_CONVOLUTIONS = {getattr(functional, f"conv{axes}d"): _NAMES for axes in (1, 2, 3)} | {
    getattr(functional, f"conv_transpose{axes}d"): _TRANSPOSED_NAMES for axes in (1, 2, 3)
}
# Nodes of autograd that a layer's own call makes, at most.
_NODES = 10_000


class BaseCall(NamedTuple):
    """A layer's output, its weight's input, and for a convolution how it was called: stride and so on."""

    output: Tensor
    x: Tensor
    how: tuple[Any, ...] | None = None


def call_opaque(
    base: Any, layer: Layer, watched: bool, where: str | None, args: Sequence[Any], kwargs: dict[str, Any]
) -> BaseCall:
    """The base layer's own output; its convolutions are `watched` if their input may not be the layer's.

    Raises ExecutionError if no update can be added to this output.
    """
    x = args[0] if args else _first_of(base, kwargs)
    if args and isinstance(x, Tensor) and is_packed_for_inference(base):
        args = (x.detach(), *args[1:])
    noted: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    if watched:
        with _Watch(noted):
            output = base.forward(*args, **kwargs)
        calls = [call for call in noted if tuple(call["weight"].shape) == layer.stored_shape]
    else:
        output = base.forward(*args, **kwargs)
    if not isinstance(x, Tensor) or not isinstance(output, Tensor):
        kinds = f"a {type(x).__name__} and a {type(output).__name__}"
        raise ExecutionError(Problem("input and output", "tensors", kinds, "Match other layers.", where=where))
    if not layer.kernel_size:
        return BaseCall(output, x)
    if not watched or not calls:
        return BaseCall(output, x, _how(vars(base), layer))
    if len(calls) > 1:
        found = f"{len(calls)} of them in its `forward`"
        raise ExecutionError(Problem("an opaque layer", "one convolution", found, "Match other layers.", where=where))
    return BaseCall(output, calls[0]["input"], _how(calls[0], layer))


def _first_of(base: Any, kwargs: dict[str, Any]) -> Any:
    """The input of a call by keywords: what stands first in `forward`, in whatever order the call has it."""
    order = inspect.signature(base.forward).parameters if len(kwargs) > 1 else ()
    return next((kwargs[name] for name in (*order, *kwargs) if name in kwargs), None)


def plain_call(base: Any, layer: Layer, output: Tensor, x: Tensor) -> BaseCall:
    """A call of a layer of torch's own that gave this output of an input of this shape."""
    return BaseCall(output, x, _how(vars(base), layer) if layer.kernel_size else None)


def pads_itself(base: nn.Module, layer: Layer) -> bool:
    """Whether a convolution may pad or change its input, because its `forward` is not torch's."""
    if not layer.kernel_size:
        return False
    kind: type = type(base)
    own, methods = getattr(nn, torch_kind(kind) or "", None), ("forward", "_conv_forward")
    return any(
        method in base.__dict__ or getattr(kind, method, None) is not getattr(own, method, None) for method in methods
    )


def _how(call: Any, layer: Layer) -> tuple[Any, ...]:
    """Stride, padding, dilation and output padding along every axis, the padding mode and what it pads."""
    axes = len(layer.kernel_size)

    def along(value: Any) -> Any:
        if isinstance(value, str):
            return value
        return tuple(value) if isinstance(value, (tuple, list)) and len(value) > 1 else _repeated(value, axes)

    defaults = (("stride", 1), ("padding", 0), ("dilation", 1), ("output_padding", 0))
    numbers = (along(call.get(key, usual)) for key, usual in defaults)
    return (*numbers, call.get("padding_mode", "zeros"), tuple(call.get("_reversed_padding_repeated_twice", ())))


def _repeated(value: Any, axes: int) -> tuple[int, ...]:
    (number,) = value if isinstance(value, (tuple, list)) else (value,)
    return (number,) * axes


def geometry_of(how: tuple[Any, ...] | None, layer: Layer) -> Any:
    """An object with the attributes of a convolution that is called in this way; None for a Linear."""
    if how is None:
        return None
    return _Geometry(how, layer)


class _Geometry:
    """What of a convolution's attributes says how it is called."""

    def __init__(self, how: tuple[Any, ...], layer: Layer) -> None:
        self.stride, self.padding, self.dilation, self.output_padding, self.padding_mode, around = how
        self.kernel_size, self.groups = layer.kernel_size, layer.groups
        self._reversed_padding_repeated_twice = around


class _Watch(TorchFunctionMode):
    """Notes torch's convolutions, their arguments by name."""

    def __init__(self, noted: list[dict[str, Any]]) -> None:
        super().__init__()
        self.noted = noted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = _CONVOLUTIONS.get(func)
        if names is not None:
            self.noted.append({**dict(zip(names, args, strict=False)), **(kwargs or {})})
        return func(*args, **(kwargs or {}))


def passing_gradients(base: nn.Module, layer: Layer, where: str | None, x: Tensor, output: Tensor) -> Tensor:
    """The output, with gradients that reach the input.

    Integer kernels pass no gradients on. If the weight can be dequantised, the gradients are those of a Linear with
    that weight. Else ExecutionError is raised, because earlier layers would be trained on a part of their gradient.
    """
    reached, severed = _reaches(output, x)
    if reached:
        return output
    if layer.kernel_size or dequantised(base, layer) is None:
        fix = "Adapt layers behind it, or attach to the unquantised model."
        found = f"{described(base)}, which passes none on"
        raise ExecutionError(Problem("gradients of the input", "a base layer that has them", found, fix, where=where))
    passed: Tensor = _PassedOn.apply(x, output.detach() if severed else output, base, layer)  # type: ignore[no-untyped-call]
    return passed


def _reaches(output: Tensor, x: Tensor) -> tuple[bool, bool]:
    """Whether autograd's graph leads from an output to an input that it was made of.

    And whether an operator stands in between of which autograd knows no gradient.
    """
    severed = False
    seen: set[Any] = set()
    below, left = x.grad_fn, [output.grad_fn]
    while left and len(seen) < _NODES:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().endswith("NotImplemented"):
            severed = True
            continue
        if (below is not None and node is below) or (below is None and getattr(node, "variable", None) is x):
            return True, severed
        left += [parent for parent, _ in node.next_functions]
    return False, severed


class _PassedOn(torch.autograd.Function):
    """Leaves a Linear's output as it is; the input's gradient is that with the dequantised weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, base: nn.Module, layer: Layer) -> Tensor:
        ctx.base, ctx.layer, ctx.dtype = base, layer, x.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        weight = dequantised(ctx.base, ctx.layer)
        assert weight is not None
        weight = weight.T if ctx.layer.turned else weight
        return (gradient.to(weight.dtype) @ weight).to(ctx.dtype), gradient, None, None
