"""Planning: sizes are checked, a path is found, and its steps are priced."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from tnpeft.errors import BindError, Problem, TnpeftError, near_miss
from tnpeft.network.model import Network
from tnpeft.plan.model import Plan, Step
from tnpeft.plan.path import Path, find_path

__all__ = ["MODES", "plan"]


def plan(network: Network, mode: str = "dense") -> Plan:
    """The plan of `network` in the execution mode `mode`; paths are cached per signature.

    Raises:
        TnpeftError: `mode` is unknown, or `network` is none.
        BindError: the cores' sizes contradict each other, or an index dangles.
    """
    _check_arguments(network, mode)
    return MODES[mode](network)


def _plan_dense(network: Network) -> Plan:
    """Contract all cores to the delta weight, which one convolution then uses together with the base weight."""
    if network.parts != (network,):
        return Plan(network, "dense", (), (), tuple(map(_plan_dense, network.parts)))
    problems = tuple(_problems(network))
    if problems:
        raise BindError(*problems)
    inputs = tuple(network.symbols_of(core) for core in network.cores)
    axes = list(network.weight)
    if network.layer.transposed:
        axes[0], axes[1] = axes[1], axes[0]
    output = "".join(network.symbols[leg] for axis in axes for leg in axis)
    sizes = tuple((letter, network.sizes[leg]) for leg, letter in network.symbols.items())
    path = find_path(inputs, output, sizes)
    return Plan(network, "dense", path, tuple(_steps(network, path)))


MODES: Mapping[str, Callable[[Network], Plan]] = MappingProxyType({"dense": _plan_dense})
"""Execution modes by name; each plans a network."""


def _check_arguments(network: object, mode: object) -> None:
    if not isinstance(mode, str) or mode not in MODES:
        known = ", ".join(f"`{name}`" for name in MODES)
        fix = near_miss(str(mode), MODES) or "Leave `mode` out for the default."
        raise TnpeftError(Problem("the execution mode", f"one of {known}", f"`{str(mode)[:40]}`", fix))
    if not isinstance(network, Network):
        fix = "Bind a spec to a layer: `tnpeft.plan(spec.bind(layer))`."
        raise TnpeftError(Problem("plan", "a network", type(network).__name__, fix))


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


def _steps(network: Network, path: Path) -> Iterator[Step]:
    """The path's steps; each result has the operands' legs, left before right, without those that are summed."""
    live = [(number, core.legs) for number, core in enumerate(network.cores)]
    for place, pair in enumerate(path):
        right_number, right = live.pop(max(pair))
        left_number, left = live.pop(min(pair))
        wanted = set(network.open_legs).union(*(legs for _, legs in live))
        joint = tuple(dict.fromkeys((*left, *right)))
        output = tuple(leg for leg in joint if leg in wanted)
        operations = math.prod(network.sizes[leg] for leg in joint) * (2 if len(output) < len(joint) else 1)
        elements = math.prod(network.sizes[leg] for leg in output)
        number = len(network.cores) + place
        yield Step(number, (left_number, right_number), left, right, output, operations, elements)
        live.append((number, output))
