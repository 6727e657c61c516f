"""diffusers' files with diffusers: what it and PEFT wrote computes the same here, what we write the same there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tnpeft

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning"),
]
diffusers.utils.logging.set_verbosity_error()


def unet() -> nn.Module:
    """Convolutions of both sizes, attention and time embeddings."""
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def flux() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def sd3() -> nn.Module:
    """A transformer with a convolution."""
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=24,
        out_channels=4,
        pos_embed_max_size=8,
    ).eval()


@torch.no_grad()
def out_of(model: nn.Module) -> Tensor:
    """The model's output on fixed inputs."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    kind = type(model).__name__
    if kind == "UNet2DConditionModel":
        return model(draw(2, 4, 8, 8), 3, draw(2, 5, 12)).sample
    if kind == "SD3Transformer2DModel":
        return model(draw(1, 4, 8, 8), draw(1, 5, 16), draw(1, 24), torch.tensor([3])).sample
    return model(
        hidden_states=draw(1, 16, 4),
        encoder_hidden_states=draw(1, 6, 32),
        pooled_projections=draw(1, 32),
        timestep=torch.tensor([0.5]),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(6, 3),
    ).sample


def move(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def scheduler() -> Any:
    return diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)


def pipeline_of(model: nn.Module, text_encoder: nn.Module | None = None) -> Any:
    kind = type(model).__name__
    if kind == "UNet2DConditionModel":
        vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
        return diffusers.StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=None,
            unet=model,
            scheduler=scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    if kind == "FluxTransformer2DModel":
        return diffusers.FluxPipeline(scheduler=flow, transformer=model, **parts)
    parts |= {"text_encoder_3": None, "tokenizer_3": None}
    return diffusers.StableDiffusion3Pipeline(scheduler=flow, transformer=model, **parts)


MODELS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "unet": (
        unet,
        "unet",
        r"to_[qkv]$|to_out\.0|conv\d?$|conv_(in|out|shortcut)$|proj_in|proj_out|ff\.net|linear_\d|time_emb_proj",
    ),
    "flux": (flux, "transformer", r"attn\.to_[qkv]$|proj_mlp|proj_out|ff\.net|norm1\.linear|x_embedder"),
    "sd3": (sd3, "transformer", r"attn\.to_[qkv]$|to_out\.0|add_k_proj|ff\.net|pos_embed\.proj|proj_out"),
}
SPECS = {"lora": {"r": 2, "alpha": 5}, "dora": {"r": 2, "alpha": 3}}


def adapted(model: str, spec: str) -> nn.Module:
    make, _, match = MODELS[model]
    ours = make()
    tnpeft.attach(ours, spec, match=match, **SPECS[spec])
    move(ours)
    assert not torch.allclose(out_of(ours), out_of(make()), atol=1e-2)
    return ours


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("model", MODELS)
def test_what_we_write_computes_the_same_in_diffusers(model: str, spec: str, tmp_path: Path):
    make, prefix, _ = MODELS[model]
    ours = adapted(model, spec)
    expected = out_of(ours)
    tnpeft.save_foreign(ours, tmp_path / "folder", "diffusers")
    tnpeft.save_foreign(ours, tmp_path / "file.safetensors", "diffusers")
    for path in (tmp_path / "folder", tmp_path / "file.safetensors"):
        pipeline = pipeline_of(make())
        pipeline.load_lora_weights(str(path))
        assert_same(out_of(getattr(pipeline, prefix)), expected)
    theirs = make()
    theirs.load_lora_adapter(str(tmp_path / "folder"), prefix=prefix, use_safetensors=True)
    assert_same(out_of(theirs), expected)
    theirs = make()
    theirs.load_lora_adapter(str(tmp_path / "file.safetensors"), prefix=prefix)  # it looks at no header here
    assert_same(out_of(theirs), expected)
    again = make()
    tnpeft.load_foreign(again, tmp_path / "folder")
    assert_same(out_of(again), expected)


def test_what_readme_says_of_load_lora_adapter(tmp_path: Path):
    ours, base = adapted("unet", "lora"), out_of(unet())
    tnpeft.save_foreign(ours, tmp_path / "folder", "diffusers")
    tnpeft.save_foreign(ours, tmp_path / "a.safetensors", "kohya")

    def loaded(path: str, **options: Any) -> Tensor:
        theirs = unet()
        theirs.load_lora_adapter(str(tmp_path / path), **options)
        return out_of(theirs)

    assert_same(loaded("folder", prefix="unet", weight_name="pytorch_lora_weights.safetensors"), out_of(ours))
    with pytest.raises(OSError, match=r"no file named pytorch_lora_weights\.bin"):
        loaded("folder", prefix="unet")
    assert torch.equal(loaded("folder", use_safetensors=True), base)  # in silence but for a line of its log
    assert torch.equal(loaded("a.safetensors", prefix="lora_unet"), base)


def test_ranks_and_scales_of_their_own(tmp_path: Path):
    """Through every loader, in both of diffusers' formats, and without the prefix."""
    text = (
        "tnpeft: 1\nname: mixed\nadapters:\n"
        "  - {spec: lora, match: 'to_[qk]$', params: {r: 2, alpha: 5}}\n"
        "  - {spec: locon_tucker, match: 'resnets.*conv\\d$|conv_in', params: {r: 3, alpha: 2}}\n"
        "  - {spec: lora, match: 'ff\\.net|conv_shortcut', params: {r: 4}}\n"
    )
    ours = unet()
    tnpeft.attach(ours, tnpeft.Recipe.from_yaml(text))
    move(ours)
    tnpeft.activate(ours, {"default": 0.7})
    expected = out_of(ours)
    for kind in ("diffusers", "kohya"):
        tnpeft.save_foreign(ours, tmp_path / f"{kind}.safetensors", kind)
        pipeline = pipeline_of(unet())
        pipeline.load_lora_weights(str(tmp_path / f"{kind}.safetensors"))
        assert_same(out_of(pipeline.unet), expected)
    tnpeft.save_foreign(ours, tmp_path / "bare", "diffusers", prefix="")
    theirs = unet()
    theirs.load_lora_adapter(str(tmp_path / "bare"), prefix=None, use_safetensors=True)
    assert_same(out_of(theirs), expected)
    again = unet()
    tnpeft.load_foreign(again, tmp_path / "bare")
    assert_same(out_of(again), expected)


def test_kohyas_names(tmp_path: Path):
    ours = adapted("unet", "lora")
    tnpeft.save_foreign(ours, tmp_path / "a.safetensors", "kohya")
    pipeline = pipeline_of(unet())
    pipeline.load_lora_weights(str(tmp_path / "a.safetensors"))
    assert_same(out_of(pipeline.unet), out_of(ours))


TARGETS = ["to_q", "to_k", "to_out.0", "conv1", "conv_in", "conv_shortcut", "proj_in", "linear_1"]


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": TARGETS, **options})


ADAPTERS: dict[str, Any] = {
    "lora": lora(),
    "patterns": lora(rank_pattern={"to_q": 2, "^conv_in": 1}, alpha_pattern={"conv1": 9, "^conv_in": 2}),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "bias of lora_B": lora(lora_bias=True, target_modules=["to_out.0", "conv1"]),
    "lokr": peft.LoKrConfig(r=2, alpha=3, target_modules=TARGETS),
    "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=TARGETS),
}


def theirs_with(config: Any) -> nn.Module:
    theirs = unet()
    theirs.add_adapter(config)
    move(theirs)
    return theirs


@pytest.mark.parametrize("case", ADAPTERS)
def test_what_save_lora_adapter_wrote_computes_the_same_here(case: str, tmp_path: Path):
    theirs = theirs_with(ADAPTERS[case])
    theirs.save_lora_adapter(tmp_path)
    ours = unet()
    tnpeft.load_foreign(ours, tmp_path)
    assert_same(out_of(ours), out_of(theirs))


def pipelines_way(theirs: nn.Module, path: Path, *, header: bool = False, old: bool = False, **options: Any) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(theirs)
    if header:
        options["unet_lora_adapter_metadata"] = theirs.peft_config["default"].to_dict()
    layers = convert_state_dict_to_diffusers(tensors) if old else tensors
    diffusers.StableDiffusionPipeline.save_lora_weights(path, unet_lora_layers=layers, **options)


SAVED: dict[str, tuple[Any, dict[str, Any]]] = {
    "a header": (lora(alpha_pattern={"^conv_in": 9}), {"header": True}),
    "alpha is the rank": (lora(lora_alpha=3), {}),
    "ranks of their own": (lora(lora_alpha=3, rank_pattern={"to_q": 2}, alpha_pattern={"to_q": 2}), {}),
    "dora": (lora(lora_alpha=3, use_dora=True), {}),
    "the old spelling": (lora(lora_alpha=3), {"old": True}),
    "torch's format": (lora(lora_alpha=3), {"safe_serialization": False}),
}


@pytest.mark.parametrize("case", SAVED)
def test_what_a_pipeline_wrote_computes_the_same_here(case: str, tmp_path: Path):
    config, options = SAVED[case]
    theirs = theirs_with(config)
    pipelines_way(theirs, tmp_path, **options)
    ours = unet()
    tnpeft.load_foreign(ours, tmp_path)
    assert_same(out_of(ours), out_of(theirs))


def test_an_unknown_scale_is_read_as_diffusers_reads_it(tmp_path: Path):
    """Without a header nobody knows the alpha: there and here the scale is 1."""
    theirs = theirs_with(lora(lora_alpha=24))
    pipelines_way(theirs, tmp_path)
    again, ours = unet(), unet()
    again.load_lora_adapter(str(tmp_path), prefix="unet", use_safetensors=True)
    tnpeft.load_foreign(ours, tmp_path)
    assert_same(out_of(ours), out_of(again))
    assert not torch.allclose(out_of(ours), out_of(theirs), atol=1e-2)


def test_the_first_spelling_of_all(tmp_path: Path):
    """`processor.to_q_lora.down`, which diffusers still reads."""
    torch.manual_seed(5)
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1"
    tensors = {
        f"unet.{attention}.processor.to_{name}_lora.{side}.weight": torch.randn(shape)
        for name in ("q", "out")
        for side, shape in (("down", (2, 16)), ("up", (16, 2)))
    }
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    pipeline, ours = pipeline_of(unet()), unet()
    pipeline.load_lora_weights(str(tmp_path))
    tnpeft.load_foreign(ours, tmp_path)
    assert_same(out_of(ours), out_of(pipeline.unet))


def clip() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=50,
            hidden_size=12,
            intermediate_size=20,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
        )
    ).eval()


@torch.no_grad()
def text_of(model: nn.Module) -> Tensor:
    return model(torch.arange(6).reshape(1, 6)).last_hidden_state


@pytest.mark.parametrize("match", ["to_q|q_proj|out_proj|fc1", "conv_in|fc2"])
@pytest.mark.parametrize("kind", ["diffusers", "kohya"])
def test_a_pipelines_unet_and_text_encoder(kind: str, match: str, tmp_path: Path):
    """One file for both, from here to there and back; `fc1` alone is what diffusers' own spelling trips over."""
    ours = nn.ModuleDict({"unet": unet(), "te": clip()})
    tnpeft.attach(ours, "lora", match=match, r=2, alpha=3)
    move(ours)
    path = tmp_path / "a.safetensors"
    tnpeft.save_foreign(ours, path, kind)
    pipeline = pipeline_of(unet(), clip())
    pipeline.load_lora_weights(str(path))
    assert_same(out_of(pipeline.unet), out_of(ours["unet"]))
    assert_same(text_of(pipeline.text_encoder), text_of(ours["te"]))
    again = nn.ModuleDict({"unet": unet(), "text_encoder": clip()})
    tnpeft.load_foreign(again, path)
    assert_same(out_of(again["unet"]), out_of(ours["unet"]))
    assert_same(text_of(again["text_encoder"]), text_of(ours["te"]))


def test_both_as_the_pipeline_saves_them(tmp_path: Path):
    from peft.utils import get_peft_model_state_dict

    denoiser, text = theirs_with(lora()), clip()
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "fc1"], alpha_pattern={"fc1": 1})
    peft.inject_adapter_in_model(config, text)
    move(text)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(denoiser),
        text_encoder_lora_layers=get_peft_model_state_dict(text),
        unet_lora_adapter_metadata=denoiser.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=config.to_dict(),
    )
    ours = nn.ModuleDict({"unet": unet(), "te": clip()})
    tnpeft.load_foreign(ours, tmp_path)
    assert_same(out_of(ours["unet"]), out_of(denoiser))
    assert_same(text_of(ours["te"]), text_of(text))


def test_names_of_the_original_code_go_through_diffusers(tmp_path: Path):
    """What the refusal of such a file proposes."""
    torch.manual_seed(5)
    name = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_down.weight": torch.randn(2, 16), f"{name}.lora_up.weight": torch.randn(16, 2)}
    save_file(tensors | {f"{name}.alpha": torch.tensor(3.0)}, tmp_path / "a.safetensors")
    with pytest.raises(tnpeft.AdapterFileError, match="save it with `save_lora_adapter`"):
        tnpeft.load_foreign(unet(), tmp_path / "a.safetensors")
    theirs = unet()
    pipeline = diffusers.StableDiffusionXLPipeline
    converted, alphas = pipeline.lora_state_dict(str(tmp_path / "a.safetensors"), unet_config=theirs.config)[:2]
    pipeline.load_lora_into_unet(converted, network_alphas=alphas, unet=theirs, adapter_name="default")
    theirs.save_lora_adapter(tmp_path / "b")
    ours = unet()
    tnpeft.load_foreign(ours, tmp_path / "b")
    assert_same(out_of(ours), out_of(theirs))
