"""The training loop: accelerate for devices, precision, accumulation and several processes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from monai.networks.schedulers import DDPMScheduler
from torch import nn
from torch.utils.data import DataLoader

import tnpeft
import tnpeft.surgery
from ddpm_lab.config import Training
from ddpm_lab.diffusion import HeldOut, HeldOutError, predict
from ddpm_lab.faults import fault

__all__ = ["History", "Step", "make_accelerator", "steps_of", "train"]

LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mse": nn.functional.mse_loss,
    "mae": nn.functional.l1_loss,
}


@dataclass
class History:
    """What training left behind; `validation` pairs optimiser steps with held-out errors."""

    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, HeldOutError]] = field(default_factory=list)
    seconds: float = 0.0  # of training steps alone, without validation

    def as_data(self) -> dict[str, Any]:
        return {
            "losses": self.losses,
            "validation": [[step, error.mean, list(error.buckets)] for step, error in self.validation],
            "seconds": self.seconds,
        }

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> History:
        validation = [(step, HeldOutError(mean, tuple(buckets))) for step, mean, buckets in data["validation"]]
        return cls(list(data["losses"]), validation, float(data["seconds"]))


@dataclass(frozen=True)
class Step:
    """Progress after one optimiser step; `held_out` is set where validation ran."""

    number: int
    total: int
    loss: float
    learning_rate: float
    held_out: HeldOutError | None


def make_accelerator(training: Training) -> Accelerator:
    """The device and the precision of a run; raises LabError for a precision the device does not have."""
    cpu = training.device == "cpu" or not torch.cuda.is_available()
    precision: str = training.precision
    if precision == "auto":
        precision = _fast_precision(cpu)
    if precision == "fp16" and cpu:
        raise fault("training.precision", "the precision", "fp32 or bf16 on a CPU", "fp16", "Use `auto`.")
    if training.threads is not None:
        torch.set_num_threads(training.threads)
    plugin = GradientAccumulationPlugin(num_steps=training.accumulation, adjust_scheduler=False)
    mixed = "no" if precision == "fp32" else precision
    accelerator = Accelerator(cpu=cpu, mixed_precision=mixed, gradient_accumulation_plugin=plugin)
    found = accelerator.num_processes
    if training.processes not in (None, found):
        # `accelerate launch --cpu --num_processes 2` starts one process and does not say so.
        fix = f"Start the driver with `torchrun --nproc_per_node {training.processes} examples/ddpm.py ...`."
        raise fault("training.processes", "the processes", str(training.processes), str(found), fix)
    return accelerator


def _fast_precision(cpu: bool) -> str:
    """bf16 where the hardware multiplies in it (without AMX a CPU is slower in bf16 than in fp32)."""
    if cpu:
        return "bf16" if getattr(torch.cpu, "_is_amx_tile_supported", bool)() else "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def steps_of(training: Training, volumes: int, processes: int = 1) -> int:
    """The number of optimiser steps; raises LabError unless either `steps` or `epochs` is given."""
    if (training.steps is None) == (training.epochs is None):
        found = "both" if training.steps is not None else "neither"
        raise fault("training", "its length", "`steps` or `epochs`", found, "Give one of the two.")
    if training.steps is not None:
        return training.steps
    assert training.epochs is not None
    batches = max(1, volumes // (training.batch_size * processes))
    return training.epochs * -(-batches // training.accumulation)


def train(
    unet: nn.Module,
    volumes: Any,
    scheduler: DDPMScheduler,
    training: Training,
    accelerator: Accelerator,
    held_out: HeldOut | None = None,
    every: int | None = None,
    on_step: Callable[[Step], None] = lambda _: None,
) -> History:
    """Train the parameters of `unet` that require a gradient; `volumes` is a dataset of (1, D, H, W) tensors.

    The held-out error is measured every `every` optimiser steps, but not after the last.
    """
    torch.manual_seed(training.seed + accelerator.process_index)
    total = steps_of(training, len(volumes), accelerator.num_processes)
    optimizer = torch.optim.Adam([p for p in unet.parameters() if p.requires_grad], lr=training.learning_rate)
    rates = _rates(optimizer, training, total)
    model, optimizer, loader = accelerator.prepare(unet, optimizer, _loader(volumes, training))
    history = History()
    model.train()
    started = time.perf_counter()
    for loss in _optimiser_steps(model, optimizer, loader, scheduler, training, accelerator):
        rate = float(rates.get_last_lr()[0])
        if not accelerator.optimizer_step_was_skipped:
            rates.step()
        number = len(history.losses) + 1
        history.losses.append(_finite(loss.item(), number, training))
        error = None
        if held_out is not None and every is not None and number % every == 0 and number < total:
            history.seconds += time.perf_counter() - started
            error = measure(held_out, unet, accelerator)
            history.validation.append((number, error))
            started = time.perf_counter()
        on_step(Step(number, total, history.losses[-1], rate, error))
        if number == total:
            break
    history.seconds += time.perf_counter() - started
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    return history


def _optimiser_steps(
    model: nn.Module,
    optimizer: Any,
    loader: Any,
    scheduler: DDPMScheduler,
    training: Training,
    accelerator: Accelerator,
) -> Iterator[torch.Tensor]:
    """Forward, backward and step without end; the mean loss of the micro-batches after each optimiser step."""
    losses: list[torch.Tensor] = []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    accumulates = training.accumulation > 1 and tnpeft.surgery.find(model) is not None
    with contextlib.ExitStack() as kept:
        while True:
            for clean in loader:
                if accumulates and not losses:  # the first micro-batch of an optimiser step
                    kept.enter_context(tnpeft.accumulating(model))
                with accelerator.accumulate(model):
                    noise = torch.randn_like(clean)
                    timesteps = torch.randint(0, scheduler.num_train_timesteps, (len(clean),), device=clean.device)
                    found, target = predict(model, scheduler, clean, noise, timesteps)
                    loss = LOSSES[training.loss](found.float(), target.float())
                    accelerator.backward(loss)
                    losses.append(loss.detach())
                    if accelerator.sync_gradients:
                        kept.close()  # the cores change now
                        if training.clip_norm is not None:
                            accelerator.clip_grad_norm_(trained, training.clip_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    yield torch.stack(losses).mean()
                    losses.clear()


def measure(
    held_out: HeldOut, unet: nn.Module, accelerator: Accelerator, progress: Any = lambda _: None
) -> HeldOutError:
    """The held-out error in the run's own precision."""
    with accelerator.autocast():
        return held_out.error(unet, accelerator.device, progress)


def _rates(optimizer: torch.optim.Optimizer, training: Training, total: int) -> Any:
    if training.schedule == "one_cycle" and total > 1:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, training.learning_rate, total_steps=total + 1)
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def _loader(volumes: Any, training: Training) -> Any:
    return DataLoader(
        volumes, batch_size=training.batch_size, shuffle=True, drop_last=True, num_workers=training.workers
    )


def _finite(loss: float, step: int, training: Training) -> float:
    if loss != loss or loss in (float("inf"), float("-inf")):
        fix = f"Lower `training.learning_rate` ({training.learning_rate:g}) or set `training.clip_norm`."
        raise fault(f"step {step}", "the loss", "a finite number", str(loss), fix)
    return loss
