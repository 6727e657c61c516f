"""What there is to draw of one network: discs, dots, lines and open legs, without any place yet."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import networkx

from tnpeft.network import BoundCore, Network

__all__ = ["ROLES", "Diagram", "Line", "Node", "Stub", "diagram_of", "mirrors", "sides"]

ROLES = ("in", "out", "kernel")
_FEWEST_TO_MIRROR, _MOST_TO_MIRROR = 2, 16
_MAPS_TRIED, _MAPS_KEPT = 400, 2


@dataclass(frozen=True)
class Node:
    """A core, or the dot of a hyperedge (`core` is None).

    `roles` are those of all its legs that are open, in the order of ROLES, and `own` those of the stubs that leave it.
    """

    name: str
    core: BoundCore | None
    roles: tuple[str, ...]
    own: tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """An index between two nodes: a bond, or a hyperedge's way from its dot to one of its cores."""

    ends: tuple[int, int]
    index: str
    size: int


@dataclass(frozen=True)
class Stub:
    """An open leg: it leaves `node` and ends in the weight, on the side of its role."""

    node: int
    index: str
    size: int
    role: str


@dataclass(frozen=True)
class Diagram:
    """The nodes (cores in file order, then dots), the lines and the stubs of one term."""

    nodes: tuple[Node, ...]
    lines: tuple[Line, ...]
    stubs: tuple[Stub, ...]

    @property
    def graph(self) -> networkx.Graph[int]:
        """Node numbers; parallel bonds are one edge that counts them in `bonds`."""
        graph: networkx.Graph[int] = networkx.Graph()
        graph.add_nodes_from(range(len(self.nodes)))
        for line in self.lines:
            bonds = graph.get_edge_data(*line.ends, {"bonds": 0})["bonds"]
            graph.add_edge(*line.ends, bonds=bonds + 1)
        return graph


def diagram_of(network: Network) -> Diagram:
    """The diagram of a network of one term.

    An index of two cores is a line and an open leg of one core is a stub; every other index is a hyperedge and
    gets a dot with a line to each of its cores, and a stub where it is open.
    """
    roles = ["out", "in", *("kernel" for _ in network.weight[2:])]
    role_of = {leg: role for role, axis in zip(roles, network.weight, strict=True) for leg in axis}
    holders: dict[str, list[int]] = {}
    for number, core in enumerate(network.cores):
        for leg in core.legs:
            holders.setdefault(leg, []).append(number)
    owner: dict[str, int] = {}
    lines: list[Line] = []
    dots: list[str] = []
    for leg, cores in holders.items():
        size = network.sizes[leg]
        if leg in role_of and len(cores) == 1:
            owner[leg] = cores[0]
        elif leg not in role_of and len(cores) == 2:
            lines.append(Line((cores[0], cores[1]), leg, size))
        else:
            owner[leg] = len(network.cores) + len(dots)
            lines += [Line((owner[leg], core), leg, size) for core in cores]
            dots.append(leg)
    stubs = [Stub(owner[leg], leg, network.sizes[leg], role) for leg, role in role_of.items() if leg in owner]
    kept: list[set[str]] = [set() for _ in range(len(network.cores) + len(dots))]
    for stub in stubs:
        kept[stub.node].add(stub.role)
    nodes = [Node(core.name, core, _ordered(role_of.get(leg) for leg in core.legs), ()) for core in network.cores]
    nodes += [Node(leg, None, _ordered([role_of.get(leg)]), ()) for leg in dots]
    nodes = [replace(node, own=_ordered(own)) for node, own in zip(nodes, kept, strict=True)]
    return Diagram(tuple(nodes), tuple(lines), tuple(stubs))


def _ordered(roles: Iterable[str | None]) -> tuple[str, ...]:
    found = set(roles)
    return tuple(role for role in ROLES if role in found)


def sides(diagram: Diagram) -> list[int | None]:
    """Where each node belongs: -1 left, 1 right, 0 in the middle, None for nodes without open legs of their own.

    The left is the input's. A core of kernel legs alone stands on the side that is fewer bonds away, a dot anywhere.
    """
    graph = diagram.graph
    to_in, to_out = (_distances(graph, diagram, role) for role in ("in", "out"))
    found: list[int | None] = []
    for number, node in enumerate(diagram.nodes):
        if not node.own or (node.core is None and node.own == ("kernel",)):
            found.append(None)
        elif {"in", "out"} & set(node.own):
            found.append(("out" in node.own) - ("in" in node.own))
        else:
            near_in, near_out = to_in.get(number, len(graph)), to_out.get(number, len(graph))
            found.append((near_out < near_in) - (near_in < near_out))
    return found


def _distances(graph: networkx.Graph[int], diagram: Diagram, role: str) -> dict[int, int]:
    border = [number for number, node in enumerate(diagram.nodes) if role in node.own]
    layers = networkx.bfs_layers(graph, border)
    return {node: steps for steps, layer in enumerate(layers) for node in layer}


def mirrors(diagram: Diagram) -> list[tuple[int, ...]]:
    """The graph's reflections that swap input and output: for each, every node's partner.

    A few are kept: first those that hold fewest nodes on the axis and turn the order of the kernel's legs round.
    Counting stops early, for a picture needs no complete list and graphs of many equal cores have millions.
    """
    graph = diagram.graph
    if not _FEWEST_TO_MIRROR <= len(graph) <= _MOST_TO_MIRROR:
        return []
    for number, node in enumerate(diagram.nodes):
        swapped = [{"in": "out", "out": "in"}.get(role, role) for role in node.own]
        graph.nodes[number]["own"] = (node.core is None, frozenset(node.own))
        graph.nodes[number]["swapped"] = (node.core is None, frozenset(swapped))
    matcher = networkx.algorithms.isomorphism.GraphMatcher(
        graph,
        graph,
        node_match=lambda one, other: one["own"] == other["swapped"],
        edge_match=lambda one, other: one["bonds"] == other["bonds"],
    )
    maps = [
        tuple(found[number] for number in graph) for found in itertools.islice(matcher.isomorphisms_iter(), _MAPS_TRIED)
    ]
    reflections = [found for found in maps if all(found[found[number]] == number for number in graph)]
    owners = list(dict.fromkeys(stub.node for stub in diagram.stubs if stub.role == "kernel"))

    def rank(found: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
        disorder = sum(abs(owners.index(found[node]) + at - len(owners) + 1) for at, node in enumerate(owners))
        return sum(found[number] == number for number in graph), disorder, found

    return sorted(reflections, key=rank)[:_MAPS_KEPT]
