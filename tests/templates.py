"""Templates of brains that have no packages: balls of three shells, and what lies where in them."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np

SIDE = 40
NAMES = {
    "icbm2009c": "mni_icbm152_t1_tal_nlin_asym_09c_brain.nii.gz",
    "colin27": "ch2bet.nii.gz",
    "inia19": "inia19-t1-brain.nii.gz",
    "three_tissue": "Template_4_GS.nii.gz",
}
RADII = {"white": 0.5, "grey": 0.7, "fluid": 0.8}  # shares of half the cube


def shells(seed: int) -> dict[str, np.ndarray]:
    """Where each tissue lies in a ball that is a little longer along one axis, another for each seed."""
    axis = (np.arange(SIDE) + 0.5) / SIDE * 2 - 1
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"))
    stretched = 1 + 0.1 * np.eye(3)[seed % 3]
    distance = np.sqrt(((points * stretched[:, None, None, None]) ** 2).sum(0))
    found, inner = {}, np.zeros(distance.shape, bool)
    for name, radius in RADII.items():
        found[name] = (distance < radius) & ~inner
        inner |= found[name]
    return found


def write_templates(folder: Path, centre: tuple[float, ...] = (0, -18, 8), side: float = 208) -> dict[str, int]:
    """Files with the names of the packages' own; the seed of each ball by its anatomy."""
    folder.mkdir(parents=True, exist_ok=True)
    seeds = {}
    for seed, (anatomy, name) in enumerate(NAMES.items()):
        middle, edge = ((0, -9, -1.5), 88) if anatomy == "inia19" else (centre, side)
        affine = np.diag([edge / SIDE] * 3 + [1.0])
        affine[:3, 3] = np.array(middle) - edge / 2 + edge / SIDE / 2
        parts = shells(seed)
        if anatomy == "three_tissue":
            rest = ~(parts["grey"] | parts["white"])
            data = np.stack([parts["grey"], parts["white"], rest], axis=-1).astype(np.float32)
        else:
            noise = np.random.default_rng(seed).normal(0, 3, parts["grey"].shape)
            signal = 30 * parts["fluid"] + 70 * parts["grey"] + 100 * parts["white"]
            data = np.where(signal > 0, np.maximum(signal + noise, 1), 0).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(data, affine), folder / name)
        seeds[anatomy] = seed
    return seeds
