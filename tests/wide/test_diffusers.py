"""diffusers: networks and pipelines that are saved with adapters on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor, nn

import tnpeft

X = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TRAIN = {"bias": "adapted", "norm": True}


def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X, 3).sample


def trained(train: dict[str, Any] | None) -> UNet2DModel:
    model = unet()
    handle = tnpeft.attach(model, "lora", match=r"conv[12]$|to_[qv]$", r=2, train=train)
    optimizer = torch.optim.SGD(handle.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (model(X, 3).sample - 1).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("train", [None, TRAIN])
def test_networks_and_pipelines_reload_as_the_base_or_the_merged_model(
    train: dict[str, Any] | None, merged: bool, tmp_path: Path
):
    model = trained(train)
    if merged:
        tnpeft.merge(model)
    expected = output(model if merged else unet())
    model.save_pretrained(tmp_path / "unet")
    torch.testing.assert_close(
        output(UNet2DModel.from_pretrained(tmp_path / "unet").eval()), expected, rtol=0, atol=1e-6
    )
    DDPMPipeline(model, DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    again = DDPMPipeline.from_pretrained(tmp_path / "pipeline")
    torch.testing.assert_close(output(again.unet.eval()), expected, rtol=0, atol=1e-6)
