"""The exponential moving average of what trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["Average"]


class Average:
    """A smoothed copy of parameters: after step n, decay * average + (1 - decay) * parameter.

    The decay starts low, min(decay, (1 + n) / (10 + n)), so that a short run's average is not its start.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters = dict(parameters)
        self.decay = decay
        self.values = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after optimiser step `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in self.values.items():
            value.lerp_(self.parameters[name], 1 - decay)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Inside, the parameters hold the average; afterwards what they held, to the bit."""
        held = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.keep()
        try:
            yield
        finally:
            self._put(held)

    def keep(self) -> None:
        """Let the parameters be the average from here on."""
        self._put(self.values)

    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        """Go on from the average of an earlier process."""
        for name, value in self.values.items():
            value.copy_(values[name])

    @torch.no_grad()
    def _put(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
