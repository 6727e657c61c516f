"""What a search is given, as one value that can be passed to other processes, and the score of one network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from tnpeft.errors import Problem, TnpeftError, clip
from tnpeft.fitting import budget, fit
from tnpeft.fitting.budget import Budget
from tnpeft.network import Layer, Spec
from tnpeft.searching.space import Space
from tnpeft.searching.updates import Update
from tnpeft.spec.pattern import KINDS

__all__ = ["SAMPLERS", "Task", "mean"]

SAMPLERS = ("mixed", "random", "tpe", "evolution", "local")
LAYOUT = "1"  # of the space and of what a study notes: a study of another layout is another search


@dataclass(frozen=True)
class Task:
    """A search: the `layers` whose adapters train at most `params` parameters in all, and the `updates` to capture.

    `kinds` are those of the layers and of the held-out ones: the networks fit them all. A fit makes at most
    `iterations` sweeps for each update.
    """

    layers: Mapping[str, Layer]
    kinds: tuple[str, ...]
    updates: tuple[Update, ...]
    params: int
    evaluations: int = 100
    iterations: int = 15
    cores: int = 8
    sampler: str = "mixed"
    seed: int = 0
    from_known: bool = True

    def check(self) -> None:
        """Raises TnpeftError with all that is wrong."""
        problems = []
        numbers = {"params": 1, "evaluations": 1, "iterations": 1, "cores": 2, "seed": 0}
        examples = {"params": 20_000, "evaluations": 100, "iterations": 15, "cores": 8, "seed": 0}
        for name, least in numbers.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                fix = f"For example `{name}={examples[name]}`."
                problems.append(Problem(f"search, `{name}`", f"a whole number from {least} on", clip(value), fix))
        if self.sampler not in SAMPLERS:
            fix = "Leave it out, or choose one of them."
            problems.append(Problem("search, `sampler`", f"one of {', '.join(SAMPLERS)}", clip(self.sampler), fix))
        if not self.updates:
            fix = "Pass a fine-tune that trained these layers."
            problems.append(Problem("search", "a layer whose weight the fine-tune changed", "none", fix))
        if problems:
            raise TnpeftError(*problems)

    @cached_property
    def space(self) -> Space:
        return Space(KINDS[self.kinds[0]], self.cores)

    @cached_property
    def digest(self) -> str:
        """A digest of all that must be equal for two processes to share one search."""
        said = hashlib.sha256()
        settings = LAYOUT, self.kinds, self.params, self.iterations, self.cores, self.sampler, self.from_known
        said.update(repr((settings, sorted((name, str(layer)) for name, layer in self.layers.items()))).encode())
        for update in self.updates:
            said.update(repr((update.name, update.pair, tuple(update.delta.shape))).encode())
            said.update(update.delta.contiguous().numpy().tobytes())
        return said.hexdigest()

    def within_budget(self, spec: Spec, param: Any = "r") -> Budget:
        """The largest ranks at which the adapters of all layers meet the budget. Raises TnpeftError."""
        return budget(spec, self._stand_ins, self.params, match="all", param=param)

    def captured(self, spec: Spec, ranks: Mapping[str, float], updates: Iterable[Update]) -> Iterator[float]:
        """The share of each update's energy that the network captures, with a frozen copy of zeros if it has one."""
        how: dict[str, Any] = {"method": "als", "iterations": self.iterations, "frozen_copy": "zeros", **ranks}
        for update in updates:
            found = fit(spec, update.delta, update.layer, **how)
            yield found.captured

    @cached_property
    def _stand_ins(self) -> nn.Module:
        """Layers of these sizes without values."""
        return nn.ModuleList(_stand_in(layer) for layer in self.layers.values())


def _stand_in(layer: Layer) -> nn.Module:
    make: Callable[..., nn.Module] = getattr(nn, layer.kind)
    with torch.device("meta"):
        if not KINDS[layer.kind]:
            return make(layer.in_channels, layer.out_channels)
        return make(layer.in_channels, layer.out_channels, layer.kernel_size, groups=layer.groups)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
