"""Files of specs with derived cores and index cores: what they hold, what they leave out, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from saved import metadata, refused, rewritten
from torch import Tensor, nn

import tnpeft

X = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
PARAMS: dict[str, dict[str, Any]] = {
    "oft": {"b": 4}, "boft_2": {"b": 2}, "hra": {"rank": 4}, "shira": {"r": 1}, "supertuning": {"sparsity": 0.9},
    "vblora": {"length": 4, "vectors": 6, "r": 2}, "delora": {"r": 2}, "waveft": {"waves": 30}, "c3a": {"b": 4},
    "adamss": {"clusters": 3, "s": 2, "r": 3}, "deft": {"rank": 2}, "psoft": {"r": 2}, "unilora": {"d": 9, "r": 2},
    "gralora": {"r": 4}, "supra": {"r": 2, "sparsity": 0.9},
}  # fmt: skip
# The index cores that each leaves out, and those that it stores for they are of the base weight.
DRAWN = {"shira": ["places"], "waveft": ["places"], "adamss": ["cluster"], "unilora": ["index_a", "index_b"]}
OF_THE_WEIGHT = {"supertuning": ["places"], "supra": ["places"], "adamss": ["V"], "psoft": ["U", "V"]}


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 8))


def move(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def adapted(spec: str, seed: int = 0, **options: Any) -> tuple[nn.Module, tnpeft.Handle]:
    model = base()
    handle = tnpeft.attach(model, spec, match="all", seed=seed, **{**PARAMS.get(spec, {}), **options})
    move(model)
    return model, handle


def cores(handle: tnpeft.Handle) -> dict[str, Tensor]:
    return {
        f"{layer}.{core}": value for layer, adapter in handle.adapters.items() for core, value in adapter.cores.items()
    }


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(tensor, right[key]) and tensor.dtype == right[key].dtype for key, tensor in left.items()
    )


@pytest.mark.parametrize("spec", PARAMS)
def test_files_give_back_every_core_and_what_is_computed(spec: str, tmp_path: Path):
    model, handle = adapted(spec)
    path = tmp_path / "a.safetensors"
    tnpeft.save(model, path)
    loaded = base()
    again = tnpeft.load(loaded, path)
    assert same(cores(again), cores(handle))
    torch.testing.assert_close(loaded(X), model(X), rtol=1e-6, atol=1e-7)
    tnpeft.save(loaded, tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()

    other, own = adapted(spec, seed=7)  # other places, other values
    tensors = {key: id(tensor) for key, tensor in other.state_dict(keep_vars=True).items()}
    tnpeft.hot_swap(other, path)
    assert {key: id(tensor) for key, tensor in other.state_dict(keep_vars=True).items()} == tensors
    assert same(cores(own), cores(handle))
    torch.testing.assert_close(other(X), model(X), rtol=1e-6, atol=1e-7)

    wide, held = adapted(spec)
    wide.double()
    tnpeft.save(wide, path)
    fresh = base().double()
    assert same(cores(tnpeft.load(fresh, path)), cores(held))


@pytest.mark.parametrize("spec", PARAMS)
def test_what_the_seed_gives_is_left_out_and_what_the_weight_gave_is_stored(spec: str, tmp_path: Path):
    model, handle = adapted(spec)
    path = tmp_path / "a.safetensors"
    tnpeft.save(model, path)
    keys, said = load_file(path), metadata(path)
    for layer, adapter in handle.adapters.items():
        held = [name for name in DRAWN.get(spec, []) if name not in adapter.shared]
        left_out = {name for name in said["layers"][layer]["drawn"] if adapter.cores[name].dtype == torch.int64}
        assert left_out == set(held)
        assert not {f"layers.{layer}.core_{name}" for name in DRAWN.get(spec, [])} & keys.keys()
        for name in OF_THE_WEIGHT.get(spec, []):
            assert torch.equal(keys[f"layers.{layer}.core_{name}"], adapter.cores[name])
    inspection = tnpeft.inspect(path)
    assert inspection.parameters == sum(parameter.numel() for parameter in handle.parameters())
    for layer in inspection.layers:
        assert set(DRAWN.get(spec, [])) >= {name for name in layer.drawn if name in DRAWN.get(spec, [])}


def test_places_by_size_are_not_taken_from_the_base_that_loads(tmp_path: Path):
    """The base may have moved on: the file's places are those that were trained."""
    model, handle = adapted("supertuning")
    path = tmp_path / "a.safetensors"
    tnpeft.save(model, path)
    other = base()
    with torch.no_grad():
        other[0].weight.neg_().add_(torch.randn(12, 12))
    with pytest.warns(tnpeft.TnpeftWarning):
        again = tnpeft.load(other, path)
    assert same(cores(again), cores(handle))


def test_places_that_were_written_are_stored(tmp_path: Path):
    """Places of the user's own are no longer what the seed gives."""
    model, handle = adapted("shira")
    with torch.no_grad():
        handle.adapters["0"].cores["places"].copy_(torch.arange(24).flip(0))
    path = tmp_path / "a.safetensors"
    tnpeft.save(model, path)
    assert load_file(path)["layers.0.core_places"].tolist() == list(range(23, -1, -1))
    loaded = base()
    assert same(cores(tnpeft.load(loaded, path)), cores(handle))
    torch.testing.assert_close(loaded(X), model(X))


WRONG: list[tuple[str, str, Callable[[Tensor], Tensor], str]] = [
    ("supertuning", "places", lambda t: t.index_fill(0, torch.tensor([2]), -1), "-1"),
    ("supertuning", "places", lambda t: t.index_fill(0, torch.tensor([0]), 144), "144"),
    ("supertuning", "places", lambda t: torch.cat([t[:1], t[:1], t[2:]]), "TWICE"),
    ("supertuning", "places", lambda t: t.to(torch.int32).index_fill(0, torch.tensor([1]), -5), "-5"),
]


@pytest.mark.parametrize(("spec", "core", "change", "found"), WRONG)
def test_places_that_no_map_can_use_are_refused(
    spec: str, core: str, change: Callable[[Tensor], Tensor], found: str, tmp_path: Path
):
    model, handle = adapted(spec)
    path = tmp_path / "a.safetensors"
    tnpeft.save(model, path)
    first = int(handle.adapters["0"].cores[core].flatten()[0])
    rewritten(
        path,
        lambda fields, tensors: tensors.update({f"layers.0.core_{core}": change(tensors[f"layers.0.core_{core}"])}),
    )
    expected = (
        f"FILE: layer '0': index core '{core}': expected different whole numbers of 0 to 143 (`scatter` in 'update'), "
        f"found {found.replace('TWICE', f'{first} twice')}. "
        "Give it the places that the adapter was trained with; nothing else can stand in for them."
    )
    assert refused(base(), path) == expected
    assert refused(model, path, tnpeft.hot_swap) == expected


def test_places_to_take_from_may_repeat_but_not_leave_the_range(tmp_path: Path):
    model, handle = adapted("adamss")
    with torch.no_grad():
        handle.adapters["0"].cores["cluster"].fill_(2)
    path = tmp_path / "a.safetensors"
    tnpeft.save(model, path)
    loaded = base()
    tnpeft.load(loaded, path)
    torch.testing.assert_close(loaded(X), model(X))
    rewritten(path, lambda fields, tensors: tensors["layers.0.core_cluster"].fill_(3))
    assert refused(base(), path) == (
        "FILE: layer '0': index core 'cluster': expected whole numbers of 0 to 2 (`gather` in 'A_of'), found 3. "
        "Give it the places that the adapter was trained with; nothing else can stand in for them."
    )


def test_places_of_another_type_are_refused(tmp_path: Path):
    model, _ = adapted("supertuning")
    path = tmp_path / "a.safetensors"
    tnpeft.save(model, path)
    key = "layers.0.core_places"
    rewritten(path, lambda fields, tensors: tensors.update({key: tensors[key].float()}))
    assert "tensor 'layers.0.core_places': expected int64(14,), found float32(14,)" in refused(base(), path)


def test_a_state_dict_with_bad_places_is_refused_and_they_stay(tmp_path: Path):
    model, handle = adapted("supertuning")
    places = handle.adapters["0"].cores["places"].clone()
    key = next(key for key in model.state_dict() if key.endswith("core_places"))
    for bad in (places + 144, places - 200, places[:1].expand(14)):
        state = {**model.state_dict(), key: bad}
        for assign in (False, True):
            with pytest.raises(
                RuntimeError, match=r"index core 'places': expected different whole numbers of 0 to 143"
            ):
                model.load_state_dict(state, assign=assign)
            assert torch.equal(handle.adapters["0"].cores["places"], places)
    model(X)


def test_a_state_dict_in_half_precision_keeps_places_whole():
    model, handle = adapted("shira")
    before = {layer: adapter.cores["places"].clone() for layer, adapter in handle.adapters.items()}
    halves = {
        key: value.half() if value.is_floating_point() else value.short() for key, value in model.state_dict().items()
    }
    model.load_state_dict(halves, assign=True)
    for layer, adapter in handle.adapters.items():
        assert adapter.cores["places"].dtype == torch.int64
        assert torch.equal(adapter.cores["places"], before[layer])
        assert adapter.cores["values"].dtype == torch.float32


SQUASHED = """
tnpeft: 2
name: squashed
title: A LoRA whose up core is squashed
layers: any
params: {r: 2}
sizes: {o: out_channels, i: in_channels, a: r}
cores:
  B: {legs: o a, init: zeros}
  A: a i k...
  b: {of: B, legs: o a, map: tanh}
terms:
  - {cores: [b, A], weight: o i k...}
start: zero
"""


@pytest.mark.parametrize("library", ["peft", "diffusers", "lycoris", "kohya", "comfyui"])
def test_no_other_library_s_file_is_written_without_the_maps(library: str, tmp_path: Path):
    """Its contraction is LoRA's: its stored cores are not."""
    model = base()
    tnpeft.attach(model, tnpeft.Spec.from_yaml(SQUASHED), match=["0"])
    with pytest.raises(tnpeft.AdapterFileError) as caught:
        tnpeft.save_foreign(model, tmp_path / ("there" if library == "peft" else "there.safetensors"), library)
    assert "with the derived core 'b'. Merge it into the model instead" in str(caught.value)
    assert not any(tmp_path.iterdir())
