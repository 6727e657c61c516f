"""What a training step of a screen's method takes: seconds beside those of full fine-tuning, in turns, and memory.

A slow minute of the machine slows both, so that their ratio holds; the seconds are those of this machine.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddpm_lab.config.settings import Method
from ddpm_lab.model.accelerator import make_accelerator
from ddpm_lab.study.cost import Counted, subject
from ddpm_lab.study.run import Run
from ddpm_lab.support.console import Screen
from ddpm_lab.support.durable import write_json

__all__ = ["CostRun", "costs", "costs_of", "in_turns", "peak_of"]

WARMUP = 2  # the first steps plan and group layers

Step = Callable[[], object]


def costs_of(out: Path, method: str) -> Path:
    """The folder of a method's costs."""
    return out / "costs" / method


@dataclass(frozen=True)
class CostRun(Run):
    """The cost of one method's training step: a run whose result are numbers in `summary.json`."""

    shape: Sequence[int] = ()
    batch: int = 1
    rounds: int = 3

    def __str__(self) -> str:
        return f"cost of {self.method}"

    @property
    def lock(self) -> str:
        return f"cost--{self.method}"

    def _stages(self, screen: Screen) -> None:
        accelerator = make_accelerator(self.config.training)

        def step(method: Method) -> Step:
            each = subject(self.config, method, self.config.training, accelerator)
            given = each.inputs(self.shape, self.batch)
            return lambda: each.step(*given)

        numbers = costs(lambda: step(self.config.method), lambda: step(Method(kind="full")), self.rounds, accelerator)
        rate = self.config.training.learning_rate
        write_json(self.folder / "summary.json", {"run": numbers, "config": {"training": {"learning_rate": rate}}})


def costs(own: Callable[[], Step], full: Callable[[], Step], rounds: int, accelerator: Any) -> dict[str, float]:
    """Memory of a step alone, then seconds in turns; both arguments build a model and give its step."""
    memory = peak_of(own, accelerator.device)
    return {**in_turns(own(), full(), rounds), "memory_bytes": memory}


def peak_of(build: Callable[[], Step], device: torch.device) -> int:
    """Bytes at the peak of a training step, its model included."""
    gc.collect()
    counted = Counted(device)
    with counted.context:
        step = build()
        for _ in range(WARMUP + 1):
            counted.restart()
            step()
        return counted.peak


def in_turns(own: Step, full: Step, rounds: int) -> dict[str, float]:
    """Seconds of a step, and their ratio to full fine-tuning's: medians over rounds in which the two take turns."""
    times: list[tuple[float, float]] = []
    for _ in range(WARMUP + rounds):
        times.append((_timed(own), _timed(full)))
    kept = times[WARMUP:]
    return {
        "step_seconds": statistics.median(one for one, _ in kept),
        "step_of_full": statistics.median(one / other for one, other in kept),
    }


def _timed(step: Step) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
