"""How long the demonstration takes on this machine: a few of its steps are timed before it begins."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from ddpm_lab.config.settings import DemoConfig, Training
from ddpm_lab.data.anatomies import tissues_of
from ddpm_lab.data.files import held_out_counts
from ddpm_lab.data.population import paint_subject
from ddpm_lab.model.accelerator import make_accelerator
from ddpm_lab.model.diffusion import noise_schedule, predict
from ddpm_lab.model.unet import build_unet
from ddpm_lab.support.console import clock
from ddpm_lab.training.train import steps_of

__all__ = ["expected_time"]

ROUNDS = 4  # after one that warms up
ADAPTED = 1.15  # a step that trains an adapter, in steps that train everything, with what goes before its first one
REST = 90  # metrics and pictures, in passes through the network


def expected_time(config: DemoConfig, populated: bool, pretrained: bool) -> str:
    """A line that says how long the demonstration will take; what an earlier run did is not done again."""
    with torch.random.fork_rng(devices=[]):
        step, forward = _network_times(config)
        subject = 0.0 if populated else _timed(_painting(config), 2)
    people = config.population
    parts = {
        "population": subject * (people.source + people.target),
        "pretraining": 0.0 if pretrained else step * steps_of(config.pretraining, people.source),
        "fine-tuning runs": _tuning(config, step, forward),
        "samples and metrics": forward * (2 * config.sampling.steps * _batches(config.sampling.count, config) + REST),
    }
    shown = ", ".join(f"{name} {clock(seconds)}" for name, seconds in parts.items() if seconds)
    return f"About {clock(sum(parts.values()))} on this machine, by a few steps that were timed: {shown}"


def _tuning(config: DemoConfig, step: float, forward: float) -> float:
    """The run, the published adapter's, the baseline and the control, with their errors on held-out volumes."""
    held_out = sum(held_out_counts(config.population.target, config.data))
    evaluation = _batches(held_out * config.validation.buckets * config.validation.draws, config) * forward
    total = 0.0
    published = [] if config.published is None else [config.published.training]
    for training in (config.training, *published, config.bias_norm, config.training):
        steps = steps_of(training, config.population.target - held_out)
        evaluations = 2 + (steps // config.validation.every if config.validation.every is not None else 0)
        total += ADAPTED * step * steps + evaluations * evaluation
    return total


def _batches(samples: int, config: DemoConfig) -> float:
    """Samples in batches of the size that is timed."""
    return samples / config.pretraining.batch_size


def _network_times(config: DemoConfig) -> tuple[float, float]:
    """Seconds of one training step and of one pass without gradients, both on a batch of pretraining."""
    training: Training = config.pretraining
    accelerator = make_accelerator(training)
    device = accelerator.device
    unet: nn.Module = build_unet(config.model).to(device)
    scheduler = noise_schedule(config.diffusion)
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-6)
    shape = config.data.resize or config.data.crop or (config.population.side,) * 3
    volumes = torch.rand((training.batch_size, 1, *shape), device=device)
    timesteps = torch.randint(0, config.diffusion.timesteps, (training.batch_size,), device=device)

    def step() -> None:
        for _ in range(training.accumulation):
            with accelerator.autocast():
                found, target = predict(unet, scheduler, volumes, torch.randn_like(volumes), timesteps)
            nn.functional.mse_loss(found.float(), target.float()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def forward() -> None:
        with accelerator.autocast():
            unet(volumes, timesteps=timesteps).float().cpu()

    return _timed(step, ROUNDS), _timed(forward, ROUNDS)


def _painting(config: DemoConfig) -> Callable[[], object]:
    tissues, generator = tissues_of("mni152", config.population.side), torch.Generator().manual_seed(0)
    return lambda: paint_subject(tissues, "t1", generator)


def _timed(work: Callable[[], object], rounds: int) -> float:
    """The median time in seconds, after a first time that warms up."""
    work()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
