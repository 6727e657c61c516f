"""MONAI's MAISI networks under their recipes: what is adapted, the exact start, a step, files, merging, detaching."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("monai", reason="MONAI is not installed")

from monai.apps.generation.maisi.networks.controlnet_maisi import ControlNetMaisi
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi

import tnpeft
from tnpeft.cli.models import build_model

SMALL = {
    "spatial_dims": 3,
    "in_channels": 4,
    "num_channels": (8, 16),
    "attention_levels": (False, True),
    "num_head_channels": (0, 8),
    "num_res_blocks": 1,
    "norm_num_groups": 4,
}
# Options of MAISI's own networks: the DDPM version, the rectified-flow version, and the one that makes masks.
OPTIONS: dict[str, dict[str, Any]] = {
    "ddpm": {
        "include_top_region_index_input": True,
        "include_bottom_region_index_input": True,
        "include_spacing_input": True,
    },
    "rflow": {"num_class_embeds": 5, "resblock_updown": True, "include_fc": True, "include_spacing_input": True},
    "masks": {"with_conditioning": True, "upcast_attention": True, "cross_attention_dim": 10},
    "combined": {"use_combined_linear": True},
}
RECIPES = ("lora", "tenvoo_l")
FULL_SIZE = {
    ("monai:maisi", "lora_maisi"): (169_370_884, 1_822_528),
    ("monai:maisi", "tenvoo_l_maisi"): (169_370_884, 658_368),
    ("monai:maisi-controlnet", "lora_maisi_controlnet"): (68_644_944, 926_672),
    ("monai:maisi-controlnet", "tenvoo_l_maisi_controlnet"): (68_644_944, 552_016),
}


def filled(make: Callable[..., nn.Module], seed: int, **options: Any) -> nn.Module:
    """Weights as after training: layers that start at zero would hide what stands before them."""
    torch.manual_seed(seed)
    model = make(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.05 if parameter.ndim == 1 else 1 / parameter[0].numel() ** 0.5
            parameter.add_(scale * torch.randn(parameter.shape))
    return model


def unet(options: str = "ddpm", seed: int = 0) -> nn.Module:
    return filled(DiffusionModelUNetMaisi, seed, **SMALL, out_channels=4, **OPTIONS[options])


def controlnet(options: str = "", seed: int = 0) -> nn.Module:
    more = {key: value for key, value in OPTIONS.get(options, {}).items() if not key.startswith("include_s")}
    sizes = {"conditioning_embedding_in_channels": 3, "conditioning_embedding_num_channels": (4, 6)}
    return filled(ControlNetMaisi, seed, **SMALL, **sizes, **more)


def call(model: nn.Module, **more: Any) -> torch.Tensor:
    """The output for fixed inputs; a ControlNet's outputs go through a frozen U-Net, as in MAISI's training."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x, timesteps = draw(2, 4, 8, 8, 8), torch.tensor([7, 600])
    classes = {"class_labels": torch.tensor([1, 4])} if model.num_class_embeds else {}
    if isinstance(model, ControlNetMaisi):
        down, middle = model(x, timesteps, controlnet_cond=draw(2, 3, 16, 16, 16), **classes)
        base = unet("combined", seed=5).requires_grad_(False)
        return base(x, timesteps, down_block_additional_residuals=down, mid_block_additional_residual=middle)
    if model.include_top_region_index_input:
        more |= {"top_region_index_tensor": draw(2, 4), "bottom_region_index_tensor": draw(2, 4)}
    if model.include_spacing_input:
        more["spacing_tensor"] = draw(2, 3)
    if model.with_conditioning:
        more["context"] = draw(2, 3, 10)  # with a single token queries would not matter
    return model(x, timesteps, **classes, **more)


CASES: list[tuple[Callable[[], nn.Module], str]] = [
    *((lambda options=options: unet(options), "maisi") for options in OPTIONS),
    (controlnet, "maisi_controlnet"),
    (lambda: controlnet("rflow"), "maisi_controlnet"),
]
NAMES = [*OPTIONS, "controlnet", "controlnet rflow"]


# Each model with one method, and each method with models of either kind.
@pytest.mark.parametrize(
    ("make", "recipe", "method"),
    [(*case, RECIPES[place % len(RECIPES)]) for place, case in enumerate(CASES)],
    ids=NAMES,
)
def test_an_adaptation_from_start_to_detaching(
    make: Callable[[], nn.Module], recipe: str, method: str, tmp_path: Path
) -> None:
    model, plain = make(), make()
    base = {name: value.clone() for name, value in plain.state_dict().items()}
    before = call(plain)
    handle = tnpeft.attach(model, f"{method}_{recipe}")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert handle.report().trained == sum(parameter.numel() for parameter in handle.parameters())
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert torch.equal(call(model), before)

    optimiser = torch.optim.Adam(handle.parameters(), lr=1e-3)
    for _ in range(2):  # LoRA's first step moves one of its two cores, the second step the other
        call(model).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, start[name])}
    assert moved == trainable
    trained = call(model)
    assert (trained - before).abs().max() > 1e-4

    tnpeft.save(model, tmp_path / "adapter.safetensors")
    fresh = make()
    tnpeft.load(fresh, tmp_path / "adapter.safetensors")
    # A model's first pass contracts layers one by one, later ones what is alike together: equal but for rounding.
    torch.testing.assert_close(call(fresh), trained, rtol=1e-4, atol=1e-5)
    assert torch.equal(call(fresh), trained)

    tnpeft.merge(model)
    torch.testing.assert_close(call(model), trained, rtol=1e-4, atol=1e-4)
    tnpeft.unmerge(model)
    assert torch.equal(call(model), trained)
    tnpeft.detach(model, merge=False)
    assert {type(module) for module in model.modules()} == {type(module) for module in plain.modules()}
    state = model.state_dict()
    assert list(state) == list(base)
    assert all(torch.equal(state[name], base[name]) for name in base)
    assert torch.equal(call(model), before)
    tnpeft.detach(fresh, merge=True)
    assert list(fresh.state_dict()) == list(base)
    torch.testing.assert_close(call(fresh), trained, rtol=1e-4, atol=1e-4)


def adapted(model: nn.Module, recipe: str) -> set[str]:
    return {row.name for row in tnpeft.attach(model, recipe).report().layers}


@pytest.mark.parametrize("method", RECIPES)
def test_which_layers_the_diffusion_model_gives(method: str) -> None:
    found = adapted(unet("ddpm"), f"{method}_maisi")
    embeddings = {"time_embed.2", "top_region_index_layer.2", "bottom_region_index_layer.2", "spacing_layer.2"}
    assert embeddings == {name for name in found if "." in name and not name.startswith(("down", "up", "middle"))}
    for name in ("conv1.conv", "conv2.conv", "time_emb_proj"):
        assert {f"middle_block.resnet_1.{name}", f"up_blocks.1.resnets.1.{name}"} <= found
    assert {
        f"{place}.attn.to_{x}" for place in ("middle_block.attention", "up_blocks.0.attentions.1") for x in "qv"
    } <= found
    assert not [name for name in found if name.endswith(("to_k", "out_proj", "op.conv", "skip_connection.conv"))]
    resampling = adapted(unet("rflow"), f"{method}_maisi")
    assert {"down_blocks.0.downsampler.conv1.conv", "up_blocks.0.upsampler.time_emb_proj"} <= resampling
    cross = adapted(unet("masks"), f"{method}_maisi")
    block = "down_blocks.1.attentions.0.transformer_blocks.0"
    assert {f"{block}.{name}" for name in ("attn1.to_q", "attn1.to_v", "attn2.to_q", "attn2.to_v")} <= cross
    assert "middle_block.attention.attn.qkv" in adapted(unet("combined"), f"{method}_maisi")


@pytest.mark.parametrize("method", RECIPES)
def test_which_layers_the_controlnet_gives(method: str) -> None:
    model = controlnet()
    handle = tnpeft.attach(model, f"{method}_maisi_controlnet")
    found = {row.name for row in handle.report().layers}
    outputs = {"controlnet_down_blocks.0", "controlnet_down_blocks.3.conv", "controlnet_mid_block.conv"}
    assert outputs <= found
    assert not [name for name in found if name.startswith("controlnet_cond_embedding")]
    condition = sum(parameter.numel() for parameter in controlnet().controlnet_cond_embedding.parameters())
    assert handle.report().also == condition


@pytest.mark.parametrize(("model", "recipe"), FULL_SIZE)
def test_counts_on_the_networks_of_full_size(model: str, recipe: str) -> None:
    report = tnpeft.attach(build_model(model), recipe).report()
    assert (report.base, report.trained) == FULL_SIZE[model, recipe]
    text = (Path(__file__).parents[2] / "specs" / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")
    base, trained = FULL_SIZE[model, recipe]
    assert f"it trains {trained:,}." in text
    assert f"{base / 1e6:.2f} M parameters (`{model}`)" in text


def test_class_embeddings_can_train_whole() -> None:
    model = unet("rflow")
    handle = tnpeft.attach(model, "lora_maisi", train={"bias": "adapted", "norm": True, "also": ["^class_embedding"]})
    assert handle.report().also == 5 * 32
    assert model.class_embedding.weight.requires_grad
