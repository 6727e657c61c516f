"""How far samples are from real volumes: FID and MMD on features, MS-SSIM on voxels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from monai.metrics import MultiScaleSSIMMetric

__all__ = ["SsimScales", "frechet_distance", "mmd_gaussian", "mmd_linear", "ms_ssim", "ssim_scales"]

# Wang et al. 2003: the weight of each scale, finest first.
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOWS = (11, 7, 5)


def frechet_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """FID between two sets of features, (n, d) and (m, d): |difference of means|² + tr(C + D - 2 (C D)^½).

    With centred features X, Y scaled so that C = XᵀX and D = YᵀY, tr (C D)^½ is the nuclear norm of X Yᵀ: n by m
    numbers instead of the root of a d by d matrix.
    """
    first, second = one.double(), other.double()
    mean = (first.mean(0) - second.mean(0)).square().sum()
    first = (first - first.mean(0)) / (len(first) - 1) ** 0.5
    second = (second - second.mean(0)) / (len(second) - 1) ** 0.5
    cross = torch.linalg.matrix_norm(first @ second.T, "nuc")
    distance = mean + first.square().sum() + second.square().sum() - 2 * cross
    return float(distance.clamp(min=0))


def mmd_linear(one: torch.Tensor, other: torch.Tensor) -> float:
    """The unbiased squared MMD with the kernel x·y, MONAI's, for sets of any two sizes."""
    first, second = one.double(), other.double()
    return _unbiased(first @ first.T, second @ second.T, first @ second.T)


def mmd_gaussian(one: torch.Tensor, other: torch.Tensor) -> float:
    """The paper's unbiased squared MMD: kernel exp(-a (d² + 1e-5)), a the median *distance* between the sets."""
    first, second = one.double(), other.double()
    alpha = torch.cdist(first, second).median()

    def kernel(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.exp(-alpha * (torch.cdist(left, right).square() + 1e-5))

    return _unbiased(kernel(first, first), kernel(second, second), kernel(first, second))


def _unbiased(inner: torch.Tensor, outer: torch.Tensor, cross: torch.Tensor) -> float:
    """Gretton et al. 2012, Lemma 6, eq. (3): diagonals are left out."""
    count, total = len(inner), len(outer)
    within = (inner.sum() - inner.trace()) / (count * (count - 1))
    within += (outer.sum() - outer.trace()) / (total * (total - 1))
    return (within - 2 * cross.mean()).item()


@dataclass(frozen=True)
class SsimScales:
    """The window and the scales that a volume has room for."""

    window: int
    scales: int

    @property
    def standard(self) -> bool:
        return self.scales == len(SCALE_WEIGHTS)

    @property
    def note(self) -> str:
        name = f"{self.scales} scale{'s' if self.scales > 1 else ''}, window {self.window}"
        return name if self.standard else f"{name}: non-standard, the volumes are small"


def ssim_scales(shape: tuple[int, ...]) -> SsimScales:
    """Five scales with the widest window that fits; on small volumes fewer scales, and a window of 5 or 3."""
    for scales in range(len(SCALE_WEIGHTS), 0, -1):
        for window in WINDOWS if scales == len(SCALE_WEIGHTS) else (5, 3):
            # The volume is halved between scales; MONAI asks for room by a rule of its own on top of that.
            if min(min(shape) // 2 ** (scales - 1), min(shape) // max(1, scales - 1) ** 2) >= window:
                return SsimScales(window, scales)
    return SsimScales(3, 1)


def ms_ssim(
    samples: Sequence[torch.Tensor] | torch.Tensor,
    real: Sequence[torch.Tensor] | torch.Tensor,
    data_range: float,
    pairs: int = 100,
) -> float:
    """The mean MS-SSIM over pairs of a sample and a real volume, each (1, D, H, W); evenly chosen when many."""
    every = list(itertools.product(range(len(samples)), range(len(real))))
    chosen = [every[int(index)] for index in torch.linspace(0, len(every) - 1, min(pairs, len(every))).tolist()]
    scales = ssim_scales(tuple(samples[0].shape[1:]))
    weights = torch.tensor(SCALE_WEIGHTS[: scales.scales])
    metric = MultiScaleSSIMMetric(
        spatial_dims=3,
        data_range=data_range,
        kernel_size=scales.window,
        weights=(weights / weights.sum()).tolist(),
    )
    values = [metric(samples[left][None], real[right][None]).mean() for left, right in chosen]
    return torch.stack(values).mean().item()
