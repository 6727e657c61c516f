"""Volumes drawn from a diffusion model: each from a seed and a number of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler
from torch import nn

from ddpm_lab.config.settings import Data, Diffusion, Sampling
from ddpm_lab.model.diffusion import sampling_schedule
from ddpm_lab.support.faults import fault

__all__ = ["check_sampling", "draw_batches", "draw_samples"]


def check_sampling(diffusion: Diffusion, sampling: Sampling) -> None:
    """Raise LabError for a number of steps that the scheduler cannot take."""
    if sampling.steps > diffusion.timesteps:
        expected = f"at most {diffusion.timesteps}, `diffusion.timesteps`"
        raise fault("sampling.steps", "the number of steps", expected, str(sampling.steps), "Take fewer.")
    if sampling.scheduler == "ddpm" and sampling.steps != diffusion.timesteps:
        # MONAI's DDPM step always goes to timestep - 1, so that leaving steps out would give noise.
        expected = f"{diffusion.timesteps}, all of them, with ddpm"
        raise fault("sampling.steps", "the number of steps", expected, str(sampling.steps), "Use ddim for fewer.")


def draw_samples(
    unet: nn.Module,
    shape: tuple[int, ...],
    diffusion: Diffusion,
    sampling: Sampling,
    data: Data,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda _: None,
    numbers: range | None = None,
) -> torch.Tensor:
    """The volumes of `numbers`, by default the first `sampling.count`; see `draw_batches`.

    They are (count, 1, D, H, W), on the CPU, in the range of the data.
    """
    if numbers is None:
        numbers = range(sampling.count)
    batches = draw_batches(unet, numbers, shape, diffusion, sampling, data, device, progress)
    return torch.cat([volumes for _, volumes in batches])


def draw_batches(
    unet: nn.Module,
    numbers: Sequence[int],
    shape: tuple[int, ...],
    diffusion: Diffusion,
    sampling: Sampling,
    data: Data,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[Sequence[int], torch.Tensor]]:
    """The volumes of these numbers, a batch at a time: their numbers, and (batch, 1, D, H, W) on the CPU.

    Volume n depends on the network, the seed and n alone, up to rounding: its first noise, and the noise that
    ddpm adds on the way, come from a stream of its own on the CPU. So batches, processes and devices may differ,
    and two networks sampled alike start from the same noise. `progress` is given the steps done, a volume each.
    """
    scheduler = sampling_schedule(diffusion, sampling.scheduler, data)
    scheduler.set_timesteps(sampling.steps)
    done = 0
    for start in range(0, len(numbers), sampling.batch_size):
        batch = numbers[start : start + sampling.batch_size]
        streams = [torch.Generator().manual_seed(sampling.seed * 1_000_003 + number) for number in batch]
        before = done

        def step_done(steps: int, before: int = before, size: int = len(batch)) -> None:
            progress(before + steps * size)

        volumes = _denoised(unet, streams, shape, scheduler, device, step_done)
        done += sampling.steps * len(batch)
        yield batch, volumes.clamp(*data.intensity)


@torch.no_grad()
def _denoised(
    unet: nn.Module,
    streams: Sequence[torch.Generator],
    shape: tuple[int, ...],
    scheduler: DDIMScheduler | DDPMScheduler,
    device: torch.device | str,
    step_done: Callable[[int], None],
) -> torch.Tensor:
    """A batch of volumes from noise, one for each stream."""
    was_training = unet.training
    unet.eval()
    volumes = torch.stack([torch.randn((1, *shape), generator=stream) for stream in streams]).to(device)
    for number, timestep in enumerate(scheduler.timesteps, 1):
        steps = torch.full((len(volumes),), int(timestep), device=device)
        found = unet(volumes, timesteps=steps).float()
        volumes = _stepped(scheduler, found, int(timestep), volumes, streams)
        step_done(number)
    unet.train(was_training)
    return volumes.cpu()


def _stepped(
    scheduler: DDIMScheduler | DDPMScheduler,
    found: torch.Tensor,
    timestep: int,
    volumes: torch.Tensor,
    streams: Sequence[torch.Generator],
) -> torch.Tensor:
    """One step towards clean volumes; ddpm's noise is drawn volume by volume, on the CPU where the streams are."""
    if isinstance(scheduler, DDIMScheduler):
        after: torch.Tensor = scheduler.step(found, timestep, volumes)[0]
        return after
    alone = [
        scheduler.step(found[place : place + 1].cpu(), timestep, volumes[place : place + 1].cpu(), generator=stream)[0]
        for place, stream in enumerate(streams)
    ]
    return torch.cat(alone).to(volumes.device)
