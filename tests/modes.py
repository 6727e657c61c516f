"""Adapted layers in every execution mode, and the oracle: torch's own layer with the summed weight, in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tnpeft.adapters import Adapter
from tnpeft.execution import AdaptedLayer, compile, wrap
from tnpeft.execution.calls import Calls
from tnpeft.network import Spec
from tnpeft.planning import Axis, Call
from tnpeft.verify.model_under_test import fill
from tnpeft.verify.oracle import dense_delta

# The modes that do not build the gradient of the weight.
FAST = ("factored", "hybrid")


def call(side: int, kernel: int = 3, axes: int = 3, batch: int = 1, stride: int = 1) -> Call:
    """A convolution that keeps the side, but for its stride."""
    outputs = (side - 1) // stride + 1
    return Call(batch, tuple(Axis(side, outputs, kernel, stride, before=kernel // 2) for _ in range(axes)))


def adapted(layer: nn.Module, spec: Spec | str, mode: str, **params: Any) -> AdaptedLayer:
    """A copy of the layer with a fresh adapter in this mode; it runs in no other than was asked for."""
    base = copy.deepcopy(layer).requires_grad_(False)
    wrapper = wrap(base)
    wrapper.add_adapter("a", compile(spec, base, mode=mode, **params))
    wrapper.act({"a": 1.0})
    return wrapper


def calls_of(wrapper: AdaptedLayer) -> Calls:
    """How its calls ran."""
    return wrapper.calls("a")


def adapter_of(wrapper: AdaptedLayer) -> Adapter:
    return wrapper.adapter("a")


def filled(wrapper: AdaptedLayer, seed: int = 0) -> AdaptedLayer:
    """Far from the start: every trainable core anew."""
    fill(adapter_of(wrapper), seed)
    return wrapper


def stepped(wrapper: AdaptedLayer, step: float, seed: int = 5) -> AdaptedLayer:
    """After a step of this size on every entry, as Adam's first is."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for core in adapter_of(wrapper).parameters():
            core.add_(step * torch.randn(core.shape, generator=generator).sign())
    return wrapper


def with_weight(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The plain layer's function with another weight."""
    values: dict[str, Tensor] = {"weight": weight}
    if bias is not None:
        values["bias"] = bias
    output: Tensor = torch.func.functional_call(layer, values, (x,))
    return output


def oracle(wrapper: AdaptedLayer, x: Tensor, upstream: Tensor, magnitude: bool = False) -> dict[str, Tensor]:
    """Output and gradients in float64, by one dense sum over all cores.

    With `magnitude` every number is positive: what was added up, which bounds what rounding can do.
    """

    def sized(tensor: Tensor) -> Tensor:
        return tensor.detach().double().abs() if magnitude else tensor.detach().double()

    adapter = adapter_of(wrapper)
    start, leaves = None, {name: sized(core) for name, core in adapter.cores.items()}
    if adapter.network.start == "frozen_copy":
        start = {**leaves, **{name: sized(core) for name, core in adapter.start.items()}}
        if magnitude:  # tensors on the way are start and change added up
            leaves = {name: core + start[name] for name, core in leaves.items()}
    trained = {name: leaves[name].requires_grad_() for name in adapter.trained}
    weight = dense_delta(adapter.network, leaves, start, magnitude) + sized(wrapper.base.weight)
    bias = None if wrapper.base.bias is None else sized(wrapper.base.bias)
    x = sized(x).requires_grad_()
    output = with_weight(copy.deepcopy(wrapper.base).double(), x, weight, bias)
    gradients = torch.autograd.grad(output, [x, *trained.values()], sized(upstream))
    return {"output": output.detach(), **dict(zip(["input", *trained], gradients, strict=True))}


def gradients_of(wrapper: AdaptedLayer, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Output and gradients as the wrapper computes them, with the names of `oracle`."""
    x = x.detach().clone().requires_grad_()
    trained = adapter_of(wrapper).trained
    output = wrapper(x)
    gradients = torch.autograd.grad(output, [x, *trained.values()], upstream.to(output.dtype))
    return {"output": output.detach(), **dict(zip(["input", *trained], gradients, strict=True))}


def agree(
    found: Mapping[str, Tensor], exact: Mapping[str, Tensor], bound: Mapping[str, Tensor], allowed: float
) -> None:
    """Within `allowed` of the largest sum of magnitudes, entry by entry."""
    assert list(found) == list(exact)
    for name, one in exact.items():
        error = float((found[name].double() - one).abs().max())
        assert error <= allowed * max(float(bound[name].abs().max()), 1e-30), name


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    found, expected = found.detach(), expected.detach()
    norm = float(expected.double().norm())
    return float((found.double() - expected.double()).norm()) / (norm if norm > 0 else 1.0)


def worst(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    assert list(found) == list(expected)
    return max(relative(found[name], one) for name, one in expected.items())
