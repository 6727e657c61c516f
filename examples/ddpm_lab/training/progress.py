"""What changes while a model trains, and how all of it becomes tensors and JSON and back."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ddpm_lab.model.diffusion import HeldOutError
from ddpm_lab.training.average import Average

__all__ = ["History", "Loop", "random_states", "restore_random_states"]

Tensors = dict[str, torch.Tensor]


@dataclass
class History:
    """What training left behind; `validation` pairs optimiser steps with held-out errors.

    `damaged` are the volumes that were left out, each with what was wrong with it.
    """

    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, HeldOutError]] = field(default_factory=list)
    seconds: float = 0.0  # of training steps alone, without validation
    damaged: dict[str, str] = field(default_factory=dict)

    def as_data(self) -> dict[str, Any]:
        return {
            "losses": self.losses,
            "validation": [[step, error.mean, list(error.buckets)] for step, error in self.validation],
            "seconds": self.seconds,
            "damaged": self.damaged,
        }

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> History:
        validation = [(step, HeldOutError(mean, tuple(buckets))) for step, mean, buckets in data["validation"]]
        return cls(list(data["losses"]), validation, float(data["seconds"]), dict(data.get("damaged", {})))


@dataclass
class Loop:
    """Everything that a training step changes, but for the trained parameters and random states."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    rates: torch.optim.lr_scheduler.LRScheduler
    scaler: Any | None = None  # of fp16
    average: Average | None = None
    history: History = field(default_factory=History)

    @property
    def step(self) -> int:
        return len(self.history.losses)

    def tensors(self) -> dict[str, Tensors]:
        """Tensors by file: the optimiser's as `state/parameter`, and the average."""
        state: Tensors = {}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                state[f"{key}/{name}"] = value
        return {"optimizer": state} | ({} if self.average is None else {"average": self.average.values})

    def data(self) -> dict[str, Any]:
        """The rest, as JSON has it."""
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self._groups()]
        return {
            "history": self.history.as_data(),
            "optimizer": groups,
            "rates": self.rates.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def restore(self, data: Mapping[str, Any], tensors: Mapping[str, Tensors]) -> None:
        """Take in what `data` and `tensors` gave in an earlier process."""
        state: dict[int, Tensors] = {number: {} for number in range(len(self.parameters))}
        numbers = {name: number for number, name in enumerate(self.parameters)}
        for key, value in tensors["optimizer"].items():
            kind, _, name = key.partition("/")
            state[numbers[name]][kind] = value
        groups = [
            {**own, **{key: _as_tuple(value) for key, value in stored.items()}}
            for own, stored in zip(self._groups(), data["optimizer"], strict=True)
        ]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.rates.load_state_dict(data["rates"])
        if self.scaler is not None:
            self.scaler.load_state_dict(data["scaler"])
        if self.average is not None:
            self.average.load(tensors["average"])
        self.history = History.from_data(data["history"])

    def _groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.optimizer.state_dict()["param_groups"]
        return groups


def _as_tuple(value: Any) -> Any:
    """JSON has no tuples, and Adam's betas are one."""
    return tuple(value) if isinstance(value, list) else value


def random_states() -> dict[str, Any]:
    """The random states of this process as JSON: Python's, NumPy's, torch's and the GPU's."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _as_text(torch.get_rng_state()),
    }
    return states | ({"cuda": _as_text(torch.cuda.get_rng_state())} if torch.cuda.is_available() else {})


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Set the random states of this process to what `random_states` gave."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_from_text(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_text(states["cuda"]))


def _as_text(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_text(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
