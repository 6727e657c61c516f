"""What a forward pass keeps of contracted cores: nothing of other tensors, nothing of another time, no model."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from modes import relative
from small import chain
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from towers import X, adapters, results, tower

import tnpeft
from tnpeft.surgery.passes import remove_pass

MODES = ("dense", "factored", "hybrid")


def alone(model: nn.Module) -> nn.Module:
    """A copy whose layers contract their own."""
    found = copy.deepcopy(model)
    remove_pass(found)
    return found


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_does_not_keep_its_model_alive(mode: str):
    model = tower(mode)
    for _ in range(2):
        model(X)
    one, adapter = model.convs[0], adapters(model)[1]
    layer, base = weakref.ref(model.convs[2]), weakref.ref(model.convs[3].base.weight)
    del model
    gc.collect()
    assert layer() is None
    assert base() is None
    assert one is not None
    assert adapter is not None


class Stepping(nn.Module):
    """Trains its layers within its own forward pass, between two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.steps = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        if self.steps:
            with torch.no_grad():
                for name, parameter in self.named_parameters():
                    if "two" in name and parameter.requires_grad:
                        parameter.mul_(1.7)
        return self.two(x)


@pytest.mark.parametrize("mode", MODES)
def test_cores_that_change_within_a_pass_are_contracted_again(mode: str):
    torch.manual_seed(0)
    model = Stepping()
    tnpeft.attach(model, chain("zero"), match="one|two", mode=mode)
    for adapter in adapters(model):
        for core in adapter.trained.values():
            nn.init.normal_(core)
    x = torch.randn(4, 8)
    for _ in range(2):
        model(x)
    other = alone(model)
    model.steps = other.steps = True
    assert relative(model(x), other(x)) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_layers_that_have_their_tensors_only_while_they_are_called(mode: str):
    """As when a library keeps weights elsewhere: all others are on the meta device then."""
    model = tower(mode)
    expected = results(model)["output"]
    model(X)
    stored = {name: one.detach().clone() for name, one in model.named_parameters()}

    def replace(layer: nn.Module, name: str, away: bool) -> None:
        for key, one in list(layer.named_parameters()):
            owner, _, leaf = key.rpartition(".")
            value = torch.empty_like(one, device="meta") if away else stored[f"{name}.{key}"].clone()
            layer.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, one.requires_grad)

    for name in [f"convs.{number}" for number in range(4)] + [f"linears.{number}" for number in range(3)]:
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(lambda layer, _, name=name: replace(layer, name, False))
        layer.register_forward_hook(lambda layer, *_, name=name: replace(layer, name, True))
        replace(layer, name, True)
    with torch.no_grad():
        assert relative(model(X), expected) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_without_values_stops_no_other(mode: str):
    model = tower(mode)
    expected = results(model)["output"]
    adapters(model)[3]._initialised = False
    model.skips = {3}
    other = tower(mode, alone=True)
    other.skips = {3}
    assert relative(model(X), other(X)) < 1e-5
    assert relative(expected, other(X)) > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_inference_and_gradients_within_one_pass(mode: str):
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode(True), torch.enable_grad():
                self.one(x)
            with torch.inference_mode(False), torch.enable_grad():
                return self.two(x.clone())

    model = Mixed()
    tnpeft.attach(model, chain(), match="one|two", mode=mode)
    x = torch.randn(4, 8)
    for _ in range(3):
        model(x).sum().backward()
    assert adapters(model)[1].trained["left"].grad is not None


@pytest.mark.parametrize("mode", MODES)
def test_a_pass_of_stand_ins_leaves_nothing_behind(mode: str):
    torch.manual_seed(0)
    sizes = {"dense": 5, "factored": 6, "hybrid": 7}[mode]  # nobody else has tables for these

    def made() -> nn.Module:
        model = nn.Sequential(*(nn.Conv2d(sizes, sizes, 3, padding=1) for _ in range(3)))
        tnpeft.attach(model, chain(), match=r"\d", mode=mode)
        return model

    first, second = made(), made()
    x = torch.randn(1, sizes, 9, 9)
    with FakeTensorMode(allow_non_fake_inputs=True) as stand_ins:
        for _ in range(2):
            first(stand_ins.from_tensor(x))
    for adapter in (*adapters(first), *adapters(second)):
        for core in adapter.trained.values():
            with torch.no_grad():
                core.add_(0.1 * torch.randn_like(core))
    for model in (first, second):
        expected = alone(model)(x)
        with torch.no_grad():
            assert relative(nn.functional.conv2d(x, model[0].weight, model[0].bias, padding=1), model[0](x)) < 1e-5
        for _ in range(2):
            assert relative(model(x), expected) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_tables_are_made_on_their_own_device(mode: str):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(9, 9, 3, padding=1) for _ in range(3)))
    tnpeft.attach(model, chain(), match=r"\d", mode=mode)
    x = torch.randn(1, 9, 11, 10)
    with torch.device("meta"):
        found = [model(x) for _ in range(2)]
    assert relative(found[1], alone(model)(x)) < 1e-5


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("merged", [True, False])
def test_plain_convolutions_are_as_differentiable_as_torch_s(merged: bool):
    torch.manual_seed(0)
    base = nn.Conv3d(3, 4, 3, padding=1)
    model = nn.Sequential(copy.deepcopy(base))
    tnpeft.attach(model, "lora", match="0")
    if merged:
        tnpeft.merge(model)
    x = torch.randn(1, 3, 8, 8, 8)
    expected = torch.func.grad(lambda x: base(x).square().sum())(x)
    with contextlib.nullcontext() if merged else tnpeft.disabled(model):
        assert relative(torch.func.grad(lambda x: model(x).square().sum())(x), expected) < 1e-6
        with forward_ad.dual_level():
            out = model(forward_ad.make_dual(x.clone().requires_grad_(), torch.ones_like(x)))
            tangent = forward_ad.unpack_dual(out).tangent
        assert relative(tangent, base(torch.ones_like(x)) - base(torch.zeros_like(x))) < 1e-5
