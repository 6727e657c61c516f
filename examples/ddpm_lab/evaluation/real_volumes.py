"""The real volumes that samples are compared with, and their features, which are computed once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file

from ddpm_lab.config.settings import Config
from ddpm_lab.data.files import check_data, check_volumes, damaged_volumes, split_volumes
from ddpm_lab.data.volumes import transforms
from ddpm_lab.evaluation.distances import Measured
from ddpm_lab.evaluation.encoder import Encoder
from ddpm_lab.support.console import Screen
from ddpm_lab.support.durable import write_tensors, writing
from ddpm_lab.support.faults import MOST, LabError, fault, known_cause, reason
from ddpm_lab.support.folders import make_folder
from tnpeft.errors import Problem

__all__ = ["Files", "RealVolumes", "times"]

# Settings of the data that say which files are read, not what a volume becomes.
WHERE = {"root", "layout", "keep", "cache", "manifest", "skip_damaged", "validation_share", "test_share", "split_seed"}


class Files(Sequence[torch.Tensor]):
    """Volumes that are read from their files each time they are looked at."""

    def __init__(self, paths: Sequence[Path], read: Callable[[Path], torch.Tensor]) -> None:
        self.paths, self.read = paths, read

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        return self.read(self.paths[index])


class RealVolumes:
    """The real volumes that samples are compared with: held out and for training, at most `metrics.most` of each.

    Those that cannot be used are a LabError that names them or, with `data.skip_damaged`, are `left_out` of both.
    """

    def __init__(self, config: Config, cache: Path, paths: Sequence[Path], screen: Screen) -> None:
        split = split_volumes(paths, config.data)
        self.config, self.cache = config, cache
        held_out = split.reference(config.metrics.reference)
        self.held_out, self.train = (_some(files, config.metrics.most) for files in (held_out, split.train))
        self.left_out: dict[Path, Problem] = {}
        self._check(screen)
        self.steps = transforms(config.data)
        self.shape: tuple[int, ...] = tuple(self.read(self.held_out[0]).shape[1:])
        self.features: dict[Path, torch.Tensor] = {}

    def _check(self, screen: Screen) -> None:
        """Find what is damaged before anything is computed, and leave it out or raise LabError."""
        data, paths = self.config.data, [*self.held_out, *self.train]
        with screen.bar("check real volumes", len(paths)) as bar:
            if data.skip_damaged:
                self.left_out = damaged_volumes(data, paths, bar)
            else:
                check_data(data, paths, bar)
        for name, files in (("held-out", self.held_out), ("training", self.train)):
            if not set(files) - set(self.left_out):
                expected, found = "at least one that can be read", f"none of {len(files)}"
                problems = [self.left_out[path] for path in files]
                raise LabError(*problems[:MOST], Problem(f"{name} volumes", expected, found, "Mend them.", "data"))
        self.held_out, self.train = (
            [path for path in files if path not in self.left_out] for files in (self.held_out, self.train)
        )

    def read(self, path: Path) -> torch.Tensor:
        """One volume as the network sees it; raises LabError that names a damaged file."""
        try:
            volume: torch.Tensor = self.steps(str(path))
            if not volume.isfinite().all():
                raise ValueError("voxels that are infinite or not a number")
        except (RuntimeError, OSError, ValueError, EOFError) as error:
            if (known := known_cause(error)) is not None:
                raise known from None
            check_volumes([path])  # it knows better what is wrong
            raise fault(
                path, "an unreadable volume", "a 3D volume", reason(error), "Replace or remove the file."
            ) from None
        return volume

    def encode(self, encoder: Encoder, accelerator: Accelerator, screen: Screen) -> None:
        """The features of all volumes, from an earlier evaluation of the same files where there was one."""
        paths = [*self.held_out, *self.train]
        cache = self.cache / f"features-{self._key(encoder, paths)}.safetensors"
        try:
            features = load_file(cache)["features"]
        except (OSError, SafetensorError, KeyError):
            with screen.bar("encode real volumes", len(paths)) as bar:
                features = encoder.features(Files(paths, self._sized), accelerator.device, progress=bar)
            make_folder(cache.parent)
            with writing(cache, "features of real volumes"):
                write_tensors(cache, {"features": features})
        self.features = dict(zip(paths, features, strict=True))

    def _sized(self, path: Path) -> torch.Tensor:
        volume = self.read(path)
        if tuple(volume.shape[1:]) != self.shape:
            found, fix = times(volume.shape[1:]), "Set `data.crop` or `data.resize`."
            raise fault(path, "a volume of another size", times(self.shape), found, fix)
        return volume

    def _key(self, encoder: Encoder, paths: Sequence[Path]) -> str:
        """A name for all that the features depend on: the encoder, the files as they are, and what is done to them."""
        data = self.config.data.model_dump(mode="json", exclude=WHERE)
        files = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
        return hashlib.sha256(json.dumps([encoder.digest, data, files]).encode()).hexdigest()[:16]

    def measured(self, paths: Sequence[Path]) -> Measured:
        return Measured(Files(paths, self._sized), torch.stack([self.features[path] for path in paths]))

    def reference(self) -> Measured:
        """What the samples are compared with: held-out volumes, or all."""
        metrics = self.config.metrics
        both = _some([*self.held_out, *self.train], metrics.most)
        return self.measured(both if metrics.reference == "all" else self.held_out)


def _some(paths: Sequence[Path], most: int) -> list[Path]:
    """The files, or `most` of them evenly chosen."""
    if len(paths) <= most:
        return list(paths)
    return [paths[int(index)] for index in torch.linspace(0, len(paths) - 1, most).tolist()]


def times(shape: Sequence[int]) -> str:
    return "x".join(str(size) for size in shape)
