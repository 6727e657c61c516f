"""NIfTI files → tensors of one shape: MONAI's transforms and datasets."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import CacheDataset, Dataset
from monai.transforms import (
    Compose,
    EnsureChannelFirst,
    EnsureType,
    LoadImage,
    Orientation,
    Resize,
    ResizeWithPadOrCrop,
    ScaleIntensity,
    ScaleIntensityRangePercentiles,
    Spacing,
    Transform,
)
from monai.transforms.utils_pytorch_numpy_unification import percentile
from safetensors import SafetensorError
from safetensors.torch import load_file

from ddpm_lab.config.settings import Data
from ddpm_lab.data.files import check_volumes
from ddpm_lab.support.durable import write_tensors
from ddpm_lab.support.faults import LabError, fault, known_cause, reason

__all__ = ["check_sizes", "dataset", "transforms"]


def transforms(data: Data) -> Compose:
    """The pipeline of one volume; its last step drops MONAI's MetaTensor, which would travel through the network.

    The axes are turned to R, A, S before anything is cropped. The paper's code crops first, so that the same
    brain stored along other axes loses other parts of itself; `paper_order` keeps that order.
    """
    turn = [Orientation(axcodes="RAS", labels=None)]
    crop = [ResizeWithPadOrCrop(data.crop, mode="minimum")] if data.crop else []
    space = [Spacing(pixdim=data.spacing)] if data.spacing else []
    resize = [Resize(data.resize, mode="area")] if data.resize else []
    placed = [*crop, *turn, *space] if data.paper_order else [*turn, *space, *crop]
    return Compose(
        [
            LoadImage(image_only=True, dtype=torch.float32),
            EnsureChannelFirst(),
            *placed,
            *resize,
            _Scale(data),
            EnsureType(dtype=torch.float32, track_meta=False),
        ],
        log_stats=False,  # what goes wrong is said once, by name
    )


class _Scale(Transform):  # type: ignore[misc]
    """Moves a volume's intensities to `data.intensity`; raises LabError where all of them are the same."""

    def __init__(self, data: Data) -> None:
        low, high = data.intensity
        self.percentiles = data.percentiles
        if data.percentiles is None:
            self.scale: Any = ScaleIntensity(minv=low, maxv=high)
        else:
            self.scale = ScaleIntensityRangePercentiles(*data.percentiles, low, high, clip=True)

    def __call__(self, volume: Any) -> Any:
        if self.percentiles is None:
            low, high = float(volume.min()), float(volume.max())
        else:
            low, high = (float(percentile(volume, share)) for share in self.percentiles)
        if low == high:
            raise self._fault(volume, low)
        return self.scale(volume)

    def _fault(self, volume: Any, value: float) -> LabError:
        path = getattr(volume, "meta", {}).get("filename_or_obj", "a volume")
        expected, found = "voxels that differ, after crop and resize", f"{value:g} everywhere"
        fix = "Check `data.crop`, or remove the file."
        if self.percentiles is not None:
            expected, found = (
                f"percentiles {self.percentiles[0]:g} and {self.percentiles[1]:g} that differ",
                f"{value:g}",
            )
            fix = "Widen `data.percentiles`, or remove the file."
        return fault(path, "the intensities of a volume", expected, found, fix)


def dataset(paths: Sequence[Path], data: Data, cache: Path) -> Any:
    """A dataset of (1, D, H, W) tensors, kept in memory, in files under `cache`, or not at all."""
    steps = transforms(data)
    files = [str(path) for path in paths]
    if data.cache == "memory":
        with _named(paths):
            return CacheDataset(files, steps, cache_rate=1.0, num_workers=None, progress=False)
    if data.cache == "disk":
        folder = cache / _key(data)
        folder.mkdir(parents=True, exist_ok=True)
        return _DiskCache(files, steps, folder)
    return Dataset(files, steps)


@contextlib.contextmanager
def _named(paths: Sequence[Path]) -> Iterator[None]:
    """Say as LabError which of the files cannot be read, and why: MONAI says that a transform failed."""
    try:
        yield
    except RuntimeError as error:
        if (known := known_cause(error)) is not None:
            raise known from None
        check_volumes(paths)
        found, fix = reason(error.__cause__ or error), "Replace or remove the file."
        raise fault(paths[0].parent, "a volume", "one that can be transformed", found, fix) from None


class _DiskCache(Dataset):  # type: ignore[misc]
    """Volumes after their transforms, in files. MONAI's PersistentDataset moves a pickle over from another folder:
    a process that is killed then leaves half a file, which stops the next.
    """

    def __init__(self, files: Sequence[str], steps: Compose, folder: Path) -> None:
        super().__init__(files, steps)
        self.folder = folder

    def _transform(self, index: int) -> torch.Tensor:
        file = self.data[index]
        cached = self.folder / f"{_file_key(file)}.safetensors"
        with contextlib.suppress(OSError, SafetensorError, KeyError):
            return load_file(cached)["volume"]
        volume = torch.as_tensor(super()._transform(index))
        with contextlib.suppress(LabError):  # without room for a cache there is none
            write_tensors(cached, {"volume": volume})
        return volume


def _file_key(file: str) -> str:
    """A name for one file as it is now: a file that is replaced is read again."""
    stat = Path(file).stat()
    return hashlib.sha256(f"{file}/{stat.st_mtime_ns}/{stat.st_size}".encode()).hexdigest()


def _key(data: Data) -> str:
    """A name for everything that changes a cached volume."""
    parts = data.model_dump(
        mode="json", include={"paper_order", "spacing", "crop", "resize", "intensity", "percentiles"}
    )
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def check_sizes(
    volumes: Iterable[torch.Tensor],
    paths: Sequence[Path],
    divisor: int,
    progress: Callable[[int], None] = lambda _: None,
    first: tuple[int, ...] | None = None,
) -> tuple[int, ...]:
    """Read every volume through its transforms (which fills a cache) and return their one shape, `first` if given.

    Raises LabError where shapes differ or an axis is no multiple of `divisor`, the network's downsampling.
    """
    with _named(paths):
        for done, (path, volume) in enumerate(zip(paths, volumes, strict=True), 1):
            shape = tuple(volume.shape[1:])
            first = first or shape
            if volume.shape[0] != 1 or shape != first:
                found = f"{volume.shape[0]} channel(s) of {_times(shape)} after the transforms"
                fix = "Set `data.crop` or `data.resize`."
                raise fault(path, "a volume of another size", f"1 channel of {_times(first)}", found, fix)
            if any(size % divisor for size in shape):
                fix = "Set `data.crop` or `data.resize`."
                raise fault(path, "the volume's size", f"multiples of {divisor}, for the network", _times(shape), fix)
            progress(done)
    assert first is not None
    return first


def _times(shape: Sequence[int]) -> str:
    return "x".join(str(size) for size in shape)
