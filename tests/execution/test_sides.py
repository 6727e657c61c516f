"""Networks on one side of the base weight: the layer's input or output is turned, and the weight is met once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnpeft
from tnpeft.network import load_spec
from tnpeft.schedule import plan, side_of

SIDES = {"oft": "input", "oft_cayley": "input", "ia3_input": "input", "diag_oft": "output", "ia3": "output"}
PARAMS: dict[str, dict[str, Any]] = {"oft": {"b": 4}, "oft_cayley": {"b": 4}}
LAYERS = {
    "linear": (nn.Linear(16, 24), (3, 5, 16)),
    "no bias": (nn.Linear(16, 24, bias=False), (3, 16)),
    "conv": (nn.Conv2d(16, 24, 3, stride=2, padding=1), (2, 16, 7, 6)),
    "dilated": (nn.Conv3d(8, 16, (1, 3, 2), dilation=(1, 2, 1)), (2, 8, 3, 7, 4)),
    "transposed": (nn.ConvTranspose2d(16, 8, 3, stride=2, output_padding=1), (2, 16, 4, 3)),
    "circular": (nn.Conv1d(16, 8, 3, padding=1, padding_mode="circular"), (2, 16, 9)),
    "unbatched": (nn.Conv2d(8, 16, 3), (8, 5, 6)),
}


def trained(spec: str, layer: nn.Module, mode: str) -> tuple[nn.Module, Any]:
    """A model of one adapted layer, in float64, whose cores have moved."""
    model = nn.Sequential(copy.deepcopy(layer)).double()
    tnpeft.attach(model, spec, match="0", mode=mode, **PARAMS.get(spec, {}))
    adapter = model[0].adapter("default")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for core in adapter.trained.values():
            core.add_(0.2 * torch.randn(core.shape, generator=generator, dtype=torch.float64))
    return model, adapter


def summed(layer: nn.Module, delta: Tensor, x: Tensor) -> Tensor:
    """What a plain layer with the summed weight computes."""
    plain = copy.deepcopy(layer).double()
    weight = plain.weight.detach() + delta  # type: ignore[operator]
    output: Tensor = torch.func.functional_call(plain, {"weight": weight}, (x,))
    return output


@pytest.mark.parametrize("spec", SIDES)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_output_and_the_gradients_are_those_of_the_summed_weight(spec: str, layer: str):
    module, shape = LAYERS[layer]
    model, adapter = trained(spec, module, "factored")
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    cores = [*adapter.trained.values()]
    direction = torch.randn_like(model(x))
    found = torch.autograd.grad((model(x) * direction).sum(), [x, *cores])
    expected = summed(module, adapter.delta_weight(), x)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    for grad, right in zip(found, torch.autograd.grad((expected * direction).sum(), [x, *cores]), strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", SIDES)
def test_the_start_is_the_base_bit_for_bit(spec: str):
    for module, shape in LAYERS.values():
        x = torch.randn(shape)
        model = nn.Sequential(copy.deepcopy(module))
        tnpeft.attach(model, spec, match="0", mode="factored", **PARAMS.get(spec, {}))
        assert torch.equal(model(x), module(x))


def test_which_networks_have_a_side():
    layer = nn.Conv2d(16, 24, 3)
    for spec, side in SIDES.items():
        network = load_spec(spec).bind(layer, **PARAMS.get(spec, {})).plain
        found = side_of(network)
        assert found is not None
        assert found.name == side
        assert plan(network, "factored").side == side
    for spec in ("lora", "hira", "hra", "road", "glora", "dora"):
        assert side_of(load_spec(spec).bind(nn.Linear(16, 24)).plain) is None
    assert side_of(load_spec("ia3").bind(nn.Conv2d(16, 24, 3, groups=2)).plain) is None


def test_hybrid_has_no_clusters_of_the_weight():
    network = load_spec("oft").bind(nn.Linear(16, 24), b=4)
    assert plan(network, "hybrid").reason == "a core is the base weight itself"


def test_beside_another_adapter_both_are_summed():
    model, adapter = trained("oft", nn.Linear(16, 24), "auto")
    tnpeft.attach(model, "lora", match="0", name="other")
    other = model[0].adapter("other")
    with torch.no_grad():
        for core in other.trained.values():
            core.add_(0.1 * torch.randn_like(core))
    tnpeft.activate(model, {"default": 0.5, "other": 1.0})
    x = torch.randn(3, 16, dtype=torch.float64)
    expected = summed(model[0].base, 0.5 * adapter.delta_weight() + other.delta_weight(), x)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
