"""Which sample comes when, and with which noise: nothing but the seed, the epoch and the sample decides.

A run is one row of samples: the first epoch in an order of its own, then the second, and so on. An optimiser step
takes the next `batch_size * accumulation * processes` of the row, wherever an epoch ends, so that no sample is left out
and every step is of one size; processes and micro-batches only share them out. Neither a loading process nor a
checkpoint has to remember a random state.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nibabel.filebasedimages import ImageFileError
from torch.utils.data import Dataset, Sampler

from ddpm_lab.config.settings import Training
from ddpm_lab.data.files import check_volumes
from ddpm_lab.support.faults import LabError, fault, known_cause

__all__ = ["Batch", "Batches", "Key", "Noised", "Sample", "Source", "collate", "epoch_order", "stream"]

SKIP = "Mend the file, or leave it out with `--set data.skip_damaged=true`; the same command then goes on."
UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, zlib.error, ImageFileError)


class Key(NamedTuple):
    """A sample's place in a run: the epoch, and the volume's number in the dataset."""

    epoch: int
    volume: int


class Sample(NamedTuple):
    """One noised sample before the noise is added; `reason` says why there is no volume, and is empty if there is."""

    clean: torch.Tensor  # (1, D, H, W)
    noise: torch.Tensor
    timestep: torch.Tensor
    volume: int
    reason: str


class Batch(NamedTuple):
    """Samples of one micro-batch; `weights` are 0 where a volume could not be read."""

    clean: torch.Tensor  # (B, 1, D, H, W)
    noise: torch.Tensor
    timesteps: torch.Tensor
    weights: torch.Tensor
    volumes: tuple[int, ...]
    reasons: tuple[str, ...]


def stream(purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator that depends on these alone, on every machine."""
    text = "/".join([purpose, *map(str, numbers)])
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1)


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    """The order of `count` samples in one epoch."""
    return tuple(torch.randperm(count, generator=stream("order", seed, epoch)).tolist())


class Batches(Sampler[list[Key]]):
    """The micro-batches that one process of several trains on, from optimiser step `first` up to `total`."""

    def __init__(
        self, count: int, training: Training, first: int, total: int, process: int = 0, processes: int = 1
    ) -> None:
        self.count, self.training = count, training
        self.steps = range(first, total)
        self.process, self.processes = process, processes

    def __len__(self) -> int:
        return len(self.steps) * self.training.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        size, micro_batches = self.training.batch_size, self.training.accumulation
        for step in self.steps:
            for micro_batch in range(micro_batches):
                number = (step * micro_batches + micro_batch) * self.processes + self.process
                yield [self._key(place) for place in range(number * size, (number + 1) * size)]

    def _key(self, place: int) -> Key:
        epoch, offset = divmod(place, self.count)
        return Key(epoch, epoch_order(self.training.seed, epoch, self.count)[offset])


class Source:
    """Volumes by number, with the names that a message calls them by; a damaged one is a LabError with `fix`."""

    def __init__(
        self,
        volumes: Any,
        files: Sequence[Path] | None = None,
        shape: tuple[int, ...] | None = None,
        fix: str = SKIP,
    ) -> None:
        self.volumes, self.files, self.fix = volumes, files, fix
        self.shape = shape or tuple(volumes[0].shape[1:])

    def __len__(self) -> int:
        return len(self.volumes)

    def name(self, index: int) -> str:
        return f"volume {index}" if self.files is None else str(self.files[index])

    def __getitem__(self, index: int) -> torch.Tensor:
        """The volume, (1, D, H, W); raises LabError that names it."""
        try:
            volume = torch.as_tensor(self.volumes[index])
        except UNREADABLE as error:
            raise self.damaged(index, self._reason(index, error)) from None
        if tuple(volume.shape) != (1, *self.shape):
            sizes = ["x".join(map(str, shape)) for shape in (volume.shape, (1, *self.shape))]
            raise self.damaged(index, f"a volume of {sizes[0]}, not {sizes[1]}")
        return volume

    def damaged(self, index: int, reason: str) -> LabError:
        expected = "one that can be read, as at the start"
        return fault(self.name(index), "a volume while training", expected, reason, self.fix)

    def _reason(self, index: int, error: BaseException) -> str:
        """What is wrong with the file; its transforms only say that they failed."""
        if self.files is not None:
            try:
                check_volumes([self.files[index]])
            except LabError as problem:
                return problem.problems[0].found
        if (known := known_cause(error)) is not None:
            return known.problems[0].found
        while error.__cause__ is not None:
            error = error.__cause__
        return " ".join(str(error).split())[:120] or type(error).__name__


class Noised(Dataset[Sample]):
    """Samples with the noise and the timestep of their epoch; a volume that cannot be read is all zeros."""

    def __init__(self, source: Source, timesteps: int, seed: int) -> None:
        self.source, self.timesteps, self.seed = source, timesteps, seed

    def __getitem__(self, key: Key) -> Sample:
        generator = stream("noise", self.seed, *key)
        timestep = torch.randint(0, self.timesteps, (), generator=generator)
        noise = torch.randn((1, *self.source.shape), generator=generator)
        try:
            clean, reason = self.source[key.volume], ""
        except LabError as error:
            clean, reason = torch.zeros_like(noise), error.problems[0].found
        return Sample(clean, noise, timestep, key.volume, reason)


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples as one micro-batch."""
    return Batch(
        torch.stack([sample.clean for sample in samples]),
        torch.stack([sample.noise for sample in samples]),
        torch.stack([sample.timestep for sample in samples]),
        torch.tensor([float(not sample.reason) for sample in samples]),
        tuple(sample.volume for sample in samples),
        tuple(sample.reason for sample in samples),
    )
