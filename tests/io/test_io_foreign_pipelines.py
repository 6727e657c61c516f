"""Files of diffusers, kohya and ComfyUI: every spelling of their keys, headers, and pipelines of several models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import Net, X, adapted, assert_same, loaded, move, specs_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, safe_open, save_file
from small import bits, same_bits
from test_io_foreign_refusals import cannot, refused
from torch import Tensor, nn

import tnpeft
from tnpeft.io.foreign.formats import guess
from tnpeft.io.foreign.spelling import respelled


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.to_out = nn.ModuleList([nn.Linear(8, 8), nn.Dropout(0.0)])

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out[0](self.to_q(x) * self.to_k(x).sigmoid() + self.to_v(x))


class UNet(nn.Module):
    """Names as a U-Net of diffusers has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn1": Attention()})])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0]["attn1"](self.conv_in(x).flatten(2).transpose(1, 2))


class Clip(nn.Module):
    """Names as CLIP's text encoder has them, the first part since transformers 5."""

    def __init__(self, wrapped: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        layer = nn.ModuleDict({"self_attn": nn.ModuleDict(), "mlp": nn.ModuleDict()})
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            layer["self_attn"].add_module(name, nn.Linear(6, 6))
        layer["mlp"].add_module("fc1", nn.Linear(6, 6))
        inner = self if not wrapped else nn.Module()
        if wrapped:
            self.text_model = inner
        inner.encoder = nn.ModuleDict({"layers": nn.ModuleList([layer])})

    def forward(self, x: Tensor) -> Tensor:
        inner = self if not hasattr(self, "text_model") else self.text_model
        layer = inner.encoder["layers"][0]
        return layer["mlp"]["fc1"](sum(part(x).relu() for part in layer["self_attn"].children()))


IMAGE, WORDS = (torch.randn(*shape, generator=torch.Generator().manual_seed(5)) for shape in ((2, 3, 4, 4), (2, 6)))
ATTENTION = "blocks.0.attn1"
UNET = ("conv_in", *(f"{ATTENTION}.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")))
CLIP = tuple(f"encoder.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1"))


def pairs(model: nn.Module, names: tuple[str, ...], ranks: tuple[int, ...] = (2,)) -> dict[str, tuple[Tensor, Tensor]]:
    """For each layer the two matrices of a LoRA, (rank, in, ...) and (out, rank, ...)."""
    generator = torch.Generator().manual_seed(7)
    found = {}
    for place, name in enumerate(names):
        weight, rank = model.get_submodule(name).weight, ranks[place % len(ranks)]
        down = torch.randn(rank, *weight.shape[1:], generator=generator) / 5
        found[name] = (down, torch.randn(weight.shape[0], rank, *(1,) * (weight.ndim - 2), generator=generator))
    return found


def with_updates(model: nn.Module, matrices: dict[str, tuple[Tensor, Tensor]], scales: Any = 1.0) -> nn.Module:
    """The model with scale * up down added to the weights: the definition."""
    for name, (down, up) in matrices.items():
        scale = scales[name] if isinstance(scales, dict) else scales
        with torch.no_grad():
            model.get_submodule(name).weight += scale * torch.einsum("or,r...->o...", up.flatten(1), down)
    return model.eval()


def old_attention(name: str, side: str) -> str:
    """diffusers' first spelling, in which attention's processors held the matrices."""
    head, _, last = name.removesuffix(".0").rpartition(".")
    if not last.startswith("to_"):
        return f"unet.{name}.lora.{side}.weight"
    return f"unet.{head}.processor.{last}_lora.{side}.weight"


SIDES = {"down": "A", "up": "B"}
SPELLINGS: dict[str, tuple[Callable[[str, str], str], str]] = {
    "today's": (lambda name, side: f"unet.{name}.lora_{SIDES[side]}.weight", "diffusers"),
    "a transformer's": (lambda name, side: f"transformer.{name}.lora_{SIDES[side]}.weight", "diffusers"),
    "no prefix": (lambda name, side: f"{name}.lora_{SIDES[side]}.weight", "diffusers"),
    "an adapter's name": (lambda name, side: f"transformer.{name}.lora_{SIDES[side]}.default.weight", "diffusers"),
    "processors": (old_attention, "diffusers"),
    "lora.down": (lambda name, side: f"unet.{name}.lora.{side}.weight", "diffusers"),
    "lora_linear_layer": (lambda name, side: f"unet.{name}.lora_linear_layer.{side}.weight", "diffusers"),
    "comfyui": (lambda name, side: f"diffusion_model.{name}.lora_{side}.weight", "comfyui"),
    "comfyui, as PEFT": (lambda name, side: f"diffusion_model.{name}.lora_{SIDES[side]}.weight", "comfyui"),
    "checkpoints": (lambda name, side: f"model.diffusion_model.{name}.lora_{side}.weight", "comfyui"),
    "a dotted prefix": (lambda name, side: f"unet.{name}.lora_{side}.weight", "lycoris"),
    "kohya": (lambda name, side: f"lora_unet_{name.replace('.', '_')}.lora_{side}.weight", "kohya"),
    "onetrainer": (lambda name, side: f"lora_transformer_{name.replace('.', '_')}.lora_{side}.weight", "kohya"),
}


@pytest.mark.parametrize("alphas", [False, True], ids=["no alpha", "alpha"])
@pytest.mark.parametrize("case", SPELLINGS)
def test_every_spelling(case: str, alphas: bool, tmp_path: Path):
    spelled, kind = SPELLINGS[case]
    matrices = pairs(UNet(), UNET, ranks=(2, 3))
    tensors, scales = {}, {}
    for place, (name, (down, up)) in enumerate(matrices.items()):
        tensors |= {spelled(name, "down"): down, spelled(name, "up"): up}
        scales[name] = (place + 1) / down.shape[0] if alphas else 1.0
        if alphas:
            before = next(key for key in tensors if tensors[key] is down)
            stem = before[: before.index(".lora") if ".lora" in before else before.index("_lora")]
            stem += ".0" * stem.endswith("to_out")
            tensors[f"{stem}.alpha"] = torch.tensor(float(place + 1))
    save_file(tensors, tmp_path / "a.safetensors")
    assert guess(tensors, pickled=False, has_config=False) == kind
    ours = loaded(tmp_path / "a.safetensors", UNet())
    assert_same(ours(IMAGE), with_updates(UNet(), matrices, scales)(IMAGE))
    assert specs_of(ours) == {"lora"}


TEXT_SPELLINGS: dict[str, Callable[[str, str], str]] = {
    "today's": lambda name, side: f"text_encoder.{name}.lora_{SIDES[side]}.weight",
    "lora_linear_layer": lambda name, side: f"text_encoder.text_model.{name}.lora_linear_layer.{side}.weight",
    "processors": lambda name, side: (
        "text_encoder.text_model."
        + name.replace("q_proj", "to_q_lora").replace("out_proj", "to_out_lora").replace("fc1", "fc1.lora_linear_layer")
        + f".{side}.weight"
    ),
    "kohya": lambda name, side: f"lora_te_text_model_{name.replace('.', '_')}.lora_{side}.weight",
    "kohya of two": lambda name, side: f"lora_te1_text_model_{name.replace('.', '_')}.lora_{side}.weight",
    "comfyui": lambda name, side: f"text_encoders.clip_l.transformer.text_model.{name}.lora_{side}.weight",
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("case", TEXT_SPELLINGS)
def test_text_encoders(case: str, wrapped: bool, tmp_path: Path):
    if wrapped and case == "today's":
        return  # a file of the newer model
    matrices = pairs(Clip(), CLIP)
    spelled = TEXT_SPELLINGS[case]
    save_file(
        {spelled(name, side): pair[side == "up"] for name, pair in matrices.items() for side in ("down", "up")},
        tmp_path / "a.safetensors",
    )
    ours = loaded(tmp_path / "a.safetensors", Clip(wrapped))
    assert_same(ours(WORDS), with_updates(Clip(), matrices)(WORDS))


PATHS = st.lists(st.sampled_from(["a", "block", "0", "attn1", "to_q", "lora", "up", "x_lora"]), min_size=1, max_size=4)
LEAVES = ["lora_A.weight", "lora_B.bias", "lora_down.weight", "alpha", "hada_w1_a", "lokr_w2", "diff", "dora_scale"]


@given(path=PATHS.map(".".join), leaf=st.sampled_from(LEAVES))
def test_other_keys_keep_their_spelling(path: str, leaf: str):
    if ".lora.up" not in f".{path}.":
        assert respelled(f"{path}.{leaf}") == f"{path}.{leaf}"


@given(path=PATHS.map(".".join), which=st.sampled_from("qkv"), side=st.sampled_from(["up", "down"]))
def test_old_keys_have_one_spelling(path: str, which: str, side: str):
    if ".lora.up" in f".{path}.":
        return
    latest = f"lora_{SIDES[side]}.weight"
    assert respelled(f"{path}.processor.to_{which}_lora.{side}.weight") == f"{path}.to_{which}.{latest}"
    assert respelled(f"{path}.processor.to_out_lora.{side}.weight") == f"{path}.to_out.0.{latest}"
    assert respelled(f"{path}.self_attn.to_{which}_lora.{side}.weight") == f"{path}.self_attn.{which}_proj.{latest}"
    for nested in ("lora", "lora_linear_layer"):
        new = respelled(f"{path}.{nested}.{side}.weight")
        assert new == f"{path}.{latest}"
        assert respelled(new) == new


def with_header(path: Path, tensors: dict[str, Tensor], header: object) -> Path:
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": text})
    return path


def peft_keys(matrices: dict[str, tuple[Tensor, Tensor]], prefix: str = "") -> dict[str, Tensor]:
    return {
        f"{prefix}{name}.lora_{side}.weight": tensor
        for name, pair in matrices.items()
        for side, tensor in zip("AB", pair, strict=True)
    }


def test_headers_with_patterns_of_one_model(tmp_path: Path):
    matrices = pairs(UNet(), UNET, ranks=(2, 3))
    config = {"r": 2, "lora_alpha": 8, "rank_pattern": {"to_q": 3, "to_v": 3}, "alpha_pattern": {"^conv_in": 1}}
    path = with_header(tmp_path / "a.safetensors", peft_keys(matrices), config)
    scales = {name: (1 if name == "conv_in" else 8) / down.shape[0] for name, (down, _) in matrices.items()}
    assert_same(loaded(path, UNet())(IMAGE), with_updates(UNet(), matrices, scales)(IMAGE))
    config["use_rslora"] = True
    path = with_header(tmp_path / "b.safetensors", peft_keys(matrices), config)
    scales = {name: scale * matrices[name][0].shape[0] ** 0.5 for name, scale in scales.items()}
    assert_same(loaded(path, UNet())(IMAGE), with_updates(UNet(), matrices, scales)(IMAGE))


def test_an_alpha_beside_a_header(tmp_path: Path):
    """It must be the header's; diffusers overlooks it."""
    matrices = pairs(UNet(), UNET)
    tensors = peft_keys(matrices, "unet.") | {"unet.conv_in.alpha": torch.tensor(6)}
    path = with_header(tmp_path / "a.safetensors", tensors, {"unet.r": 2, "unet.lora_alpha": 6})
    assert_same(loaded(path, UNet())(IMAGE), with_updates(UNet(), matrices, 3.0)(IMAGE))
    path = with_header(tmp_path / "a.safetensors", tensors, {"unet.r": 2, "unet.lora_alpha": 4})
    assert refused(path, base=UNet()) == (
        "PATH: layer 'conv_in': alpha: expected 4, as `lora_adapter_metadata` has it, found [6.0] in "
        "'unet.conv_in.alpha'. Keep the config and the tensors of one adapter together."
    )


OPTIONS = ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "peft_type", "modules_to_save"]
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 9), st.floats(), st.sampled_from(["LORA", "to_q", "(", "^"])),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.sampled_from(["to_q", "(", ""]), inner)),
    max_leaves=4,
)


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.dictionaries(
        st.builds(str.__add__, st.sampled_from(["", "unet.", "text_encoder.", ".", "a.b."]), st.sampled_from(OPTIONS)),
        VALUES,
        max_size=5,
    )
)
def test_any_header_is_read_or_refused(header: dict[str, Any], tmp_path: Path):
    path = with_header(tmp_path / "a.safetensors", peft_keys(pairs(UNet(), UNET), "unet."), header)
    model = UNet()
    before = bits(model)
    try:
        tnpeft.load_foreign(model, path)
    except tnpeft.TnpeftError:
        assert same_bits(bits(model), before)


def test_changes_of_norms_and_biases_in_comfyuis_names(tmp_path: Path):
    """`diff` and `diff_b` are added to the base's parameters, beside an update or alone."""
    generator = torch.Generator().manual_seed(3)
    changes = {
        "norm.weight": torch.randn(12, generator=generator),
        "norm.bias": torch.randn(12, generator=generator),
        "line.bias": torch.randn(18, generator=generator),
    }
    matrices = pairs(Net(), ("line",))
    tensors = {f"diffusion_model.line.lora_{side}.weight": matrices["line"][side == "up"] for side in SIDES}
    for name, change in changes.items():
        layer, _, which = name.rpartition(".")
        tensors[f"diffusion_model.{layer}.{'diff' if which == 'weight' else 'diff_b'}"] = change
    save_file(tensors, tmp_path / "a.safetensors")
    expected = with_updates(Net(), matrices)
    with torch.no_grad():
        for name, change in changes.items():
            expected.get_parameter(name).add_(change)
    assert_same(loaded(tmp_path / "a.safetensors")(X), expected(X))


def test_one_header_for_prefixed_keys(tmp_path: Path):
    """Its patterns mean the names behind the prefix, unless the prefix is a child of the model."""
    matrices = pairs(UNet(), UNET)
    config = {"r": 2, "lora_alpha": 6, "alpha_pattern": {"^conv_in": 1}}
    path = with_header(tmp_path / "a.safetensors", peft_keys(matrices, "transformer."), config)
    scales = {name: 0.5 if name == "conv_in" else 3.0 for name in matrices}
    assert_same(loaded(path, UNet())(IMAGE), with_updates(UNet(), matrices, scales)(IMAGE))
    ours = nn.ModuleDict({"transformer": UNet()})
    config["alpha_pattern"] = {r"^transformer\.conv_in": 1, "^conv_in": 50}
    tnpeft.load_foreign(ours, with_header(path, peft_keys(matrices, "transformer."), config))
    assert_same(ours["transformer"](IMAGE), with_updates(UNet(), matrices, scales)(IMAGE))


def parts_of() -> nn.ModuleDict:
    return nn.ModuleDict({"unet": UNet(), "te": Clip()})


def test_headers_of_a_pipelines_models(tmp_path: Path):
    """Each model has its own config; patterns are for names in the model."""
    unet, text = pairs(UNet(), UNET), pairs(Clip(), CLIP)
    header = {
        **{f"unet.{key}": value for key, value in {"r": 2, "lora_alpha": 6, "alpha_pattern": {"^conv_in": 1}}.items()},
        **{f"text_encoder.{key}": value for key, value in {"r": 2, "lora_alpha": 1, "peft_type": "LORA"}.items()},
    }
    tensors = peft_keys(unet, "unet.") | peft_keys(text, "text_encoder.")
    path = with_header(tmp_path / "a.safetensors", tensors, header)
    ours = parts_of()
    tnpeft.load_foreign(ours, path)
    scales = {name: 0.5 if name == "conv_in" else 3.0 for name in unet}
    assert_same(ours["unet"](IMAGE), with_updates(UNet(), unet, scales)(IMAGE))
    assert_same(ours["te"](WORDS), with_updates(Clip(), text, 0.5)(WORDS))


HEADERS = {
    "no JSON": ("{", "`lora_adapter_metadata` in the header: expected a JSON file, found "),
    "no object": ("[1]", "`lora_adapter_metadata` in the header: expected a JSON object, found [1]. Copy or download"),
    "another method": (
        {"unet.peft_type": "OFT"},
        "`peft_type`: expected LORA, LOHA or LOKR (supported are LoRA, LoHa and LoKr of PEFT,",
    ),
    "rank": (
        {"unet.r": 5},
        "layer 'blocks.0.attn1.to_k': rank: expected 5, as `lora_adapter_metadata` has it, found 2. Keep the config",
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_do_not_fit(case: str, tmp_path: Path):
    header, text = HEADERS[case]
    path = with_header(tmp_path / "a.safetensors", peft_keys(pairs(UNet(), UNET), "unet."), header)
    assert refused(path, base=UNet()).startswith(f"PATH: {text}")


def test_a_magnitude_and_the_bias_of_lora_b(tmp_path: Path):
    """What diffusers wrote without a header: DoRA in an old spelling, and a bias of the update."""
    ours = adapted("dora", "to_out", base=UNet(), r=2)
    tnpeft.save_foreign(ours, tmp_path / "a.safetensors", "diffusers")
    tensors = load_file(tmp_path / "a.safetensors")
    old = {key.replace("to_out.0.lora_magnitude", "to_out.lora_magnitude"): value for key, value in tensors.items()}
    assert old.keys() != tensors.keys()
    save_file(old, tmp_path / "b.safetensors")
    assert_same(loaded(tmp_path / "b.safetensors", UNet())(IMAGE), ours(IMAGE))

    matrices = pairs(UNet(), UNET[:2])
    bias = torch.randn(8)
    tensors = peft_keys(matrices, "unet.") | {"unet.conv_in.lora_B.bias": bias}
    save_file(tensors, tmp_path / "c.safetensors")
    expected = with_updates(UNet(), matrices)
    with torch.no_grad():
        expected.conv_in.bias += bias
    assert_same(loaded(tmp_path / "c.safetensors", UNet())(IMAGE), expected(IMAGE))


def kohya_of_two() -> tuple[dict[str, Tensor], Any, Any]:
    unet, text = pairs(UNet(), UNET), pairs(Clip(), CLIP)
    tensors = {SPELLINGS["kohya"][0](name, side): pair[side == "up"] for name, pair in unet.items() for side in SIDES}
    tensors |= {TEXT_SPELLINGS["kohya"](name, side): p[side == "up"] for name, p in text.items() for side in SIDES}
    return tensors, unet, text


@pytest.mark.parametrize("names", [("unet", "te"), ("unet", "text_encoder"), ("transformer", "te1")])
def test_a_file_for_a_denoiser_and_a_text_encoder(names: tuple[str, str], tmp_path: Path):
    tensors, unet, text = kohya_of_two()
    save_file(tensors, tmp_path / "a.safetensors")
    ours = nn.ModuleDict(dict(zip(names, (UNet(), Clip()), strict=True)))
    tnpeft.load_foreign(ours, tmp_path / "a.safetensors")
    assert_same(ours[names[0]](IMAGE), with_updates(UNet(), unet)(IMAGE))
    assert_same(ours[names[1]](WORDS), with_updates(Clip(), text)(WORDS))


@pytest.mark.parametrize("base", [UNet, Clip, lambda: nn.ModuleDict({"unet": UNet()})], ids=["unet", "te", "dict"])
def test_one_model_alone_is_told_what_takes_them_all(base: Callable[[], nn.Module], tmp_path: Path):
    save_file(kohya_of_two()[0], tmp_path / "a.safetensors")
    assert refused(tmp_path / "a.safetensors", base=base()) == (
        "PATH: adapted models: expected one, which this model is, found 'lora_unet_' and 'lora_te_'. Load it onto "
        '`torch.nn.ModuleDict({"unet": unet, "te": te})`, which takes them all, and call its parts.'
    )


def test_one_of_the_models_as_a_child(tmp_path: Path):
    """A file for the U-Net alone goes onto the U-Net, and onto a module that has one."""
    matrices = pairs(UNet(), UNET)
    save_file(peft_keys(matrices, "unet."), tmp_path / "a.safetensors")
    ours = parts_of()
    tnpeft.load_foreign(ours, tmp_path / "a.safetensors")
    assert_same(ours["unet"](IMAGE), with_updates(UNet(), matrices)(IMAGE))
    assert torch.equal(ours["te"](WORDS), Clip()(WORDS))


def test_a_layer_under_two_prefixes(tmp_path: Path):
    matrices = pairs(UNet(), UNET[:1])
    again = peft_keys(pairs(UNet(), UNET[:1]), "diffusion_model.")
    save_file(peft_keys(matrices, "unet.") | again, tmp_path / "a.safetensors")
    assert refused(tmp_path / "a.safetensors", base=UNet()) == (
        "PATH: layers: expected each once, found tensors of 'conv_in' under two prefixes. Save one adapter in a file."
    )
    key = "unet.conv_in.lora.down.weight"
    save_file({**peft_keys(matrices, "unet."), key: matrices["conv_in"][0].clone()}, tmp_path / "b.safetensors")
    text = refused(tmp_path / "b.safetensors", base=UNet())
    assert text.startswith("PATH: tensor 'unet.conv_in.lora_A.weight': expected one, found ")
    assert key in text
    assert text.endswith("Save one adapter in a file.")


def test_missing_tensors_are_called_as_the_file_would(tmp_path: Path):
    for case, missing in (("processors", "to_q_lora.up"), ("lora_linear_layer", "lora_linear_layer.up")):
        key = SPELLINGS[case][0](f"{ATTENTION}.to_q", "down")
        save_file({key: torch.ones(2, 8)}, tmp_path / "a.safetensors")
        assert refused(tmp_path / "a.safetensors", base=UNet()) == (
            f"PATH: layer '{ATTENTION}.to_q': tensors: expected `{missing}` beside '{key}', found no such tensor. "
            "The file is incomplete: copy it again, or save the adapter once more."
        )


def test_names_of_the_original_code(tmp_path: Path):
    key = "lora_unet_input_blocks_1_1_proj_in.lora_down.weight"
    save_file({key: torch.ones(2, 8)}, tmp_path / "a.safetensors")
    assert refused(tmp_path / "a.safetensors", base=UNet()) == (
        f"PATH: tensor '{key}': expected a layer of this model, found no such layer. "
        "It has the names of the original code: load it in diffusers, and save it with `save_lora_adapter`."
    )


def test_folders_and_a_config_beside(tmp_path: Path):
    """diffusers' file in a folder; PEFT's config there is not its own where the keys have parts."""
    matrices = pairs(UNet(), UNET)
    save_file(peft_keys(matrices, "unet."), tmp_path / "pytorch_lora_weights.safetensors")
    expected = with_updates(UNet(), matrices)(IMAGE)
    assert_same(loaded(tmp_path, UNet())(IMAGE), expected)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 20}))
    assert_same(loaded(tmp_path, UNet())(IMAGE), expected)
    torch.save(peft_keys(matrices, "unet."), tmp_path / "pytorch_lora_weights.bin")
    (tmp_path / "pytorch_lora_weights.safetensors").unlink()
    assert_same(loaded(tmp_path, UNet())(IMAGE), expected)


def test_a_file_of_pefts_name_needs_its_config(tmp_path: Path):
    """Also where its keys have lost their prefix; what the caller says counts more."""
    matrices = pairs(UNet(), UNET)
    save_file(peft_keys(matrices), tmp_path / "adapter_model.safetensors")
    assert refused(tmp_path, base=UNet()) == (
        "PATH: PEFT adapter: expected `adapter_config.json` beside it, found no such file. "
        "Keep the two files that PEFT saves together: the scale of the update stands in the config."
    )
    ours = loaded(tmp_path, UNet(), format="diffusers")
    assert_same(ours(IMAGE), with_updates(UNet(), matrices)(IMAGE))


def header_of(path: Path) -> Any:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["lora_adapter_metadata"])


ALL = "conv_in|to_"


def mixed() -> nn.Module:
    """LoRAs of two ranks and three scales."""
    model = UNet()
    text = (
        "tnpeft: 1\nname: mixed\nadapters:\n"
        "  - {spec: lora, match: conv_in, params: {r: 3, alpha: 1}}\n"
        "  - {spec: lora, match: 'to_[qk]$', params: {r: 2, alpha: 5}}\n"
        "  - {spec: lora, match: to_out, params: {r: 2, alpha: 3}}\n"
    )
    tnpeft.attach(model, tnpeft.Recipe.from_yaml(text))
    move(model)
    return model.eval()


@pytest.mark.parametrize("kind", ["diffusers", "kohya", "comfyui"])
def test_what_we_write_has_its_readers_names_and_comes_back(kind: str, tmp_path: Path):
    ours = mixed()
    path = tmp_path / "a.safetensors"
    tnpeft.save_foreign(ours, path, kind)
    assert_same(loaded(path, UNet())(IMAGE), ours(IMAGE))
    tensors = load_file(path)
    names = {
        "diffusers": lambda name: f"unet.{name}.lora_B.weight",
        "kohya": lambda name: f"lora_unet_{name.replace('.', '_')}.lora_up.weight",
        "comfyui": lambda name: f"diffusion_model.{name}.lora_up.weight",
    }
    layers = ("conv_in", *(f"{ATTENTION}.{name}" for name in ("to_q", "to_k", "to_out.0")))
    assert {names[kind](layer) for layer in layers} == {key for key in tensors if "lora_B" in key or "lora_up" in key}
    # A reader that knows each layer's rank and alpha, and nothing else.
    matrices, scales = {}, {}
    for layer in layers:
        up = names[kind](layer)
        down = up.replace("lora_B", "lora_A").replace("lora_up", "lora_down")
        matrices[layer] = (tensors[down], tensors[up])
        alpha = tensors.get(up.removesuffix(".lora_up.weight") + ".alpha")
        scales[layer] = 1.0 if alpha is None else float(alpha) / tensors[down].shape[0]
    assert_same(with_updates(UNet(), matrices, scales)(IMAGE), ours(IMAGE))


def test_the_header_that_we_write(tmp_path: Path):
    tnpeft.save_foreign(mixed(), tmp_path / "a", "diffusers")
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["pytorch_lora_weights.safetensors"]
    assert header_of(tmp_path / "a" / "pytorch_lora_weights.safetensors") == {
        "unet.alpha_pattern": {"^conv_in": 3},
        "unet.bias": "none",
        "unet.init_lora_weights": True,
        "unet.lora_alpha": 2,
        "unet.lora_dropout": 0.0,
        "unet.peft_type": "LORA",
        "unet.r": 2,
        "unet.rank_pattern": {"^conv_in": 3},
        "unet.target_modules": sorted(["conv_in", *(f"{ATTENTION}.{name}" for name in ("to_q", "to_k", "to_out.0"))]),
        "unet.use_dora": False,
    }


def test_kohyas_alphas_are_one(tmp_path: Path):
    """diffusers loses the others."""
    tnpeft.save_foreign(mixed(), tmp_path / "a.safetensors", "kohya")
    assert {float(value) for key, value in load_file(tmp_path / "a.safetensors").items() if "alpha" in key} == {5.0}


@pytest.mark.parametrize("kind", ["diffusers", "kohya", "comfyui"])
def test_a_pipelines_models_in_one_file(kind: str, tmp_path: Path):
    ours = nn.ModuleDict({"unet": UNet(), "te": Clip(), "te2": Clip()})
    tnpeft.attach(ours, "lora", match="conv_in|to_q|q_proj|fc1", r=2, alpha=3)
    move(ours)
    tnpeft.save_foreign(ours, tmp_path / "a.safetensors", kind)
    again = nn.ModuleDict({"unet": UNet(), "te": Clip(), "te2": Clip()})
    tnpeft.load_foreign(again, tmp_path / "a.safetensors")
    assert_same(again["unet"](IMAGE), ours["unet"](IMAGE))
    for part in ("te", "te2"):
        assert_same(again[part](WORDS), ours[part](WORDS))
    prefixes = {
        "diffusers": {"unet.conv_in", "text_encoder.encoder", "text_encoder_2.encoder"},
        "kohya": {"lora_unet_conv_in", "lora_te1_text_model_encoder", "lora_te2_text_model_encoder"},
        "comfyui": {"diffusion_model.conv_in", "text_encoder.text_model.encoder", "text_encoder_2.text_model.encoder"},
    }
    keys = load_file(tmp_path / "a.safetensors")
    assert all(any(key.startswith(prefix) for key in keys) for prefix in prefixes[kind])
    assert "lora_linear_layer" in "".join(keys) or kind != "diffusers"


SHARED = {
    "kohya": (("unet", "transformer"), "'lora_unet_' for 'unet' and 'lora_unet_' for 'transformer'"),
    "kohya, of two": (
        ("transformer", "transformer_2"),
        "'lora_unet_' for 'transformer' and 'lora_unet_' for 'transformer_2'",
    ),
    "comfyui": (("unet", "transformer"), "'diffusion_model.' for 'unet' and 'diffusion_model.' for 'transformer'"),
    "diffusers": (("te", "text_encoder"), "'text_encoder.' for 'te' and 'text_encoder.' for 'text_encoder'"),
}


@pytest.mark.parametrize("case", SHARED)
def test_parts_that_would_share_a_prefix(case: str, tmp_path: Path):
    names, prefixes = SHARED[case]
    ours, again = (nn.ModuleDict({name: UNet() for name in names}) for _ in range(2))
    tnpeft.attach(ours, "lora", match="conv_in|to_q", r=2)
    move(ours)
    assert cannot(ours, tmp_path / "a", case.partition(",")[0]) == (
        f"PATH: prefixes of the model's parts: expected one for each, found {prefixes}. "
        "Attach, and save, each part for itself."
    )
    tnpeft.save_foreign(ours, tmp_path / "b.safetensors", "lycoris")  # it has the whole names
    tnpeft.load_foreign(again, tmp_path / "b.safetensors")
    for name in names:
        assert_same(again[name](IMAGE), ours[name](IMAGE))


@pytest.mark.parametrize("names", [("unet", "transformer"), ("transformer", "transformer_2")])
def test_two_denoisers_of_diffusers(names: tuple[str, str], tmp_path: Path):
    ours, again = (nn.ModuleDict({name: UNet() for name in names}) for _ in range(2))
    tnpeft.attach(ours, "lora", match="conv_in|to_q", r=2)
    move(ours)
    tnpeft.save_foreign(ours, tmp_path / "a", "diffusers")
    tnpeft.load_foreign(again, tmp_path / "a")
    for name in names:
        assert_same(again[name](IMAGE), ours[name](IMAGE))


PREFIXES = {
    "another class": (Net, "diffusers", None, "transformer.line."),
    "of the caller": (Net, "diffusers", "unet", "unet.line."),
    "with its dot": (Net, "diffusers", "unet.", "unet.line."),
    "none": (Net, "diffusers", "", "line."),
    "lycoris": (Net, "lycoris", None, "lycoris_line."),
    "kohya's for lycoris": (Net, "lycoris", "lora_unet", "lora_unet_line."),
    "a text encoder's": (Net, "kohya", "lora_te_", "lora_te_line."),
    "comfyui": (Net, "comfyui", "model.diffusion_model", "model.diffusion_model.line."),
}


@pytest.mark.parametrize("case", PREFIXES)
def test_prefixes_that_are_written(case: str, tmp_path: Path):
    base, kind, prefix, expected = PREFIXES[case]
    ours = adapted("lora", "line", base=base(), r=2)
    tnpeft.save_foreign(ours, tmp_path / "a.safetensors", kind, prefix=prefix)
    assert all(key.startswith(expected) for key in load_file(tmp_path / "a.safetensors"))
    assert_same(loaded(tmp_path / "a.safetensors")(X), ours(X))


KEEP = "Merge it into the model instead, or keep it in tnpeft's own file."
CANNOT: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "another method in diffusers": (
        lambda: adapted("loha", "line"),
        "diffusers",
        'PATH: layer \'line\': diffusers\' pipelines: expected LoRA, found LOHA. Write it as "lycoris", "kohya" or '
        '"comfyui", or merge it into the model.',
    ),
    "biases in diffusers": (
        lambda: adapted("lora", "line", train={"bias": "adapted"}),
        "diffusers",
        "PATH: parameters trained beside the cores: expected none: diffusers has no place for them, found 'line.bias'. "
        "Train the cores alone, or merge the adapter.",
    ),
    "groups in diffusers": (
        lambda: adapted("lora", "conv1", base=Net(groups=2)),
        "diffusers",
        "PATH: layer 'conv1': PEFT's LORA: expected an ungrouped convolution, found Conv1d(18, 20, 3, groups=2). "
        + KEEP,
    ),
    "LoKr of one axis in ComfyUI": (
        lambda: adapted("lokr", "conv1"),
        "comfyui",
        f"PATH: layer 'conv1': ComfyUI's LoKr: expected one of Linear, Conv2d, found Conv1d(18, 20, 3). {KEEP}",
    ),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_be_written(case: str, tmp_path: Path):
    make, kind, text = CANNOT[case]
    assert cannot(make(), tmp_path / "a", kind) == text


def test_prefixes_that_cannot_be_written(tmp_path: Path):
    ours = adapted("lora", "line")
    for kind, prefix, text in (
        ("peft", "a", "expected none: \"peft\" has its own, found 'a'. Leave it out."),
        (
            "lycoris",
            "diffusion_model.",
            'expected a text without dots, found \'diffusion_model.\'. For example `prefix="lora_te"`; "comfyui" '
            "writes names with dots.",
        ),
        (
            "diffusers",
            3,
            'expected a text, found 3. For example `prefix="transformer"`.',
        ),
    ):
        with pytest.raises(tnpeft.AdapterFileError) as excinfo:
            tnpeft.save_foreign(ours, tmp_path / "a", kind, prefix=prefix)
        assert str(excinfo.value) == f"{tmp_path / 'a'}: `prefix`: {text}"
    assert not (tmp_path / "a").exists()


def test_the_cores_of_kernels_that_comfyui_takes(tmp_path: Path):
    """Of two axes alone: others go into the factor beside."""
    ours = adapted("locon_tucker", "conv", r=2)
    tnpeft.save_foreign(ours, tmp_path / "a.safetensors", "comfyui")
    assert [key for key in load_file(tmp_path / "a.safetensors") if "mid" in key] == [
        "diffusion_model.conv2.lora_mid.weight"
    ]
    assert_same(loaded(tmp_path / "a.safetensors")(X), ours(X))
    ours = adapted("loha_tucker", "conv", r=2)
    tnpeft.save_foreign(ours, tmp_path / "b.safetensors", "comfyui")
    assert_same(loaded(tmp_path / "b.safetensors")(X), ours(X))
