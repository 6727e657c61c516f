"""The models that benchmarks train, and the other libraries' adapters on the same layers."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence

import torch
from monai.networks.nets import DiffusionModelUNet
from torch import nn

__all__ = ["LINEAR", "TARGETS", "lycoris_model", "matched", "peft_model", "train_biases_and_norms", "unet"]

CONV = r"resnets\.\d+\.conv[12]\.conv$"
LINEAR = r"attentions\.\d+\.attn\.to_[qv]$|^time_embed\.2$|resnets\.\d+\.time_emb_proj$"
TARGETS = rf"{CONV}|{LINEAR}"


def unet(name: str) -> nn.Module:
    """`small`: 41.7 M parameters, 40 convolutions to adapt; `paper`: the paper's 166.67 M, 60 convolutions.

    `tiny` has what the others have, to try a script with.
    """
    channels, attention, heads = {
        "small": ((32, 64, 128, 256), (False, False, True, True), (0, 0, 128, 256)),
        "tiny": ((8, 16), (False, True), (0, 16)),
        "paper": ((32, 32, 64, 128, 256, 512), (False,) * 4 + (True,) * 2, (0, 0, 0, 0, 256, 512)),
    }[name]
    torch.manual_seed(0)
    model = DiffusionModelUNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        num_res_blocks=2,
        channels=channels,
        attention_levels=attention,
        norm_num_groups=min(32, channels[0]),
        norm_eps=1e-6,
        num_head_channels=heads,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)  # the output convolution would start at zero and stop every gradient
    return model


def train_biases_and_norms(model: nn.Module, adapted: Iterable[str]) -> None:
    """What the recipes train beside the cores, for the floor and for the other libraries."""
    biases = {f"{name}.bias" for name in adapted}
    for name, parameter in model.named_parameters():
        plain = name.replace(".base_layer.", ".").replace("base_model.model.", "")
        if plain in biases or "norm" in plain:
            parameter.requires_grad_(True)


def matched(model: nn.Module) -> list[str]:
    """The names of the layers that the recipes adapt."""
    return [name for name, _ in model.named_modules() if re.search(TARGETS, name)]


def peft_model(model: nn.Module, config: str, layers: Sequence[str] | None = None, **options: object) -> nn.Module:
    """HF PEFT's method of a config class on the recipes' layers, or on those of them in `layers`."""
    import peft

    names = matched(model)
    targets = names if layers is None else list(layers)
    adapted: nn.Module = peft.get_peft_model(model, getattr(peft, config)(target_modules=targets, **options))
    train_biases_and_norms(adapted, names)
    return adapted


def lycoris_model(
    model: nn.Module, algorithm: str, rank: int, layers: Sequence[str] | None = None, **options: object
) -> nn.Module:
    """LyCORIS's LoCon, LoHa or LoKr on the recipes' layers, or on those of them in `layers`."""
    from lycoris import LycorisNetwork, create_lycoris

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)  # it tells of every module
    names = matched(model)
    targets = names if layers is None else list(layers)
    preset = {"enable_conv": True, "target_module": [], "target_name": targets, "use_fnmatch": False}
    model.requires_grad_(False)
    before = {name: value for name, value in vars(LycorisNetwork).items() if name.isupper()}
    try:
        LycorisNetwork.apply_preset(preset)  # the class has it, and every other network of this process
        network = create_lycoris(
            model, 1.0, linear_dim=rank, linear_alpha=rank, conv_dim=rank, conv_alpha=rank, algo=algorithm, **options
        )
    finally:
        for name, value in before.items():
            setattr(LycorisNetwork, name, value)
    network.apply_to()
    network.requires_grad_(True)
    model.lycoris = network
    train_biases_and_norms(model, names)
    return model
