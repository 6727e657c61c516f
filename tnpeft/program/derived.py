"""Factors from stored cores: derived cores by products and maps, and cores under the legs of references.

With a frozen copy a derived core is carried as its change d since the start, never as a difference of rounded values:

    products    d(A B) = dA B0 + A dB                       each A - A0 of a stored core is exact
    maps        linear: f(d);  others: f(A0 + d) - f(A0), both in float64, of tensors laid out alike: equal inputs must
                give zero, and torch rounds a number by its place (in a vector of the processor, or after them);
                or a formula of their own

Gradients need no differences: the change is walked back as the value, in the dtype of the cores.

Every tensor here has an axis of layers first, so that layers alike are one computation. Derived cores that are made of
base weights are `heavy`: those of several layers are never copied together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from tnpeft.network import Network
from tnpeft.network.derived import BoundMap, BoundReference, BoundSummand, DerivedCore
from tnpeft.program.autocast import without_autocast
from tnpeft.program.maps import Map, map_change, map_function
from tnpeft.program.products import LAYERS, Factor, contract, contract_with_start

__all__ = ["Derivations", "StartValues", "build_derivations"]


class StartValues(NamedTuple):
    """What changes need of the frozen copies of all layers."""

    cores: Mapping[str, Tensor]  # every core by name, derived ones too
    inputs: Mapping[str, tuple[Tensor, ...]]  # of each map of a derived core, by its name


class _Pair(NamedTuple):
    """A derived core that is a product of a constant core and of one that changes."""

    core: DerivedCore
    constant: BoundReference
    changing: BoundReference


class Derivations:
    """The derived cores and factors of a network, from its stored cores in their order."""

    def __init__(self, network: Network) -> None:
        self.network = network.slice_network or network
        derived, stored = self.network.derived, self.network.cores
        self.names = [core.name for core in stored]
        self.copies = self.network.start == "frozen_copy"
        self._derived = {core.name for core in derived}
        self._frozen = {core.name for core in stored if core.frozen}
        weights = {core.name for core in stored if core.origin == "weight"}
        roots = {core.name: self.network.roots_of(core.name) for core in derived}
        self._constant = {name for name, cores in roots.items() if self._frozen.issuperset(cores)}
        self.light = [core for core in derived if weights.isdisjoint(roots[core.name])]
        self.heavy = [core for core in derived if not weights.isdisjoint(roots[core.name])]
        # The cores that each is made of, index cores too.
        self.reads = {core.name: (*core.sources, *(each.at for each in core.maps if each.at)) for core in derived}
        self.pairs = self._pairs()
        # The stored cores that light ones, and all of them, are made of, by their places.
        self.light_roots = self._places({root for core in self.light for root in roots[core.name]})
        self.roots = self._places({root for cores in roots.values() for root in cores})

    def _pairs(self) -> list[_Pair]:
        """The heavy cores, where each is the product of a constant and of a core that is not heavy; else none."""
        pairs, heavy = [], {core.name for core in self.heavy}
        for core in self.heavy:
            summand = core.summands[0]
            fixed = [each.core in self._frozen or each.core in self._constant for each in summand.references]
            if (
                len(core.summands) > 1
                or core.maps
                or sorted(fixed) != [False, True]
                or heavy.intersection(core.sources)
            ):
                return []
            pairs.append(_Pair(core, summand.references[fixed.index(True)], summand.references[fixed.index(False)]))
        return pairs

    def _places(self, names: set[str]) -> list[int]:
        return [place for place, name in enumerate(self.names) if name in names]

    def start(self, copies: Mapping[str, Tensor], derived: Sequence[DerivedCore]) -> StartValues:
        """What changes need, from the frozen copies by name (cores that are frozen are their own)."""
        cores = dict(copies)
        inputs: dict[str, tuple[Tensor, ...]] = {}  # an annotation, for Dynamo calls no `dict[...]()`
        with torch.no_grad():
            self._evaluate(derived, cores, inputs, self.copies)
        return StartValues(cores, inputs)

    def values(self, stored: Mapping[str, Tensor], derived: Sequence[DerivedCore]) -> list[Tensor]:
        """Derived cores, those among them that they are made of first, from cores by name."""
        cores = dict(stored)
        self._evaluate(derived, cores, {}, self.copies)
        return [cores[core.name] for core in derived]

    def differentiated(
        self, now: Mapping[str, Tensor], start: StartValues, derived: Sequence[DerivedCore]
    ) -> list[Tensor]:
        """What has the gradients of `changes`, which need no differences: the values, in the dtype of the cores."""
        changing = self._derived - self._constant
        cores = {name: start.cores[name] + core if name in changing else core for name, core in now.items()}
        cores |= {core.name: start.cores[core.name] for core in derived if core.name in self._constant}
        self._evaluate([core for core in derived if core.name not in self._constant], cores, {}, False)
        return [cores[core.name] for core in derived]

    def changes(self, now: Mapping[str, Tensor], start: StartValues, derived: Sequence[DerivedCore]) -> list[Tensor]:
        """How derived cores changed, the value of those that cannot; `now` has the same of those that are known."""
        moved = _Moved(now, start, self._derived, self._constant | self._frozen)
        with without_autocast(next(iter(now.values()))):
            for core in derived:
                moved.changes[core.name] = self._change(core, moved, start)
        return [self._given(core.name, moved.changes[core.name], start) for core in derived]

    def with_start(self, now: Mapping[str, Tensor], start: StartValues) -> tuple[StartValues, list[Tensor]]:
        """The heavy cores at the start, and their changes, made together where they are `pairs`."""
        cores, changes = dict(start.cores), []
        with without_autocast(next(iter(now.values()))):
            for core, constant, other in self.pairs:
                fixed, changing = _factor(now[constant.core], constant), _factor(now[other.core], other)
                first, changed = _under(start.cores[other.core], other), other.core in self._derived
                both = contract_with_start(fixed, first, changing, changed, (LAYERS, *core.before))
                scale = core.summands[0].scale
                value, moved = (
                    _ordered(part if scale == 1.0 else part * scale, core.before, core.legs) for part in both
                )
                cores[core.name] = value
                changes.append(moved)
        return StartValues(cores, {**start.inputs, **{pair.core.name: () for pair in self.pairs}}), changes

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
        self,
        derived: Sequence[DerivedCore],
        cores: dict[str, Tensor],
        inputs: dict[str, tuple[Tensor, ...]],
        wide: bool,
    ) -> None:
        """Add derived cores to `cores`, and what their maps act on to `inputs`; `wide` computes maps in float64."""
        if not derived:
            return
        with without_autocast(next(iter(cores.values()))):
            for core in derived:
                value = _summed([_product(summand, cores, core.before) for summand in core.summands])
                before, legs = [], core.before
                for each in core.maps:
                    before.append(value)
                    at = None if each.at is None else cores[each.at]
                    taken = value.double() if wide and not each.linear else value
                    mapped, legs = _mapped(each, [taken], legs, at, map_function(each.name))
                    value = mapped.to(value.dtype)
                cores[core.name] = _ordered(value, legs, core.legs)
                inputs[core.name] = tuple(before)

    def _change(self, core: DerivedCore, moved: _Moved, start: StartValues) -> Tensor | None:
        """How a derived core changed; None where it cannot."""
        if core.name in self._constant:
            return None
        legs = core.before
        places = [(summand, place) for summand in core.summands for place in range(len(summand.references))]
        parts = [_product_change(summand, moved, start, legs, place) for summand, place in places]
        changed = [part for part in parts if part is not None]
        if not changed:
            return None
        change = _summed(changed)
        for each, first in zip(core.maps, start.inputs[core.name], strict=True):
            at = None if each.at is None else moved.value(each.at)
            change, legs = _mapped_change(each, first, change, legs, at)
        return _ordered(change, legs, core.legs)


class _Moved:
    """Cores as they are, and how they changed since the start, each made when it is first asked for."""

    def __init__(self, now: Mapping[str, Tensor], start: StartValues, derived: set[str], constant: set[str]) -> None:
        self._start = start.cores
        self._values = {name: tensor for name, tensor in now.items() if name not in derived}
        self.changes: dict[str, Tensor | None] = {name: now[name] for name in derived.intersection(now)}
        self.changes |= dict.fromkeys(constant.intersection(now))

    def change(self, name: str) -> Tensor | None:
        """None where a core cannot change."""
        if name not in self.changes:
            self.changes[name] = self._values[name] - self._start[name]
        return self.changes[name]

    def value(self, name: str) -> Tensor:
        """A derived core is its start and its change together."""
        value = self._values.get(name)
        if value is None:
            change = self.changes[name]
            self._values[name] = value = self._start[name] if change is None else self._start[name] + change
        return value


def _summed(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def _under(core: Tensor, reference: BoundReference) -> Tensor:
    """A core of all layers under the legs of a reference."""
    return core if core.shape[1:] == reference.shape else core.reshape(core.shape[0], *reference.shape)


def _factor(core: Tensor, reference: BoundReference) -> Factor:
    return _under(core, reference), (LAYERS, *reference.legs)


def _product(summand: BoundSummand, cores: Mapping[str, Tensor], legs: Sequence[str]) -> Tensor:
    """(layers, legs): scale * einsum(cores)."""
    return _contracted(summand, [cores[reference.core] for reference in summand.references], legs)


def _product_change(
    summand: BoundSummand, moved: _Moved, start: StartValues, legs: Sequence[str], place: int
) -> Tensor | None:
    """The part of a product's change that core number `place` makes; None where that cannot change.

    einsum: cores before it as they are now, its own change, cores after it as they were.
    """
    names = [reference.core for reference in summand.references]
    change = moved.change(names[place])
    if change is None:
        return None
    before, after = map(moved.value, names[:place]), map(start.cores.__getitem__, names[place + 1 :])
    return _contracted(summand, [*before, change, *after], legs)


def _contracted(summand: BoundSummand, cores: Sequence[Tensor], legs: Sequence[str]) -> Tensor:
    product = contract([*map(_factor, cores, summand.references)], (LAYERS, *legs))
    return product if summand.scale == 1.0 else product * summand.scale


def _mapped(
    each: BoundMap, tensors: Sequence[Tensor], legs: Sequence[str], at: Tensor | None, function: Map
) -> tuple[Tensor, tuple[str, ...]]:
    """The function of tensors of equal legs, and its legs: those that the map leaves alone, those that it makes."""
    rest = tuple(leg for leg in legs if leg not in each.takes)
    moved = [_ordered(tensor, legs, (*rest, *each.takes)) for tensor in tensors]
    layers, *others = moved[0].shape[: 1 + len(rest)]
    arguments: dict[str, object] = dict(each.arguments)
    if at is not None:
        arguments["at"] = at
    flat = [tensor.reshape(layers, math.prod(others), *tensor.shape[1 + len(rest) :]) for tensor in moved]
    result = function(*flat, each.shape, **arguments)
    return result.reshape(layers, *others, *each.shape), (*rest, *each.gives)


def _mapped_change(
    each: BoundMap, first: Tensor, change: Tensor, legs: Sequence[str], at: Tensor | None
) -> tuple[Tensor, tuple[str, ...]]:
    """How a map's result changes where what it acts on changes from `first`, and its legs."""
    function, change_of = map_function(each.name), map_change(each.name)
    if each.linear:
        return _mapped(each, [change], legs, at, function)
    if change_of is not None:
        return _mapped(each, [first, change], legs, at, change_of)
    order = (*(leg for leg in legs if leg not in each.takes), *each.takes)
    wide = _ordered(first, legs, order).double().contiguous()
    moved = (wide + _ordered(change, legs, order).double()).contiguous()
    (before, made), (now, _) = (_mapped(each, [tensor], order, at, function) for tensor in (wide, moved))
    return (now - before).to(change.dtype), made


def _ordered(tensor: Tensor, legs: Sequence[str], order: Sequence[str]) -> Tensor:
    """(layers, legs) with the legs in another order."""
    return tensor if tuple(legs) == tuple(order) else tensor.permute(0, *(1 + legs.index(leg) for leg in order))


@lru_cache(maxsize=1024)
def build_derivations(network: Network) -> Derivations:
    """The derivations of a network, cached."""
    return Derivations(network)
