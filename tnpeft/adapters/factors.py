"""The tensors that execution modes contract in place of an adapter's stored cores: its factors, with derived cores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from tnpeft.network import Network
from tnpeft.network.derived import DerivedCore
from tnpeft.program import needs_plain_ops, saved_tensors_are_hooked, versions
from tnpeft.program.derived import Derivations, StartValues, build_derivations
from tnpeft.program.repeatable import repeatable

__all__ = ["Factors", "KeptStart", "Light"]


Light = Sequence[Tensor] | None
"""Derived cores that no base weight is part of, as a pass has made them for layers alike; None: they are not known."""


_Evaluate = Callable[[Mapping[str, Tensor], Sequence[DerivedCore]], Sequence[Tensor]]


class _Start(NamedTuple):
    """The start of derived cores, and what it was made of."""

    values: StartValues
    sources: tuple[list[int], list[int]]
    tensors: tuple[Tensor, ...]  # alive, or another one could get the id of one of them


class KeptStart:
    """What derived cores need from frozen copies, kept while the copies do not change."""

    def __init__(self) -> None:
        self._known: _Start | None = None

    def get(self, sources: Sequence[Tensor], make: Callable[[], StartValues]) -> StartValues:
        """The result of `make()`, called once as long as the `sources` are the same."""
        if needs_plain_ops(*sources):
            return make()
        made_of = [*map(id, sources)], versions(sources)
        if self._known is None or self._known.sources != made_of:
            self._known = _Start(make(), made_of, tuple(sources))
        return self._known.values


class Factors:
    """The factors of one adapter; derived cores that other layers have too may come from a forward pass."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self.derivations: Derivations = build_derivations(network)
        self._stack = network.layer.slices > 0
        self._start = KeptStart()
        self._once: tuple[object, StartValues | None] = (None, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._network,)  # copies and pickles make anew what is kept

    def values(self, stored: Sequence[Tensor], light: Light = None) -> list[Tensor]:
        """The factors made of stored cores: for `start: zero`, and for T(theta)."""
        return self._split(self.derivations.factors(self._values(stored, light)))

    def derived(self, stored: Sequence[Tensor], name: str) -> Tensor:
        """A derived core's value."""
        return self._split([self._values(stored, None)[name]])[0]

    def _values(self, stored: Sequence[Tensor], light: Light) -> dict[str, Tensor]:
        every = [*self.derivations.light, *self.derivations.heavy]
        return self._evaluated(stored, light, every, self.derivations.values)

    def changes(self, stored: Sequence[Tensor], copies: Sequence[Tensor], light: Light = None) -> list[Tensor]:
        """The factors with a frozen copy: derived cores that train are given by their change."""
        derivations = self.derivations
        if derivations.pairs and not needs_plain_ops(*stored) and not saved_tensors_are_hooked():
            return self._split(derivations.factors(self._changes_with_start(stored, copies, light)))
        start = self._start_values(copies, first=True)
        every = [*derivations.light, *derivations.heavy]
        return self._split(derivations.factors(self._changed(stored, light, every, start)))

    def _changes_with_start(
        self, stored: Sequence[Tensor], copies: Sequence[Tensor], light: Light
    ) -> dict[str, Tensor]:
        """The changes of all cores by name; the start of those that base weights are part of is made with theirs."""
        derivations, start = self.derivations, self._light_start(copies)
        now = self._changed(stored, light, derivations.light, start)
        values, changes = derivations.with_start(now, start)
        self._once = (self._made_of(copies), values)
        return now | {core.name: change for core, change in zip(derivations.heavy, changes, strict=True)}

    def start(self, copies: Sequence[Tensor]) -> list[Tensor]:
        """The factors of the frozen copies."""
        return self._split(self.derivations.factors(self._start_values(copies).cores))

    def _changed(
        self, stored: Sequence[Tensor], light: Light, derived: Sequence[DerivedCore], start: StartValues
    ) -> dict[str, Tensor]:
        """Every core by name, of `derived` ones their change."""
        return self._evaluated(
            stored,
            light,
            derived,
            lambda cores, rest: self.derivations.changes(cores, start, rest),
            lambda cores, rest: self.derivations.differentiated(cores, start, rest),
        )

    def _evaluated(
        self,
        stored: Sequence[Tensor],
        light: Light,
        derived: Sequence[DerivedCore],
        evaluate: _Evaluate,
        differentiated: _Evaluate | None = None,
    ) -> dict[str, Tensor]:
        """Every core by name: stored ones, `light` ones where these are known, what `evaluate` makes of `derived`."""
        derivations, now = self.derivations, self._layers(stored)
        if light is not None:
            now |= {core.name: tensor for core, tensor in zip(derivations.light, light, strict=True)}
        rest = [core for core in derived if core.name not in now]
        names = [name for core in rest for name in derivations.reads[core.name] if name in now]
        names = [*dict.fromkeys(names)]

        def by(function: _Evaluate) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
            return lambda tensors: function(dict(zip(names, tensors, strict=True)), rest)

        inputs = [now[name] for name in names]
        found = repeatable(by(evaluate), inputs, differentiated and by(differentiated)) if rest else []
        return now | {core.name: tensor for core, tensor in zip(rest, found, strict=True)}

    def _light_start(self, copies: Sequence[Tensor]) -> StartValues:
        """The start of derived cores that no base weight is part of, and the copies."""
        derivations, layers = self.derivations, self._layers(copies)
        sources = [copies[place] for place in derivations.light_roots]
        light = self._start.get(sources, lambda: derivations.start(layers, derivations.light))
        # Cores that no derived one is made of may be others since, the base weight above all.
        return StartValues({**light.cores, **layers}, light.inputs)

    def _start_values(self, copies: Sequence[Tensor], first: bool = False) -> StartValues:
        """The start of all derived cores. Those that base weights are part of are made anew, for these may be written
        to unseen; but what the `first` one of two calls made for one product serves both."""
        derivations, known = self.derivations, self._light_start(copies)
        if not derivations.heavy:
            return known
        made_of, (given, values) = self._made_of(copies), self._once
        if first or values is None or given is None or given != made_of:
            heavy = derivations.start(known.cores, derivations.heavy)
            values = StartValues(heavy.cores, {**known.inputs, **heavy.inputs})
        self._once = (made_of, values) if first else (None, None)
        return values

    def _made_of(self, copies: Sequence[Tensor]) -> object:
        """What tells whether derived cores were made of these copies; None where somebody looks on."""
        tensors = [copies[place] for place in self.derivations.roots]
        return None if needs_plain_ops(*copies) else ([tensor.data_ptr() for tensor in tensors], versions(tensors))

    def _layers(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """By name, with an axis of layers: the slices of a stack, or one layer."""
        names = self.derivations.names
        if not self._stack:
            return {name: tensor.unsqueeze(0) for name, tensor in zip(names, tensors, strict=True)}
        cores = self.derivations.network.cores
        slices = next(len(tensor) for tensor, core in zip(tensors, cores, strict=True) if core.shared is None)
        return {
            core.name: tensor if core.shared is None else tensor.expand(slices, *tensor.shape)
            for tensor, core in zip(tensors, cores, strict=True)
        }

    def _split(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if not self._stack:
            return [tensor.squeeze(0) for tensor in tensors]
        cores = self.derivations.network.plain.cores
        return [tensor if core.shared is None else tensor[0] for tensor, core in zip(tensors, cores, strict=False)]
