"""Files between bases that keep the same layers otherwise: packed as GPTQ's are, or turned as GPT-2's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from opaque import PackedQuantLinear, plain_update
from torch import nn

import tnpeft

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 16), nn.Linear(16, 16))


def packed() -> nn.Sequential:
    model = plain()
    for place in (0, 3, 4):
        model[place] = PackedQuantLinear(model[place])
    return model


def trained(model: nn.Module, spec: str = "lora", **options: object) -> nn.Module:
    handle = tnpeft.attach(model, spec, match="^[03]$", r=2, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("spec", ["lora", "loha", "tt_lora", "vera"])
@pytest.mark.parametrize(("source", "target"), [(plain, packed), (packed, plain)])
def test_packed_and_plain_bases_take_each_others_files(
    source: Callable[[], nn.Module], target: Callable[[], nn.Module], spec: str, tmp_path: Path
):
    first = trained(source(), spec, train={"norm": True})
    tnpeft.save(first, tmp_path / "a.safetensors")
    second = target()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tnpeft.load(second, tmp_path / "a.safetensors")
    for place in (0, 3):
        delta = first[place].adapter("default").delta_weight()
        assert torch.equal(delta, second[place].adapter("default").delta_weight())
        x = torch.randn(3, 16 if place == 0 else 24)
        base = target()[place]
        torch.testing.assert_close(second[place](x), base(x) + plain_update(nn.Linear(1, 1), x, delta))
    assert torch.equal(first[1].weight, second[1].weight)
    # And the other way, onto the adapter that is attached.
    tnpeft.save(second, tmp_path / "b.safetensors")
    tnpeft.hot_swap(first, tmp_path / "b.safetensors")


def test_a_base_that_was_cast_with_its_quantisation(tmp_path: Path):
    tnpeft.save(trained(plain().bfloat16()), tmp_path / "a.safetensors")
    tnpeft.load(packed(), tmp_path / "a.safetensors")  # its norms and biases are fp32, as prepared for training
    with pytest.raises(tnpeft.AdapterFileError) as caught:
        tnpeft.load(plain(), tmp_path / "a.safetensors")
    assert str(caught.value).endswith("Load the adapter before casting the model to another type.")


def test_another_network_is_refused_all_the_same(tmp_path: Path):
    tnpeft.save(trained(packed()), tmp_path / "a.safetensors")
    wider = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 16), nn.Linear(16, 16))
    with pytest.raises(tnpeft.AdapterFileError) as caught:
        tnpeft.load(wider, tmp_path / "a.safetensors")
    assert str(caught.value) == (
        f"{tmp_path / 'a.safetensors'}: base model: expected the one the adapter was saved from, "
        "found '0.qweight' is int32(2, 24) there and missing here; "
        "'0.scales' is float32(2, 1, 24) there and missing here; "
        "'0.lows' is float32(2, 1, 24) there and missing here; and 4 more. "
        "Build the base model as it was when the adapter was saved."
    )
    assert type(wider[0]) is nn.Linear


def test_a_bias_that_trained_and_is_no_parameter_here(tmp_path: Path):
    tnpeft.save(trained(plain(), train={"bias": "adapted"}), tmp_path / "a.safetensors")
    model = packed()
    with pytest.raises(tnpeft.AdapterFileError) as caught:
        tnpeft.load(model, tmp_path / "a.safetensors")
    assert str(caught.value) == (
        f"{tmp_path / 'a.safetensors'}: trained parameters: expected parameters of the base model, "
        "found none here for '0.bias', '3.bias'. "
        "Load it onto a base that has them as parameters, or train the adapter without them."
    )
    assert type(model[0]) is PackedQuantLinear


def test_specs_that_are_made_of_the_weight_warn(tmp_path: Path):
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(16, 8)))
    tnpeft.save(trained(model, "dora"), tmp_path / "a.safetensors")
    with pytest.warns(tnpeft.TnpeftWarning) as told:
        tnpeft.load(nn.Sequential(nn.Linear(16, 8)), tmp_path / "a.safetensors")
    assert str(told[0].message) == (
        f"{tmp_path / 'a.safetensors'}: base model: expected the values that the adapter was trained on, "
        "found others in '0'. Load it onto that base; here it computes something else than it was trained to."
    )


class Conv1D(nn.Module):
    """transformers' layer, by its name and its attributes."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.nf, self.nx = linear.out_features, linear.in_features
        self.weight = nn.Parameter(linear.weight.detach().T.contiguous())
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight)


def turned() -> nn.Sequential:
    model = plain()
    for place in (0, 3, 4):
        model[place] = Conv1D(model[place])
    return model


@pytest.mark.parametrize("spec", ["lora", "dora", "pissa", "quanta"])
@pytest.mark.parametrize(("source", "target"), [(plain, turned), (turned, plain)])
def test_turned_layers_take_each_others_files(
    source: Callable[[], nn.Module], target: Callable[[], nn.Module], spec: str, tmp_path: Path
):
    first = trained(source(), spec)
    tnpeft.save(first, tmp_path / "a.safetensors")
    second = target()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tnpeft.load(second, tmp_path / "a.safetensors")
    torch.testing.assert_close(second(X), first(X))
    other = target()
    with torch.no_grad():
        other[3].weight[0, 0] += 1
    with pytest.warns(tnpeft.TnpeftWarning, match="found others in '3'"):
        tnpeft.load(other, tmp_path / "a.safetensors")


def test_a_turned_layer_of_other_sizes_is_refused(tmp_path: Path):
    def model(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(16, 16), nn.Linear(inputs, outputs))

    tnpeft.save(trained(model(16, 24)), tmp_path / "a.safetensors")
    with pytest.raises(
        tnpeft.AdapterFileError, match=r"found '1.weight' is float32\(24, 16\) there and float32\(16, 24\)"
    ):
        tnpeft.load(model(24, 16), tmp_path / "a.safetensors")
