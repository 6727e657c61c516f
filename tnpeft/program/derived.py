"""Factors from stored cores: derived cores by products and maps, and cores under the legs of references.

With a frozen copy a derived core is carried as its change d since the start, never as a difference of rounded values:

    products    d(A B) = dA B0 + A dB                       each A - A0 of a stored core is exact
    maps        linear: f(d);  others: f(A0 + d) - f(A0), both in float64 by one call, so that equal inputs give zero

Every tensor here has an axis of layers first, so that layers alike are one computation. Derived cores that are made of
base weights are `heavy`: those of several layers are never copied together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from opt_einsum import get_symbol
from torch import Tensor

from tnpeft.network import Network
from tnpeft.network.derived import BoundMap, BoundReference, BoundSummand, DerivedCore
from tnpeft.program.autocast import without_autocast
from tnpeft.program.maps import map_function

__all__ = ["Derivations", "StartValues", "build_derivations"]

# Legs that no file can name: the axis of layers, and that of a value before and after a change.
LAYERS, PAIR = "layers.", "pair."


class StartValues(NamedTuple):
    """What changes need of the frozen copies of all layers."""

    cores: Mapping[str, Tensor]  # every core by name, derived ones too
    inputs: Mapping[str, tuple[Tensor, ...]]  # of each map of a derived core, by its name


class Derivations:
    """The derived cores and factors of a network, from its stored cores in their order."""

    def __init__(self, network: Network) -> None:
        self.network = network.slice_network or network
        derived, stored = self.network.derived, self.network.cores
        self.names = [core.name for core in stored]
        self.copies = self.network.start == "frozen_copy"
        self._frozen = {core.name for core in stored if core.frozen}
        weights = {core.name for core in stored if core.origin == "weight"}
        roots = {core.name: self.network.roots_of(core.name) for core in derived}
        self._constant = {name for name, cores in roots.items() if self._frozen.issuperset(cores)}
        self.light = [core for core in derived if weights.isdisjoint(roots[core.name])]
        self.heavy = [core for core in derived if not weights.isdisjoint(roots[core.name])]
        # The stored cores that light ones, and all of them, are made of, by their places.
        self.light_roots = self._places({root for core in self.light for root in roots[core.name]})
        self.roots = self._places({root for cores in roots.values() for root in cores})

    def _places(self, names: set[str]) -> list[int]:
        return [place for place, name in enumerate(self.names) if name in names]

    def start(self, copies: Mapping[str, Tensor], derived: Sequence[DerivedCore]) -> StartValues:
        """What changes need, from the frozen copies by name (cores that are frozen are their own)."""
        cores = dict(copies)
        inputs: dict[str, tuple[Tensor, ...]] = {}  # an annotation, for Dynamo calls no `dict[...]()`
        with torch.no_grad():
            self._evaluate(derived, cores, inputs)
        return StartValues(cores, inputs)

    def values(self, stored: Mapping[str, Tensor], derived: Sequence[DerivedCore]) -> list[Tensor]:
        """Derived cores, those among them that they are made of first, from cores by name."""
        cores = dict(stored)
        self._evaluate(derived, cores, {})
        return [cores[core.name] for core in derived]

    def changes(self, now: Mapping[str, Tensor], start: StartValues, derived: Sequence[DerivedCore]) -> list[Tensor]:
        """How derived cores changed, the value of those that cannot; `now` has the same of those that are known."""
        cores: dict[str, Tensor] = {}
        changed: dict[str, Tensor | None] = {}
        made = {core.name for core in self.network.derived}
        with without_autocast(next(iter(now.values()))):
            for name, tensor in now.items():
                first = start.cores[name]
                if name in made:
                    constant = name in self._constant
                    cores[name] = first if constant else first + tensor
                    changed[name] = None if constant else tensor
                else:
                    cores[name] = tensor
                    changed[name] = None if name in self._frozen else tensor - first
            for core in derived:
                changed[core.name] = change = self._change(core, cores, changed, start)
                cores[core.name] = start.cores[core.name] if change is None else start.cores[core.name] + change
        return [self._given(core.name, changed[core.name], start) for core in derived]

    def _given(self, name: str, change: Tensor | None, start: StartValues) -> Tensor:
        """What a factor of a derived core holds: its change, or its value where it cannot change."""
        if change is not None:
            return change
        first = start.cores[name]
        return first if name in self._constant else torch.zeros_like(first)

    def factors(self, cores: Mapping[str, Tensor]) -> list[Tensor]:
        """What terms name, in the plain network's order, from the tensor of each core."""
        return [_under(cores[factor.reference.core], factor.reference) for factor in self.network.factors]

    def _evaluate(
        self, derived: Sequence[DerivedCore], cores: dict[str, Tensor], inputs: dict[str, tuple[Tensor, ...]]
    ) -> None:
        """Add derived cores to `cores`, and what their maps act on to `inputs`."""
        if not derived:
            return
        with without_autocast(next(iter(cores.values()))):
            for core in derived:
                value = _summed([_product(summand, cores, core.before) for summand in core.summands])
                before, legs = [], core.before
                for each in core.maps:
                    before.append(value)
                    at = None if each.at is None else cores[each.at]
                    wide = value.double() if self.copies and not each.linear else value
                    mapped, legs = _mapped(each, wide, legs, at)
                    value = mapped.to(value.dtype)
                cores[core.name] = _ordered(value, legs, core.legs)
                inputs[core.name] = tuple(before)

    def _change(
        self,
        core: DerivedCore,
        cores: Mapping[str, Tensor],
        changed: Mapping[str, Tensor | None],
        start: StartValues,
    ) -> Tensor | None:
        """How a derived core changed; None where it cannot."""
        if core.name in self._constant:
            return None
        legs, parts = core.before, []
        for summand in core.summands:
            for place, reference in enumerate(summand.references):
                if changed[reference.core] is not None:
                    parts.append(_product(summand, cores, legs, start.cores, changed, place))
        if not parts:
            return None
        change = _summed(parts)
        for each, first in zip(core.maps, start.inputs[core.name], strict=True):
            at = None if each.at is None else cores[each.at]
            if each.linear:
                change, legs = _mapped(each, change, legs, at)
                continue
            order = (*(leg for leg in legs if leg not in each.takes), *each.takes)
            wide, step = _ordered(first, legs, order).double(), _ordered(change, legs, order).double()
            # Contiguous, for torch sums rows that are not in another order at the ends: equal inputs would differ.
            pair = torch.stack((wide, wide + step), 1).contiguous()
            both, paired = _mapped(each, pair, (PAIR, *order), at)
            before, now = both.unbind(1 + paired.index(PAIR))
            change, legs = (now - before).to(change.dtype), tuple(leg for leg in paired if leg != PAIR)
        return _ordered(change, legs, core.legs)


def _known(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _summed(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def _under(core: Tensor, reference: BoundReference) -> Tensor:
    """A core of all layers under the legs of a reference."""
    return core if core.shape[1:] == reference.shape else core.reshape(core.shape[0], *reference.shape)


def _product(
    summand: BoundSummand,
    cores: Mapping[str, Tensor],
    legs: Sequence[str],
    start: Mapping[str, Tensor] | None = None,
    changed: Mapping[str, Tensor | None] | None = None,
    place: int = -1,
) -> Tensor:
    """(layers, legs): scale * einsum(cores); with `changed`, the part of its change that core number `place` makes.

    einsum: cores before it as they are now, its own change, cores after it as they were.
    """
    operands, inputs = [], []
    letters = {leg: get_symbol(number) for number, leg in enumerate((LAYERS, *summand.legs))}
    for number, reference in enumerate(summand.references):
        source = cores if start is None or changed is None or number < place else start
        tensor = _known(changed[reference.core]) if changed is not None and number == place else source[reference.core]
        operands.append(_under(tensor, reference))
        inputs.append(letters[LAYERS] + "".join(letters[leg] for leg in reference.legs))
    result = letters[LAYERS] + "".join(letters[leg] for leg in legs)
    product: Tensor = torch.einsum(f"{','.join(inputs)}->{result}", *operands)
    return product if summand.scale == 1.0 else product * summand.scale


def _mapped(each: BoundMap, tensor: Tensor, legs: Sequence[str], at: Tensor | None) -> tuple[Tensor, tuple[str, ...]]:
    """The map's result with its legs: those that it leaves alone first, then those that it made."""
    rest = tuple(leg for leg in legs if leg not in each.takes)
    moved = _ordered(tensor, legs, (*rest, *each.takes))
    layers, others, taken = moved.shape[0], moved.shape[1 : 1 + len(rest)], moved.shape[1 + len(rest) :]
    arguments: dict[str, object] = dict(each.arguments)
    if at is not None:
        arguments["at"] = at
    flat = moved.reshape(layers, math.prod(others), *taken)
    result = map_function(each.name)(flat, each.shape, **arguments)
    return result.reshape(layers, *others, *each.shape), (*rest, *each.gives)


def _ordered(tensor: Tensor, legs: Sequence[str], order: Sequence[str]) -> Tensor:
    """(layers, legs) with the legs in another order."""
    return tensor if tuple(legs) == tuple(order) else tensor.permute(0, *(1 + legs.index(leg) for leg in order))


@lru_cache(maxsize=1024)
def build_derivations(network: Network) -> Derivations:
    """The derivations of a network, cached."""
    return Derivations(network)
