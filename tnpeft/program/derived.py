"""Factors from stored cores: derived cores by products and maps, and cores under the legs of references.

With a frozen copy a derived core is carried as its change d since the start, never as a difference of rounded values:

    products    d(A B) = dA B0 + A dB                       each A - A0 of a stored core is exact
    maps        linear: f(d);  others: f(A0 + d) - f(A0), both in float64 by one call, so that equal inputs give zero

Every tensor here has an axis of layers first, so that layers alike are one computation.
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
    """The factors of a network, from its stored cores in their order; `count` of layers is what they come with."""

    def __init__(self, network: Network) -> None:
        self.network = network.slice_network or network
        self.names = [core.name for core in self.network.cores]
        self.frozen = {core.name for core in self.network.cores if core.frozen}
        self.changing = [core.changes for core in self.network.plain.cores]
        self.constant = {
            core.name for core in self.network.derived if self.frozen.issuperset(self.network.roots_of(core.name))
        }
        self.roots = sorted({root for core in self.network.derived for root in self.network.roots_of(core.name)})

    def values(self, stored: Sequence[Tensor]) -> dict[str, Tensor]:
        """Every core by name, derived ones too."""
        return dict(self._evaluated(stored).cores)

    def start(self, copies: Sequence[Tensor]) -> StartValues:
        """What `changes` needs, from the frozen copies; cores that are frozen are their own."""
        with torch.no_grad():
            return self._evaluated(copies)

    def factors(self, cores: Mapping[str, Tensor]) -> list[Tensor]:
        """What terms name, in the plain network's order."""
        return [_under(cores[factor.reference.core], factor.reference) for factor in self.network.factors]

    def changes(self, stored: Sequence[Tensor], start: StartValues) -> list[Tensor]:
        """The factors; of those that are derived and train, their change since the start."""
        cores = dict(zip(self.names, stored, strict=True))
        changed: dict[str, Tensor | None] = {}
        with without_autocast(stored[0]):
            for name, core in cores.items():
                changed[name] = None if name in self.frozen else core - start.cores[name]
            for derived in self.network.derived:
                name = derived.name
                changed[name] = change = self._change(derived, cores, changed, start)
                cores[name] = start.cores[name] if change is None else start.cores[name] + change
        chosen = zip(self.network.factors, self.changing, strict=True)
        return [
            _under(
                _known(changed[factor.reference.core]) if changes else cores[factor.reference.core], factor.reference
            )
            for factor, changes in chosen
        ]

    def _evaluated(self, stored: Sequence[Tensor]) -> StartValues:
        cores = dict(zip(self.names, stored, strict=True))
        inputs: dict[str, tuple[Tensor, ...]] = {}
        exact = self.network.start == "frozen_copy"
        with without_autocast(stored[0]):
            for derived in self.network.derived:
                value = _summed([_product(summand, cores, derived.before) for summand in derived.summands])
                before, legs = [], derived.before
                for each in derived.maps:
                    before.append(value)
                    at = None if each.at is None else cores[each.at]
                    wide = value.double() if exact and not each.linear else value
                    mapped, legs_after = _mapped(each, wide, legs, at)
                    value, legs = mapped.to(value.dtype), legs_after
                cores[derived.name] = _ordered(value, legs, derived.legs)
                inputs[derived.name] = tuple(before)
        return StartValues(cores, inputs)

    def _change(
        self,
        derived: DerivedCore,
        cores: Mapping[str, Tensor],
        changed: Mapping[str, Tensor | None],
        start: StartValues,
    ) -> Tensor | None:
        """How a derived core changed; None where it cannot."""
        if derived.name in self.constant:
            return None
        legs, totals = derived.before, []
        for summand in derived.summands:
            for place, reference in enumerate(summand.references):
                if changed[reference.core] is not None:
                    totals.append(_product(summand, cores, legs, start.cores, changed, place))
        change = _summed(totals)
        for each, first in zip(derived.maps, start.inputs[derived.name], strict=True):
            at = None if each.at is None else cores[each.at]
            if each.linear:
                change, legs_after = _mapped(each, change, legs, at)
            else:
                wide = first.double()
                both = torch.stack((wide, wide + change.double()), 1)
                after, paired = _mapped(each, both, (PAIR, *legs), at)
                legs_after = tuple(leg for leg in paired if leg != PAIR)
                before, now = after.unbind(1 + paired.index(PAIR))
                change = (now - before).to(change.dtype)
            legs = legs_after
        return _ordered(change, legs, derived.legs)


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
    arguments = dict(each.arguments)
    if at is not None:
        arguments["at"] = at  # type: ignore[assignment]
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
