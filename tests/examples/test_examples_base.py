"""Base checkpoints as training scripts and frameworks write them: what is taken, what is said, what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("monai", reason="the example driver needs the `demo` extra")

from ddpm_lab.config.settings import Base, Model
from ddpm_lab.model.unet import build_unet, load_base
from ddpm_lab.support.faults import LabError
from torch import Tensor

TINY = Model(channels=(8, 8), attention_levels=(False, True), head_channels=(0, 8), res_blocks=1, norm_groups=4)
STATE: dict[str, Tensor] = build_unet(TINY, seed=1).state_dict()
FIX = "Give the checkpoint of this model, or set `model` to the checkpoint's."
OLD = "pass `--set base.old_generative=true`."


def under(prefix: str, state: Mapping[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def within(place: str, word: str) -> dict[str, Tensor]:
    """A wrapper around one part of the model."""
    return {name.replace(f"{place}.", f"{place}.{word}.", 1): value for name, value in STATE.items()}


def bare() -> dict[str, Tensor]:
    """Without the projection after attention, as models of MAISI and of monai-generative."""
    return {name: value for name, value in STATE.items() if ".out_proj." not in name}


def loaded(content: Any, tmp_path: Path, **base: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The weights after loading, and what was said."""
    path = tmp_path / "base.pt"
    torch.save(content, path)
    settings = Base(checkpoint=path, **base)
    unet, notes = build_unet(TINY, settings, seed=2), []
    load_base(unet, settings, notes.append)
    return unet.state_dict(), [note.replace(str(path), "FILE") for note in notes]


def refusal(content: Any, tmp_path: Path, **base: Any) -> str:
    """What is said of it, after a check that the model is as it was."""
    path = tmp_path / "base.pt"
    torch.save(content, path)
    settings = Base(checkpoint=path, **base)
    unet = build_unet(TINY, settings, seed=2)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    with pytest.raises(LabError) as excinfo:
        load_base(unet, settings)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    return str(excinfo.value).replace(str(path), "FILE")


WRAPPED: dict[str, tuple[Any, list[str]]] = {
    "MAISI": (
        {"epoch": 3, "loss": 0.1, "unet_state_dict": STATE, "scale_factor": torch.tensor(1.5)},
        [
            "Base: 142 tensors under `unet_state_dict` of FILE; not used: `scale_factor`",
            "Base: `scale_factor` 1.5 is not used: it scales a latent space, and this model works on voxels",
        ],
    ),
    "state_dict": ({"state_dict": STATE}, ["Base: 142 tensors under `state_dict` of FILE"]),
    "diffusion": (
        {"diffusion": STATE, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1}]}},
        ["Base: 142 tensors under `diffusion` of FILE; not used: `optimizer.state.0.exp_avg`"],
    ),
    "nested": ({"checkpoint": {"model": STATE}}, ["Base: 142 tensors under `checkpoint.model` of FILE"]),
    "Lightning": (
        {"state_dict": {**under("unet."), "vae.a": torch.zeros(1), "vae.b": torch.zeros(1)}, "global_step": 9},
        ["Base: 142 tensors under `state_dict.unet` of FILE; not used: `state_dict.vae.a`, `state_dict.vae.b`"],
    ),
    "compiled": (under("_orig_mod."), []),
    "DDP": (under("module."), []),
    "DDP of a compiled one": ({"model": under("module._orig_mod.")}, ["Base: 142 tensors under `model` of FILE"]),
    "a compiled part": (within("middle_block", "_orig_mod"), []),
    "FSDP": (within("down_blocks.0", "_fsdp_wrapped_module"), []),
    "DeepSpeed": ({"module": STATE, "epoch": 1}, []),
    "unet.": (under("unet."), ["Base: 142 tensors under `unet` of FILE"]),
    "model.": (under("model."), ["Base: 142 tensors under `model` of FILE"]),
    "ComfyUI": (under("model.diffusion_model."), ["Base: 142 tensors under `model.diffusion_model` of FILE"]),
    "twice the same": (
        {"model": dict(STATE), "student": dict(STATE)},
        [
            "Base: 142 tensors under `model` of FILE; not used: `student.conv_in.conv.weight`, "
            "`student.conv_in.conv.bias`, `student.time_embed.0.weight` and 139 more"
        ],
    ),
    "an average beside it": (
        {**STATE, **under("ema.", {name: value + 1 for name, value in STATE.items()})},
        [
            "Base: 142 tensors of FILE; not used: `ema.conv_in.conv.weight`, `ema.conv_in.conv.bias`, "
            "`ema.time_embed.0.weight` and 139 more"
        ],
    ),
    "half precision": ({name: value.bfloat16().float() for name, value in STATE.items()}, []),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_model_is_found_in_whatever_wraps_it(tmp_path: Path, kind: str) -> None:
    content, notes = WRAPPED[kind]
    state, said = loaded(content, tmp_path)
    expected = content if kind == "half precision" else STATE
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
    assert said == notes


def test_names_of_files_do_not_matter(tmp_path: Path) -> None:
    torch.save(under("unet."), tmp_path / "a.safetensors")
    save_file(under("unet."), tmp_path / "b.pt")
    for name in ("a.safetensors", "b.pt"):
        unet = build_unet(TINY, seed=2)
        load_base(unet, Base(checkpoint=tmp_path / name))
        assert all(torch.equal(value, STATE[name]) for name, value in unet.state_dict().items())


def test_of_several_models_none_is_taken_by_chance(tmp_path: Path) -> None:
    content = {"model": STATE, "model_ema": {name: value + 1 for name, value in STATE.items()}}
    assert refusal(content, tmp_path) == (
        "FILE: `base.checkpoint`: expected one model, found 2 with the same names, `model`, `model_ema`. "
        "Save the tensors of the one that you want in a file of their own."
    )
    state, _ = loaded(content["model_ema"], tmp_path)
    assert all(torch.equal(value, STATE[name] + 1) for name, value in state.items())


@pytest.mark.parametrize("wrapper", ["", "model_state_dict."])
def test_a_model_without_projections_loads_as_the_advice_says(tmp_path: Path, wrapper: str) -> None:
    assert refusal({**under(wrapper, bare()), "scale_factor": 0.7}, tmp_path) == (
        "FILE: the base's tensors: expected the 142 of this model, found 8 missing "
        "(`down_blocks.1.attentions.0.attn.out_proj.weight`, `down_blocks.1.attentions.0.attn.out_proj.bias`, "
        "`middle_block.attention.attn.out_proj.weight` and 5 more). "
        f"It has no `attn.out_proj`, as models of monai-generative: {OLD}"
    )
    state, _ = loaded({**under(wrapper, bare()), "scale_factor": 0.7}, tmp_path, old_generative=True)
    assert state.keys() == bare().keys()
    assert all(torch.equal(value, STATE[name]) for name, value in state.items())


def other_model(**changes: Any) -> dict[str, Tensor]:
    state: dict[str, Tensor] = build_unet(TINY.model_copy(update=changes)).state_dict()
    return state


REFUSED: dict[str, tuple[Any, str]] = {
    "another size": (
        other_model(channels=(8, 16), head_channels=(0, 16)),
        "the base's tensors: expected the 142 of this model, found 4 that it has not "
        "(`up_blocks.0.resnets.1.skip_connection.conv.weight`, `up_blocks.0.resnets.1.skip_connection.conv.bias`, "
        "`up_blocks.1.resnets.0.skip_connection.conv.weight` and 1 more). ",
    ),
    "one cut off": (
        {name: value for name, value in STATE.items() if name != "out.2.conv.bias"},
        f"tensor `out.2.conv.bias`: expected 1, found no such tensor. {FIX}",
    ),
    "latent": (
        {"unet_state_dict": {**STATE, "conv_in.conv.weight": torch.zeros(8, 4, 3, 3, 3)}, "scale_factor": 1.0},
        "tensor `conv_in.conv.weight`: expected 8x1x3x3x3, found 8x4x3x3x3. "
        "Give a model of volumes with one channel: this one takes 4, and no setting does that.",
    ),
    "with classes": (
        {**STATE, "class_embedding.weight": torch.zeros(3, 8)},
        "tensor `class_embedding.weight`: expected no such tensor, found 3x8. "
        "Give a model without classes and conditions: this one has them, and no setting does that.",
    ),
    "something else": (
        {"weight": torch.zeros(2)},
        "`base.checkpoint`: expected this model's tensors, `conv_in.conv.weight`, `conv_in.conv.bias`, "
        f"`time_embed.0.weight` and 139 more, found only `weight`. {FIX}",
    ),
    "nothing": (
        {"epoch": 3},
        "`base.checkpoint`: expected this model's tensors, `conv_in.conv.weight`, `conv_in.conv.bias`, "
        f"`time_embed.0.weight` and 139 more, found no tensors. {FIX}",
    ),
    "a module": (
        torch.nn.Linear(2, 2),
        "`base.checkpoint`: expected a safetensors file or a state dict, found a pickle with "
        "`torch.nn.modules.linear.Linear`, which would run code. "
        "Save the tensors alone: `torch.save(model.state_dict(), FILE)`.",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_content_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    content, expected = REFUSED[kind]
    said = refusal(content, tmp_path)
    assert "\n" not in said
    if kind == "another size":
        assert said.startswith("FILE: the base's tensors: expected the 142 of this model, found ")
        assert said.endswith(FIX)
    else:
        assert said == f"FILE: {expected}"


def test_old_models_of_other_sizes_get_both_advices(tmp_path: Path) -> None:
    state = other_model(channels=(8, 16), head_channels=(0, 16))
    state = {name: value for name, value in state.items() if ".out_proj." not in name}
    assert refusal(state, tmp_path).endswith(
        "It has no `attn.out_proj`, as models of monai-generative: pass `--set base.old_generative=true`, "
        "and set `model` to the checkpoint's."
    )


FIVE = {
    "time_embed.0.weight": STATE["time_embed.0.weight"],
    "conv_in.conv.weight": STATE["conv_in.conv.weight"],
    "down_blocks.1.attentions.0.attn.to_q.weight": torch.zeros(8, 8),
    "down_blocks.1.attentions.0.attn.to_k.weight": torch.zeros(8, 8),
    "down_blocks.1.attentions.0.attn.to_v.weight": torch.zeros(8, 8),
}


@pytest.mark.parametrize("attends", [False, True])
def test_few_tensors_of_another_network_are_no_old_model(tmp_path: Path, attends: bool) -> None:
    state = {name: value for name, value in FIVE.items() if attends or ".attn." not in name}
    said = refusal(under("controlnet_state_dict.", state), tmp_path)
    assert said.startswith(
        f"FILE: the base's tensors: expected the 142 of this model, found {142 - len(state)} missing "
    )
    assert said.endswith(f"). {FIX}")
    said = refusal(under("controlnet_state_dict.", state), tmp_path, old_generative=True)
    assert said == (
        f"FILE: the base's tensors: expected the 134 of this model without `attn.out_proj`, found {134 - len(state)} "
        "missing (`conv_in.conv.bias`, `time_embed.0.bias`, `time_embed.2.weight` and "
        f"{131 - len(state)} more). {FIX}"
    )


def test_a_wrong_checkpoint_is_told_in_our_words_whatever_is_set(tmp_path: Path) -> None:
    said = refusal(other_model(channels=(8, 16), head_channels=(0, 16)), tmp_path, old_generative=True)
    assert said.startswith(
        "FILE: the base's tensors: expected the 134 of this model without `attn.out_proj`, found 90 of other sizes ("
    )
    assert said.endswith("It was written with MONAI itself: pass `--set base.old_generative=false`.")
    assert refusal({**bare(), "more": torch.zeros(2)}, tmp_path, old_generative=True) == (
        f"FILE: tensor `more`: expected no such tensor, found 2. {FIX}"
    )


def test_what_is_no_file_of_tensors_is_named(tmp_path: Path) -> None:
    script, zipped, pickled = tmp_path / "model.ts", tmp_path / "cut.pt", tmp_path / "bytes.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(script))
    zipped.write_bytes(b"PK\x03\x04hello")
    pickled.write_bytes(b"\x80\x02hello")
    expected = {
        Path("/dev/zero"): "expected a file, found a device. Check the path.",
        tmp_path: "expected a file, found a folder. Check the path.",
        script: "expected a safetensors file or a state dict, found a TorchScript archive. "
        "Give the state dict; in a MONAI bundle it is `models/model.pt`.",
        pickled: "expected a safetensors file or a state dict, found a pickle that is damaged. Check the file.",
    }
    for path, text in expected.items():
        with pytest.raises(LabError) as excinfo:
            load_base(build_unet(TINY), Base(checkpoint=path))
        assert str(excinfo.value) == f"{path}: `base.checkpoint`: {text}"
    with pytest.raises(LabError) as excinfo:
        load_base(build_unet(TINY), Base(checkpoint=zipped))
    assert str(excinfo.value).startswith(f"{zipped}: `base.checkpoint`: expected a safetensors file or a state dict, ")


def test_mappings_that_hold_themselves_end(tmp_path: Path) -> None:
    content: dict[str, Any] = {"model": STATE}
    content["again"] = content
    state, _ = loaded(content, tmp_path)
    assert all(torch.equal(value, STATE[name]) for name, value in state.items())
