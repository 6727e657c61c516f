"""Derived cores of equal layers as one computation, once per forward pass, however many layers there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tnpeft.adapters import Adapter
from tnpeft.adapters.factors import KeptStart
from tnpeft.execution.batches import Sources, sources_of
from tnpeft.program import needs_plain_ops
from tnpeft.program.derived import Derivations, StartValues
from tnpeft.program.repeatable import repeatable

__all__ = ["DerivedBatch", "DerivedResults", "derived_batches"]


class DerivedResults(NamedTuple):
    """The light derived cores of one adapter, and what they were made of."""

    cores: list[Tensor]
    sources: Sources


class DerivedBatch:
    """Adapters whose derived cores are computed in the same way."""

    def __init__(self, derivations: Derivations, adapters: Sequence[Adapter]) -> None:
        self.derivations, self.adapters = derivations, tuple(adapters)
        self._start = KeptStart()

    def results(self) -> dict[Adapter, DerivedResults] | None:
        """The light derived cores of each adapter; None where somebody looks on: each makes its own."""
        derivations, count = self.derivations, len(self.adapters)
        stored = [adapter.at(derivations.light_roots) for adapter in self.adapters]
        inputs = [tensors[place] for place in range(len(derivations.light_roots)) for tensors in stored]
        if needs_plain_ops(*inputs):
            return None
        names = [derivations.names[place] for place in derivations.light_roots]
        start = self._start_values(names) if derivations.copies else None

        def made(stacked: Sequence[Tensor]) -> list[Tensor]:
            together = dict(zip(names, stacked, strict=True))
            if start is None:
                return derivations.values(together, derivations.light)
            return derivations.changes(together, start, derivations.light)

        def differentiated(stacked: Sequence[Tensor]) -> list[Tensor]:
            assert start is not None
            return derivations.differentiated(dict(zip(names, stacked, strict=True)), start, derivations.light)

        # Stacking and splitting keep nothing that a backward pass frees.
        stacked = [*_by_name(names, inputs, count).values()]
        flat = _split(repeatable(made, stacked, None if start is None else differentiated), count)
        each = len(derivations.light)
        return {
            adapter: DerivedResults(flat[place * each : (place + 1) * each], sources_of(adapter.stored))
            for place, adapter in enumerate(self.adapters)
        }

    def _start_values(self, names: Sequence[str]) -> StartValues:
        derivations, count = self.derivations, len(self.adapters)
        copies = [adapter.at(derivations.light_roots, start=True) for adapter in self.adapters]
        flat = [tensors[place] for place in range(len(names)) for tensors in copies]
        return self._start.get(flat, lambda: derivations.start(_by_name(names, flat, count), derivations.light))


def _by_name(names: Sequence[str], flat: Sequence[Tensor], count: int) -> dict[str, Tensor]:
    """The cores of all layers, from the first core of every layer, then the second of every layer."""
    return {name: _stacked(flat[place * count : (place + 1) * count]) for place, name in enumerate(names)}


def _split(tensors: Sequence[Tensor], count: int) -> list[Tensor]:
    """All derived cores of the first layer, then those of the second."""
    pieces = [tensor.split_with_sizes([1] * count) for tensor in tensors]
    return [core for of_layer in zip(*pieces, strict=True) for core in of_layer]


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """(layers, axes); one that all layers share is not copied."""
    first = tensors[0]
    if all(tensor is first for tensor in tensors):
        return first.unsqueeze(0).expand(len(tensors), *first.shape)
    return torch.stack([*tensors])


def derived_batches(adapters: Sequence[Adapter]) -> dict[Adapter, DerivedBatch]:
    """The batch of each adapter that has derived cores in common with another one."""
    alike: dict[tuple[Derivations, torch.device, torch.dtype], list[Adapter]] = {}
    for adapter in adapters:
        factors = adapter.factors
        if factors is None or not factors.derivations.light or adapter.network.layer.slices or not adapter.has_values:
            continue
        like = adapter.stored[0]
        alike.setdefault((factors.derivations, like.device, like.dtype), []).append(adapter)
    batches = [DerivedBatch(key[0], members) for key, members in alike.items() if len(members) > 1]
    return {adapter: batch for batch in batches for adapter in batch.adapters}
