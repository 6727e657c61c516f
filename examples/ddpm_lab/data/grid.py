"""Where the voxels of a volume lie: its size and spacing as the network sees it, and NIfTI files of it."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai.transforms import Compose
from nibabel.affines import voxel_sizes

from ddpm_lab.config.settings import Data
from ddpm_lab.data.files import UNREADABLE, check_volumes, damaged_volumes, find_volumes
from ddpm_lab.data.volumes import check_sizes, transforms
from ddpm_lab.support.faults import fault, reason
from tnpeft.documents.files import replace_files

__all__ = ["Grid", "grid_of", "read_volume", "write_volume"]

ALIGNED = 2  # NIfTI's code for axes that are anatomical and an origin that is no scanner's


@dataclass(frozen=True)
class Grid:
    """Voxels along the axes R, A, S and their size in mm; `source` says how the size is known."""

    shape: tuple[int, ...]
    spacing: tuple[float, float, float]
    source: str

    @property
    def affine(self) -> np.ndarray[Any, Any]:
        """Voxels → mm, with the origin in the centre of the volume."""
        affine = np.diag((*self.spacing, 1.0))
        affine[:3, 3] = [-size * (count - 1) / 2 for size, count in zip(self.spacing, self.shape, strict=True)]
        return affine


def grid_of(data: Data, divisor: int) -> Grid:
    """The grid that the network sees: a real volume's after its transforms, or what the settings say without one.

    Raises LabError where the data cannot be read, or the settings leave the size open.
    """
    if data.root is not None or data.manifest is not None:
        path = _first(data)
        check_volumes([path])
        # Without the last transform, which drops the affine.
        volume = Compose(transforms(data).transforms[:-1])(str(path))
        shape = check_sizes([torch.as_tensor(volume)], [path], divisor)
        first, second, third = (round(float(size), 5) for size in voxel_sizes(np.asarray(volume.affine)))
        return Grid(shape, (first, second, third), f"a volume of the data, {path.name}")
    shape_known = data.resize or (None if data.paper_order and data.spacing else data.crop)
    if shape_known is None:
        fix = "Pass `--set data.root=FOLDER` or `--set data.resize=[...]`."
        raise fault("data", "the size of volumes", "`data.root`, `data.resize` or `data.crop`", "none of them", fix)
    check_sizes([torch.empty((1, *shape_known))], [Path("data.resize" if data.resize else "data.crop")], divisor)
    return _from_settings(data, shape_known)


def _first(data: Data) -> Path:
    """The first file or, where damaged ones are to be left out, the first that is sound."""
    paths = find_volumes(data, changed_too=data.skip_damaged)
    sound = (path for path in paths if not (data.skip_damaged and damaged_volumes(data, [path])))
    return next(sound, paths[0])


def _from_settings(data: Data, shape: tuple[int, ...]) -> Grid:
    """Spacing, times crop over resize where both are given; 1 mm where the settings cannot tell."""
    known = data.spacing is not None and (data.resize is None or (data.crop is not None and not data.paper_order))
    if not known:
        return Grid(shape, (1.0, 1.0, 1.0), "assumed: neither data nor settings tell it")
    assert data.spacing is not None
    before = data.crop or shape
    sizes = (size * old / new for size, old, new in zip(data.spacing, before, shape, strict=True))
    first, second, third = (round(size, 5) for size in sizes)
    return Grid(shape, (first, second, third), "the settings")


def write_volume(
    path: Path, volume: torch.Tensor, grid: Grid, intensity: tuple[float, float], description: str
) -> None:
    """Write a volume (1, D, H, W) as float32, whole or not at all; raises LabError where that cannot be."""
    image = nibabel.Nifti1Image(volume[0].numpy().astype(np.float32), grid.affine)
    header = image.header
    header.set_xyzt_units("mm")
    image.set_sform(grid.affine, code=ALIGNED)
    image.set_qform(grid.affine, code=ALIGNED)
    header["cal_min"], header["cal_max"] = intensity  # what viewers show as black and white
    header["descrip"] = description.encode("ascii", "replace")[:79]
    replace_files({path: gzip.compress(image.to_bytes(), mtime=0)}, _unwritten)


def _unwritten(path: Path, reason: str) -> Exception:
    fix = "Free space, or choose another `--out`; then the same command goes on."
    return fault(path, "a sample", "a place to write it", reason, fix)


def read_volume(path: Path) -> torch.Tensor:
    """A volume that `write_volume` wrote, (1, D, H, W); raises LabError for one that is damaged."""
    fix = "Remove it and run `sample` again."
    try:
        image = nibabel.load(path)
        voxels = np.asarray(image.dataobj, dtype=np.float32)
    except UNREADABLE as error:
        raise fault(path, "a damaged sample", "a NIfTI file", reason(error), fix) from None
    if voxels.ndim != 3 or not np.isfinite(voxels).all():
        found = "voxels that are infinite or not a number" if voxels.ndim == 3 else f"{voxels.ndim} axes"
        raise fault(path, "a damaged sample", "one 3D volume of finite numbers", found, fix)
    return torch.from_numpy(voxels)[None]
