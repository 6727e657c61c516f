"""deepbet's encoder: the half of a trained 3D U-Net that looks at a brain before it is cut out (Fisch et al. 2024).

The package (MIT licence, extra `encoder`) carries the network in its wheel. Its file is found in the package's own list
of files and deepbet is never imported, for it would bring a graphical interface along.
"""

from __future__ import annotations

import base64
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool3d, interpolate

from ddpm_lab.support.durable import digest_of_file
from ddpm_lab.support.faults import LabError, fault
from tnpeft.documents.paths import is_file

__all__ = ["DeepBet", "has_deepbet", "load_deepbet"]

PACKAGE = "deepbet"
FILE = "data/models/model.pt"  # beside the package, in the folder into which packages are installed
LEVELS = ("down0", "down1", "down2", "down3")  # 16, 32, 64 and 128 features
SIDE = 48  # voxels, whatever the volume has: small enough to be quick, and what separates domains well
# deepbet's own scale of intensities: from one quantile to the other, then to this mean and standard deviation.
QUANTILES = (0.005, 0.995)
MEAN, SPREAD = 0.449, 0.226
LEAST = 1e-6  # a volume that is all alike has no spread


class DeepBet(nn.Module):
    """(N, 1, D, H, W) → (N, 240): the mean over space of what each level of the encoder gives."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.relu = getattr(network.conv, "2")  # all levels share it, and ask for it
        for name in ("init", *LEVELS):
            getattr(network, name)

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        features = []
        # As it was traced: TorchScript would else rewrite it after the first calls, and numbers would move.
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            hidden = self.network.init(self.relu, _prepared(volumes))
            for name in LEVELS:
                hidden = getattr(self.network, name)(self.relu, hidden)
                features.append(hidden.mean((2, 3, 4)))
        return torch.cat(features, dim=1)  # (N, 240)


def _prepared(volumes: torch.Tensor) -> torch.Tensor:
    """Volumes of SIDE voxels a side with the intensities that deepbet gives its network."""
    depth, height, width = (min(side, SIDE) for side in volumes.shape[2:])
    coarse = adaptive_avg_pool3d(volumes.float(), (depth, height, width))
    sized = interpolate(coarse, size=(SIDE,) * 3, mode="trilinear", align_corners=False)
    flat = sized.flatten(1)
    low, high = flat.quantile(torch.tensor(QUANTILES, device=flat.device), dim=1, keepdim=True)
    flat = ((flat - low) / (high - low).clamp(min=LEAST)).clamp(0, 1)
    flat = (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True).clamp(min=LEAST)
    scaled: torch.Tensor = SPREAD * flat + MEAN
    return scaled.reshape(sized.shape)


def has_deepbet() -> bool:
    try:
        metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        return False
    return True


def load_deepbet() -> tuple[DeepBet, str, str]:
    """The encoder from the installed package, the package's version and the digest of the file.

    The file is TorchScript, which `torch.jit.load` reads: torch 2.13 calls that deprecated, and `torch.export` reads
    no such files. TorchScript runs no Python. Raises LabError where the package or its file is missing or damaged.
    """
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        fix = "Run `pip install 'tnpeft[encoder]'`, or write `metrics: {encoder: auto}`."
        raise fault("metrics.encoder", "deepbet's encoder", "the package deepbet", "none installed", fix) from None
    path = Path(str(package.locate_file(FILE)))
    if not is_file(path):
        raise _broken(path, "nothing there")
    digest = digest_of_file(path)
    if _recorded(package) not in (None, digest):
        raise _broken(path, "other bytes than the package lists")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", DeprecationWarning)
            network = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
        return DeepBet(network), package.version, digest
    except (RuntimeError, OSError, ValueError, AttributeError):  # torch's own words are a page of C++
        raise _broken(path, "another network, or none") from None


def _broken(path: Path, found: str) -> LabError:
    fix = "Run `pip install --force-reinstall --no-deps deepbet==1.0.2`."
    return fault(path, "deepbet's encoder", "the file of an installed deepbet", found, fix)


def _recorded(package: metadata.Distribution) -> str | None:
    """The digest that the package's list of files has for this one, where it has any."""
    for file in package.files or ():
        if file.as_posix() == FILE and file.hash is not None and file.hash.mode == "sha256":
            return base64.urlsafe_b64decode(file.hash.value + "=").hex()
    return None
