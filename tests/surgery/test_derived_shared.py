"""Cores that layers share behind derived ones: held once, counted once, and shared only where they mean the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from sharded import adapted as sharded_layers
from sharded import base as blocks
from sharded import changed, everyones, losses, mean, run, sharded
from sharded import rows as own_rows
from test_derived_models import attached, close, move, oracle
from torch import Tensor, nn

import tnpeft

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


def layers(*outputs: int) -> nn.Sequential:
    torch.manual_seed(0)
    sizes = (16, *outputs)
    return nn.Sequential(*[nn.Linear(inputs, out) for inputs, out in zip(sizes, outputs, strict=False)])


def test_a_bank_is_held_once_and_is_everyones(tmp_path: Path):
    model = layers(16, 16, 16)
    handle = attached(model, "vblora")
    adapters = list(handle.adapters.values())
    banks = {id(adapter.cores["bank"]) for adapter in adapters}
    assert len(banks) == 1
    bank, logits = 6 * 4, 2 * 6 * (16 // 4) * 2  # vectors x length; r x vectors x tokens, of both sides
    assert sum(parameter.numel() for parameter in handle.parameters()) == bank + 3 * logits
    assert handle.report().cores == bank + 3 * logits
    assert sum(key.endswith("core_bank") for key in model.state_dict()) == 1
    move(model)
    close(model(X), oracle({handle: 1.0}, lambda: layers(16, 16, 16))(X.double()))
    # The bank's gradient is that of all layers together.
    (model(X).square().sum()).backward()
    found = adapters[0].cores["bank"].grad.clone()
    step, ends = torch.randn(6, 4, generator=torch.Generator().manual_seed(2)), []
    for size in (1e-4, -2e-4):
        with torch.no_grad():
            adapters[0].cores["bank"].add_(size * step)
        ends.append(float(oracle({handle: 1.0}, lambda: layers(16, 16, 16))(X.double()).square().sum().detach()))
    assert (ends[0] - ends[1]) / 2e-4 == pytest.approx(float((found * step).sum()), rel=1e-2)
    tnpeft.save(model, tmp_path / "a.safetensors")
    loaded = layers(16, 16, 16)
    again = tnpeft.load(loaded, tmp_path / "a.safetensors")
    assert len({id(adapter.cores["bank"]) for adapter in again.adapters.values()}) == 1
    close(loaded(X), model(X), 1e-6)


@pytest.mark.parametrize("outputs", [(16, 32, 16, 32), (32, 16, 16)])
def test_places_are_shared_by_layers_of_one_size_alone(outputs: tuple[int, ...], tmp_path: Path):
    """As many places in tensors of several sizes: those of the larger one are none of the smaller."""
    model = layers(*outputs)
    handle = tnpeft.attach(model, "waveft", match="all", waves=200)
    shapes = {layer: tuple(model.get_submodule(layer).weight.shape) for layer in handle.adapters}
    held: dict[tuple[int, ...], set[int]] = {}
    for layer, adapter in handle.adapters.items():
        places = adapter.cores["places"]
        held.setdefault(shapes[layer], set()).add(id(places))
        assert int(places.min()) >= 0
        assert int(places.max()) < shapes[layer][0] * shapes[layer][1]
        assert len(set(places.tolist())) == 200
    assert all(len(ids) == 1 for ids in held.values())
    assert len(set.union(*held.values())) == len(held)
    largest = max(shapes, key=lambda layer: shapes[layer])
    assert int(handle.adapters[largest].cores["places"].max()) >= 400  # the whole tensor, not a smaller one's part
    move(model)
    exact = oracle({handle: 1.0}, lambda: layers(*outputs))(X.double())
    close(model(X), exact)
    tnpeft.save(model, tmp_path / "a.safetensors")
    loaded = layers(*outputs)
    tnpeft.load(loaded, tmp_path / "a.safetensors")
    close(loaded(X), exact)


SCOPED = """
tnpeft: 2
name: scoped
title: A core that blocks share, and one of the model, behind maps
layers: any
params: {r: 2}
sizes: {o: out_channels, i: in_channels, a b: r}
cores:
  B: {legs: o a, init: zeros}
  S: {legs: a b, shared: block, init: normal(1)}
  A: {legs: b i k..., shared: model, init: normal(1)}
  s: {of: S, legs: a b, map: tanh}
  w: {of: A, legs: b i k..., map: "unit(i k..., floor=1e-4)"}
terms:
  - {cores: [B, s, w], weight: o i k...}
start: START
"""


@pytest.mark.parametrize("start", ["zero", "frozen_copy"])
def test_scopes_behind_maps_are_a_hand_computation(start: str):
    text = SCOPED.replace("START", start)
    text = text if start == "zero" else text.replace("init: zeros", "init: normal(1)")
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.ModuleList(nn.Linear(16, 16) for _ in range(2)) for name in ("left", "right")})
    handle = tnpeft.attach(model, tnpeft.Spec.from_yaml(text), match="all", scopes={"block": r"^(\w+)\."})
    move(handle.model, size=0.5)
    cores = {layer: adapter.cores for layer, adapter in handle.adapters.items()}
    for name in cores:
        assert cores[name]["A"] is cores["left.0"]["A"]
        assert cores[name]["S"] is cores[f"{name.partition('.')[0]}.0"]["S"]
    assert cores["left.0"]["S"] is not cores["right.0"]["S"]
    assert handle.report().cores == 4 * 16 * 2 + 2 * 4 + 2 * 16

    def value(cores: dict[str, Tensor]) -> Tensor:
        wide = {name: core.detach().double() for name, core in cores.items()}
        return wide["B"] @ wide["S"].tanh() @ (wide["A"] / wide["A"].norm(dim=1, keepdim=True))

    for adapter in handle.adapters.values():
        delta = value(adapter.cores) - (value(adapter.start) if start == "frozen_copy" else 0)
        close(adapter.delta_weight(), delta, 1e-5)


SOME: dict[str, dict[str, Any]] = {
    "oft": {"b": 4}, "shira": {"r": 1}, "vblora": {"length": 4, "vectors": 6, "r": 2}, "waveft": {"waves": 30},
    "supertuning": {"sparsity": 0.9}, "delora": {"r": 2},
}  # fmt: skip


def _train_and_save(folder: Path) -> None:
    x, y = own_rows()
    for spec, params in [(spec, SOME[spec]) for spec in ("oft", "shira", "vblora")]:
        for way in ("blocks", "DDP"):
            whole, model = (sharded_layers(spec, **params) for _ in range(2))
            model = sharded(model, way)
            wanted = losses(whole, *everyones())
            torch.testing.assert_close(mean(losses(model, x, y)), wanted, rtol=1e-5, atol=1e-5)
            path = folder / f"{spec}-{way}.safetensors"
            tnpeft.save(model, path)
            loaded = blocks()
            tnpeft.load(loaded, path)
            torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)
            if way == "blocks":
                other = sharded(changed(sharded_layers(spec, seed=9, **params), 3), way)
                tnpeft.hot_swap(other, path)
                torch.testing.assert_close(other(x), loaded(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_two_processes_train_and_save_what_one_does(tmp_path: Path):
    run(_train_and_save, 2, tmp_path)


@pytest.mark.parametrize("spec", SOME)
@pytest.mark.parametrize("late", [False, True])
def test_weights_that_come_and_go(spec: str, late: bool, tmp_path: Path):
    """As `device_map` leaves a model: values are on the device only while a layer is called."""
    plain, model = layers(16, 16), layers(16, 16)
    exact = tnpeft.attach(plain, spec, match="all", **SOME[spec])
    places = {"0": "disk", "1": "cpu"}

    def offload() -> None:
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path / "off", force_hooks=True)

    if late:
        offload()
    handle = tnpeft.attach(model, spec, match="all", **SOME[spec])
    move(plain)
    for layer, adapter in handle.adapters.items():
        adapter.load_state_dict(exact.adapters[layer].state_dict())
    if not late:
        offload()
    close(model(X), plain(X), 1e-6)
    model(X).sum().backward()
    tnpeft.save(model, tmp_path / "a.safetensors")
    loaded = layers(16, 16)
    tnpeft.load(loaded, tmp_path / "a.safetensors")
    close(loaded(X), plain(X), 1e-6)
