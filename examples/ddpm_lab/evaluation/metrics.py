"""How far samples are from real volumes: FID and MMD on features, MS-SSIM on voxels.

FID and MMD need only inner products of features, and every one of them takes weights: how often each volume counts,
so that a bootstrap encodes nothing and multiplies nothing again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from monai.metrics import MultiScaleSSIMMetric

from ddpm_lab.support.faults import fault

__all__ = [
    "Kernels",
    "Pairs",
    "Products",
    "SsimScales",
    "frechet_distance",
    "gaussian_kernels",
    "linear_kernels",
    "mmd_gaussian",
    "mmd_linear",
    "mmd_rbf",
    "ms_ssim",
    "rbf_kernels",
    "similar_pairs",
    "ssim_scales",
]

# Wang et al. 2003: the weight of each scale, finest first.
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOWS, WINDOWS_SMALL = (11, 7, 5), (5, 3)


@dataclass(frozen=True)
class Products:
    """Inner products x·y within and across two sets of features, (n, n), (m, m) and (n, m), in float64.

    The features are centred on their common mean, which changes no distance and keeps digits.
    """

    inner: torch.Tensor
    outer: torch.Tensor
    cross: torch.Tensor

    @classmethod
    def of(cls, one: torch.Tensor, other: torch.Tensor) -> Products:
        first, second = one.double(), other.double()
        centre = torch.cat([first, second]).mean(0)
        first, second = first - centre, second - centre
        return cls(first @ first.T, second @ second.T, first @ second.T)

    def frechet(self, first: torch.Tensor, second: torch.Tensor) -> float:
        """FID with a weight for each row: |difference of means|² + tr(C + D - 2 (C D)^½).

        With centred features X, Y scaled so that C = XᵀX and D = YᵀY, tr (C D)^½ is the nuclear norm of X Yᵀ: n by m
        numbers instead of the root of a d by d matrix. Not a number where a set has weight for less than two rows.
        """
        count, total = float(first.sum()), float(second.sum())
        if min(count, total) < 2:
            return float("nan")
        left, right = first / count, second / total
        inner, outer, cross = left @ self.inner @ left, right @ self.outer @ right, left @ self.cross @ right
        traces = (first @ self.inner.diagonal() - count * inner) / (count - 1)
        traces += (second @ self.outer.diagonal() - total * outer) / (total - 1)
        centred = self.cross - (left @ self.cross)[None] - (self.cross @ right)[:, None] + cross
        scaled = (first / (count - 1)).sqrt()[:, None] * centred * (second / (total - 1)).sqrt()[None]
        root = torch.linalg.svdvals(scaled[first > 0][:, second > 0]).sum()
        return float((inner + outer - 2 * cross + traces - 2 * root).clamp(min=0))

    def distances(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Squared distances within and across the sets."""
        first, second = self.inner.diagonal(), self.outer.diagonal()
        squared = (
            first[:, None] + first[None] - 2 * self.inner,
            second[:, None] + second[None] - 2 * self.outer,
            first[:, None] + second[None] - 2 * self.cross,
        )
        within, beyond, across = (each.clamp(min=0) for each in squared)
        return within, beyond, across


@dataclass(frozen=True)
class Kernels:
    """A kernel's values within and across two sets."""

    inner: torch.Tensor
    outer: torch.Tensor
    cross: torch.Tensor

    def mmd(self, first: torch.Tensor, second: torch.Tensor) -> float:
        """The unbiased squared MMD with a weight for each row (Gretton et al. 2012, Lemma 6, eq. 3).

        Pairs of a row with itself are left out, also where it has weight for two: a bootstrap would else be biased.
        Not a number where a set has weight on less than two rows.
        """
        across = first @ self.cross @ second / (first.sum() * second.sum())
        return float(_within(self.inner, first) + _within(self.outer, second) - 2 * across)


def _within(kernel: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    squares = weights.square()
    pairs = weights.sum().square() - squares.sum()
    if pairs <= 0:
        return torch.tensor(float("nan"))
    return (weights @ kernel @ weights - squares @ kernel.diagonal()) / pairs


def linear_kernels(products: Products) -> Kernels:
    """x·y, MONAI's."""
    return Kernels(products.inner, products.outer, products.cross)


def gaussian_kernels(products: Products) -> Kernels:
    """The paper's: exp(-a (d² + 1e-5)), a the median *distance* between the two sets."""
    inner, outer, cross = products.distances()
    alpha = cross.sqrt().median()
    return Kernels(*(torch.exp(-alpha * (squared + 1e-5)) for squared in (inner, outer, cross)))


def rbf_kernels(products: Products) -> Kernels:
    """The standard Gaussian: exp(-d² / s), s the median of the squared distances between all different volumes."""
    inner, outer, cross = products.distances()
    pairs = [_upper(inner), _upper(outer), cross.flatten()]
    every = torch.cat(pairs)
    apart = every[every > 0]  # copies of one volume tell no scale
    scale = apart.median() if len(apart) else torch.tensor(1.0, dtype=torch.float64)
    return Kernels(*(torch.exp(-squared / scale) for squared in (inner, outer, cross)))


def _upper(squared: torch.Tensor) -> torch.Tensor:
    rows, columns = torch.triu_indices(len(squared), len(squared), offset=1)
    return squared[rows, columns]


def frechet_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """FID between two sets of features, (n, d) and (m, d)."""
    return Products.of(one, other).frechet(*_ones(one, other))


def mmd_linear(one: torch.Tensor, other: torch.Tensor) -> float:
    """The unbiased squared MMD with the kernel x·y, for sets of any two sizes."""
    return linear_kernels(Products.of(one, other)).mmd(*_ones(one, other))


def mmd_gaussian(one: torch.Tensor, other: torch.Tensor) -> float:
    """The unbiased squared MMD with the paper's kernel."""
    return gaussian_kernels(Products.of(one, other)).mmd(*_ones(one, other))


def mmd_rbf(one: torch.Tensor, other: torch.Tensor) -> float:
    """The unbiased squared MMD with the standard Gaussian kernel."""
    return rbf_kernels(Products.of(one, other)).mmd(*_ones(one, other))


def _ones(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(len(one), dtype=torch.float64), torch.ones(len(other), dtype=torch.float64)


@dataclass(frozen=True)
class SsimScales:
    """The window and the scales that a volume has room for."""

    window: int
    scales: int

    @property
    def standard(self) -> bool:
        return self.scales == len(SCALE_WEIGHTS)

    @property
    def weights(self) -> list[float]:
        """The published ones, which add up to 1.0001; those of fewer scales are made to add up to 1."""
        some = SCALE_WEIGHTS[: self.scales]
        return list(some) if self.standard else [weight / sum(some) for weight in some]

    @property
    def note(self) -> str:
        name = f"{self.scales} scale{'s' if self.scales > 1 else ''}, window {self.window}"
        return name if self.standard else f"{name}: non-standard, the volumes are small"


def ssim_scales(shape: tuple[int, ...]) -> SsimScales:
    """Five scales with the widest window that fits; on small volumes fewer scales, and a window of 5 or 3.

    Raises LabError for volumes that are smaller than any window.
    """
    for scales in range(len(SCALE_WEIGHTS), 0, -1):
        for window in WINDOWS if scales == len(SCALE_WEIGHTS) else WINDOWS_SMALL:
            # The volume is halved between scales; MONAI asks for room by a rule of its own on top of that.
            if min(min(shape) // 2 ** (scales - 1), min(shape) // max(1, scales - 1) ** 2) >= window:
                return SsimScales(window, scales)
    fix = "Set `data.crop` or `data.resize`."
    found = "x".join(map(str, shape))
    raise fault("data", "volumes for MS-SSIM", f"at least {WINDOWS_SMALL[-1]} voxels a side", found, fix)


@dataclass(frozen=True)
class Pairs:
    """The similarity of some pairs of a sample and a real volume, by their places in the two sets."""

    left: torch.Tensor
    right: torch.Tensor
    values: torch.Tensor

    def mean(self, first: torch.Tensor, second: torch.Tensor) -> float:
        """The mean with a weight for each volume; not a number where no pair has any."""
        weights = first[self.left] * second[self.right]
        return float((weights @ self.values) / weights.sum())


def ms_ssim(
    samples: Sequence[torch.Tensor] | torch.Tensor,
    real: Sequence[torch.Tensor] | torch.Tensor,
    data_range: float,
    pairs: int = 100,
) -> float:
    """The mean MS-SSIM over pairs of a sample and a real volume, each (1, D, H, W); evenly chosen when many."""
    return float(similar_pairs(samples, real, data_range, pairs).values.mean())


def similar_pairs(
    samples: Sequence[torch.Tensor] | torch.Tensor,
    real: Sequence[torch.Tensor] | torch.Tensor,
    data_range: float,
    pairs: int = 100,
    device: torch.device | str = "cpu",
) -> Pairs:
    """The MS-SSIM of pairs of a sample and a real volume, each (1, D, H, W); evenly chosen when many."""
    every = len(samples) * len(real)
    places = [int(place) for place in torch.linspace(0, every - 1, min(pairs, every), dtype=torch.float64).tolist()]
    chosen = [divmod(place, len(real)) for place in places]
    scales = ssim_scales(tuple(samples[0].shape[1:]))
    metric = MultiScaleSSIMMetric(
        spatial_dims=3, data_range=data_range, kernel_size=scales.window, weights=scales.weights
    )
    values = [metric(samples[left][None].to(device), real[right][None].to(device)).mean() for left, right in chosen]
    left, right = torch.tensor(chosen).T
    return Pairs(left, right, torch.stack(values).double().cpu())
