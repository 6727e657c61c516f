"""Which files a run reads: the paper's folder layouts or a manifest, a check of every volume, and the split."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import nibabel
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, HeaderTypeError

from ddpm_lab.config.settings import Data
from ddpm_lab.data.manifest import Entry, compare, read_manifest, root_of
from ddpm_lab.data.outliers import Outliers, find_outliers
from ddpm_lab.data.reading import SLACK, announced, not_a_file, skip_rest
from ddpm_lab.support.faults import fault, raise_all, reason
from tnpeft.documents.paths import is_folder, is_there
from tnpeft.errors import Problem

__all__ = [
    "LAYOUTS",
    "UNREADABLE",
    "Split",
    "Volume",
    "check_data",
    "check_volumes",
    "damaged_volumes",
    "each",
    "fewest",
    "find_volumes",
    "held_out_counts",
    "inspect",
    "rooted",
    "split_volumes",
    "stratum_of",
    "subject_of",
]

A = TypeVar("A")
B = TypeVar("B")

# Patterns below the root, as the paper's data sets are unpacked; gzipped or not where that may differ.
LAYOUTS: dict[str, tuple[str, ...]] = {
    "plain": ("**/*.nii", "**/*.nii.gz"),
    "ukb": ("*/*/*/T1_brain_to_MNI.nii.gz",),
    "adni": ("*/*/*/*/*.nii", "*/*/*/*/*.nii.gz"),
    "ppmi": ("*/*/*.nii", "*/*/*.nii.gz"),
    "brats": ("*/*t1.nii.gz",),
}
THREADS = 8  # each holds one volume in memory
# What nibabel raises for a damaged file; OverflowError: a header whose sizes multiply to nothing or too much.
UNREADABLE = (
    ImageFileError,
    HeaderDataError,
    HeaderTypeError,
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    MemoryError,
    zlib.error,
)


def rooted(data: Data) -> Data:
    """The same settings with `root` set, by the manifest where they name none; raises LabError where neither does."""
    if data.manifest is not None:
        return data.model_copy(update={"root": root_of(data, read_manifest(data))})
    if data.root is None:
        fix = "Pass `--set data.root=FOLDER`."
        raise fault("data.root", "the data", "a folder of NIfTI files", "nothing", fix)
    return data


def find_volumes(data: Data, changed_too: bool = False) -> list[Path]:
    """The files of the manifest or of the layout, sorted by path so that every machine sees one order.

    Raises LabError, also for files of the manifest that are missing or have another size, unless those are wanted too.
    """
    if data.manifest is not None:
        return _listed(data, changed_too)
    data = rooted(data)
    assert data.root is not None
    if not is_folder(data.root):
        found = "a file" if is_there(data.root) else "nothing there"
        raise fault(data.root, "`data.root`", "a folder of NIfTI files", found, "Check the path.")
    patterns = LAYOUTS[data.layout]
    paths = sorted({path for pattern in patterns for path in data.root.glob(pattern) if _is_file(path)})
    if data.keep is not None:
        paths = _kept(paths, data)
    if len(paths) < fewest(data):
        expected = f"at least {fewest(data)} files matching {' or '.join(patterns)}"
        fix = f"Check the folder and `data.layout` ({', '.join(LAYOUTS)})."
        raise fault(data.root, f"layout `{data.layout}`", expected, str(len(paths)), fix)
    return paths


def fewest(data: Data) -> int:
    """One subject to train on, one to validate on and, where asked for, one to test on."""
    return 3 if data.test_share else 2


def _is_file(path: Path) -> bool:
    """Also links that lead nowhere, pipes and devices: `inspect` says so, which a missing scan would not."""
    return not is_folder(path)


def _listed(data: Data, changed_too: bool) -> list[Path]:
    """The manifest's files."""
    manifest = read_manifest(data)
    root = root_of(data, manifest)
    if not changed_too:
        raise_all(filter(None, (compare(root, entry) for entry in manifest.entries)), str(root))
    return sorted(root / entry.path for entry in manifest.entries)


def _kept(paths: Sequence[Path], data: Data) -> list[Path]:
    """The files whose names stand in the keep-list, one name a line."""
    assert data.keep is not None
    if data.layout != "brats":
        raise fault("data.keep", "a list of files", "layout brats", f"layout {data.layout}", "Remove `data.keep`.")
    try:
        if (kind := not_a_file(data.keep)) is not None:
            raise fault(data.keep, "`data.keep`", "a readable text file", kind, "Check the path.")
        lines = data.keep.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise fault(data.keep, "`data.keep`", "a readable text file", reason(error), "Check the path.") from None
    names = {line.strip() for line in lines if line.strip()}
    kept = [path for path in paths if path.name in names]
    if not kept:
        found = f"none of {len(names)} names among {len(paths)} files"
        raise fault(data.keep, "the keep-list", "names of files to keep", found, "Write one file name a line.")
    return kept


def check_data(
    data: Data, paths: Sequence[Path], progress: Callable[[int], None] = lambda _: None
) -> dict[Path, Outliers]:
    """Raise LabError that names the files of `find_volumes` which cannot be used; returns those with outliers.

    `prepare` has read the files of a manifest: their sizes suffice, unless `data.checksums` asks for more.
    """
    if data.manifest is None:
        return check_volumes(paths, progress)
    if data.checksums:
        manifest = read_manifest(data)
        root = root_of(data, manifest)
        raise_all(filter(None, each(partial(compare, root, contents=True), manifest.entries, progress)), str(root))
    return {}


def damaged_volumes(
    data: Data, paths: Sequence[Path], progress: Callable[[int], None] = lambda _: None
) -> dict[Path, Problem]:
    """Those of the files that cannot be used, read to their end, or that are not as the manifest has them."""
    entries: dict[Path, Entry] = {}
    if data.manifest is not None:
        manifest = read_manifest(data)
        root = root_of(data, manifest)
        entries = {root / entry.path: entry for entry in manifest.entries}

    def wrong(path: Path) -> Problem | None:
        changed = compare(root, entries[path], data.checksums) if path in entries else None
        found = changed or inspect(path)
        return found if isinstance(found, Problem) else None

    return {path: found for path, found in zip(paths, each(wrong, paths, progress), strict=True) if found is not None}


def check_volumes(paths: Sequence[Path], progress: Callable[[int], None] = lambda _: None) -> dict[Path, Outliers]:
    """Read every file to its end; raises LabError that names those that are no finite 3D volume.

    Returns those with outliers.
    """
    inspected = list(each(inspect, paths, progress))
    raise_all((item for item in inspected if isinstance(item, Problem)), str(paths[0].parent) if paths else "")
    volumes = {path: item for path, item in zip(paths, inspected, strict=True) if isinstance(item, Volume)}
    return {path: volume.outliers for path, volume in volumes.items() if volume.outliers is not None}


def each(work: Callable[[A], B], items: Iterable[A], progress: Callable[[int], None] = lambda _: None) -> Iterator[B]:
    """`work` on every item in threads, in order: reading, unzipping and hashing leave Python's lock."""
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        try:
            for done, result in enumerate(pool.map(work, items), 1):
                progress(done)
                yield result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # an interrupt does not wait for thousands of files


@dataclass(frozen=True)
class Volume:
    """What a sound file holds: voxels and their size in mm, along the stored axes."""

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    digest: str  # of the voxels: the same for a file and its zipped copy
    outliers: Outliers | None = None


def inspect(path: Path) -> Volume | Problem:
    """Read one file to its end: the volume it holds, or what is wrong with it."""

    def wrong(expected: str, found: str) -> Problem:
        return Problem("an unreadable volume", expected, found, "Replace or remove the file.", str(path))

    try:
        if (kind := not_a_file(path)) is not None:
            return wrong("a NIfTI file", kind)
        sizes = announced(path)
        if sizes is not None and (fault_of_size := sizes.fault(0 if path.suffix == ".gz" else path.stat().st_size)):
            return wrong(*fault_of_size)
        image, voxels = _read(path, SLACK if sizes is None else sizes.most)
    except UNREADABLE as error:
        return wrong("a NIfTI file", reason(error))
    shape = tuple(size for axis, size in enumerate(voxels.shape) if axis < 3 or size > 1)
    if voxels.ndim > 4 or len(shape) != 3 or min(shape) < 2:  # MONAI takes one axis more for channels
        return wrong("one 3D volume", "shape " + "x".join(str(size) for size in voxels.shape))
    if not np.issubdtype(voxels.dtype, np.number) or np.iscomplexobj(voxels):
        return wrong("real numbers", f"voxels of type {voxels.dtype}")
    low, high = float(voxels.min()), float(voxels.max())  # not a number where any voxel is none
    if not (math.isfinite(low) and math.isfinite(high)):
        return wrong("finite numbers", "voxels that are infinite or not a number")
    if max(-low, high, high - low) > float(np.finfo(np.float32).max):  # runs read in this precision
        return wrong("numbers that float32 can hold", f"voxels from {low:g} to {high:g}")
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-12:
        return wrong("an affine that places the voxels", "one that is singular")
    if np.float32(low) == np.float32(high):
        return wrong("an image", f"the same value everywhere, {low:g}")
    first, second, third = (round(float(size), 4) for size in voxel_sizes(image.affine))  # the header has 7 digits
    digest = hashlib.sha256(np.ascontiguousarray(voxels.T).data).hexdigest()  # along the file's order
    return Volume((shape[0], shape[1], shape[2]), (first, second, third), digest, find_outliers(voxels))


def _read(path: Path, most: int) -> tuple[Any, np.ndarray]:
    """An image and its voxels; of a zipped file all that is in it, unzipped once.

    nibabel stops at the last voxel, before the checksum that says whether all of them are as they were. At most
    `most` bytes may follow.
    """
    image = nibabel.load(path)
    if path.suffix != ".gz":
        return image, np.asanyarray(image.dataobj)
    with gzip.open(path) as file:
        image = type(image).from_stream(file)
        voxels = np.asanyarray(image.dataobj)
        skip_rest(cast(IO[bytes], file), most)
    return image, voxels


@dataclass(frozen=True)
class Split:
    """Which files train, which are validated on, and which a study reports on that nothing else sees."""

    train: tuple[Path, ...]
    validation: tuple[Path, ...]
    test: tuple[Path, ...]
    seed: int
    unseen: tuple[Path, ...] = ()  # of strata that are held out whole

    def write(self, path: Path, root: Path) -> None:
        """Write the split down as JSON, with paths below `root`."""
        lists = {name: [str(file.relative_to(root)) for file in files] for name, files in self.named()}
        path.write_text(json.dumps({"root": str(root), "seed": self.seed, **lists}, indent=1) + "\n", encoding="utf-8")

    def reference(self, wanted: str) -> tuple[Path, ...]:
        """The held-out files that samples are compared with; raises LabError for a split that has none to test on."""
        if wanted == "test" and not self.test:
            fix = "Set `data.test_share`, or run `prepare` with it."
            raise fault("metrics.reference", "volumes to compare with", "some to test on", "none in the split", fix)
        return self.test if wanted == "test" else self.validation

    def named(self) -> tuple[tuple[str, tuple[Path, ...]], ...]:
        """The lists that the split has, by name."""
        lists = ("train", self.train), ("validation", self.validation), ("test", self.test), ("unseen", self.unseen)
        return tuple((name, files) for name, files in lists if files)


def split_volumes(paths: Sequence[Path], data: Data) -> Split:
    """Hold out shares of the subjects, at least one and not all; the same seed gives the same split.

    A manifest has the split already. In layout `plain` each file is a subject of its own. Subjects to test on are
    taken from those that would train: the others are validated on with or without them. Strata are spread evenly
    over the shuffled subjects, so that each part has its share of each.
    """
    if data.manifest is not None:
        manifest = read_manifest(data)
        root = root_of(data, manifest)
        entries = (manifest.train, manifest.validation, manifest.test, manifest.unseen)
        train, validation, test, unseen = (tuple(sorted(root / entry.path for entry in each)) for each in entries)
        return Split(train, validation, test, manifest.seed, unseen)
    unseen = tuple(sorted(path for path in paths if stratum_of(path, data) in data.unseen))
    paths = [path for path in paths if stratum_of(path, data) not in data.unseen]
    strata = {subject_of(path, data): stratum_of(path, data) for path in sorted(paths)}
    subjects = list(strata)
    if len(subjects) < fewest(data):
        found = f"{len(subjects)}, {', '.join(subjects)}"
        fix = "Add subjects, or split by file with `--set data.layout=plain`."
        raise fault(data.root, "subjects to split", f"at least {fewest(data)}", found, fix)
    first, last = held_out_counts(len(subjects), data)
    random.Random(data.split_seed).shuffle(subjects)
    subjects = _spread(subjects, strata)
    parts = (set(part) for part in (subjects[first + last :], subjects[:first], subjects[first : first + last]))
    train, validation, test = (
        tuple(sorted(path for path in paths if subject_of(path, data) in part)) for part in parts
    )
    return Split(train, validation, test, data.split_seed, unseen)


def _spread(subjects: Sequence[str], strata: Mapping[str, str | None]) -> list[str]:
    """The subjects in an order in which every stretch has its share of each stratum; a single one stays as it is."""
    sizes, seen = Counter(strata.values()), Counter[str | None]()
    places = {}
    for subject in subjects:
        stratum = strata[subject]
        places[subject] = (seen[stratum] + 0.5) / sizes[stratum]
        seen[stratum] += 1
    return sorted(subjects, key=lambda subject: places[subject])


def held_out_counts(subjects: int, data: Data) -> tuple[int, int]:
    """How many subjects are validated on, at least one, and tested on, at least one where asked for; one trains."""
    test = max(1, round(subjects * data.test_share)) if data.test_share else 0
    validation = min(max(1, round(subjects * data.validation_share)), subjects - 1 - min(test, 1))
    return validation, min(test, subjects - validation - 1)


def stratum_of(path: Path, data: Data) -> str | None:
    """The stratum that a file's name says, None where there are none or it says nothing."""
    found = re.search(data.strata, path.name) if data.strata is not None else None
    return found.group(1) if found is not None else None


def subject_of(path: Path, data: Data) -> str:
    """Whose scan a file is: the first folder below the root in the paper's layouts, in `plain` the file itself.

    A subject's scans must not stand on two sides of the split: the held-out error would be that of known brains.
    """
    if data.layout == "plain":
        return str(path)
    assert data.root is not None
    return path.relative_to(data.root).parts[0]
