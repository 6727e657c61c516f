"""Files of adapters on parameters and embeddings: they load to the bit, say what they hold, and fit nowhere else."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import tnpeft
from tests.beside_layers import PARAMETERS, TOKENS, attached, model, train
from tnpeft.errors import AdapterFileError, AttachError, TnpeftWarning


@pytest.mark.parametrize("spec", ["lora", "dora", "vera", "tt_lora", "pissa"])
def test_what_is_loaded_computes_the_same_bits(spec: str, tmp_path: Path) -> None:
    adapted, base, _ = attached(spec)
    path = tmp_path / "beside.safetensors"
    tnpeft.save(adapted, path)
    handle = tnpeft.load(base, path)
    assert torch.equal(base(TOKENS), adapted(TOKENS))
    assert [row.layer for row in handle.report().layers] == [
        "Linear(20, 8, turned)", "Linear(8, 8)", *["Linear(8, 8, turned)", "Linear(8, 6) x 3"] * 2
    ]  # fmt: skip
    again = tmp_path / "again.safetensors"
    tnpeft.save(base, again)
    assert again.read_bytes() == path.read_bytes()


def test_values_are_swapped_in_place(tmp_path: Path) -> None:
    adapted, _, handle = attached()
    other, _, _ = attached()
    train(handle)
    tnpeft.save(adapted, tmp_path / "other.safetensors")
    before = [id(parameter) for parameter in other.parameters()]
    tnpeft.hot_swap(other, tmp_path / "other.safetensors")
    assert torch.equal(other(TOKENS), adapted(TOKENS))
    assert [id(parameter) for parameter in other.parameters()] == before


def test_a_file_says_what_it_holds(tmp_path: Path) -> None:
    adapted, _, handle = attached()
    tnpeft.save(adapted, tmp_path / "beside.safetensors")
    told = tnpeft.inspect(tmp_path / "beside.safetensors")
    assert told.parameters == handle.report().trained
    rows = {row.name: (row.weight, row.trained, row.digest is not None) for row in told.layers}
    assert rows["embed"] == ((20, 8), 4 * 28, True)
    assert rows["blocks.1.experts"] == ((3, 6, 8), 3 * 4 * 14, True)
    assert told.layers[-1].tensors["core_down"] == (3, 4, 8)


def test_another_bases_values_are_warned_of(tmp_path: Path) -> None:
    adapted, base, _ = attached()
    tnpeft.save(adapted, tmp_path / "beside.safetensors")
    with torch.no_grad():
        base.blocks[1].experts.add_(1)
    with pytest.warns(TnpeftWarning, match="found others in 'blocks.1'"):
        tnpeft.load(base, tmp_path / "beside.safetensors")


def test_another_orientation_is_refused_in_place(tmp_path: Path) -> None:
    adapted, base = model(), model()
    tnpeft.attach(adapted, "lora", parameters={r"0\.square": "i o"})
    tnpeft.save(adapted, tmp_path / "one.safetensors")
    tnpeft.attach(base, "lora", parameters={r"0\.square": "o i"}, name="other")
    with pytest.raises(AttachError) as caught:
        tnpeft.load(base, tmp_path / "one.safetensors")
    assert str(caught.value).partition(": ")[2] == (
        "parameter 'blocks.0.square': its orientation: expected `o i`, as other adapters have it, found `i o`. Give "
        "it the "
        "same way round, or detach the other adapters first."
    )
    assert tnpeft.names_of(base) == ("other",)


def test_a_model_without_the_parameter(tmp_path: Path) -> None:
    adapted, _, _ = attached()
    tnpeft.save(adapted, tmp_path / "beside.safetensors")
    other = model()
    del other.blocks[1].experts
    keys = list(other.state_dict())
    with pytest.raises(AdapterFileError, match=r"'blocks\.1\.experts' is"):
        tnpeft.load(other, tmp_path / "beside.safetensors")
    assert list(other.state_dict()) == keys


@pytest.mark.parametrize("library", ["diffusers", "lycoris", "kohya", "comfyui"])
def test_files_of_others_than_peft_hold_layers_alone(library: str, tmp_path: Path) -> None:
    adapted, _, _ = attached()
    with pytest.raises(AdapterFileError) as caught:
        tnpeft.save_foreign(adapted, tmp_path / "theirs", library)
    assert str(caught.value).partition(": ")[2] == (
        "adapters: expected those of layers alone, found also 'embed', 'blocks.0.square', 'blocks.0.experts', "
        "'blocks.1.square', 'blocks.1.experts'. Write it with `tnpeft.save`, or merge it into the model."
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spec", ["lora", "dora"])
def test_a_fine_tune_is_extracted(spec: str) -> None:
    adapted, base, _ = attached("lora")
    output = adapted(TOKENS)
    tnpeft.detach(adapted, merge=True)
    extracted = tnpeft.extract(
        base, adapted.state_dict(), spec, match=["embed", "blocks.0.line"], parameters=PARAMETERS
    )
    assert extracted.captured > 0.999
    assert not extracted.unexplained
    torch.testing.assert_close(base(TOKENS), output, rtol=1e-3, atol=1e-3)


def test_ranks_of_a_stack_shrink_slice_by_slice() -> None:
    adapted, _, handle = attached()
    deltas = {name: adapter.delta_weight().double() for name, adapter in handle.adapters.items()}
    tnpeft.truncate(adapted, r=2)
    adapted(TOKENS)
    for name, adapter in handle.adapters.items():
        u, s, v = torch.linalg.svd(deltas[name], full_matrices=False)
        nearest = u[..., :2] @ torch.diag_embed(s[..., :2]) @ v[..., :2, :]
        torch.testing.assert_close(adapter.delta_weight().double(), nearest, rtol=1e-3, atol=1e-4)


def test_a_budget_counts_slices() -> None:
    found = tnpeft.budget("lora", model(), 1000, match=["embed"], parameters=PARAMETERS)
    handle = tnpeft.attach(copy.deepcopy(model()), "lora", match=["embed"], parameters=PARAMETERS, r=found.value)
    assert handle.report().trained == found.total <= 1000
