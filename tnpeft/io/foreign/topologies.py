"""The topologies that other libraries' files hold, and how to find them in a network.

A core is known by what it is joined to, never by its name: a user's own spec of the same network is
the same topology, whatever its cores and indices are called and however its cores are stored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import networkx
from networkx.algorithms.isomorphism import GraphMatcher
from torch import Tensor

from tnpeft.network import Network

__all__ = ["KRONS", "TOPOLOGIES", "WRITABLE", "Topology", "arranged", "found_in", "kron_name"]

KERNEL = "K"  # one index for each kernel axis, none for Linear


@dataclass(frozen=True)
class Topology:
    """Cores by name with their legs, and the weight's pattern. `rank` is the leg that a file's rank is the size of.

    With `one_rank` every bond has that size.
    """

    name: str
    cores: Mapping[str, str]
    weight: str
    rank: str | None = None
    start: str = "zero"
    one_rank: bool = False

    def legs(self, core: str, axes: int) -> tuple[str, ...]:
        return _expanded(self.cores[core], axes)

    def axes(self, axes: int) -> tuple[tuple[str, ...], ...]:
        """The legs of each weight axis, for a layer with so many kernel axes."""
        groups = [group or single for group, single in re.findall(r"\(([^)]*)\)|(\S+)", self.weight)]
        flat = [_expanded(group, axes) if group != KERNEL else () for group in groups]
        kernel = [(leg,) for leg in _expanded(KERNEL, axes)] if KERNEL in groups else []
        return (*(group for group in flat if group), *kernel)


def _expanded(legs: str, axes: int) -> tuple[str, ...]:
    kernel = [f"k{axis}" for axis in range(axes)]
    return tuple(leg for word in legs.split() for leg in (kernel if word == KERNEL else [word]))


_KRON = "(oa ob) (ia ib) K"
_KRON_INNER = "(ob oa) (ib ia) K"
_SMALL = {"whole": {"small": "oa ia"}, "low": {"small_up": "oa s", "small_down": "s ia"}}
_LARGE = {
    "whole": {"large": "ob ib K"},
    "low": {"up": "ob r", "down": "r ib K"},
    "tucker": {"mid": "r q K", "up": "r ob", "down": "q ib"},
}
_KRON_NAMES = {
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


def _kron(name: str, small: str, large: str, inner: bool) -> Topology:
    rank = "r" if large != "whole" else "s" if small == "low" else None
    return Topology(name, {**_SMALL[small], **_LARGE[large]}, _KRON_INNER if inner else _KRON, rank)


KRONS: Mapping[str, tuple[str, str, bool]] = {  # the forms of the two factors, and whether the small one is inside
    _KRON_NAMES[small, large] + "_inner" * inner: (small, large, inner)
    for small, large in _KRON_NAMES
    for inner in ((False, True) if large == "whole" else (False,))
}


def _tenvoo(name: str, height: str, width: str, *inner: str) -> Topology:
    """TenVOO by the legs of the cores in which its two graphs differ."""
    cores = ("i2 i1 d e", "i3 e f g", "kd g h i", height, width, "o3 m n p", "o2 p q o1", *inner)
    numbered = {str(number): legs for number, legs in enumerate(cores)}
    return Topology(name, numbered, "(o1 o2 o3) (i1 i2 i3) kd kh kw", "d", "frozen_copy", one_rank=True)


def _loha(*legs: str) -> dict[str, str]:
    return dict(zip(("up_1", "down_1", "up_2", "down_2"), legs, strict=True))


_QUANTA = {"-1 -2": "e f i2 i3", "-1 -3": "d o3 i1 f", "-2 -3": "o1 o2 d e"}
_ALL = (
    Topology("lora", {"up": "o r", "down": "r i K"}, "o i K", "r"),
    Topology("locon_tucker", {"up": "o r", "mid": "r s K", "down": "s i"}, "o i K", "r"),
    Topology("loha", _loha("o r", "r i K", "o s", "s i K"), "o i K", "r"),
    Topology(
        "loha_tucker",
        {"mid_1": "r q K", "up_1": "r o", "down_1": "q i", "mid_2": "s t K", "up_2": "s o", "down_2": "t i"},
        "o i K",
        "r",
    ),
    *(_kron(name, *parts) for name, parts in KRONS.items()),
    _tenvoo("tenvoo_l", "kh i j k", "kw k l m", "f d s h", "l t q n", "j s t"),
    _tenvoo("tenvoo_q", "kh i j", "kw j l m", "n q u s", "d f t u", "h l s t"),
    Topology("quanta", _QUANTA, "(o1 o2 o3) (i1 i2 i3)", "d", "frozen_copy"),
    # The published LoHa of a Linear: an (in, out) matrix viewed, not transposed, as (out, in).
    Topology("loha_viewed_wide", _loha("p r", "r oa ib", "p s", "s oa ib"), "(p oa) ib", "r"),
    Topology("loha_viewed_tall", _loha("oa ia r", "r q", "oa ia s", "s q"), "oa (ia q)", "r"),
)
TOPOLOGIES: Mapping[str, Topology] = {topology.name: topology for topology in _ALL}
WRITABLE = tuple(
    topology for topology in _ALL if topology.start == "zero" and not topology.name.startswith("loha_viewed")
)


def found_in(network: Network, topology: Topology) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """For each core of `topology`: the network's core and the order of its axes that gives the topology's legs.

    None where the network is another one, or keeps only a part of its entries.
    """
    plain = len(network.terms) == 1 and all(core.origin != "weight" for core in network.cores)
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


def arranged(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """A network's core with its axes in the topology's order."""
    return tensor.permute(order) if order else tensor
