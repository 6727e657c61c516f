"""Directions: in how many the first steps move, and at which learning rate they go as far as LoRA's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tnpeft.adapters import Adapter
from tnpeft.errors import TnpeftError
from tnpeft.execution import compile
from tnpeft.fitting import tangent_space_of
from tnpeft.network import Spec, load_spec
from tnpeft.verify.case import Case
from tnpeft.verify.conditioning import LARGE_NETWORK

__all__ = ["Directions", "directions_on"]

RANK, RATE, STEPS = 8, 1e-3, 10  # of the LoRA that others are held against: Adam's steps along one random gradient
LEAST, MOST = 1e-9, 1.0  # rates that are tried
SMALL = 1e-3  # a share that is not printed


@dataclass(frozen=True)
class Directions:
    """The directions in which one layer's delta weight can move at the start, to first order: `rank` of `entries`.

    If `counted` is false, `rank` is an upper bound. At learning rate `rate`, Adam's first ten steps along a random
    gradient move the weight as far as those of LoRA (r=8, alpha=8) at 1e-3; None if no rate up to 1 does. `size` is
    std(T) / std(W) of the frozen copy, 0 without one.
    """

    layer: str
    params: Mapping[str, float]
    rank: int
    entries: int
    counted: bool
    rate: float | None
    size: float = 0.0

    @property
    def share(self) -> float:
        return self.rank / self.entries

    def __str__(self) -> str:
        return f"{self.layer}: {self._moves}; {self._rate}"

    @property
    def _moves(self) -> str:
        if not self.rank:
            return "at this start the first step moves nothing, to first order"
        if self.rank == self.entries and self.counted:
            return "at this start the first steps move in all directions"
        bound = "" if self.counted else "at most "
        share = f"less than {SMALL:.1%}" if self.share < SMALL else f"{bound}{self.share:.1%}"
        number = f"{bound}{self.rank:,} of {self.entries:,}"
        later = ", and so do later ones" if self.size > LARGE_NETWORK else ""
        return f"at this start the first steps move in {share} of the directions ({number}){later}"

    @property
    def _rate(self) -> str:
        far = f"as far in {STEPS} steps as LoRA (r={RANK}) at {RATE:g}"
        return f"rate {self.rate:.1g} moves {far}" if self.rate is not None else f"no rate up to {MOST:g} moves {far}"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "params": dict(self.params), "share": self.share, "text": str(self)}


def directions_on(spec: Spec, case: Case) -> Directions:
    """The directions of a spec on a layer. Raises TnpeftError where the spec refuses it."""
    base = case.build()
    params: dict[str, Any] = dict(case.params)
    adapter = compile(spec, base, name="layer", **params)
    assert isinstance(base.weight, Tensor)
    space = tangent_space_of(adapter, base.weight)
    network = adapter.network
    rate = _rate(spec, case) if adapter.trained else None
    size = _size(adapter, base.weight) if network.start == "frozen_copy" else 0.0
    return Directions(space.layer, dict(network.params), space.rank, space.entries, space.counted, rate, size)


@torch.no_grad()
def _size(adapter: Adapter, weight: Tensor) -> float:
    """std(T) / std(W) at the start; 0 where either has none."""
    have, base = (each.double().std(correction=0) for each in (adapter.network_weight(weight), weight))
    size = float(have / base)
    return size if math.isfinite(size) else 0.0


def _rate(spec: Spec, case: Case) -> float | None:
    """The rate of equal way, between powers of ten as if the way were a power of the rate."""
    try:
        target = _way(load_spec("lora"), case, {"r": RANK}, RATE)
    except TnpeftError:
        return None
    rate = RATE
    way = _way(spec, case, case.params, rate)
    factor = 10.0 if way < target else 0.1
    while LEAST <= rate * factor <= 1.01 * MOST:
        before, way_before = rate, way
        rate *= factor
        way = _way(spec, case, case.params, rate)
        if (way < target) != (factor > 1):
            if not (0 < way < math.inf and 0 < way_before < math.inf):
                return min(rate, before)
            steepness: float = math.log(way / way_before) / math.log(factor)
            return before * math.exp(math.log(target / way_before) / steepness)
    return None


def _way(spec: Spec, case: Case, params: Mapping[str, float], rate: float) -> float:
    """How far Adam's first steps along one random gradient move the weight; infinite where they leave the numbers."""
    base = case.build()
    given: dict[str, Any] = dict(params)
    adapter = compile(spec, base, name="layer", **given)
    generator = torch.Generator().manual_seed(case.seed)
    upstream = torch.randn(base.weight.shape, generator=generator, dtype=torch.float64).to(base.weight)  # type: ignore[arg-type]
    optimiser = torch.optim.Adam(adapter.parameters(), lr=rate)
    for _ in range(STEPS):
        optimiser.zero_grad()
        (adapter.delta_weight() * upstream).sum().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    way = float(adapter.delta_weight().detach().double().norm())
    return way if math.isfinite(way) else math.inf
