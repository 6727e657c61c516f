"""Which files a run reads: the paper's folder layouts, a check of every volume, and the split."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError

from ddpm_lab.config import Data
from ddpm_lab.faults import fault, raise_all
from tnpeft.errors import Problem

__all__ = ["LAYOUTS", "Split", "check_volumes", "find_volumes", "make_folder", "split_volumes", "write_json"]

# Patterns below the root, as the paper's data sets are unpacked; gzipped or not where that may differ.
LAYOUTS: dict[str, tuple[str, ...]] = {
    "plain": ("**/*.nii", "**/*.nii.gz"),
    "ukb": ("*/*/*/T1_brain_to_MNI.nii.gz",),
    "adni": ("*/*/*/*/*.nii", "*/*/*/*/*.nii.gz"),
    "ppmi": ("*/*/*.nii", "*/*/*.nii.gz"),
    "brats": ("*/*t1.nii.gz",),
}
FEWEST = 2  # one to train on, one to hold out


def find_volumes(data: Data) -> list[Path]:
    """The files of the layout, sorted by path so that every machine sees one order; raises LabError."""
    if data.root is None:
        raise fault("data.root", "the data", "a folder of NIfTI files", "nothing", "Pass `--set data.root=FOLDER`.")
    if not data.root.is_dir():
        found = "a file" if data.root.exists() else "nothing there"
        raise fault(data.root, "`data.root`", "a folder of NIfTI files", found, "Check the path.")
    patterns = LAYOUTS[data.layout]
    paths = sorted({path for pattern in patterns for path in data.root.glob(pattern) if path.is_file()})
    if data.keep is not None:
        paths = _kept(paths, data)
    if len(paths) < FEWEST:
        expected = f"at least {FEWEST} files matching {' or '.join(patterns)}"
        fix = f"Check the folder and `data.layout` ({', '.join(LAYOUTS)})."
        raise fault(data.root, f"layout `{data.layout}`", expected, str(len(paths)), fix)
    return paths


def _kept(paths: Sequence[Path], data: Data) -> list[Path]:
    """The files whose names stand in the keep-list, one name a line."""
    assert data.keep is not None
    if data.layout != "brats":
        raise fault("data.keep", "a list of files", "layout brats", f"layout {data.layout}", "Remove `data.keep`.")
    try:
        names = set(data.keep.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise fault(data.keep, "`data.keep`", "a readable text file", _reason(error), "Check the path.") from None
    kept = [path for path in paths if path.name in names]
    if not kept:
        found = f"none of {len(names)} names among {len(paths)} files"
        raise fault(data.keep, "the keep-list", "names of files to keep", found, "Write one file name a line.")
    return kept


def check_volumes(paths: Sequence[Path], progress: Callable[[int], None] = lambda _: None) -> None:
    """Read every file to its end; raises LabError that names those that are no finite 3D volume."""
    problems: list[Problem] = []
    with ThreadPoolExecutor() as pool:  # reading and unzipping leave Python's lock
        for done, problem in enumerate(pool.map(_problem, paths), 1):
            progress(done)
            if problem is not None:
                problems.append(problem)
    raise_all(problems, str(paths[0].parent) if paths else "")


def _problem(path: Path) -> Problem | None:
    """What is wrong with one file, or None."""

    def wrong(expected: str, found: str) -> Problem:
        return Problem("an unreadable volume", expected, found, "Replace or remove the file.", str(path))

    try:
        image = nibabel.load(path)
        voxels = np.asanyarray(image.dataobj)
    except (ImageFileError, OSError, EOFError, ValueError, zlib.error, MemoryError) as error:
        return wrong("a NIfTI file", _reason(error))
    shape = tuple(size for axis, size in enumerate(voxels.shape) if axis < 3 or size > 1)
    if len(shape) != 3 or min(shape) < 2:
        return wrong("one 3D volume", "shape " + "x".join(str(size) for size in voxels.shape))
    if not np.issubdtype(voxels.dtype, np.number) or np.iscomplexobj(voxels):
        return wrong("real numbers", f"voxels of type {voxels.dtype}")
    if not np.isfinite(voxels).all():
        return wrong("finite numbers", "voxels that are infinite or not a number")
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-12:
        return wrong("an affine that places the voxels", "one that is singular")
    if voxels.min() == voxels.max():
        return wrong("an image", f"the same value everywhere, {float(voxels.flat[0]):g}")
    return None


def _reason(error: BaseException) -> str:
    """The library's message as a few plain words on one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    line = " ".join(text.split())
    return line if len(line) <= 120 else line[:117] + "..."


def make_folder(path: Path) -> None:
    """Make the folder of results; raises LabError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise fault(path, "`--out`", "a folder to write to", _reason(error), "Choose another.") from None


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write data whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


@dataclass(frozen=True)
class Split:
    """Which files train and which are held out."""

    train: tuple[Path, ...]
    validation: tuple[Path, ...]
    seed: int

    def write(self, path: Path, root: Path) -> None:
        """Write the split down as JSON, with paths below `root`."""
        lists = {name: [str(file.relative_to(root)) for file in files] for name, files in self._named()}
        path.write_text(json.dumps({"root": str(root), "seed": self.seed, **lists}, indent=1) + "\n", encoding="utf-8")

    def _named(self) -> tuple[tuple[str, tuple[Path, ...]], ...]:
        return ("train", self.train), ("validation", self.validation)


def split_volumes(paths: Sequence[Path], data: Data) -> Split:
    """Hold out a share of the files, at least one and not all; the same seed gives the same split."""
    count = min(max(1, round(len(paths) * data.validation_share)), len(paths) - 1)
    shuffled = list(paths)
    random.Random(data.split_seed).shuffle(shuffled)
    return Split(tuple(sorted(shuffled[count:])), tuple(sorted(shuffled[:count])), data.split_seed)
