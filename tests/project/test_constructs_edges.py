"""Corners of shared cores, files and DoRA: mixed types, values written behind a layer's back, odd patterns."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from saved import metadata, refused
from torch import nn

import tnpeft
from tnpeft.io.manifest import KEY, _canonical, digest

HEAD = "tnpeft: 1\nname: {}\nlayers: any\nparams: {{r: 2}}\nsizes: {{o: out_channels, i: in_channels}}\n"
SHARED = (
    HEAD.format("shared")
    + "cores: {up: {legs: o r, shared: model}, down: {legs: r i k..., shared: block}, gain: {legs: r, init: ones}}\n"
    "weight: o i k...\nstart: frozen_copy\n"
)
DORA = (
    HEAD.format("dora")
    + "cores: {up: {legs: o r, init: zeros}, down: r i k...}\nweight: o i k...\nstart: zero\ncompose: dora\n"
)


def rows(*dtypes: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(6, 6, dtype=dtype) for dtype in dtypes or (torch.float32,) * 3])


def attached(model: nn.Module, text: str = SHARED, block: str = "^(.)", seed: int = 0) -> list[tnpeft.Adapter]:
    spec = tnpeft.Spec.from_yaml(text)
    scopes = {"block": block} if spec.scopes else None
    tnpeft.attach(model, spec, match="^.$", scopes=scopes, seed=seed)
    return [layer.adapter("default") for layer in model]


def shift(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)


@pytest.mark.parametrize(("block", "tensors"), [("^(.)", 3), (r"^\d", 3), ("", 1), ("(x)?", 1), (r"[01]|(2)", 2)])
def test_a_scope_without_groups_captures_all_it_matches(block: str, tensors: int):
    assert len({id(adapter.cores["down"]) for adapter in attached(rows(), block=block)}) == tensors


def test_layers_of_several_types_share_one_tensor(tmp_path):
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    model, file = rows(*dtypes), tmp_path / "mixed.safetensors"
    adapters = attached(model)
    assert len({id(adapter.cores["up"]) for adapter in adapters}) == 1
    shift(model)
    for layer, dtype in zip(model, dtypes, strict=True):
        assert layer(torch.ones(1, 6, dtype=dtype)).dtype == dtype
    assert adapters[1].delta_weight().dtype == torch.float64
    tnpeft.save(model, file)
    fresh = rows(*dtypes)
    tnpeft.load(fresh, file)
    assert all(torch.equal(layer.weight, other.weight) for layer, other in zip(fresh, model, strict=True))


def test_a_part_of_the_model_that_was_cast_is_saved_and_loaded(tmp_path):
    model, file = rows(), tmp_path / "cast.safetensors"
    attached(model)
    model[1].double()
    shift(model)
    tnpeft.save(model, file)
    fresh = rows()
    fresh[1].double()
    tnpeft.load(fresh, file)
    assert all(torch.equal(layer.weight, other.weight) for layer, other in zip(fresh, model, strict=True))


def test_frozen_copies_that_are_loaded_where_they_are_held_are_read_everywhere():
    model, other = rows(), rows()
    adapters, others = attached(model, block=""), attached(other, block="", seed=5)
    shift(other)
    model(torch.ones(1, 6))  # the first copies are folded into constants
    for adapter, with_values in reversed([*zip(adapters, others, strict=True)]):
        adapter.load_state_dict(with_values.state_dict())
        model(torch.ones(1, 6))
    assert torch.equal(model(torch.ones(1, 6)), other(torch.ones(1, 6)))


@pytest.mark.parametrize("name", ["sharing", "captured", "initialise", "layer_name", "network"])
def test_a_param_may_be_called_as_inner_arguments_are(name: str):
    text = DORA.replace("{r: 2}", f"{{{name}: 2}}").replace("o: out", f"r: {name}, o: out")
    model = nn.Sequential(nn.Linear(3, 4))
    tnpeft.attach(model, tnpeft.Spec.from_yaml(text), match="0", **{name: 1})
    assert model[0].adapter("default").cores["up"].shape == (4, 1)


def test_a_file_needs_no_function_that_was_registered_where_it_was_made(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tnpeft.spec.inits._registered", {})
    tnpeft.register_init("mine", lambda shape, generator, power, shift=0: torch.full(shape, float(power) + shift))
    text = DORA.replace(
        "down: r i k...", "down: {legs: r i k..., init: 'mine(r + 1, shift=out_channels)', frozen: true}"
    )
    model, file = rows(), tmp_path / "mine.safetensors"
    attached(model, text)
    shift(model)
    after = model(torch.ones(1, 6))
    tnpeft.save(model, file)
    pickled = pickle.dumps(model)
    monkeypatch.setattr("tnpeft.spec.inits._registered", {})
    fresh = rows()
    tnpeft.load(fresh, file)
    assert torch.equal(fresh(torch.ones(1, 6)), after)
    assert torch.equal(pickle.loads(pickled)(torch.ones(1, 6)), after)
    with pytest.raises(tnpeft.BindError) as caught:
        fresh[0].reset_parameters()
    assert str(caught.value) == (
        "core `down`, init `mine`: expected a registered function, found none of that name. "
        'Call `tnpeft.register_init("mine", function)` first.'
    )
    tnpeft.register_init("mine", lambda shape, generator: torch.zeros(shape))  # another one of that name
    tnpeft.load(rows(), file)


def test_a_frozen_core_that_cannot_be_drawn_again_is_a_damaged_file(tmp_path):
    text = DORA.replace("down: r i k...", "down: r i k..., s: {legs: r, init: ones, frozen: true}")
    model, file = rows(), tmp_path / "odd.safetensors"
    attached(model, text)
    tnpeft.save(model, file)
    _forge_text(file, "init: ones", "init: cosine(0)")
    assert refused(rows(), file) == (
        "FILE: layer '0': core `s`, init `cosine`: expected two legs, waves and positions, found 1. "
        "Give the core another `init`."
    )


def test_a_frozen_core_that_lapack_makes_is_stored(tmp_path):
    text = DORA.replace("down: r i k...", "down: {legs: r i k..., init: orthogonal, frozen: true}")
    model, file = rows(), tmp_path / "odd.safetensors"
    attached(model, text)
    tnpeft.save(model, file)
    assert metadata(file)["layers"]["0"]["drawn"] == {}


def _forge_text(path: Path, old: str, new: str) -> None:
    with safe_open(path, framework="pt") as opened:
        fields = json.loads(opened.metadata()[KEY])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    fields.pop("sha256")
    number = fields.pop("format")
    fields["specs"][0]["text"] = fields["specs"][0]["text"].replace(old, new)
    header = {KEY: _canonical({"format": number, "sha256": digest(fields, tensors), **fields})}
    safetensors.torch.save_file(tensors, path, header)


@pytest.mark.parametrize("left", [1e-1, 1e-3, 1e-5])
def test_a_weight_that_is_nearly_cancelled_keeps_its_direction(left: float):
    layer = nn.Linear(64, 8)
    adapter = tnpeft.compile(tnpeft.Spec.from_yaml(DORA), layer, r=8)
    w = layer.weight.detach()
    with torch.no_grad():
        adapter.cores["up"].copy_(torch.eye(8))
        adapter.cores["down"].copy_(w * (left * torch.linspace(0.5, 1, 64) - 1))
    whole = w.double() + adapter.cores["down"].double()
    expected = w.double().norm(dim=1, keepdim=True) * whole / whole.norm(dim=1, keepdim=True) - w
    assert (adapter.delta_weight() - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-30, 1e25, 1e37])
def test_the_start_is_exact_for_weights_whose_squares_are_no_numbers(size: float):
    model = rows()
    with torch.no_grad():
        model[0].weight.mul_(size)
    x = torch.full((1, 6), 1e-3)
    before = model(x)
    attached(model, DORA)
    assert torch.equal(model(x), before)
