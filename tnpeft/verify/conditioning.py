"""Conditioning: how large the network and the first step are, relative to the weight that they change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from tnpeft.errors import TnpeftError
from tnpeft.execution import compile
from tnpeft.network import Layer, Spec
from tnpeft.verify.case import Case

__all__ = ["RATE", "Conditioning", "conditioning_of", "rows_on"]

Row = TypeVar("Row")

RATE = 1e-3  # of Adam, whose first step moves every number by this much
LARGE_NETWORK, LARGE_STEP, SMALL_STEP = 10.0, 0.1, 1e-5

_LAYERS = (
    Layer("Linear", 256, 256),
    Layer("Conv1d", 64, 64, (3,)),
    Layer("Conv2d", 64, 64, (3, 3)),
    Layer("Conv3d", 32, 32, (3, 3, 3)),
    Layer("ConvTranspose1d", 64, 64, (3,)),
    Layer("ConvTranspose2d", 64, 64, (3, 3)),
    Layer("ConvTranspose3d", 32, 32, (3, 3, 3)),
)


@dataclass(frozen=True)
class Conditioning:
    """Standard deviations at the start of one layer: of its weight W, of scale * T, and of Adam's first step in dW.

    `steps` has each trainable core's share: the update's standard deviation if that core alone takes the step.
    """

    layer: str
    params: Mapping[str, float]
    start: str
    rate: float
    weight: float
    network: float
    step: float
    steps: Mapping[str, float]

    @property
    def network_ratio(self) -> float:
        """std(scale * T) over std(W)."""
        return self.network / self.weight if self.weight else 0.0

    @property
    def step_ratio(self) -> float:
        """The first step over std(W)."""
        return self.step / self.weight if self.weight else 0.0

    @property
    def advice(self) -> str:
        """What to change, or an empty text."""
        leading = max(self.steps, key=lambda name: self.steps[name], default="")
        if self.step_ratio > LARGE_STEP:
            less = LARGE_STEP / 10 / self.step_ratio
            first = f"the first step moves the weight by {self.step_ratio:.2g} of its deviation"
            if self.start == "frozen_copy" and self.network_ratio > LARGE_NETWORK:
                first = f"std(T) is {self.network_ratio:.3g} times std(W), and {first}"
            change = f"multiply the init of the other cores, or the learning rate, by {less:.1g}"
            return f"{first}, the most by core '{leading}': {change}"
        if self.start == "frozen_copy" and self.network_ratio > LARGE_NETWORK:
            return (
                f"std(T) is {self.network_ratio:.3g} times std(W): harmless to the start, which is exact, but a "
                f"small change of a core moves much; scale the init of one core by {1 / self.network_ratio:.1g}"
            )
        if self.step_ratio < SMALL_STEP:
            return (
                f"the first step moves the weight by {self.step_ratio:.1g} of its deviation: "
                "use a larger init of the other cores, a larger `scale` or a larger learning rate"
            )
        return ""

    def as_dict(self) -> dict[str, Any]:
        ratios = {"network_ratio": self.network_ratio, "step_ratio": self.step_ratio, "advice": self.advice}
        return {**asdict(self), "params": dict(self.params), "steps": dict(self.steps), **ratios}


def conditioning_of(
    spec: Spec, params: Mapping[str, float], layer: Layer | None = None, seed: int = 0
) -> tuple[Conditioning, ...]:
    """One row for each kind that the spec takes, or for `layer` alone."""
    return rows_on(partial(_row, spec), params, layer, seed)


def rows_on(
    row: Callable[[Case], Row], params: Mapping[str, float], layer: Layer | None = None, seed: int = 0
) -> tuple[Row, ...]:
    """A row for each kind of layer that the spec takes (transposed ones only if there is no other), or for `layer`."""
    groups = (
        [[one for one in _LAYERS if one.transposed == kind] for kind in (False, True)] if layer is None else [[layer]]
    )
    for layers in groups:
        rows = []
        for one in layers:
            with suppress(TnpeftError):
                rows.append(row(Case.on(one, params=params, seed=seed)))
        if rows:
            return tuple(rows)
    return ()


def _row(spec: Spec, case: Case) -> Conditioning:
    base = case.build()
    params: dict[str, Any] = dict(case.params)
    adapter = compile(spec, base, name="layer", **params)
    network = adapter.network
    assert isinstance(base.weight, torch.Tensor)
    weight = base.weight.detach()
    generator = torch.Generator().manual_seed(case.seed)
    upstream = torch.randn(weight.shape, generator=generator)
    cores = {name: core for name, core in adapter.cores.items() if isinstance(core, nn.Parameter)}
    delta = adapter.delta_weight()
    gradients = torch.autograd.grad((delta * upstream).sum(), list(cores.values()), allow_unused=True)
    steps: dict[str, float] = {}
    with torch.no_grad():
        size = float((network.scale * adapter.network_weight()).std(correction=0))
        moves = {name: -RATE * _sign(gradient, cores[name]) for name, gradient in zip(cores, gradients, strict=True)}
        for name, move in moves.items():
            before = cores[name].clone()
            cores[name].add_(move)
            steps[name] = float(adapter.delta_weight().std(correction=0))
            cores[name].copy_(before)
        for name, move in moves.items():
            cores[name].add_(move)
        step = float(adapter.delta_weight().std(correction=0))
    deviation = float(weight.std(correction=0))
    return Conditioning(str(network.layer), dict(network.params), network.start, RATE, deviation, size, step, steps)


def _sign(gradient: torch.Tensor | None, core: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(core) if gradient is None else gradient.sign()
