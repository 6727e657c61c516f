"""deepbet's encoder written anew from the names of its tensors, and a file of the package's kind with a small one."""

from __future__ import annotations

import base64
import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


def plain_features(state: Mapping[str, Tensor], volumes: np.ndarray) -> Tensor:
    """(N, 1, 48, 48, 48) → (N, features) in float64: the mean of each of the four levels."""
    weights = {name: value.double() for name, value in state.items()}
    hidden = torch.from_numpy(np.stack([_scaled(volume) for volume in volumes.astype(np.float64)]))

    def unit(x: Tensor, name: str, stride: int, padding: int) -> Tensor:
        return functional.instance_norm(functional.conv3d(x, weights[name], stride=stride, padding=padding))

    hidden = functional.max_pool3d(unit(hidden, "init.0.weight", 2, 3).relu(), 3, 2, 1)
    found = []
    for level in range(4):
        for block in ("block1", "block2"):
            name = f"down{level}.{block}"
            shrinks = f"{name}.downsample.0.weight" in weights
            inner = unit(hidden, f"{name}.double_conv.0.weight", 2 if shrinks else 1, 1).relu()
            inner = unit(inner, f"{name}.double_conv.3.weight", 1, 1)
            hidden = (inner + (unit(hidden, f"{name}.downsample.0.weight", 2, 0) if shrinks else hidden)).relu()
        found.append(hidden.mean((2, 3, 4)))
    return torch.cat(found, dim=1)


def _scaled(volume: np.ndarray) -> np.ndarray:
    low, high = np.quantile(volume, (0.005, 0.995))
    clipped = np.clip((volume - low) / (high - low), 0, 1)
    return np.asarray(0.449 + 0.226 * (clipped - clipped.mean()) / clipped.std(ddof=1))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, relu: nn.ReLU) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        convolutions = (
            nn.Conv3d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.Conv3d(outputs, outputs, 3, padding=1, bias=False),
        )
        norms = (nn.InstanceNorm3d(outputs), nn.InstanceNorm3d(outputs))
        self.double_conv = nn.Sequential(convolutions[0], norms[0], relu, convolutions[1], norms[1])
        if stride == 2:
            self.downsample = nn.Sequential(nn.Conv3d(inputs, outputs, 1, 2, bias=False), nn.InstanceNorm3d(outputs))
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.relu(self.double_conv(x) + (self.downsample(x) if self.downsamples else x)))

    @property
    def downsamples(self) -> bool:
        return hasattr(self, "downsample")


class Level(nn.Module):
    def __init__(self, inputs: int, outputs: int, relu: nn.ReLU) -> None:
        super().__init__()
        self.block1, self.block2 = Block(inputs, outputs, relu), Block(outputs, outputs, relu)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.block2(self.block1(x)))


class Small(nn.Module):
    """Names and wiring as in deepbet, with few channels, and a head in place of the other half."""

    def __init__(self) -> None:
        super().__init__()
        relu = nn.ReLU()
        self.init = nn.Sequential(
            nn.Conv3d(1, 2, 7, 2, 3, bias=False), nn.InstanceNorm3d(2), relu, nn.MaxPool3d(3, 2, 1)
        )
        self.down0, self.down1 = Level(2, 2, relu), Level(2, 3, relu)
        self.down2, self.down3 = Level(3, 4, relu), Level(4, 5, relu)
        self.conv = nn.Sequential(nn.Conv3d(5, 1, 1), nn.InstanceNorm3d(1), relu)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down3(self.down2(self.down1(self.down0(self.init(x)))))
        return torch.as_tensor(self.conv(x))


def write_network(network: nn.Module, example: Tensor, path: Path) -> None:
    """A file of TorchScript, with nothing of what torch says against making one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(network, example), path)  # type: ignore[no-untyped-call]


def tensors_of(path: Path) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(torch.jit.load(path).state_dict())  # type: ignore[no-untyped-call]


def install_small(folder: Path) -> Path:
    """A package called deepbet in a folder, as pip leaves it; the path of its network."""
    file = folder / "data" / "models" / "model.pt"
    file.parent.mkdir(parents=True)
    torch.manual_seed(0)
    # 64 voxels, so that no level is a single voxel, of which a norm cannot tell the spread.
    write_network(Small().eval(), torch.rand(2, 1, 64, 64, 64), file)
    about = folder / "deepbet-1.0.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: deepbet\nVersion: 1.0.2\n", encoding="utf-8")
    record(folder, file)
    return file


def record(folder: Path, file: Path) -> None:
    """The package's list of files with the bytes that are there now."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(file.read_bytes()).digest()).rstrip(b"=").decode()
    lines = f"data/models/model.pt,sha256={digest},{file.stat().st_size}\ndeepbet-1.0.2.dist-info/METADATA,,\n"
    (folder / "deepbet-1.0.2.dist-info" / "RECORD").write_text(lines, encoding="utf-8")
