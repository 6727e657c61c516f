"""PEFT's adapters: what it saved computes the same here, and what we write computes the same there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import (
    FLAT,
    LAYERS,
    Net,
    X,
    adapted,
    assert_same,
    loaded,
    move,
    peft_of,
    save_or_refuse,
    specs_of,
    with_peft,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import tnpeft

peft = pytest.importorskip("peft")

ALL, FOUR = "|".join(LAYERS), "|".join(FLAT)


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": list(LAYERS), **options})


def loha(**options: Any) -> Any:
    return peft.LoHaConfig(**{"r": 3, "alpha": 5, "target_modules": list(FLAT), **options})


def lokr(**options: Any) -> Any:
    return peft.LoKrConfig(**{"r": 2, "alpha": 5, "target_modules": list(FLAT), **options})


READ = {
    "lora": (lora(), {"lora"}),
    "rslora": (lora(use_rslora=True, r=4), {"lora"}),
    "patterns": (lora(rank_pattern={"conv[12]": 5, "^line": 2}, alpha_pattern={"line": 7, "point": 0.5}), {"lora"}),
    "rslora patterns": (lora(use_rslora=True, rank_pattern={"conv2": 5}, alpha_pattern={"conv2": 3}), {"lora"}),
    "bias all": (lora(bias="all"), {"lora"}),
    "bias lora_only": (lora(bias="lora_only", target_modules=["line", "conv2"]), {"lora"}),
    "modules to save": (lora(target_modules=["line"], modules_to_save=["norm", "conv3"]), {"lora"}),
    "loha": (loha(), {"loha"}),
    "loha effective": (loha(use_effective_conv2d=True), {"loha", "loha_tucker"}),
    "loha patterns": (loha(rank_pattern={"line": 4}, alpha_pattern={"conv1": 1}), {"loha"}),
    "lokr": (lokr(), {"lokr"}),
    "lokr both": (lokr(r=1, decompose_both=True), {"lokr_both"}),
    "lokr effective": (lokr(r=1, use_effective_conv2d=True), None),
    "lokr effective both": (lokr(r=1, use_effective_conv2d=True, decompose_both=True), None),
    "lokr whole": (lokr(r=16), {"krona_sizes", "krona_inner_sizes"}),
    "lokr factor": (lokr(decompose_factor=3), {"lokr"}),
    "lokr unsorted factor": (lokr(decompose_factor=6, r=1), None),
    "lokr unsorted factor both": (lokr(decompose_factor=6, decompose_both=True), None),
    "lokr patterns": (lokr(rank_pattern={"line": 16, "conv2": 1}, alpha_pattern={"line": 3}), None),
}


@pytest.mark.parametrize("case", READ)
def test_what_peft_saved_computes_the_same_here(case: str, tmp_path: Path):
    config, specs = READ[case]
    theirs = with_peft(config)
    theirs.save_pretrained(tmp_path)
    ours = loaded(tmp_path)
    assert_same(ours(X), theirs(X))
    assert specs is None or specs_of(ours) == specs
    with tnpeft.disabled(ours):
        assert torch.equal(ours(X), Net()(X))


def test_dora(tmp_path: Path):
    theirs = with_peft(lora(use_dora=True))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = loaded(tmp_path / "theirs")
    assert_same(ours(X), theirs(X))
    tnpeft.save_foreign(ours, tmp_path / "ours", "peft")
    assert_same(peft_of(tmp_path / "ours")(X), theirs(X))
    tnpeft.save(ours, tmp_path / "ours.safetensors")
    again = Net()
    tnpeft.load(again, tmp_path / "ours.safetensors")
    assert torch.equal(again.eval()(X), ours(X))


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor:peft.utils.warning.PeftWarning")
def test_the_bias_of_lora_b(tmp_path: Path):
    theirs = with_peft(lora(lora_bias=True, bias="lora_only", target_modules=["line", "conv2"]))
    theirs.save_pretrained(tmp_path)
    ours = loaded(tmp_path)
    assert_same(ours(X), theirs(X))
    assert tnpeft.Handle(ours, "default").report().bias == 18 + 24


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_of_files(dtype: torch.dtype, tmp_path: Path):
    with_peft(lora()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in load_file(path).items()}, path)
    assert_same(loaded(tmp_path)(X), peft_of(tmp_path)(X))


def test_the_file_instead_of_the_folder_and_pickled_weights(tmp_path: Path):
    theirs = with_peft(lora())
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    assert_same(loaded(path)(X), theirs(X))
    torch.save(load_file(path), tmp_path / "adapter_model.bin")
    path.unlink()
    assert_same(loaded(tmp_path)(X), theirs(X))


def test_keys_without_the_prefix_and_with_the_adapters_name(tmp_path: Path):
    theirs = with_peft(lora())
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {key.removeprefix("base_model.model."): tensor.clone() for key, tensor in load_file(path).items()}
    save_file(tensors, path)
    assert_same(loaded(tmp_path)(X), theirs(X))
    save_file({key.replace(".weight", ".default.weight"): tensor for key, tensor in tensors.items()}, path)
    assert_same(loaded(tmp_path)(X), theirs(X))


def test_a_layer_whose_name_starts_like_a_wrapper(tmp_path: Path):
    base = nn.Sequential()
    base.add_module("model", nn.Sequential(nn.Linear(3, 4)))
    theirs = with_peft(lora(target_modules=["0"]), base)
    theirs.save_pretrained(tmp_path)
    assert_same(loaded(tmp_path, base)(X[..., :3]), theirs(X[..., :3]))


WRITTEN = {
    "lora": ("lora", ALL, {"r": 3, "alpha": 5}),
    "locon_tucker": ("locon_tucker", "conv|point", {"r": 3, "alpha": 5}),
    "loha": ("loha", FOUR, {"r": 3, "alpha": 5}),
    "loha_tucker": ("loha_tucker", "conv[12]|point", {"r": 3, "alpha": 5}),
    "lokr": ("lokr", FOUR, {"r": 2, "alpha": 5}),
    "lokr of rank 1": ("lokr", FOUR, {"r": 1}),
    "lokr factor": ("lokr", FOUR, {"r": 1, "factor": 3}),
    "lokr whole": ("lokr", "line|conv2|point", {"r": 9}),
    "lokr_both": ("lokr_both", FOUR, {"r": 1, "alpha": 3}),
    "lokr_both, one whole": ("lokr_both", FOUR, {"r": 2, "alpha": 3}),
    "krona": ("krona", "line|conv2|point", {}),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_what_we_write_computes_the_same_in_peft(case: str, tmp_path: Path):
    spec, match, params = WRITTEN[case]
    ours = adapted(spec, match, **params)
    tnpeft.save_foreign(ours, tmp_path / "a", "peft")
    assert_same(peft_of(tmp_path / "a")(X), ours(X))
    assert_same(loaded(tmp_path / "a")(X), ours(X))


def test_biases_scales_and_ranks_of_their_own(tmp_path: Path):
    ours = adapted("lora", "line|conv2", train={"bias": "adapted"}, r=2)
    tnpeft.activate(ours, {"default": 0.75})
    tnpeft.save_foreign(ours, tmp_path / "a", "peft")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["bias"] == "lora_only"
    assert_same(peft_of(tmp_path / "a")(X), ours(X))

    ours = adapted("lora", "line|conv2", train={"bias": "all"}, r=2, trained=False)
    with torch.no_grad():
        ours.conv1.bias.add_(1)
    tnpeft.save_foreign(ours, tmp_path / "b", "peft")
    assert_same(peft_of(tmp_path / "b")(X), ours(X))
    assert_same(loaded(tmp_path / "b")(X), ours(X))

    ours = adapted("lora", "line", r=2)
    tnpeft.activate(ours, {"default": 0.0})
    tnpeft.save_foreign(ours, tmp_path / "c", "peft")
    assert torch.equal(loaded(tmp_path / "c")(X), Net()(X))


def test_a_list_of_targets_unless_peft_would_take_others_too(tmp_path: Path):
    ours = adapted("lora", "conv", r=2)
    tnpeft.save_foreign(ours, tmp_path / "a", "peft")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["conv1", "conv2", "conv3"]

    def twice() -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential()
        net.add_module("end", nn.Linear(12, 12))
        net.add_module("block", nn.Sequential())
        net.block.add_module("end", nn.Linear(12, 12))
        return net

    ours = adapted("lora", "^end$", base=twice(), r=2)
    tnpeft.save_foreign(ours, tmp_path / "b", "peft")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["target_modules"] == "end"
    assert_same(peft_of(tmp_path / "b", twice())(X), ours(X))


def test_different_ranks_on_the_layers(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "tnpeft: 1\nname: two\nadapters:\n"
        "  - {spec: lora, match: line, params: {r: 2, alpha: 3}}\n"
        "  - {spec: locon_tucker, match: conv, params: {r: 4}}\n"
    )
    ours = Net()
    tnpeft.attach(ours, recipe)
    move(ours)
    tnpeft.save_foreign(ours.eval(), tmp_path / "a", "peft")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"^line": 2}
    assert config["alpha_pattern"] == {"^line": 3}
    assert_same(peft_of(tmp_path / "a")(X), ours(X))


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_sizes_both_ways(data: st.DataObject, tmp_path: Path):
    """Every method on one layer of any channels, rank and alpha; where PEFT takes it, both compute the same."""
    kind = data.draw(st.sampled_from([nn.Linear, nn.Conv1d, nn.Conv2d]))
    outs, ins = data.draw(st.integers(1, 16)), data.draw(st.integers(1, 16))
    kernel = () if kind is nn.Linear else (data.draw(st.integers(1, 3)),)

    def base() -> nn.Module:
        torch.manual_seed(5)
        return nn.Sequential(kind(ins, outs, *kernel))

    rank, alpha = data.draw(st.integers(1, 9)), data.draw(st.floats(0.1, 9))
    common: dict[str, Any] = {"r": rank, "target_modules": ["0"]}
    factor = data.draw(st.sampled_from([-1, 2, 3, 4, 5]))
    flags = {"decompose_both": data.draw(st.booleans()), "use_effective_conv2d": data.draw(st.booleans())}
    config = data.draw(
        st.sampled_from(
            [
                peft.LoraConfig(lora_alpha=alpha, use_rslora=flags["decompose_both"], **common),
                peft.LoHaConfig(alpha=alpha, use_effective_conv2d=flags["use_effective_conv2d"], **common),
                peft.LoKrConfig(alpha=alpha, decompose_factor=factor, **flags, **common),
            ]
        )
    )
    theirs = with_peft(config, base())
    theirs.save_pretrained(tmp_path / "theirs")
    x = torch.randn(2, 3, ins) if kind is nn.Linear else torch.randn(2, ins, *(4,) * (base()[0].weight.ndim - 2))
    ours = loaded(tmp_path / "theirs", base())
    assert_same(ours(x), theirs(x))
    why = save_or_refuse(ours, tmp_path / "ours", "peft")
    if why is None:
        assert_same(peft_of(tmp_path / "ours", base())(x), theirs(x))
    else:  # the sizes of unsorted factors, of which PEFT could have meant another
        assert "PEFT's LOKR" in why
        assert kind is nn.Conv1d or "decompose_factor" in why


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor:peft.utils.warning.PeftWarning")
def test_a_second_adapter_starts_from_the_base(tmp_path: Path):
    """The bias of `lora_B` adds to the base's, not to that which another adapter trains."""
    theirs = with_peft(lora(lora_bias=True, target_modules=["line", "conv2"]))
    theirs.save_pretrained(tmp_path)
    ours = adapted("lora", "line", train={"bias": "adapted"})
    tnpeft.load_foreign(ours, tmp_path, name="second")
    assert_same(ours(X), theirs(X))
