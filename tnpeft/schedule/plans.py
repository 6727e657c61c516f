"""The plan of each mode: a path over all cores, an order of clusters to absorb, or a path that passes through these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

from opt_einsum.paths import ssa_to_linear

from tnpeft.errors import BindError, Problem
from tnpeft.network.model import Network
from tnpeft.planning.bitsets import Graph
from tnpeft.planning.call import Call
from tnpeft.planning.chain_search import Absorption, find_chain
from tnpeft.planning.path import Path, find_path
from tnpeft.planning.steps import Link, steps_of
from tnpeft.schedule.model import Plan
from tnpeft.schedule.side import side_of

__all__ = ["obstacle", "plan_dense", "plan_factored", "plan_hybrid"]

Tensors = Sequence[tuple[int, tuple[str, ...]]]
"""Numbers and legs."""


@lru_cache(maxsize=1024)
def plan_dense(network: Network) -> Plan:
    """Contract all cores to the delta weight, which one call of the layer then uses together with the base weight."""
    if network.plain is not network:
        return plan_dense(network.plain)
    if network.parts != (network,):
        return Plan(network, "dense", (), (), tuple(map(plan_dense, network.parts)))
    if problems := tuple(_problems(network)):
        raise BindError(*problems)
    cores = [(number, core.legs) for number, core in enumerate(network.cores)]
    path = _path_over(network, cores, _stored_legs(network))
    return Plan(network, "dense", path, tuple(steps_of(cores, network.open_legs, path, network.sizes)))


def obstacle(network: Network) -> str | None:
    """Why a network cannot be contracted with its layer's input, whatever the call, or None if it may be."""
    network = network.plain
    if network.layer.slices:
        return "a stack of layers: each slice has its own input"
    if network.layer.groups > 1:
        return f"groups={network.layer.groups}: each group has its own input"
    if network.compose is not None:
        return f"`compose: {network.compose}` needs the whole weight"
    if any(core.origin == "weight" for part in network.parts for core in part.cores):
        return "a core is the base weight itself"
    return next((reason for part in network.parts if (reason := _padded_kernel(part))), None)


def _padded_kernel(network: Network) -> str | None:
    """Channels may be padded: the chain's input and output are. Entries of the kernel that the layer lacks may not."""
    for has, size in zip(network.padded_shape[2:], network.layer.kernel_size, strict=True):
        if has != size:
            return f"a kernel axis of {size} is padded to {has}"
    return None


def plan_factored(network: Network, call: Call, whole: bool = False) -> Plan | str:
    """The plan of the chain for one call, or why there is none; with `whole` one link of all cores is a chain too."""
    network = network.plain
    if (side := side_of(network)) is not None:
        chain = plan_factored(side.network, side.call(call), whole=True)
        return chain if isinstance(chain, str) else replace(chain, side=side.name)
    if reason := obstacle(network):
        return reason
    if network.parts != (network,):
        parts = [plan_factored(part, call, whole) for part in network.parts]
        for number, part in enumerate(parts):
            if isinstance(part, str):
                return f"term {number + 1}: {part}"
        terms = tuple(part for part in parts if isinstance(part, Plan))
        return Plan(network, "factored", (), (), terms, call=call)
    absorptions = find_chain(_graph(network, whole), call)
    if isinstance(absorptions, str):
        return absorptions
    links = tuple(_links(network, absorptions))
    steps = tuple(step for link in links for step in link.steps)
    return Plan(network, "factored", _path(network, links), steps, call=call, links=links)


def plan_hybrid(dense: Plan, chain: Plan) -> Plan:
    """The plan that contracts the clusters of `chain`, a factored plan, to the delta weight."""
    terms = tuple(plan_hybrid(part, one) for part, one in zip(dense.terms, chain.terms, strict=True))
    hybrid = replace(dense, mode="hybrid", terms=terms, call=chain.call, chain=chain)
    if terms:
        return replace(hybrid, terms=tuple(replace(term, chain=None) for term in terms))
    network = chain.network
    # In the order of the cores: where each is a cluster by itself, the path is the dense mode's, which is known.
    clusters = sorted((link.cluster, link.kept) for link in chain.links)
    kept = _stored_legs(network)
    path = _path_over(network, clusters, kept)
    steps = (*chain.steps, *steps_of(clusters, kept, path, network.sizes, len(network.cores) + len(chain.steps)))
    return replace(hybrid, path=_linear([step.operands for step in steps]), steps=steps)


def _graph(network: Network, whole: bool) -> Graph:
    """In the network's letters, so that layers of one signature share a search."""
    letters = network.symbols
    outputs, inputs, *kernel = (tuple(letters[leg] for leg in axis) for axis in network.weight)
    cores = tuple(tuple(network.symbols_of(core)) for core in network.cores)
    sizes = tuple((letters[leg], network.sizes[leg]) for leg in letters)
    return Graph(cores, outputs, inputs, tuple(kernel), sizes, whole)


def _links(network: Network, absorptions: tuple[Absorption, ...]) -> Iterator[Link]:
    names = {letter: leg for leg, letter in network.symbols.items()}
    kernel = {leg for axis in network.weight[2:] for leg in axis}
    legs = network.weight[1]
    number = len(network.cores)
    for absorption in absorptions:
        after = {names[letter] for letter in absorption.legs}
        members = [(core, network.cores[core].legs) for core in absorption.cores]
        others = (core for number, core in enumerate(network.cores) if number not in absorption.cores)
        outside = {*network.open_legs, *(leg for core in others for leg in core.legs)}
        kept = tuple(dict.fromkeys(leg for _, of_core in members for leg in of_core if leg in outside))
        steps = tuple(steps_of(members, kept, _path_over(network, members, kept), network.sizes, number))
        result = steps[-1].number if steps else absorption.cores[0]
        number += len(steps)
        new = tuple(leg for leg in (*legs, *kept) if leg in after and leg not in kernel)
        axes = tuple(leg for axis in absorption.axes for leg in network.weight[2 + axis])
        yield Link(
            result, steps, kept, absorption.axes, axes, absorption.gather, legs, tuple(dict.fromkeys(new)),
            2 * absorption.multiplications,
        )  # fmt: skip
        legs = tuple(dict.fromkeys(new))


def _path_over(network: Network, tensors: Tensors, kept: tuple[str, ...]) -> Path:
    letters = network.symbols
    inputs = tuple("".join(map(letters.__getitem__, legs)) for _, legs in tensors)
    sizes = {letters[leg]: network.sizes[leg] for _, legs in tensors for leg in legs}
    return find_path(inputs, "".join(map(letters.__getitem__, kept)), tuple(sizes.items()))


def _path(network: Network, links: tuple[Link, ...]) -> Path:
    """The whole contraction in opt_einsum's linear format; the layer's input stands after the last core."""
    bearing = cores = len(network.cores)
    numbers = {number: number for number in range(cores)}
    pairs: list[tuple[int, int]] = []
    for link in links:
        for step in link.steps:
            pairs.append((numbers[step.operands[0]], numbers[step.operands[1]]))
            numbers[step.number] = cores + len(pairs)
        pairs.append((bearing, numbers[link.cluster]))
        bearing = cores + len(pairs)
    return _linear(pairs)


def _linear(pairs: Sequence[tuple[int, int]]) -> Path:
    """Pairs of tensors by number, the results counted on, as opt_einsum's linear format."""
    return tuple((min(pair), max(pair)) for pair in ssa_to_linear(pairs))


def _stored_legs(network: Network) -> tuple[str, ...]:
    """The weight's legs in the order in which the layer stores it."""
    first = 1 if network.layer.slices else 0
    outputs, inputs, *kernel = network.weight[first:]
    ends = (inputs, outputs) if network.layer.input_first else (outputs, inputs)
    return tuple(leg for axis in (*network.weight[:first], *ends, *kernel) for leg in axis)


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
