"""Convolutions whose gradients are cut in two: torch's own output to the bit, gradients against float64."""

from __future__ import annotations

import gc
import weakref

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from modes import relative
from torch import Tensor, nn
from torch.nn import functional

import tnpeft
from tnpeft.execution.torch_call import convolved
from tnpeft.program import Geometry, convolve

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Conv3d, Tensor]:
    """Any options of one group, and a volume that it fits."""
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(3))
    stride = tuple(draw(st.integers(1, 5)) for _ in range(3))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(3))
    padding = tuple(draw(st.integers(0, size - 1 if place else 3)) for place, size in enumerate(kernel))
    inputs, outputs = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    torch.manual_seed(draw(st.integers(0, 99)))
    layer = nn.Conv3d(inputs, outputs, kernel, stride, padding, dilation, bias=draw(st.booleans()))
    # Outputs of 4 to 8 along each axis, so that cutting pays for most.
    sizes = [
        (draw(st.integers(4, 8)) - 1) * step + apart * (size - 1) + 1 - 2 * pad + draw(st.integers(0, step - 1))
        for size, step, apart, pad in zip(kernel, stride, dilation, padding, strict=True)
    ]
    x = torch.randn(*([1] * draw(st.integers(0, 1))), inputs, *(max(1, size) for size in sizes))
    return layer, x


def geometry(layer: nn.Conv3d) -> Geometry:
    return Geometry(layer.stride, layer.padding, layer.dilation)


@settings(max_examples=200)
@given(convolutions(), st.sampled_from([(True, True), (True, False), (False, True)]))
def test_output_and_gradients_are_those_of_torch(found: tuple[nn.Conv3d, Tensor], wanted: tuple[bool, bool]):
    layer, x = found
    x = x.requires_grad_(wanted[0])
    layer.weight.requires_grad_(wanted[1])
    expected = layer(x)
    made = convolve(x, layer.weight, layer.bias, geometry(layer))
    if made is None:
        assert expected[..., 0, :, :, :].numel() < 128 * layer.out_channels or expected.shape[-3] < 2
        return
    assert torch.equal(made, expected)
    upstream = torch.randn_like(made)
    inputs = [one for one in (x, layer.weight, layer.bias) if one is not None and one.requires_grad]
    gradients = torch.autograd.grad(made, inputs, upstream)
    for own, exact, bound in zip(gradients, wide(found, upstream, False), wide(found, upstream, True), strict=True):
        assert own.shape == exact.shape
        assert float((own.double() - exact).abs().max()) <= 1e-5 * max(float(bound.max()), 1e-30)


def wide(found: tuple[nn.Conv3d, Tensor], upstream: Tensor, magnitude: bool) -> tuple[Tensor, ...]:
    """torch's gradients in float64; with `magnitude` those of positive numbers, which bound what rounding can do."""
    layer, x = found
    tensors = [None if one is None else one.detach().double() for one in (x, layer.weight, layer.bias, upstream)]
    if magnitude:
        tensors = [None if one is None else one.abs() for one in tensors]
    *inputs, upstream = tensors
    for one, like in zip(inputs, (x, layer.weight, layer.bias), strict=True):
        if one is not None:
            one.requires_grad_(like.requires_grad)
    output = functional.conv3d(*inputs, layer.stride, layer.padding, layer.dilation)
    return torch.autograd.grad(output, [one for one in inputs if one is not None and one.requires_grad], upstream)


@pytest.mark.parametrize("stride", [2, 3, 4, 5])
@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 2, 3])
def test_halves_that_read_little_but_padding(stride: int, kernel: int, padding: int):
    for depth in range(1, 7):
        torch.manual_seed(0)
        layer = nn.Conv3d(2, 3, (kernel, 1, 1), (stride, 1, 1), (padding, 0, 0))
        if depth + 2 * padding < kernel:
            continue
        x = torch.randn(1, 2, depth, 16, 16, requires_grad=True)
        expected = layer(x)
        made = convolve(x, layer.weight, layer.bias, geometry(layer))
        assert (made is None) == (expected.shape[2] < 2)
        if made is not None:
            upstream = torch.randn_like(made)
            inputs = (x, layer.weight, layer.bias)
            pairs = zip(*(torch.autograd.grad(one, inputs, upstream) for one in (made, expected)), strict=True)
            assert all(relative(*one) < 1e-5 for one in pairs)


def test_several_volumes_are_torch_s():
    layer = nn.Conv3d(4, 4, 1)  # a kernel for which torch may take its own kernels up to fifteen of them
    x = torch.randn(2, 4, 4, 8, 8, requires_grad=True)
    assert convolve(x, layer.weight, layer.bias, geometry(layer)) is None


def example(requires_grad: bool = True) -> tuple[nn.Conv3d, Tensor]:
    torch.manual_seed(0)
    return nn.Conv3d(6, 5, 3, padding=1), torch.randn(1, 6, 9, 8, 7, requires_grad=requires_grad)


def test_second_derivatives_are_torch_s():
    layer, x = example()
    for output in (convolve(x, layer.weight, layer.bias, geometry(layer)), layer(x)):
        assert output is not None
        first = torch.autograd.grad(output.square().sum(), [x, layer.weight], create_graph=True)
        second = torch.autograd.grad(sum(one.square().sum() for one in first), [x, layer.weight, layer.bias])
        if output.grad_fn is not None and "Convolved" in output.grad_fn.name():
            own = second
    for one, other in zip(own, second, strict=True):
        assert relative(one, other) < 1e-5


def test_a_frozen_weight_keeps_no_input():
    layer, x = example()
    layer.requires_grad_(False)
    seen = x * 1
    output = convolve(seen, layer.weight, layer.bias, geometry(layer))
    assert output is not None
    kept = weakref.ref(seen)
    del seen
    gc.collect()
    assert kept() is None
    output.sum().backward()
    assert relative(x.grad, torch.autograd.grad(layer(x).sum(), x)[0]) < 1e-5


def test_what_torch_does_as_quickly_is_left_to_torch(monkeypatch: pytest.MonkeyPatch):
    layer, x = example()
    known = geometry(layer)
    assert convolve(x, layer.weight, layer.bias, known) is not None
    with torch.no_grad():
        assert convolve(x, layer.weight, layer.bias, known) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert convolve(x, layer.weight, layer.bias, known) is None
    assert convolve(x.double(), layer.weight.double(), None, known) is None
    assert convolve(x.detach(), layer.weight.detach(), layer.bias, known) is None
    assert convolve(x.expand(2, -1, -1, -1, -1), layer.weight, layer.bias, known) is None  # takes oneDNN itself
    assert convolve(x[..., :4, :4, :4], layer.weight, layer.bias, known) is None
    flat = nn.Conv2d(6, 5, 3, padding=1)
    assert convolve(x[0, :, 0], flat.weight, flat.bias, Geometry((1, 1), (1, 1), (1, 1))) is None
    monkeypatch.setattr("torch._C._has_mkldnn", False)
    assert convolve(x, layer.weight, layer.bias, known) is None


@pytest.mark.parametrize(
    ("options", "cut"),
    [
        ({}, True),
        ({"padding": "same"}, True),
        ({"padding": "valid"}, True),
        ({"padding": "same", "kernel_size": (3, 2, 3)}, False),
        ({"padding_mode": "circular"}, False),
        ({"groups": 3}, False),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_every_option_of_the_layer_is_heeded(options: dict[str, object], cut: bool):
    torch.manual_seed(0)
    layer = nn.Conv3d(6, 6, **{"kernel_size": 3, "padding": 1, **options})
    x = torch.randn(1, 6, 9, 8, 7, requires_grad=True)
    found = convolved(layer, x, layer.weight, layer.bias)
    assert (found is not None) == cut
    assert found is None or torch.equal(found, layer(x))


@pytest.mark.parametrize("mode", ["dense", "factored", "hybrid"])
def test_adapted_layers_take_it_in_every_mode(mode: str, monkeypatch: pytest.MonkeyPatch):
    layer, x = example()
    model = nn.Sequential(layer)
    tnpeft.attach(model, "lora", match=["0"], mode=mode, r=2)
    with torch.no_grad():
        for parameter in model[0].adapter("default").parameters():
            parameter.normal_()
    weight = model[0].weight.detach()
    upstream = torch.randn_like(layer(x))
    found = torch.autograd.grad(model(x), [x, *model[0].adapter("default").parameters()], upstream)
    assert relative(found[0], torch.autograd.grad(functional.conv3d(x, weight, padding=1), x, upstream)[0]) < 1e-5
    monkeypatch.setattr("tnpeft.execution.layer_kinds.convolved", lambda *_: None)
    for own, other in zip(
        found, torch.autograd.grad(model(x), [x, *model[0].adapter("default").parameters()], upstream), strict=True
    ):
        assert relative(own, other) < 1e-5
