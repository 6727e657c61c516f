"""The model of a case: a few equal layers, and the spec's adapter on them."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tnpeft.adapters import Adapter
from tnpeft.execution import AdaptedLayer
from tnpeft.network import Network, Spec
from tnpeft.recipe import attach
from tnpeft.spec.maps import registered_map
from tnpeft.verify.case import Case

__all__ = ["Mismatch", "Skip", "Subject", "adapted_layers", "fill"]


SCOPE = r"blocks\.(\d+)\."  # what every scope of shared cores is bound to


class Mismatch(Exception):  # noqa: N818 - a verdict, caught where it is reported
    """A check found something wrong."""


class Skip(Exception):  # noqa: N818 - see above
    """A check does not apply to a case."""


class Stack(nn.Module):
    """Layers of one shape in blocks, all fed with one input."""

    def __init__(self, blocks: list[list[nn.Module]]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleList(layers) for layers in blocks])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers()])

    def layers(self) -> list[nn.Module]:
        return [layer for block in self.blocks for layer in block]  # type: ignore[attr-defined]


class Subject:
    """A spec on a case. Raises TnpeftError from the constructor where the spec refuses the layer."""

    def __init__(self, spec: Spec, case: Case) -> None:
        self.spec, self.case = spec, case
        self.network: Network = spec.bind(case.layer, **case.params)
        # Two blocks of one layer; where cores are shared within a scope, the first has two.
        layers = [case.build(seed) for seed in range(3 if spec.scopes else 2)]
        self.plain = Stack([layers[:-1], layers[-1:]]).eval()
        self.x = case.input()
        self.attached()

    def model(self) -> Stack:
        """A new model without adapters, which may be changed."""
        return copy.deepcopy(self.plain)

    def attached(self, mode: str = "dense", dtype: torch.dtype | None = None, moved: bool = False) -> Stack:
        """The model with a fresh adapter; `moved`: its cores are no longer those of the start."""
        model = self.model().to(dtype)
        scopes = dict.fromkeys(self.spec.scopes, SCOPE)
        params: dict[str, Any] = dict(self.case.params)
        attach(model, self.spec, match=self.names, mode=mode, scopes=scopes, **params)
        if moved:
            for number, layer in enumerate(adapted_layers(model)):
                fill(layer.adapter("default"), self.case.seed + number)
        return model

    @cached_property
    def names(self) -> list[str]:
        return [name for name, _ in self.plain.named_modules() if re.fullmatch(SCOPE + r"\d+", name)]

    @cached_property
    def blocks(self) -> list[int]:
        """The block of each layer."""
        return [int(name.split(".")[1]) for name in self.names]

    @cached_property
    def working(self) -> torch.dtype:
        """The dtype in which values are compared: fp32 for fp32 layers, for all others fp64, which hides nothing."""
        return torch.float32 if self.case.dtype == "float32" else torch.float64

    @cached_property
    def tolerance(self) -> float:
        """The tolerance of an error, relative to the sum of the magnitudes of all that was added up."""
        if self.working == torch.float32:
            return 2e-5
        # The gradients of maps that users registered are known from differences.
        registered = any(registered_map(each.name) for core in self.network.derived for each in core.maps)
        return 1e-8 if registered else 1e-11

    def runs(self, model: nn.Module, x: Tensor) -> Tensor:
        """The plain model's output. Raises Skip where torch itself cannot compute it, or not in finite numbers."""
        try:
            with torch.no_grad():
                y: Tensor = model(x)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            raise Skip(f"torch: {error}") from error
        if not bool(y.isfinite().all()):
            raise Skip("the layer's own output is not finite")
        return y


def adapted_layers(model: nn.Module) -> Iterator[AdaptedLayer]:
    return (module for module in model.modules() if isinstance(module, AdaptedLayer))


def fill(adapter: Adapter, seed: int = 0) -> None:
    """Every trainable core anew, so that the network has entries of order one; frozen cores and copies stay."""
    generator = torch.Generator().manual_seed(seed)
    opened = set(adapter.network.open_legs)
    with torch.no_grad():
        for bound in adapter.network.cores:
            core = adapter.cores.get(bound.name)
            if not isinstance(core, nn.Parameter):
                continue
            summed = math.prod(size for leg, size in zip(bound.legs, bound.unfolded, strict=True) if leg not in opened)
            drawn = torch.randn(bound.shape, generator=generator, dtype=torch.float64)
            core.copy_(drawn / math.sqrt(math.sqrt(summed)))
        if adapter.magnitude is not None:
            adapter.magnitude.mul_(0.5 + torch.rand(adapter.magnitude.shape, generator=generator))


def require_close(what: str, found: Tensor, exact: Tensor, bound: Tensor, tolerance: float) -> None:
    """Raises Mismatch unless every entry is within `tolerance` of the largest sum of magnitudes."""
    if found.shape != exact.shape:
        raise Mismatch(f"{what} has the shape {tuple(found.shape)}, expected {tuple(exact.shape)}")
    if not found.numel():
        return
    error = (found.double() - exact.double()).abs()
    worst = int(error.argmax())
    allowed = tolerance * max(float(bound.abs().max()), 1e-30)
    if not bool((error <= allowed).all()):
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), found.shape))
        got, wanted = float(found.flatten()[worst]), float(exact.flatten()[worst])
        raise Mismatch(
            f"{what} is {got:.8g} at {list(place)}, expected {wanted:.8g} "
            f"(error {float(error.max()):.2g}, allowed {allowed:.2g})"
        )


def require_equal(what: str, found: Any, expected: Any) -> None:
    """Raises Mismatch unless both are equal; tensors bit for bit."""
    if isinstance(expected, Tensor):
        if found.shape != expected.shape or found.dtype != expected.dtype:
            raise Mismatch(
                f"{what} is {found.dtype} {tuple(found.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
            )
        if not torch.equal(found, expected):
            worst = float((found.double() - expected.double()).abs().max())
            differing = int((found != expected).sum())
            raise Mismatch(
                f"{what} differs in {differing} of {expected.numel()} numbers, by up to {worst:.3g}; "
                "expected equal bits"
            )
    elif found != expected:
        raise Mismatch(f"{what} is {found}, expected {expected}")
