"""Layers of the libraries that quantise, and subclasses of others: base(x) with the update beside it.

tests/execution/test_opaque.py has what needs no library, and a layer packed as GPTQ's are.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from diffusers.models.lora import LoRACompatibleConv, LoRACompatibleLinear
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from timm_alone import timm
from torch import Tensor, nn
from torch.nn import functional
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers.pytorch_utils import Conv1D

import tnpeft

INPUTS, OUTPUTS = 64, 32


def eight_bits(**options: Any) -> nn.Module:
    layer = bnb.nn.Linear8bitLt(INPUTS, OUTPUTS, has_fp16_weights=False, **options)
    return layer.to("cpu")  # which quantises


def four_bits(**options: Any) -> nn.Module:
    return bnb.nn.Linear4bit(INPUTS, OUTPUTS, quant_type="nf4", **options).to("cpu")


def torchao(config: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(INPUTS, OUTPUTS))
    quantize_(model, config)
    return model[0]


def hqq(bits: int = 4) -> nn.Module:
    with torch.no_grad():
        config = BaseQuantizeConfig(nbits=bits, group_size=32)
        return HQQLinear(
            nn.Linear(INPUTS, OUTPUTS).requires_grad_(False), config, compute_dtype=torch.float32, device="cpu"
        )


def quiet(make: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers says that they are old
        return make(*arguments)


QUANTISED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "bitsandbytes, 8 bits": (eight_bits, "Linear8bitLt, quantised by bitsandbytes"),
    "bitsandbytes, 4 bits": (four_bits, "Linear4bit, quantised by bitsandbytes"),
    "torchao, weight alone": (lambda: torchao(Int8WeightOnlyConfig()), "Int8Tensor, quantised by torchao"),
    "torchao, inputs too": (
        lambda: torchao(Int8DynamicActivationInt8WeightConfig()),
        "Int8Tensor, quantised by torchao",
    ),
    "HQQ": (hqq, "HQQLinear, quantised by HQQ"),
}
LINEAR = {name: make for name, (make, _) in QUANTISED.items()} | {
    "timm's Linear": lambda: timm.layers.Linear(INPUTS, OUTPUTS),
    "diffusers' Linear": lambda: quiet(LoRACompatibleLinear, INPUTS, OUTPUTS),
}
CONV: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "timm's Conv2dSame": (lambda: timm.layers.Conv2dSame(4, 8, 3, 2), (2, 4, 8, 9)),
    "timm's ScaledStdConv2d": (lambda: timm.layers.ScaledStdConv2d(4, 8, 3, 2), (2, 4, 8, 9)),
    "timm's ScaledStdConv2dSame": (lambda: timm.layers.ScaledStdConv2dSame(4, 8, 3, 2), (2, 4, 7, 9)),
    "diffusers' Conv2d": (lambda: quiet(LoRACompatibleConv, 4, 8, 3, 1, 1), (2, 4, 7, 9)),
    "diffusers' causal Conv3d": (lambda: WanCausalConv3d(4, 8, 3, padding=1), (1, 4, 3, 5, 4)),
}


def train(handle: tnpeft.Handle) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(LINEAR[name]())


def gradients(run: Callable[[Tensor], Tensor], x: Tensor, handle: tnpeft.Handle) -> list[Tensor]:
    known = x.clone().requires_grad_()
    for parameter in handle.parameters():
        parameter.grad = None
    run(known).square().sum().backward()
    return [known.grad, *[parameter.grad for parameter in handle.parameters()]]


@pytest.mark.parametrize("mode", ["auto", "dense"])
@pytest.mark.parametrize("spec", ["lora", "quanta", "tt_lora", "loha"])
@pytest.mark.parametrize("name", LINEAR)
def test_linear_layers(name: str, spec: str, mode: str, tmp_path):
    model, x = model_of(name), torch.randn(2, 3, INPUTS)
    keys, first = [*model.state_dict()], model(x)
    handle = tnpeft.attach(model, spec, match="all", mode=mode)
    assert torch.equal(model(x), first)
    train(handle)
    base, adapter = model[0].base, model[0].adapter("default")

    def expected(x: Tensor) -> Tensor:
        return base.forward(x.detach()) + functional.linear(x, adapter.delta_weight())

    output = model(x)
    torch.testing.assert_close(output, expected(x), rtol=1e-4, atol=1e-4)
    found, right = gradients(model, x, handle), gradients(expected, x, handle)
    torch.testing.assert_close(found[1:], right[1:], rtol=1e-3, atol=1e-3)
    weight = _weight(base)
    whole = right[0] + 2 * output.detach() @ weight  # and through the base: exactly so, or through integers
    torch.testing.assert_close(found[0], whole, rtol=0.05, atol=0.05 * float(whole.abs().max()))
    with tnpeft.disabled(model):
        assert torch.equal(model(x), first)
    torch.testing.assert_close(copy.deepcopy(model)(x), output)
    assert [key for key in model.state_dict() if ".adapters." not in key] == keys
    tnpeft.save(model, tmp_path / "a.safetensors")
    again = model_of(name)
    tnpeft.load(again, tmp_path / "a.safetensors")
    torch.testing.assert_close(again(x), output)
    tnpeft.detach(model)
    assert torch.equal(model(x), first)
    assert [*model.state_dict()] == keys


def _weight(base: nn.Module) -> Tensor:
    """The weight as the layer itself shows it: its outputs for unit vectors."""
    with torch.no_grad():
        zero = base.forward(torch.zeros(1, INPUTS))
        return (base.forward(torch.eye(INPUTS)) - zero).T


@pytest.mark.parametrize("spec", ["lora", "loha"])
@pytest.mark.parametrize("name", CONV)
def test_convolutions_see_what_their_base_sees(name: str, spec: str):
    make, shape = CONV[name]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape)
    model = nn.Sequential(layer)
    first = model(x)
    handle = tnpeft.attach(model, spec, match="0")
    assert torch.equal(model(x), first)
    train(handle)
    adapter = model[0].adapter("default")

    def update(x: Tensor) -> Tensor:
        """A plain layer of the class with dW for its weight, and no standardisation."""
        delta = adapter.delta_weight()
        if "Same" in name:
            padded = timm.layers.pad_same(x, layer.kernel_size, layer.stride, layer.dilation)
            return functional.conv2d(padded, delta, None, layer.stride)
        if "causal" in name:
            return functional.conv3d(functional.pad(x, (1, 1, 1, 1, 2, 0)), delta)
        return functional.conv2d(x, delta, None, layer.stride, layer.padding)

    for mode in ("auto", "dense"):
        adapter.mode = mode
        torch.testing.assert_close(model(x), layer.forward(x) + update(x), rtol=1e-4, atol=1e-4)
        found = gradients(model, x, handle)
        right = gradients(lambda x: layer.forward(x) + update(x), x, handle)
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-3)


def test_tenvoo_on_a_causal_convolution():
    torch.manual_seed(0)
    model, x = nn.Sequential(WanCausalConv3d(4, 8, 3, padding=1)), torch.randn(1, 4, 3, 5, 4)
    first = model(x)
    handle = tnpeft.attach(model, "tenvoo_l", match="all")
    assert torch.equal(model(x), first)
    train(handle)
    update = functional.conv3d(functional.pad(x, (1, 1, 1, 1, 2, 0)), model[0].adapter("default").delta_weight())
    torch.testing.assert_close(model(x), first + update, rtol=1e-4, atol=1e-4)
    assert handle.report().layers[0].runs == "auto: factored"


@pytest.mark.parametrize("name", QUANTISED)
def test_merging_dequantises(name: str):
    model, x = model_of(name), torch.randn(3, INPUTS)
    train(tnpeft.attach(model, "lora", match="0"))
    output = model(x)
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.merge(model)
    assert str(caught.value) == (
        f"layer '0': merging: expected a weight that the update can be added to, found {QUANTISED[name][1]}. "
        "Let `dequantise=True` put a plain layer with the dequantised weight in its place."
    )
    tnpeft.merge(model, dequantise=True)
    torch.testing.assert_close(model(x), output, rtol=0.05, atol=0.05)
    tnpeft.unmerge(model)
    assert torch.equal(model(x), output)
    tnpeft.detach(model, merge=True, dequantise=True)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), output, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("name", QUANTISED)
def test_files_of_quantised_and_plain_bases(name: str, back: bool, tmp_path):
    """Trained on 4 bits, used on the whole weight, as QLoRA's users do; and the reverse."""

    def both() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(INPUTS, OUTPUTS), nn.LayerNorm(OUTPUTS))
        found = (nn.Sequential(model_of(name)[0], nn.LayerNorm(OUTPUTS)), plain)
        return found[::-1] if back else found

    first, second = both()
    train(tnpeft.attach(first, "lora", match="0", train={"norm": True}))
    tnpeft.save(first, tmp_path / "a.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error", tnpeft.TnpeftWarning)
        tnpeft.load(second, tmp_path / "a.safetensors")
    x, delta = torch.randn(3, INPUTS), first[0].adapter("default").delta_weight()
    torch.testing.assert_close(second[0](x), second[0].base.forward(x) + functional.linear(x, delta))
    assert torch.equal(first[1].bias, second[1].bias)
    tnpeft.save(second, tmp_path / "b.safetensors")
    tnpeft.hot_swap(first, tmp_path / "b.safetensors")


def test_conv1d_and_a_linear_in_its_place_take_each_others_files(tmp_path):
    torch.manual_seed(0)
    layer, linear = Conv1D(6, 8), nn.Linear(8, 6)
    linear.weight, linear.bias = nn.Parameter(layer.weight.T.contiguous()), nn.Parameter(layer.bias.detach().clone())
    x, models = torch.randn(2, 8), {"turned": nn.Sequential(layer), "plain": nn.Sequential(linear)}
    for there, here in (("turned", "plain"), ("plain", "turned")):
        first, second = (copy.deepcopy(models[each]) for each in (there, here))
        train(tnpeft.attach(first, "dora", match="0"))
        tnpeft.save(first, tmp_path / "a.safetensors")
        with warnings.catch_warnings():
            warnings.simplefilter("error", tnpeft.TnpeftWarning)
            tnpeft.load(second, tmp_path / "a.safetensors")
        torch.testing.assert_close(second(x), first(x))


@pytest.mark.parametrize("spec", ["dora", "pissa"])
@pytest.mark.parametrize("name", QUANTISED)
def test_specs_that_read_the_weight_have_the_dequantised_one(name: str, spec: str):
    model, x = model_of(name), torch.randn(3, INPUTS)
    first = model(x)
    handle = tnpeft.attach(model, spec, match="0")
    assert torch.equal(model(x), first)
    train(handle)
    right = first + functional.linear(x, model[0].adapter("default").delta_weight())
    torch.testing.assert_close(model(x), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_layers_that_compute_in_another_type(stored: torch.dtype, given: torch.dtype):
    torch.manual_seed(0)
    model = nn.Sequential(four_bits(compute_dtype=stored)).train()
    x = torch.randn(4, INPUTS).to(given)
    first = model(x)
    handle = tnpeft.attach(model, "lora", match="0")
    output = model(x)
    assert torch.equal(output, first)
    assert output.dtype == given
    train(handle)
    update = functional.linear(x.float(), model[0].adapter("default").delta_weight())
    torch.testing.assert_close(model(x).float(), first.float() + update, rtol=0.05, atol=0.05)
    gradients(model, x, handle)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == first.dtype


def test_evaluating_between_steps():
    """bitsandbytes packs 4 bits for inference on some CPUs, after which nothing of it is differentiable."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, INPUTS), four_bits()).eval()
    handle = tnpeft.attach(model, "lora", match="all")
    train(handle)
    x = torch.randn(4, 8)
    with torch.no_grad():
        model(x)
    found = gradients(model, x, handle)
    weight = _weight(model[1].base) + model[1].adapter("default").delta_weight().detach()
    before = model[0].weight.detach()
    right = 2 * model(x).detach() @ weight @ before
    torch.testing.assert_close(found[0], right, rtol=0.05, atol=0.05 * float(right.abs().max()))


@pytest.mark.parametrize("mode", ["factored", "dense", "hybrid"])
@pytest.mark.parametrize("spec", ["lora", "quanta", "tt_lora", "loha", "dora", "pissa", "hira"])
def test_conv1d_is_a_linear_layer_turned(spec: str, mode: str, tmp_path):
    torch.manual_seed(0)
    layer, x = Conv1D(6, 8), torch.randn(2, 3, 8)
    turned = nn.Linear(8, 6)
    turned.weight, turned.bias = nn.Parameter(layer.weight.T.contiguous()), nn.Parameter(layer.bias.detach().clone())
    model, plain = nn.Sequential(copy.deepcopy(layer)), nn.Sequential(turned)
    first = model(x)
    handles = [tnpeft.attach(each, spec, match="0", mode=mode) for each in (model, plain)]
    assert torch.equal(model(x), first)
    assert handles[0].report().layers[0].layer == "Linear(8, 6, turned)"
    for handle in handles:
        train(handle)
    output = model(x)
    torch.testing.assert_close(output, plain(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model[0].weight, plain[0].weight.T, rtol=1e-4, atol=1e-5)
    found, right = (gradients(each, x, handle) for each, handle in zip((model, plain), handles, strict=True))
    torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-3)
    tnpeft.save(model, tmp_path / "a.safetensors")
    tnpeft.merge(model)
    torch.testing.assert_close(model(x), output, rtol=1e-4, atol=1e-5)
    tnpeft.unmerge(model)
    assert torch.equal(model(x), output)
    tnpeft.detach(model, merge=True)
    assert (type(model[0]), tuple(model[0].weight.shape)) == (Conv1D, (8, 6))
    torch.testing.assert_close(model(x), output, rtol=1e-4, atol=1e-5)
    again = nn.Sequential(copy.deepcopy(layer))
    tnpeft.load(again, tmp_path / "a.safetensors")
    assert torch.equal(again(x), output)


def test_timms_models_train():
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_b0", pretrained=False, num_classes=3).eval()
    x = torch.randn(1, 3, 33, 33)
    first = model(x)
    handle = tnpeft.attach(model, "lora", match="conv_stem|conv_pw|classifier", r=2)
    assert torch.equal(model(x), first)
    optimizer = torch.optim.SGD(handle.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert not torch.equal(model(x), first)
    assert handle.report().layers[0].layer == "Conv2d(3, 32, 3x3, opaque)"
