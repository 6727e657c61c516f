"""Volumes → features for FID and MMD.

By MedicalNet's ResNet-50 as in the paper, by deepbet's encoder, or by a random network where neither is at hand.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import resnet10, resnet50
from torch import nn

from ddpm_lab.config.settings import Metrics
from ddpm_lab.evaluation.deepbet import SIDE, has_deepbet, load_deepbet
from ddpm_lab.support.durable import digest_of_file
from ddpm_lab.support.faults import fault, raise_all, reason
from tnpeft.documents.paths import is_file
from tnpeft.errors import Problem
from tnpeft.io.foreign.archive import load_archive

__all__ = ["Encoder", "load_encoder", "medicalnet_resnet50"]

SEED = 2025  # of the random encoder: the same features on every machine
SHAPE = {"spatial_dims": 3, "n_input_channels": 1, "feed_forward": False, "conv1_t_stride": 2, "shortcut_type": "B"}


@dataclass(frozen=True)
class Encoder:
    """A network from (N, 1, D, H, W) to (N, features), and how its distances must be labelled."""

    network: nn.Module
    comparable: bool  # with the paper's distances
    digest: str  # of what its features depend on: distances of two encoders never stand side by side
    title: str

    @property
    def mark(self) -> str:
        return "" if self.comparable else "*"

    @property
    def note(self) -> str:
        return self.title if self.comparable else f"* {self.title}"

    @torch.no_grad()
    def features(
        self,
        volumes: Sequence[torch.Tensor] | torch.Tensor,
        device: torch.device | str = "cpu",
        batch: int = 4,
        progress: Callable[[int], None] = lambda _: None,
    ) -> torch.Tensor:
        """(N, features) in float64 on the CPU; volumes are read one batch at a time."""
        network = self.network.to(device).eval()
        features = []
        for start in range(0, len(volumes), batch):
            part = torch.stack([volumes[index] for index in range(start, min(start + batch, len(volumes)))])
            features.append(network(part.to(device)).double().cpu())
            progress(start + len(part))
        return torch.cat(features)


def load_encoder(metrics: Metrics) -> Encoder:
    """The encoder that the settings ask for; `auto` takes the first that is there, and the random one always is.

    Raises LabError for one that is asked for by name and is not there, and for files that are damaged.
    """
    name = _chosen(metrics)
    if name == "medicalnet":
        assert metrics.medicalnet is not None  # `_chosen` has seen to it
        network = medicalnet_resnet50(metrics.medicalnet)
        return Encoder(network, True, digest_of_file(metrics.medicalnet), "MedicalNet ResNet-50 features")
    if name == "deepbet":
        found, version, digest = load_deepbet()
        title = f"features of deepbet {version}, comparable between methods and not with the paper"
        return Encoder(found, False, f"deepbet at {SIDE} voxels, {digest}", title)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = resnet10(**SHAPE)
    return Encoder(network, False, f"random ResNet-10, seed {SEED}", "random features, not comparable")


def _chosen(metrics: Metrics) -> str:
    named = metrics.medicalnet is not None
    if metrics.encoder == "auto":
        return "medicalnet" if named else "deepbet" if has_deepbet() else "random"
    if named != (metrics.encoder == "medicalnet"):
        expected = "with `medicalnet` and with no other"
        found = f"`encoder: {metrics.encoder}` {'with' if named else 'without'} them"
        fix = "Write `metrics: {encoder: auto}`, or set `metrics.medicalnet` " + (
            "to null." if named else "to the file."
        )
        raise fault("metrics.encoder", "weights in `metrics.medicalnet`", expected, found, fix)
    return metrics.encoder


def medicalnet_resnet50(weights: Path) -> nn.Module:
    """MONAI's ResNet-50 with MedicalNet's weights (Chen et al. 2019, Med3D) and its dilations; raises LabError."""
    network: nn.Module = resnet50(bias_downsample=False, **SHAPE)
    _dilate(network)
    state = _read(weights)
    own = network.state_dict()
    problems = []
    fix = "Give MedicalNet's resnet_50.pth or resnet_50_23dataset.pth."
    for name in sorted(own.keys() | state.keys()):
        expected = "x".join(map(str, own[name].shape)) or "a number" if name in own else "no such tensor"
        found = "x".join(map(str, state[name].shape)) or "a number" if name in state else "no such tensor"
        if expected != found and not name.endswith("num_batches_tracked"):  # absent from old checkpoints
            problems.append(Problem(f"tensor `{name}`", expected, found, fix, str(weights)))
        elif name in state and not torch.isfinite(state[name]).all():
            found = "some that are infinite or not a number"
            problems.append(Problem(f"tensor `{name}`", "finite numbers", found, fix, str(weights)))
    raise_all(problems, str(weights))
    network.load_state_dict(state, strict=False)
    return network


def _dilate(network: nn.Module) -> None:
    """MedicalNet keeps the resolution of layer2: layer3 and layer4 are dilated by 2 and 4 where MONAI strides.

    The tensors have the same shapes either way, so that forgetting this gives wrong features without an error.
    """
    for layer, dilation in (("layer3", 2), ("layer4", 4)):
        for module in network.get_submodule(layer).modules():
            if isinstance(module, nn.Conv3d):
                module.stride = (1, 1, 1)
                if module.kernel_size == (3, 3, 3):
                    module.dilation = module.padding = (dilation,) * 3


def _read(weights: Path) -> dict[str, torch.Tensor]:
    """The tensors of a MedicalNet checkpoint without its segmentation head."""
    if not is_file(weights):
        raise fault(weights, "`metrics.medicalnet`", "a file", "nothing there", "Check the path, or leave it out.")
    try:
        content: Any = load_archive(weights)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        # torch's own words advise to run whatever the file holds, or are the byte where reading ended
        found = reason(error) if isinstance(error, OSError) else "other objects than tensors, or another kind of file"
        raise fault(weights, "`metrics.medicalnet`", "a state dict", found, "Check the file.") from None
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict):
        raise fault(weights, "`metrics.medicalnet`", "a state dict", type(content).__name__, "Check the file.")
    if not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise fault(weights, "`metrics.medicalnet`", "a state dict", "values that are no tensors", "Check the file.")
    names = {str(name).removeprefix("module."): value for name, value in content.items()}
    return {name: value for name, value in names.items() if not name.startswith("conv_seg.")}
