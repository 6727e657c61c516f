"""The topologies that other libraries' files hold, and how to find them in a network.

A core is identified by what it is joined to, never by its name. So a user's own spec of the same network has the same
topology, whatever the names of its cores and indices and the order of its axes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import networkx
from networkx.algorithms.isomorphism import GraphMatcher

from tnpeft.network import Network, load_spec
from tnpeft.spec.pattern import Axes, expand, expand_axes

__all__ = ["KRONS", "TOPOLOGIES", "WRITABLE", "Topology", "found_in", "kron_name", "topology_named"]


@dataclass(frozen=True)
class Topology:
    """Cores by name with their legs, and the weight's axes of legs, as a spec has them: `k...` is unexpanded.

    With `one_rank` every bond has the same size.
    """

    name: str
    cores: Mapping[str, tuple[str, ...]]
    weight: Axes
    start: str = "zero"
    one_rank: bool = False

    def legs(self, core: str, kernel_axes: int) -> tuple[str, ...]:
        return expand(self.cores[core], kernel_axes)

    def axes(self, kernel_axes: int) -> Axes:
        """The legs of each weight axis, for a layer with so many kernel axes."""
        return expand_axes(self.weight, kernel_axes)

    @property
    def rank(self) -> str | None:
        """The bond whose size a file calls the rank, the first by name; None where there is no bond."""
        opened = {leg for axis in self.weight for leg in axis}
        return min((leg for legs in self.cores.values() for leg in legs if leg not in opened), default=None)


_KRON_NAMES = {  # by the forms of the small and the large factor
    ("whole", "low"): "lokr",
    ("low", "low"): "lokr_both",
    ("whole", "whole"): "krona",
    ("low", "whole"): "lokr_small",
    ("whole", "tucker"): "lokr_tucker",
    ("low", "tucker"): "lokr_both_tucker",
}


def kron_name(small: str, large: str, inner: bool = False) -> str:
    """The topology of a Kronecker product of these factors; `inner` where the small one is the inner one."""
    return _KRON_NAMES[small, large] + "_inner" * inner


KRONS: Mapping[str, tuple[str, str, bool]] = {  # the forms of the two factors, and whether the small one is inside
    kron_name(small, large, inner): (small, large, inner)
    for small, large in _KRON_NAMES
    for inner in ((False, True) if large == "whole" else (False,))
}
WRITABLE = ("lora", "locon_tucker", "loha", "loha_tucker", *KRONS)
# The published LoHa of a Linear: an (in, out) matrix viewed, not transposed, as (out, in).
_VIEWED = {
    "loha_viewed_wide": (("p r", "r oa ib", "p s", "s oa ib"), (("p", "oa"), ("ib",))),
    "loha_viewed_tall": (("oa ia r", "r q", "oa ia s", "s q"), (("oa",), ("ia", "q"))),
}
TOPOLOGIES = (*WRITABLE, "tenvoo_l", "tenvoo_q", "quanta", *_VIEWED)


@cache
def topology_named(name: str) -> Topology:
    """That of the shipped spec of this name, or one of `TOPOLOGIES` made of the cores of shipped ones."""
    if name in _VIEWED:
        legs, weight = _VIEWED[name]
        cores = ("up_1", "down_1", "up_2", "down_2")
        return Topology(name, {core: tuple(words.split()) for core, words in zip(cores, legs, strict=True)}, weight)
    if name in KRONS:
        return _kron(name, *KRONS[name])
    return _shipped(name)


def _shipped(name: str) -> Topology:
    spec = load_spec(name)
    cores = {core.name: core.legs for core in spec.cores}
    return Topology(name, cores, spec.terms[0].weight, spec.start, spec.bond is not None)


def _kron(name: str, small: str, large: str, inner: bool) -> Topology:
    """The small factor's cores of one shipped spec and the large one's of another."""
    both, other = _shipped(_KRON_NAMES[small, "low"]), _shipped(_KRON_NAMES["whole", large])
    cores = {core: legs for core, legs in both.cores.items() if core.startswith("small")}
    for core, legs in other.cores.items():
        if core != "small":
            cores[core] = tuple("t" if leg == "s" else leg for leg in legs)  # `s` is a bond of the small factor
    weight = tuple(axis[::-1] for axis in other.weight) if inner else other.weight
    return Topology(name, cores, weight)


def found_in(network: Network, topology: Topology) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """For each core of `topology`: the network's core and the order of its axes that gives the topology's legs.

    None if it is another network, contracts tensors other than those it stores, or keeps only a part of its entries.
    """
    plain = len(network.terms) == 1 and not network.factors and all(core.origin != "weight" for core in network.cores)
    if not plain or network.padded_shape != network.layer.weight_shape:
        return None
    axes = len(network.layer.kernel_size)
    wanted = {core: topology.legs(core, axes) for core in topology.cores}
    have = {core.name: core.legs for core in network.cores}
    if sorted(map(len, wanted.values())) != sorted(map(len, have.values())):
        return None
    matcher = GraphMatcher(
        _graph(wanted, topology.axes(axes)), _graph(have, network.weight), node_match=lambda one, other: one == other
    )
    if not matcher.is_isomorphic():
        return None
    to = matcher.mapping
    found = {}
    for core, legs in wanted.items():
        name = to["core", core][1]
        found[core] = (name, tuple(have[name].index(to["index", leg][1]) for leg in legs))
    return found


def _graph(cores: Mapping[str, tuple[str, ...]], weight: Iterable[tuple[str, ...]]) -> networkx.Graph[tuple[str, str]]:
    """Cores and indices; an open index is marked with its place in the weight."""
    graph: networkx.Graph[tuple[str, str]] = networkx.Graph()
    places = {leg: (axis, place) for axis, legs in enumerate(weight) for place, leg in enumerate(legs)}
    for core, legs in cores.items():
        graph.add_node(("core", core), place="core")
        for leg in legs:
            graph.add_node(("index", leg), place=places.get(leg))
            graph.add_edge(("core", core), ("index", leg))
    return graph
