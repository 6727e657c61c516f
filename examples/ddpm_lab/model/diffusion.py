"""The noise schedule, the training target and the held-out error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler
from torch import nn

from ddpm_lab.config.settings import Data, Diffusion, Validation
from ddpm_lab.data.order import stream
from ddpm_lab.model.sharding import is_sharded

__all__ = ["HeldOut", "HeldOutError", "noise_schedule", "predict", "sampling_schedule"]


def noise_schedule(diffusion: Diffusion) -> DDPMScheduler:
    """The forward process, which adds noise."""
    return DDPMScheduler(**_arguments(diffusion))


def sampling_schedule(diffusion: Diffusion, kind: str, data: Data) -> DDPMScheduler | DDIMScheduler:
    """The reverse process; predicted volumes are held to the range of the data."""
    low, high = data.intensity
    bounds = {"clip_sample": True, "clip_sample_min": low, "clip_sample_max": high}
    scheduler = DDIMScheduler if kind == "ddim" else DDPMScheduler
    return scheduler(**_arguments(diffusion), **bounds)


def _arguments(diffusion: Diffusion) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "num_train_timesteps": diffusion.timesteps,
        "schedule": diffusion.schedule,
        "prediction_type": diffusion.prediction,
    }
    if diffusion.schedule != "cosine":
        arguments |= {"beta_start": diffusion.beta_start, "beta_end": diffusion.beta_end}
    return arguments


def predict(
    unet: nn.Module, scheduler: DDPMScheduler, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The network's output for noised volumes and what it should have been: the noise, or the velocity."""
    noised = scheduler.add_noise(original_samples=clean, noise=noise, timesteps=timesteps)
    if scheduler.prediction_type == "v_prediction":
        target = scheduler.get_velocity(clean, noise, timesteps)
    else:
        target = noise
    return unet(noised, timesteps=timesteps), target


@dataclass(frozen=True)
class HeldOutError:
    """The mean squared error on held-out volumes: whole, for equal ranges of timesteps, and for each volume."""

    mean: float
    buckets: tuple[float, ...]
    volumes: tuple[float, ...] = ()  # in the order of the split

    def as_data(self) -> list[Any]:
        return [self.mean, list(self.buckets), list(self.volumes)]

    @classmethod
    def from_data(cls, data: Sequence[Any]) -> HeldOutError:
        mean, *lists = data
        return cls(float(mean), *(tuple(each) for each in lists))

    def change(self, before: HeldOutError) -> float:
        """The relative change since `before`, in percent; negative is better."""
        return 100 * (self.mean / before.mean - 1)


class HeldOut:
    """Held-out volumes with noise and timesteps that never change, so that errors can be compared.

    `volumes` is a dataset of (1, D, H, W) tensors. The noise of a volume depends on the seed, the bucket, the draw and
    the volume alone, whatever the batch size, and is drawn anew each time, not kept. Sets of another `purpose` have
    other noise.
    """

    def __init__(
        self,
        volumes: Any,
        scheduler: DDPMScheduler,
        validation: Validation,
        batch_size: int,
        purpose: str = "held-out",
    ) -> None:
        self.volumes = volumes
        self.purpose = purpose
        self.scheduler = scheduler
        self.validation = validation
        self.batch_size = validation.batch_size or batch_size

    @property
    def evaluations(self) -> int:
        """Volumes that one measurement sends through the network."""
        return len(self.volumes) * self.validation.buckets * self.validation.draws

    @torch.no_grad()
    def errors(
        self,
        unet: nn.Module,
        device: torch.device | str = "cpu",
        progress: Callable[[int], None] = lambda _: None,
        process: int = 0,
        processes: int = 1,
    ) -> torch.Tensor:
        """The error of each volume that is this process's, in each bucket and draw, and 0 for the others'.

        Measures `unet` in evaluation mode; its mode is put back.
        """
        batches = self._batches()
        errors = torch.zeros(self.validation.buckets, len(self.volumes) * self.validation.draws, dtype=torch.float64)
        was_training = unet.training
        unet.eval()
        done = 0
        for number, (bucket, places) in enumerate(batches):
            if number % processes == process:
                errors[bucket, places.start : places.stop] = self._errors(unet, bucket, places, device)
            done += len(places)
            if (number + 1) % processes == 0 or number + 1 == len(batches):
                progress(done)
        if is_sharded(unet) and 0 < len(batches) % processes <= process:
            self._errors(unet, *batches[-1], device)  # in vain: the others' last batch needs this process's parts
        unet.train(was_training)
        return errors

    def _errors(self, unet: nn.Module, bucket: int, places: range, device: torch.device | str) -> torch.Tensor:
        """The errors of one batch."""
        drawn = [self._drawn(bucket, place) for place in places]
        clean, noise, timesteps = (torch.stack(part).to(device) for part in zip(*drawn, strict=True))
        found, target = predict(unet, self.scheduler, clean, noise, timesteps)
        return (found.float() - target.float()).pow(2).flatten(1).mean(1).double().cpu()

    def error_of(self, errors: torch.Tensor) -> HeldOutError:
        """The means of what `errors` gave, added in one order whoever measured them."""
        by_volume = errors.view(len(errors), self.validation.draws, len(self.volumes)).mean((0, 1))
        means = errors.mean(1)
        return HeldOutError(float(means.mean()), tuple(means.tolist()), tuple(by_volume.tolist()))

    def _batches(self) -> list[tuple[int, range]]:
        """Each batch's bucket, and the places of its volumes among those of all draws."""
        count = len(self.volumes) * self.validation.draws
        return [
            (bucket, range(start, min(start + self.batch_size, count)))
            for bucket in range(self.validation.buckets)
            for start in range(0, count, self.batch_size)
        ]

    def _drawn(self, bucket: int, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One volume, its noise, and a timestep of the bucket."""
        draw, index = divmod(number, len(self.volumes))
        low, high = (
            self.scheduler.num_train_timesteps * edge // self.validation.buckets for edge in (bucket, bucket + 1)
        )
        generator = stream(self.purpose, self.validation.seed, bucket, draw, index)
        clean = torch.as_tensor(self.volumes[index])
        timestep = torch.randint(low, max(high, low + 1), (), generator=generator)
        return clean, torch.randn(clean.shape, generator=generator), timestep
