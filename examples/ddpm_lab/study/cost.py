"""Table 4: what a method costs beside full fine-tuning, measured here.

Methods take turns in one process: each ratio is the median over rounds of times of the same round. Memory is the peak
of a training step with a model alone in memory. On a CPU it is what operations allocate, counted storage by storage;
workspace within a kernel is unseen. On a GPU it is what torch's allocator has given out.
"""

from __future__ import annotations

import gc
import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from monai.networks.schedulers import DDPMScheduler
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tnpeft
from ddpm_lab.config.settings import Config, Method, Training
from ddpm_lab.model.accelerator import make_accelerator
from ddpm_lab.model.diffusion import noise_schedule, predict
from ddpm_lab.model.method import Trained, apply_method
from ddpm_lab.model.unet import build_unet, recompute_activations
from ddpm_lab.study.settings import StudyConfig
from ddpm_lab.support.console import Screen
from ddpm_lab.support.durable import write_json
from ddpm_lab.support.record import machine, revision, versions

__all__ = ["FULL", "Allocations", "Counted", "Subject", "measure_costs", "subject"]

FULL = "full fine-tuning"  # what everything is a percentage of


class Subject:
    """One method on a model of its own, and its training step on noise."""

    def __init__(
        self, trained: Trained, training: Training, scheduler: DDPMScheduler, accelerator: Accelerator
    ) -> None:
        self.trained, self.unet = trained, trained.unet
        self.scheduler, self.accelerator = scheduler, accelerator
        self.optimizer = torch.optim.Adam(
            [each for each in self.unet.parameters() if each.requires_grad], lr=training.learning_rate
        )

    def inputs(self, shape: Sequence[int], batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        volumes = torch.rand((batch, 1, *shape), generator=generator)
        timesteps = torch.randint(0, self.scheduler.num_train_timesteps, (batch,), generator=generator)
        return volumes.to(self.accelerator.device), timesteps.to(self.accelerator.device)

    def step(self, volumes: torch.Tensor, timesteps: torch.Tensor) -> float:
        """Forward, backward and Adam; the loss before it."""
        self.unet.train()
        with self.accelerator.autocast():
            found, target = predict(self.unet, self.scheduler, volumes, torch.randn_like(volumes), timesteps)
        loss = nn.functional.mse_loss(found.float(), target.float())
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    @torch.no_grad()
    def infer(self, volumes: torch.Tensor, timesteps: torch.Tensor) -> None:
        self.unet.eval()
        with self.accelerator.autocast():
            self.unet(volumes, timesteps=timesteps)


def subject(config: Config | StudyConfig, method: Method, training: Training, accelerator: Accelerator) -> Subject:
    """A fresh model of the study with one method, on the accelerator's device."""
    unet: nn.Module = build_unet(config.model, config.base, training.seed)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        for parameter in unet.parameters():
            if not parameter.any():  # the last layer of each block starts at zero, and would stop every gradient
                parameter.normal_(0, 0.02)
    unet.to(accelerator.device)
    if config.model.checkpointing:
        recompute_activations(unet)
    trained = apply_method(unet, method)
    unet.to(accelerator.device)
    return Subject(trained, training, noise_schedule(config.diffusion), accelerator)


def measure_costs(config: StudyConfig, out: Path, screen: Screen) -> None:
    """Measure each method of `table4` at each size, and write `costs.json`."""
    accelerator = make_accelerator(config.training)
    methods = {FULL: Method(kind="full")}
    methods |= {
        name: config.methods[name].method for name in config.table4 if config.methods[name].method.kind != "full"
    }
    sizes: dict[str, dict[str, Any]] = {}
    for name, shape in config.cost.shapes.items():
        memory = _memory(config, methods, shape, accelerator, screen, name)
        found = _times(config, methods, shape, accelerator, screen, name)
        for method, costs in found.items():
            costs |= {"memory_bytes": memory[method], "memory": memory[method] / memory[FULL]}
        sizes[name] = {"shape": list(shape), "methods": found}
    about = {
        "batch_size": config.cost.batch_size,
        "rounds": config.cost.rounds,
        "precision": accelerator.mixed_precision,
        "counted": "torch's allocator" if accelerator.device.type == "cuda" else "operations' allocations",
        "machine": machine(),
        "versions": versions(),
        "revision": revision(),
    }
    write_json(out / "costs.json", {**about, "sizes": sizes})


def _memory(
    config: StudyConfig,
    methods: Mapping[str, Method],
    shape: Sequence[int],
    accelerator: Accelerator,
    screen: Screen,
    title: str,
) -> dict[str, int]:
    """Bytes at the peak of a training step, one model in memory at a time."""
    found = {}
    with screen.bar(f"memory, {title}", len(methods)) as bar:
        for number, (name, method) in enumerate(methods.items(), 1):
            gc.collect()
            counted = Counted(accelerator.device)
            with counted.context:
                each = subject(config, method, config.training, accelerator)
                for _ in range(3):  # the first plans, the second groups layers
                    counted.restart()
                    each.step(*each.inputs(shape, config.cost.batch_size))
                found[name] = counted.peak
            del each
            bar(number, name)
    return found


def _times(
    config: StudyConfig,
    methods: Mapping[str, Method],
    shape: Sequence[int],
    accelerator: Accelerator,
    screen: Screen,
    title: str,
) -> dict[str, dict[str, Any]]:
    """Training steps, then calls of the same models with merged weights."""
    gc.collect()
    subjects = {name: subject(config, method, config.training, accelerator) for name, method in methods.items()}
    given = subjects[FULL].inputs(shape, config.cost.batch_size)
    steps = {name: lambda each=each: each.step(*given) for name, each in subjects.items()}
    training = _alternating(steps, config, accelerator, screen, f"training steps, {title}")
    for each in subjects.values():
        if each.trained.report is not None:
            tnpeft.merge(each.unet)
    calls = {name: lambda each=each: each.infer(*given) for name, each in subjects.items()}
    inference = _alternating(calls, config, accelerator, screen, f"inference, {title}")
    return {
        name: {
            "trainable_parameters": each.trained.parameters,
            "base_parameters": each.trained.total,
            "training_seconds": statistics.median(training[name]),
            "training": _ratio(training, name),
            "inference_seconds": statistics.median(inference[name]),
            "inference": _ratio(inference, name),
        }
        for name, each in subjects.items()
    }


def _ratio(times: Mapping[str, Sequence[float]], name: str) -> dict[str, float]:
    """The median of the ratios to full fine-tuning round by round, and their middle half."""
    ratios = sorted(own / full for own, full in zip(times[name], times[FULL], strict=True))
    quarter = len(ratios) // 4
    return {"value": statistics.median(ratios), "low": ratios[quarter], "high": ratios[-1 - quarter]}


def _alternating(
    calls: Mapping[str, Callable[[], object]], config: StudyConfig, accelerator: Accelerator, screen: Screen, title: str
) -> dict[str, list[float]]:
    """Seconds of each call, in turn in every round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    rounds, warmup = config.cost.rounds, config.cost.warmup
    with screen.bar(title, warmup + rounds) as bar:
        for number in range(warmup + rounds):
            for name, call in calls.items():
                _wait(accelerator)
                started = time.perf_counter()
                call()
                _wait(accelerator)
                if number >= warmup:
                    times[name].append(time.perf_counter() - started)
            bar(number + 1)
    return times


def _wait(accelerator: Accelerator) -> None:
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()


class Counted:
    """The most bytes that were alive since `restart`."""

    def __init__(self, device: torch.device) -> None:
        self._counts = None if device.type == "cuda" else Allocations()
        self.context: Any = self._counts or nullcontext()

    def restart(self) -> None:
        gc.collect()
        if self._counts is not None:
            self._counts.peak = self._counts.alive
        else:
            torch.cuda.reset_peak_memory_stats()

    @property
    def peak(self) -> int:
        return self._counts.peak if self._counts is not None else torch.cuda.max_memory_allocated()


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages made inside that are alive, and the most that were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(each)._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
        made = function(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor) and _storage(each)._cdata not in given:
                self._count(_storage(each))
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._sizes:
            return
        self._sizes[storage._cdata] = storage.nbytes()
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
