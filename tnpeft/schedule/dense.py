"""Planning the dense mode: sizes are checked, a path is found, and its steps are priced."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from tnpeft.errors import BindError, Problem
from tnpeft.network.model import Network
from tnpeft.planning.path import find_path
from tnpeft.planning.steps import steps_of
from tnpeft.schedule.model import Plan

__all__ = ["plan_dense", "stored_legs"]


@lru_cache(maxsize=1024)
def plan_dense(network: Network) -> Plan:
    """Contract all cores to the delta weight, which one convolution then uses together with the base weight."""
    if network.parts != (network,):
        return Plan(network, "dense", (), (), tuple(map(plan_dense, network.parts)))
    problems = tuple(_problems(network))
    if problems:
        raise BindError(*problems)
    inputs = tuple(network.symbols_of(core) for core in network.cores)
    output = "".join(network.symbols[leg] for leg in stored_legs(network))
    sizes = tuple((letter, network.sizes[leg]) for leg, letter in network.symbols.items())
    path = find_path(inputs, output, sizes)
    cores = [(number, core.legs) for number, core in enumerate(network.cores)]
    steps = tuple(steps_of(cores, network.open_legs, path, network.sizes))
    return Plan(network, "dense", path, steps)


def stored_legs(network: Network) -> tuple[str, ...]:
    """The weight's legs in the order in which the layer stores it."""
    outputs, inputs, *kernel = network.weight
    ends = (inputs, outputs) if network.layer.transposed else (outputs, inputs)
    return tuple(leg for axis in (*ends, *kernel) for leg in axis)


def _problems(network: Network) -> Iterator[Problem]:
    """What opt_einsum would broadcast or sum in silence."""
    places: dict[str, int] = dict.fromkeys(network.open_legs, 1)
    for core in network.cores:
        for leg, size in zip(core.legs, core.shape, strict=True):
            places[leg] = places.get(leg, 0) + 1
            if size != network.sizes[leg]:
                where = f"core {core.name!r}, index {leg!r}"
                fix = "Give every end of the index the same size."
                yield Problem(where, f"size {network.sizes[leg]}", f"size {size}", fix, core=core.name, index=leg)
    for leg, number in places.items():
        if number < 2:
            expected, found = "two places or more among cores and `weight`", "one"
            yield Problem(f"index {leg!r}", expected, found, "Add it to another core, or to `weight`.", index=leg)
