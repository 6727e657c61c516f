"""A population of brains made from a few real templates, for machines that have no MRI data.

The tissue maps of a template (`anatomies`) are deformed, painted with the contrast of a sequence and
passed through the faults of a scanner. Every subject is a deformation of a template's brain: what is
learnt from them says nothing about patients.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import nibabel
import numpy as np
import torch
from monai.transforms import AdjustContrast, Compose, EnsureType, RandBiasField, RandGibbsNoise, RandRicianNoise
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from torch.nn.functional import grid_sample, interpolate

from ddpm_lab.data.anatomies import Tissues

__all__ = ["Domain", "paint_subject", "write_population"]

# What is drawn: healthy subjects in two contrasts, and two diseases in the first.
Domain = Literal["t1", "t2", "atrophy", "lesion"]

# Mean signal of cerebrospinal fluid, grey matter and white matter.
T1 = (0.22, 0.58, 0.88)
SIGNAL: dict[Domain, tuple[float, float, float]] = {
    "t1": T1,
    "t2": (0.95, 0.62, 0.38),
    "atrophy": T1,
    "lesion": T1,
}
SIGNAL_SPREAD = 0.04
ROTATION = 0.08  # rad
SCALING = 0.08
SHIFT = 0.03  # of half the field of view
DISPLACEMENT = 0.035  # of half the field of view, at 6 x 6 x 6 knots

# Lengths below are shares of half the field of view, in the order R, A, S; places are those of a brain in MNI space.
VENTRICLES = (0.0, 0.13, 0.06)  # the middle of the lateral ventricles
VENTRICLE_REACH = (0.22, 0.34, 0.24)
WIDENING = (0.16, 0.24)  # of the ventricles, in either direction of an axis
LESION_RADIUS = (0.20, 0.36)  # of the whole lesion; core, rim and oedema are shares of it
LESION_PLACE = ((0.25, 0.42), (-0.35, 0.35), (0.05, 0.35))  # of its middle, in either half of the brain
LESION_SIGNAL = {"oedema": 0.46, "rim": 0.98, "core": 0.16}
LESION_REACH = {"oedema": 1.0, "rim": 0.66, "core": 0.46}
LESION_EDGE = 0.05  # over this width one signal gives way to the next

STORED_AXES = ("RAS", "LPS", "LAS", "PIR")  # scanners disagree about axes, and so do these files


def paint_subject(tissues: Tissues, domain: Domain, generator: torch.Generator) -> torch.Tensor:
    """One subject, (side, side, side) in [0, 1]; the same generator state gives the same subject."""
    grid = _deformation(tissues.maps.shape[-1], generator)
    spread = 1 + SIGNAL_SPREAD * (2 * torch.rand(3, generator=generator) - 1)
    scanner = _scanner(generator)
    if domain == "atrophy":  # diseases draw last, so that the subject is otherwise the healthy one of the same state
        grid = _widened(grid, generator)
    shape = grid_sample(tissues.maps[None], grid, align_corners=False)[0]
    clean = torch.einsum("t,tdhw->dhw", torch.tensor(SIGNAL[domain]) * spread, shape)
    if domain == "lesion":
        clean = _with_lesion(clean, shape.sum(0).clamp(0, 1), generator)
    return torch.as_tensor(scanner(clean[None]))[0].clamp(0, 1)


def _scanner(generator: torch.Generator) -> Compose:
    """What a scanner does to a volume: a bias field, another gamma, ringing and noise."""
    gamma = float(0.9 + 0.2 * torch.rand((), generator=generator))
    acquisition = Compose(
        [
            RandBiasField(degree=3, coeff_range=(0.0, 0.06), prob=1.0),
            AdjustContrast(gamma=gamma),
            RandGibbsNoise(prob=1.0, alpha=(0.1, 0.4)),
            RandRicianNoise(prob=1.0, std=0.015),
            EnsureType(dtype=torch.float32, track_meta=False),
        ]
    )
    acquisition.set_random_state(seed=int(torch.randint(2**31, (), generator=generator)))
    return acquisition


def _between(bounds: tuple[float, float], generator: torch.Generator) -> float:
    low, high = bounds
    return low + (high - low) * float(torch.rand((), generator=generator))


def _widened(grid: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A sampling grid that pushes the walls of the ventricles outwards, and the tissue around them together."""
    away = grid - torch.tensor(VENTRICLES).flip(0)  # a grid's coordinates run S, A, R
    near = torch.exp(-(away / torch.tensor(VENTRICLE_REACH).flip(0)).square().sum(-1, keepdim=True) / 2)
    # Each point shows what lay closer to the middle of the ventricles.
    return grid - 3 * _between(WIDENING, generator) * near * away


def _with_lesion(clean: torch.Tensor, brain: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A lesion in one half of the brain: oedema, within it a bright rim, within that a dark core."""
    radius = _between(LESION_RADIUS, generator)
    place = torch.tensor([_between(bounds, generator) for bounds in LESION_PLACE])
    place[0] *= 1 if torch.rand((), generator=generator) < 0.5 else -1
    side = clean.shape[-1]
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)
    knots = 0.25 * (2 * torch.rand((1, 1, 4, 4, 4), generator=generator) - 1)
    uneven = interpolate(knots, size=(side,) * 3, mode="trilinear", align_corners=True)[0, 0]
    distance = (points - place).norm(dim=-1) / radius * (1 + uneven)
    for part, signal in LESION_SIGNAL.items():
        inside = torch.sigmoid((LESION_REACH[part] - distance) * radius / LESION_EDGE * 4) * brain
        clean = clean + inside * (signal - clean)
    return clean


def _deformation(side: int, generator: torch.Generator) -> torch.Tensor:
    """A sampling grid, (1, side, side, side, 3): rotation, scaling, shift and a smooth displacement."""

    def uniform(*size: int) -> torch.Tensor:
        return 2 * torch.rand(size, generator=generator) - 1

    angles = ROTATION * uniform(3)
    skew = torch.zeros(3, 3)
    skew[0, 1], skew[0, 2], skew[1, 2] = angles.tolist()
    rotation = torch.linalg.matrix_exp(skew - skew.T)
    matrix = torch.cat([rotation @ torch.diag(1 + SCALING * uniform(3)), SHIFT * uniform(3, 1)], dim=1)
    grid = torch.nn.functional.affine_grid(matrix[None], [1, 1, side, side, side], align_corners=False)
    knots = DISPLACEMENT * uniform(1, 3, 6, 6, 6)
    smooth = interpolate(knots, size=(side,) * 3, mode="trilinear", align_corners=True)
    return grid + smooth.movedim(1, -1)


def write_population(
    folder: Path,
    tissues: Sequence[Tissues],
    domain: Domain,
    count: int,
    seed: int,
    progress: Callable[[int], None] = lambda _: None,
    named: bool = False,
    first: int = 1,
) -> list[Path]:
    """Write `count` subjects as NIfTI files, dealt to the brains in turn; existing files with these names are replaced.

    Each subject has a random stream of its own, drawn from `seed` and its name. The first has the number `first`.
    Names say the anatomy where they are `named`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for done in range(count):
        brain = tissues[done % len(tissues)]
        anatomy = f"{brain.anatomy}_" if named else ""
        name = f"sub-{first + done:03d}_{anatomy}{domain}{'w' if domain in ('t1', 't2') else ''}"
        key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        volume = paint_subject(brain, domain, generator)
        axes = STORED_AXES[int(torch.randint(len(STORED_AXES), (), generator=generator))]
        path = folder / f"{name}.nii.gz"
        nibabel.save(_stored_as(volume, brain.affine, axes), path)
        paths.append(path)
        progress(first + done)
    return paths


def _stored_as(volume: torch.Tensor, affine: np.ndarray, axes: str) -> nibabel.Nifti1Image:
    """A NIfTI image whose voxel axes run as `axes` says, for instance LPS; space stays the same."""
    image = nibabel.Nifti1Image(volume.numpy(), affine)
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(axes))
    return image.as_reoriented(turn)
