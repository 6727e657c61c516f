"""Timing the modes of a layer on a real call, to choose the fastest.

A twin of the layer's site is timed, whose adapter holds aliases of the real one's tensors. No gradient is left on these
or on the input, and the results of a pass, autocast's cache and the random state stay as they are.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tnpeft.execution.calls import Acting, Calls, Running
from tnpeft.execution.forward_pass import ModelResults
from tnpeft.execution.modes import run
from tnpeft.execution.site import Site
from tnpeft.program import needs_plain_ops, without_autocast

__all__ = ["can_be_timed", "quickest"]

# Rounds in which every mode runs once; after the first `ENOUGH` no more are begun once `SECONDS` have passed.
ROUNDS, ENOUGH, SECONDS = 9, 3, 0.25
# A mode whose best time is so many times the best of all is tried no more.
HOPELESS = 1.5


def can_be_timed(x: Tensor) -> bool:
    """Whether timing a layer on `x` is meaningful, and nothing records or counts the operations."""
    captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return not (needs_plain_ops(x) or torch._C._len_torch_dispatch_stack() or captured)


def quickest(site: Site, options: Sequence[Running], x: Tensor, rest: Sequence[Any], training: bool) -> str:
    """The mode, of the options, that takes the least time on a call, with its backward pass if `training`.

    Modes take turns and their medians are compared, so that other work on the machine slows all of them.
    """
    trial = _Trial(site, x, rest, training)
    # First runs also make what later ones find.
    alive = [option for option in options if trial(option) < math.inf] if len(options) > 1 else []
    times: dict[str, list[float]] = {option.mode: [] for option in alive}
    started = time.perf_counter()
    for number in range(ROUNDS):
        if len(alive) < 2 or (number >= ENOUGH and time.perf_counter() - started > SECONDS):
            break
        for option in alive:
            times[option.mode].append(trial(option))
        best = min(min(seconds) for seconds in times.values())
        alive = [option for option in alive if min(times[option.mode]) <= HOPELESS * best]
    if len(alive) < 2:
        return (alive or options)[0].mode
    return min(alive, key=lambda option: statistics.median(times[option.mode])).mode


class _Trial:
    """Runs a call in one mode, on aliases of everything, and says how many seconds it took."""

    def __init__(self, site: Site, x: Tensor, rest: Sequence[Any], training: bool) -> None:
        self.rest, self.training = rest, training
        self.x = x.detach().requires_grad_(training and x.requires_grad)
        self.wanted = [self.x] if self.x.requires_grad else []
        (acting,) = site.acting
        self.acting = Acting(acting.adapter.twin(self._alias), acting.scale, Calls())
        self.site = site._replace(acting=(self.acting,), results=ModelResults(), alone=self.acting)

    def __call__(self, running: Running) -> float:
        """Infinite if there is not enough memory for it."""
        try:
            with _uncached(self.x.device.type):
                return self._seconds(running)
        except torch.OutOfMemoryError:
            return math.inf

    def _seconds(self, running: Running) -> float:
        _synchronise(self.x.device)
        started = time.perf_counter()
        with contextlib.nullcontext() if self.training else torch.no_grad():
            out = run(self.site, self.acting, running, self.x, *self.rest)
        if self.training:
            with without_autocast(out):
                torch.autograd.grad(out, self.wanted, torch.ones_like(out), allow_unused=True)
        _synchronise(self.x.device)
        return time.perf_counter() - started

    def _alias(self, core: Tensor) -> Tensor:
        alias = core.detach().requires_grad_(self.training and core.requires_grad)
        self.wanted += [alias] if alias.requires_grad else []
        return alias


def _uncached(device: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast as it is, but leaving nothing in its cache."""
    if not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
