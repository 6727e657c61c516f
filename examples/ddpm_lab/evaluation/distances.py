"""Every distance between two sets of volumes, with its interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ddpm_lab.config.settings import Metrics
from ddpm_lab.evaluation.bootstrap import Estimate, estimate
from ddpm_lab.evaluation.metrics import Products, gaussian_kernels, linear_kernels, rbf_kernels, similar_pairs

__all__ = ["KERNELS", "TITLES", "Measured", "distances"]

# What each key of `evaluation.json` is called in tables; `*` stands for the encoder's mark. The last two MMDs are
# Gaussian.
TITLES = {
    "fid": "FID*",
    "mmd_linear": "MMD* linear",
    "mmd_gaussian": "MMD* paper's",
    "mmd_rbf": "MMD* standard",
    "ms_ssim": "MS-SSIM",
}
KERNELS = {
    "mmd_linear": "x·y",
    "mmd_gaussian": "exp(-a (d² + 1e-5)), a the median distance between the sets, as in the paper",
    "mmd_rbf": "exp(-d² / s), s the median squared distance between different volumes, the standard",
}


@dataclass(frozen=True)
class Measured:
    """A set of volumes (1, D, H, W), read when they are looked at, and their features (N, d)."""

    volumes: Sequence[torch.Tensor] | torch.Tensor
    features: torch.Tensor

    def __len__(self) -> int:
        return len(self.features)


def distances(
    one: Measured, other: Measured, data_range: float, metrics: Metrics, device: torch.device | str = "cpu"
) -> dict[str, Estimate]:
    """FID, the MMDs and MS-SSIM by key; all intervals come from the same resampled volumes of both sets."""
    sizes = (len(one), len(other))
    products = Products.of(one.features, other.features)
    pairs = similar_pairs(one.volumes, other.volumes, data_range, metrics.pairs, device)
    statistics: dict[str, Callable[..., float]] = {
        "fid": products.frechet,
        "mmd_linear": linear_kernels(products).mmd,
        "mmd_gaussian": gaussian_kernels(products).mmd,
        "mmd_rbf": rbf_kernels(products).mmd,
        "ms_ssim": pairs.mean,
    }
    return {
        key: estimate(statistic, sizes, metrics.resamples, metrics.confidence, metrics.seed)
        for key, statistic in statistics.items()
    }
