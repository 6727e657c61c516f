"""Volumes drawn from a diffusion model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ddpm_lab.config import Data, Diffusion, Sampling
from ddpm_lab.diffusion import sampling_schedule
from ddpm_lab.faults import fault

__all__ = ["check_sampling", "draw_samples"]


def check_sampling(diffusion: Diffusion, sampling: Sampling) -> None:
    """Raise LabError for a number of steps that the scheduler cannot take."""
    if sampling.steps > diffusion.timesteps:
        expected = f"at most {diffusion.timesteps}, `diffusion.timesteps`"
        raise fault("sampling.steps", "the number of steps", expected, str(sampling.steps), "Take fewer.")
    if sampling.scheduler == "ddpm" and sampling.steps != diffusion.timesteps:
        # MONAI's DDPM step always goes to timestep - 1, so that leaving steps out would give noise.
        expected = f"{diffusion.timesteps}, all of them, with ddpm"
        raise fault("sampling.steps", "the number of steps", expected, str(sampling.steps), "Use ddim for fewer.")


@torch.no_grad()
def draw_samples(
    unet: nn.Module,
    shape: tuple[int, ...],
    diffusion: Diffusion,
    sampling: Sampling,
    data: Data,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda _: None,
) -> torch.Tensor:
    """`sampling.count` volumes, (count, 1, D, H, W) on the CPU in the range of the data.

    The first noise of volume n depends on the seed and n alone: two models sampled alike start from the same
    noise, whatever the batch size. (The noise that ddpm adds on the way depends on the batch size too.)
    """
    scheduler = sampling_schedule(diffusion, sampling.scheduler, data)
    scheduler.set_timesteps(sampling.steps)
    was_training = unet.training
    unet.eval()
    done = 0
    batches = []
    for start in range(0, sampling.count, sampling.batch_size):
        numbers = range(start, min(start + sampling.batch_size, sampling.count))
        streams = [torch.Generator().manual_seed(sampling.seed * 1_000_003 + number) for number in numbers]
        volumes = torch.stack([torch.randn((1, *shape), generator=stream) for stream in streams]).to(device)
        added = torch.Generator().manual_seed(sampling.seed * 1_000_003 + start)
        for timestep in scheduler.timesteps:
            steps = torch.full((len(volumes),), int(timestep), device=device)
            found = unet(volumes, timesteps=steps).float()
            volumes, _ = scheduler.step(found, int(timestep), volumes, generator=added)
            done += len(volumes)
            progress(done)
        batches.append(volumes.cpu())
    unet.train(was_training)
    return torch.cat(batches).clamp(*data.intensity)
