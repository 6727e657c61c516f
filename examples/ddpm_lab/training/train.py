"""The training loop over what `accelerator` set up."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from monai.networks.schedulers import DDPMScheduler
from torch import nn
from torch.utils.data import DataLoader

from ddpm_lab.config.settings import Training
from ddpm_lab.data.order import Batches, Noised, Source, collate
from ddpm_lab.model.diffusion import HeldOut, HeldOutError
from ddpm_lab.model.sharding import is_sharded
from ddpm_lab.support.faults import DivergenceError, fault
from ddpm_lab.support.processes import together
from ddpm_lab.training.average import Average
from ddpm_lab.training.engine import Damage, Engine, smaller_steps
from ddpm_lab.training.progress import History, Loop
from tnpeft.errors import Problem

__all__ = ["History", "Keeper", "Step", "measure", "steps_of", "train"]


@dataclass(frozen=True)
class Step:
    """Progress after one optimiser step; `held_out` is set where validation ran, `damaged` are the volumes left out."""

    number: int
    total: int
    loss: float
    learning_rate: float
    held_out: HeldOutError | None
    damaged: list[Damage]


class Keeper(Protocol):
    """Who brings a loop to where an earlier process stood, and keeps it after a step."""

    def restore(self, loop: Loop) -> None: ...

    def after_step(self, loop: Loop, total: int) -> None: ...


def steps_of(training: Training, volumes: int, processes: int = 1) -> int:
    """The number of optimiser steps; raises LabError unless either `steps` or `epochs` is given.

    Batches go on from one epoch into the next: of a run given in epochs only its last, short batch is left out.
    """
    if (training.steps is None) == (training.epochs is None):
        found = "both" if training.steps is not None else "neither"
        raise fault("training", "its length", "`steps` or `epochs`", found, "Give one of the two.")
    if training.steps is not None:
        return training.steps
    assert training.epochs is not None
    return max(1, training.epochs * volumes // (training.batch_size * training.accumulation * processes))


def train(
    unet: nn.Module,
    source: Source,
    scheduler: DDPMScheduler,
    training: Training,
    accelerator: Accelerator,
    held_out: HeldOut | None = None,
    every: int | None = None,
    on_step: Callable[[Step], None] = lambda _: None,
    keeper: Keeper | None = None,
    skip_damaged: bool = False,
) -> History:
    """Train the parameters of `unet` that require a gradient, from where `keeper` has it; they end as their average.

    The held-out error (of the average, if there is one) is measured every `every` optimiser steps, but not after the
    last. Raises LabError for a loss that is not finite, and for a damaged volume unless those are to be skipped.
    """
    torch.manual_seed(training.seed + accelerator.process_index)
    total = steps_of(training, len(source), accelerator.num_processes)
    loop = _loop(unet, training, accelerator, total)
    model, optimizer = _prepared(unet, loop.optimizer, accelerator)
    if keeper is not None:
        keeper.restore(loop)
    model.train()
    if 0 < loop.step < total:
        _warm_up(unet, source, training, accelerator)
    engine = Engine(model, optimizer, scheduler, training, accelerator, source, skip_damaged)
    clock = time.perf_counter()
    batches = _loader(source, scheduler, training, accelerator, range(loop.step, total))
    for loss, damaged in engine.steps(batches, loop.step + 1):
        rate = float(loop.rates.get_last_lr()[0])
        _count(loop, loss, damaged, accelerator.optimizer_step_was_skipped)
        loop.history.seconds += time.perf_counter() - clock
        error = None
        if held_out is not None and every is not None and loop.step % every == 0 and loop.step < total:
            with contextlib.nullcontext() if loop.average is None else loop.average.shown():
                error = measure(held_out, unet, accelerator, f"step {loop.step}", smaller_steps(training))
            loop.history.validation.append((loop.step, error))
        if keeper is not None:
            keeper.after_step(loop, total)
        on_step(Step(loop.step, total, loss, rate, error, damaged))
        clock = time.perf_counter()
    if loop.average is not None:
        loop.average.keep()
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    return loop.history


def _prepared(unet: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> tuple[nn.Module, Any]:
    """The network and the optimiser as accelerate runs them; to what is sharded it adds the precision alone."""
    if not is_sharded(unet):
        model, prepared = accelerator.prepare(unet, optimizer)
        return model, prepared
    model = accelerator.prepare_model(unet, device_placement=False, evaluation_mode=True)
    return model, accelerator.prepare_optimizer(optimizer)


def _loop(unet: nn.Module, training: Training, accelerator: Accelerator, total: int) -> Loop:
    """The state of training before the first step."""
    parameters = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.Adam(parameters.values(), lr=training.learning_rate)
    average = None if training.ema is None else Average(parameters, training.ema)
    return Loop(parameters, optimizer, _rates(optimizer, training, total), accelerator.scaler, average)


def _rates(optimizer: torch.optim.Optimizer, training: Training, total: int) -> torch.optim.lr_scheduler.LRScheduler:
    if training.schedule == "one_cycle" and total > 1:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, training.learning_rate, total_steps=total + 1)
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def _loader(
    source: Source, scheduler: DDPMScheduler, training: Training, accelerator: Accelerator, steps: range
) -> DataLoader[Any]:
    """This process's micro-batches. Accelerate must not share them out again, and so never sees the loader."""
    process, processes = accelerator.process_index, accelerator.num_processes
    return DataLoader(
        Noised(source, scheduler.num_train_timesteps, training.seed),
        batch_sampler=Batches(len(source), training, steps.start, steps.stop, process, processes),
        num_workers=training.workers,
        collate_fn=collate,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),  # so that making it takes nothing from the global one
    )


def _warm_up(unet: nn.Module, source: Source, training: Training, accelerator: Accelerator) -> None:
    """One forward pass in vain after a restart: a first pass plans how later ones run, which may round otherwise."""
    shape = (training.batch_size, 1, *source.shape)
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        unet(torch.zeros(shape, device=accelerator.device), timesteps=torch.zeros(shape[:1], device=accelerator.device))


def _count(loop: Loop, loss: float, damaged: list[Damage], skipped: bool) -> None:
    """Write down an optimiser step; fp16 skips those whose gradients are too large for it."""
    loop.history.losses.append(loss)
    loop.history.damaged.update(damaged)
    if skipped:
        return
    loop.rates.step()
    if loop.average is not None:
        loop.average.update(loop.step)


def measure(
    held_out: HeldOut, unet: nn.Module, accelerator: Accelerator, when: str, fix: str, progress: Any = lambda _: None
) -> HeldOutError:
    """The held-out error in the run's own precision; processes share the batches, and all get the same error.

    Raises LabError, which says `when` and gives `fix`, for one that is not finite. While a sharded model is measured
    processes wait for each other's parts: what goes wrong in one ends that one, and torchrun ends the others.
    """
    device, process, processes = accelerator.device, accelerator.process_index, accelerator.num_processes
    with contextlib.nullcontext() if is_sharded(unet) else together(), accelerator.autocast():
        errors = held_out.errors(unet, device, progress, process, processes)
    # Each volume's error is one process's; adding the others' zeros changes no bit of it.
    error = held_out.error_of(accelerator.reduce(errors.to(device), "sum").cpu())
    if not math.isfinite(error.mean):
        raise DivergenceError(Problem("the error on held-out volumes", "a finite number", str(error.mean), fix, when))
    return error
