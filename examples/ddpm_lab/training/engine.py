"""Forward and backward passes and optimiser steps, each over a global batch that processes and micro-batches share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from monai.networks.schedulers import DDPMScheduler
from torch import nn

import tnpeft
import tnpeft.surgery
from ddpm_lab.config.settings import Training
from ddpm_lab.data.order import Batch, Source
from ddpm_lab.model.diffusion import predict
from ddpm_lab.support.faults import DivergenceError, fault
from tnpeft.errors import Problem

__all__ = ["Damage", "Engine", "smaller_steps"]

LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "mse": nn.functional.mse_loss,
    "mae": nn.functional.l1_loss,
}
MOST_NAMED = 4  # samples in a message

Damage = tuple[str, str]  # the name of a volume that could not be read, and what is wrong with it


class _Seen(NamedTuple):
    """What is known of a micro-batch after its backward pass."""

    errors: torch.Tensor  # (B,)
    weights: torch.Tensor
    timesteps: list[int]
    indices: tuple[int, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Engine:
    """Trains `model` on micro-batches; `optimizer` is accelerate's."""

    model: nn.Module
    optimizer: Any
    scheduler: DDPMScheduler
    training: Training
    accelerator: Accelerator
    source: Source
    skip_damaged: bool

    def steps(self, batches: Iterable[Batch], number: int) -> Iterator[tuple[float, list[Damage]]]:
        """After each optimiser step, the first being `number`: the mean loss of its samples, and what it left out.

        Raises LabError where a loss is not finite, and where a volume is damaged unless those are to be skipped.
        """
        seen: list[_Seen] = []
        accumulates = self.training.accumulation > 1 and tnpeft.surgery.find(self.model) is not None
        with contextlib.ExitStack() as kept:
            for batch in batches:
                if accumulates and not seen:  # the first micro-batch of an optimiser step
                    kept.enter_context(tnpeft.accumulating(self.model))
                with self.accelerator.accumulate(self.model):
                    seen.append(self._backward(batch))
                    if self.accelerator.sync_gradients:
                        kept.close()  # the cores change now
                        outcome = self._outcome(seen, number)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                if self.accelerator.sync_gradients:
                    yield outcome
                    seen.clear()
                    number += 1

    def _backward(self, batch: Batch) -> _Seen:
        clean, noise, timesteps, weights = (part.to(self.accelerator.device, non_blocking=True) for part in batch[:4])
        found, target = predict(self.model, self.scheduler, clean, noise, timesteps)
        errors = LOSSES[self.training.loss](found.float(), target.float(), reduction="none").flatten(1).mean(1)
        self.accelerator.backward((errors * weights).mean())
        return _Seen(errors.detach(), weights, batch.timesteps.tolist(), batch.volumes, batch.reasons)

    def _outcome(self, seen: Sequence[_Seen], number: int) -> tuple[float, list[Damage]]:
        """The mean over the samples of all processes, and what was left out; the gradients are made ready to use."""
        errors = torch.cat([one.errors * one.weights for one in seen]).double()
        weights = torch.cat([one.weights for one in seen]).double()
        total, count = self.accelerator.reduce(torch.stack([errors.sum(), weights.sum()]), "sum").tolist()
        if not math.isfinite(total):
            raise self._diverged(seen, number)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        damaged: list[Damage] = []
        samples = len(errors) * self.accelerator.num_processes
        if count < samples:
            damaged = self._left_out(seen, number, empty=count == 0)
            for parameter in trained:
                if parameter.grad is not None:
                    parameter.grad.mul_(samples / count)  # the mean is over those that are left
        if self.training.clip_norm is not None:
            self.accelerator.clip_grad_norm_(trained, self.training.clip_norm)
        return total / count, damaged

    def _left_out(self, seen: Sequence[_Seen], number: int, empty: bool) -> list[Damage]:
        """The damaged volumes of this step, in all processes; raises LabError, the same in all, where none may be."""
        own = [
            (index, reason) for one in seen for index, reason in zip(one.indices, one.reasons, strict=True) if reason
        ]
        found: list[tuple[int, str]] = gather_object(own)
        if not self.skip_damaged:
            raise self.source.damaged(*found[0])
        damaged = [(self.source.name(index), reason) for index, reason in found]
        if empty:
            names = _some([f"{name} ({reason})" for name, reason in damaged])
            expected = "at least one that can be read"
            raise fault(f"step {number}", "the volumes", expected, f"none: {names}", "Mend them.")
        return damaged

    def _diverged(self, seen: Sequence[_Seen], number: int) -> DivergenceError:
        """What gave a loss that is not finite: the same message in all processes."""
        own = [
            (f"{self.source.name(index)} at timestep {timestep}", str(error))
            for one in seen
            for index, timestep, error in zip(one.indices, one.timesteps, one.errors.tolist(), strict=True)
            if not math.isfinite(error)
        ]
        found: list[tuple[str, str]] = gather_object(own)
        values = " and ".join(sorted({value for _, value in found}))
        names = _some([name for name, _ in found])
        found_here = f"{values} from {names}"
        fix = smaller_steps(self.training)
        return DivergenceError(Problem("the loss", "a finite number", found_here, fix, f"step {number}"))


def smaller_steps(training: Training) -> str:
    """How to mend numbers that grew beyond all bounds."""
    return f"Lower `training.learning_rate` ({training.learning_rate:g}) or set `training.clip_norm`."


def _some(names: Sequence[str]) -> str:
    rest = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")
