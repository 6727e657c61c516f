"""Shipped recipes on the classes that they are for: layers, the exact start, a step, files, merging, PEFT beside."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from zoo import Specimen, specimen

import tnpeft

# Of transformers, accelerate and nnU-Net's networks, on their own behalf.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning", "ignore:.*:UserWarning"
)


def below(model: nn.Module, owners: str, *kinds: str) -> Iterator[nn.Module]:
    """The modules of some classes that stand in modules of classes that the pattern names."""
    for owner in model.modules():
        if re.fullmatch(owners, type(owner).__name__):
            yield from (module for module in owner.modules() if type(module).__name__ in kinds)


def wide_convolutions(model: nn.Module, owners: str) -> Iterator[nn.Module]:
    return (module for module in below(model, owners, "Conv3d") if max(module.kernel_size) > 1)


def experts(model: nn.Module) -> Iterator[object]:
    yield from below(model, "MixtralAttention", "Linear")
    yield from (each for module in below(model, ".*", "MixtralExperts") for each in module.parameters())


def swin(model: nn.Module) -> Iterator[nn.Module]:
    yield from below(model, "SwinTransformerBlock", "Linear")
    yield from wide_convolutions(model, "UnetResBlock")


def pointwise(model: nn.Module) -> Iterator[nn.Module]:
    found = below(model, "InvertedResidual|DepthwiseSeparableConv", "Conv2d")
    squeezed = {id(module) for module in below(model, "SqueezeExcite", "Conv2d")}
    return (module for module in found if module.groups == 1 and id(module) not in squeezed)


# Recipe, model → what the class says should be adapted.
CASES: dict[tuple[str, str], Callable[[nn.Module], Iterator[object]]] = {
    ("lora_llama", "llama"): lambda model: below(model, "LlamaAttention|LlamaMLP", "Linear"),
    ("lora_gpt2", "gpt2"): lambda model: below(model, "GPT2Block", "Conv1D"),
    ("lora_bert", "bert"): lambda model: below(model, "BertLayer", "Linear"),
    ("lora_vit", "vit"): lambda model: below(model, "ViTLayer", "Linear"),
    ("lora_vit", "timm_vit"): lambda model: below(model, "Block", "Linear"),
    ("lora_mixtral", "mixtral"): experts,
    ("lora_unet", "unet"): lambda model: below(model, "Attention", "Linear"),
    ("lora_unet", "dit"): lambda model: below(model, "Attention", "Linear"),
    ("lora_flux", "flux"): lambda model: below(model, "FluxAttention|FeedForward", "Linear"),
    ("tenvoo_l_swin_unetr", "swin_unetr"): swin,
    ("lora_nnunet", "plain_conv_unet"): lambda model: wide_convolutions(model, "ConvDropoutNormReLU"),
    ("lora_nnunet", "residual_encoder_unet"): lambda model: wide_convolutions(model, "ConvDropoutNormReLU"),
    ("tenvoo_l_nnunet", "plain_conv_unet"): lambda model: wide_convolutions(model, "ConvDropoutNormReLU"),
    ("tenvoo_l_nnunet", "residual_encoder_unet"): lambda model: wide_convolutions(model, "ConvDropoutNormReLU"),
}
# Networks without a recipe of their own, as their pages match them.
MATCHED: dict[str, tuple[str, str, Callable[[nn.Module], Iterator[object]]]] = {
    "dynunet": ("tenvoo_l", r"\.conv[12]\.conv$", lambda model: wide_convolutions(model, "UnetBasicBlock")),
    "segresnet": ("lora", r"\.conv[12]\.conv$", lambda model: below(model, "ResBlock", "Conv3d")),
    "autoencoder": ("tenvoo_l", r"\.conv[12]\.conv$", lambda model: wide_convolutions(model, "AEKLResBlock")),
    "convnext": ("lora", r"mlp\.fc[12]$", lambda model: below(model, "GlobalResponseNormMlp|Mlp", "Conv2d", "Linear")),
    "efficientnet": ("lora", r"conv_pwl?$", lambda model: pointwise(model)),
}
each_case = pytest.mark.parametrize(("recipe", "name"), CASES)


def output(found: Specimen) -> Tensor:
    with torch.no_grad():
        return found.run(found.model)


def trained(found: Specimen, handle: tnpeft.Handle) -> tuple[float, float]:
    """The losses before and after one step."""
    optimiser = torch.optim.Adam(handle.parameters(), 1e-4)
    losses = []
    for _ in range(2):
        loss = found.run(found.model).square().mean()
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return losses[0], losses[1]


@each_case
def test_the_layers_are_those_of_the_class(recipe: str, name: str):
    found = specimen(name)
    wanted = {id(each) for each in CASES[recipe, name](found.model)}
    known = {
        **dict(found.model.named_parameters(remove_duplicate=False)),
        **dict(found.model.named_modules(remove_duplicate=False)),
    }
    handle = tnpeft.attach(found.model, recipe)
    assert {id(known[layer]) for layer in handle.adapters} == wanted
    assert len(handle.adapters) == len(wanted) > 0


@each_case
def test_start_step_file_and_merging(recipe: str, name: str, tmp_path: Path):
    _through_its_life(name, tmp_path, recipe)


@pytest.mark.parametrize("name", MATCHED)
def test_networks_without_a_recipe(name: str, tmp_path: Path):
    spec, pattern, layers = MATCHED[name]
    model = specimen(name).model
    wanted = {id(each) for each in layers(model)}
    known = dict(model.named_modules())
    assert {id(known[layer]) for layer in tnpeft.attach(model, spec, match=pattern).adapters} == wanted
    _through_its_life(name, tmp_path, spec, match=pattern, r=2)


def _through_its_life(name: str, tmp_path: Path, what: str, **options: object) -> None:
    """The exact start, a step that helps, a file that gives the same bits on a fresh base, merging both ways."""
    found, keys = specimen(name), [*specimen(name).model.state_dict()]
    first = output(found)
    handle = tnpeft.attach(found.model, what, **options)
    assert torch.equal(output(found), first)
    before, after = trained(found, handle)
    assert after < before
    expected = output(found)
    assert not torch.equal(expected, first)
    handle.save(tmp_path / "a.safetensors")
    fresh = specimen(name)
    tnpeft.load(fresh.model, tmp_path / "a.safetensors")
    output(fresh)  # a first pass contracts layer by layer
    assert torch.equal(output(fresh), expected)
    with tnpeft.disabled(fresh.model):
        assert torch.equal(output(fresh), first)
    tnpeft.merge(fresh.model)
    scale = float(expected.abs().max())
    torch.testing.assert_close(output(fresh), expected, rtol=0, atol=1e-5 * scale)
    tnpeft.unmerge(fresh.model)
    assert torch.equal(output(fresh), expected)
    tnpeft.detach(fresh.model, merge=True)
    torch.testing.assert_close(output(fresh), expected, rtol=0, atol=1e-5 * scale)
    assert [*fresh.model.state_dict()] == keys


@pytest.mark.parametrize(
    ("recipe", "name"),
    [(recipe, name) for recipe, name in CASES if recipe.startswith("lora") and "nnunet" not in recipe],
)
def test_peft_adapts_the_same_layers_with_as_many_numbers(recipe: str, name: str):
    from peft import LoraConfig, get_peft_model

    ours, theirs = specimen(name).model, specimen(name).model
    handle = tnpeft.attach(ours, recipe)
    entries = tnpeft.load_recipe(recipe).entries
    patterns = "|".join(entry.match for entry in entries if entry.match)
    stacks = [layer for layer in handle.adapters if "experts" in layer]
    config = LoraConfig(r=entries[0].params["r"], target_modules=f".*({patterns})", target_parameters=stacks or None)
    model = get_peft_model(theirs, config)
    numbers = {key: each.numel() for key, each in model.named_parameters() if "lora_" in key}
    assert sum(numbers.values()) == sum(
        each.numel() for adapter in handle.adapters.values() for each in adapter.parameters()
    )
    if not stacks:
        layers = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in numbers}
        assert layers == set(handle.adapters)


@pytest.mark.parametrize(
    ("recipe", "name", "layers"),
    [
        ("lora_llama", "MistralForCausalLM", 14), ("lora_llama", "Qwen2ForCausalLM", 14),
        ("lora_llama", "Qwen3ForCausalLM", 14), ("lora_llama", "Gemma2ForCausalLM", 14),
        ("lora_bert", "RobertaForSequenceClassification", 12), ("lora_vit", "DeiTForImageClassification", 12),
    ],
)  # fmt: skip
def test_their_kin_have_the_same_names(recipe: str, name: str, layers: int):
    """Seven layers in each of two blocks, or six."""
    import transformers

    known = getattr(transformers, name)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"vocab_size": 32, "pad_token_id": 0}
    more = {
        "lora_llama": {**words, "num_key_value_heads": 1, "head_dim": 8},
        "lora_bert": words,
        "lora_vit": {"image_size": 8, "patch_size": 4},
    }
    handle = tnpeft.attach(known(known.config_class(**sizes, **more[recipe])), recipe)
    assert len(handle.adapters) == layers
