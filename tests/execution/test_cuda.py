"""On a GPU every mode computes what it computes on the CPU. Without one these tests are skipped."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from modes import FAST, adapted, filled, gradients_of, stepped, worst
from small import chain
from torch import Tensor, nn

import tnpeft
from tnpeft.execution import AdaptedLayer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
EVERY_MODE = ("dense", *FAST, "auto")
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "Conv3d": (nn.Conv3d(16, 24, 3, stride=(1, 2, 1), padding=1), (2, 16, 5, 6, 7)),
    "Conv2d": (nn.Conv2d(16, 24, 3, padding=1), (2, 16, 9, 8)),
    "Linear": (nn.Linear(16, 24), (3, 5, 16)),
}


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """Products and convolutions in fp32, not in tf32."""
    known = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = known


def on_gpu(wrapper: AdaptedLayer) -> AdaptedLayer:
    return copy.deepcopy(wrapper).cuda()


def moved(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: one.cpu() for name, one in found.items()}


def both(wrapper: AdaptedLayer, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    with torch.no_grad():
        upstream = torch.randn(wrapper(x).shape)
    return gradients_of(wrapper, x, upstream), moved(gradients_of(on_gpu(wrapper), x.cuda(), upstream.cuda()))


@pytest.mark.parametrize("mode", EVERY_MODE)
@pytest.mark.parametrize("name", tnpeft.list_specs())
def test_every_spec_agrees_with_the_cpu(name: str, mode: str):
    spec = tnpeft.load_spec(name)
    kind = next((kind for kind in LAYERS if kind in spec.layers), None)
    if kind is None:
        pytest.skip(f"none of its layers is here: {', '.join(spec.layers)}")
    torch.manual_seed(0)
    layer, shape = copy.deepcopy(LAYERS[kind][0]), LAYERS[kind][1]
    wrapper = filled(adapted(layer, spec, mode))
    on_cpu, on_device = both(wrapper, torch.randn(shape))
    assert worst(on_device, on_cpu) < 1e-4


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", EVERY_MODE)
@pytest.mark.parametrize("kind", LAYERS)
def test_frozen_copies_start_as_the_base_layer_to_the_bit(kind: str, mode: str, autocast: torch.dtype | None):
    layer, shape = copy.deepcopy(LAYERS[kind][0]).cuda(), LAYERS[kind][1]
    wrapper = on_gpu(adapted(LAYERS[kind][0], chain(), mode))
    wrapper.base.load_state_dict(layer.state_dict())
    x = torch.randn(shape, device="cuda")
    with torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
        assert torch.equal(wrapper(x), layer(x))


@pytest.mark.parametrize("mode", EVERY_MODE)
def test_small_changes_are_exact_in_bf16_autocast(mode: str):
    torch.manual_seed(0)
    layer = nn.Conv3d(16, 24, 3, padding=1, bias=False)
    layer.weight.data.zero_()  # the output is the update alone
    wrapper = stepped(adapted(layer, chain(), mode), 1e-4)
    x = torch.randn(2, 16, 5, 6, 7)
    with torch.autocast("cuda", torch.bfloat16):
        found = on_gpu(wrapper)(x.cuda())
    assert worst({"update": found.cpu().float()}, {"update": wrapper(x)}) < 2e-2


def test_a_model_s_layers_contract_together_as_on_the_cpu():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv3d(8, 8, 3, padding=1) for _ in range(4)))
    tnpeft.attach(model, "tenvoo_l", match=r"\d", mode="factored")
    for layer in model:
        filled_default(layer)
    x = torch.randn(1, 8, 6, 6, 6)
    device = copy.deepcopy(model).cuda()
    for _ in range(2):  # the second pass groups layers
        model.zero_grad()
        device.zero_grad()
        model(x).square().mean().backward()
        device(x.cuda()).square().mean().backward()
    expected = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    found = {name: one.grad.cpu() for name, one in device.named_parameters() if one.grad is not None}
    assert len(found) >= 4 * 10
    assert worst(found, expected) < 1e-4


def filled_default(layer: AdaptedLayer) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for core in layer.adapter("default").parameters():
            core.add_(0.1 * torch.randn(core.shape, generator=generator))
