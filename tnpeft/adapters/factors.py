"""What execution modes contract in place of an adapter's stored cores: its factors, derived cores among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from tnpeft.network import Network
from tnpeft.program import needs_plain_ops, versions
from tnpeft.program.derived import Derivations, StartValues, build_derivations

__all__ = ["Factors"]


class _Start(NamedTuple):
    """The start of derived cores, and what it was made of."""

    values: StartValues
    sources: tuple[list[int], list[int]]
    tensors: tuple[Tensor, ...]  # alive, or another one could get the id of one of them


class Factors:
    """The factors of one adapter. What the start gives is kept as long as the frozen copies are as they were."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.derivations: Derivations = build_derivations(network)
        self._stack = network.layer.slices > 0
        self._places = [self.derivations.names.index(name) for name in self.derivations.roots]
        self._start: _Start | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._network,)  # copies and pickles make anew what is kept

    def values(self, stored: Sequence[Tensor]) -> list[Tensor]:
        """The factors of stored cores, with `start: zero` and for T(theta)."""
        derivations = self.derivations
        return self._split(derivations.factors(derivations.values(self._layers(stored))))

    def derived(self, stored: Sequence[Tensor], name: str) -> Tensor:
        """A derived core's value."""
        return self._split([self.derivations.values(self._layers(stored))[name]])[0]

    def changes(self, stored: Sequence[Tensor], copies: Sequence[Tensor]) -> list[Tensor]:
        """The factors with a frozen copy: of derived cores that train, their change."""
        return self._split(self.derivations.changes(self._layers(stored), self._start_values(copies)))

    def start(self, copies: Sequence[Tensor]) -> list[Tensor]:
        """The factors of the frozen copies."""
        return self._split(self.derivations.factors(self._start_values(copies).cores))

    def _start_values(self, copies: Sequence[Tensor]) -> StartValues:
        layers = self._layers(copies)
        if needs_plain_ops(*copies):
            return self.derivations.start(layers)
        sources = [copies[place] for place in self._places]
        made_of = [*map(id, sources)], versions(sources)
        if self._start is None or self._start.sources != made_of:
            self._start = _Start(self.derivations.start(layers), made_of, tuple(sources))
        known = self._start.values
        # Cores that no derived one is made of may be others since, the base weight above all.
        return StartValues({**known.cores, **dict(zip(self.derivations.names, layers, strict=True))}, known.inputs)

    def _layers(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """With an axis of layers: the slices of a stack, or one layer."""
        if not self._stack:
            return [tensor.unsqueeze(0) for tensor in tensors]
        cores = self.derivations.network.cores
        slices = next(len(tensor) for tensor, core in zip(tensors, cores, strict=True) if core.shared is None)
        return [
            tensor if core.shared is None else tensor.expand(slices, *tensor.shape)
            for tensor, core in zip(tensors, cores, strict=True)
        ]

    def _split(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if not self._stack:
            return [tensor.squeeze(0) for tensor in tensors]
        cores = self.derivations.network.plain.cores
        return [tensor if core.shared is None else tensor[0] for tensor, core in zip(tensors, cores, strict=False)]
