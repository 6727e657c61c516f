"""What to draw for one network: discs, dots, lines and open legs, without positions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import networkx

from tnpeft.network import BoundCore, Network
from tnpeft.network.derived import BoundReference, Factor

__all__ = [
    "ROLES",
    "Diagram",
    "Line",
    "Node",
    "Stub",
    "diagram_of",
    "diagram_of_product",
    "mirrors",
    "roles_of",
    "sides",
]

ROLES = ("in", "out", "kernel")
INNER = "inner"  # of a leg that a derived core has open, and the weight has not
_FEWEST_TO_MIRROR, _MOST_TO_MIRROR = 2, 16
_MAPS_TRIED, _MAPS_KEPT = 400, 2


@dataclass(frozen=True)
class Node:
    """A core, or the dot of a hyperedge (`core` is None).

    `roles` are the roles of all its open legs, in the order of ROLES, and `own` those of the stubs that leave it.
    `text` is the text in it: a core that is named with other legs has the same text.
    """

    name: str
    core: BoundCore | None
    roles: tuple[str, ...]
    own: tuple[str, ...]
    text: str = ""
    derived: bool = False


@dataclass(frozen=True)
class Line:
    """An index between two nodes: a bond, or a hyperedge's line from its dot to one of its cores."""

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
        """The graph of node numbers; parallel bonds are one edge that counts them in `bonds`."""
        graph: networkx.Graph[int] = networkx.Graph()
        graph.add_nodes_from(range(len(self.nodes)))
        for line in self.lines:
            bonds = graph.get_edge_data(*line.ends, {"bonds": 0})["bonds"]
            graph.add_edge(*line.ends, bonds=bonds + 1)
        return graph


def diagram_of(part: Network, whole: Network | None = None) -> Diagram:
    """The diagram of a network of one term; `whole` is the network whose factors its cores are.

    An index of two cores is a line and an open leg of one core is a stub; every other index is a hyperedge and
    gets a dot with a line to each of its cores, and a stub where it is open. Hyperedges of the same cores share one.
    """
    factors = {factor.label: factor for factor in whole.factors} if whole is not None else {}
    cores = [core for core in part.cores if not core.is_index]
    if whole is None or not factors:
        nodes = [Node(core.name, core, (), (), core.name) for core in cores]
    else:
        nodes = [_node(whole, factors[core.name]) for core in cores]
    return _diagram(nodes, roles_of(part), part.sizes)


def diagram_of_product(network: Network, references: Sequence[BoundReference], legs: Sequence[str]) -> Diagram:
    """The diagram of a product of cores, of which `legs` stay open."""
    known = roles_of(network)
    factors = [Factor(f"{reference.core}({' '.join(reference.legs)})", reference) for reference in references]
    return _diagram(
        [_node(network, each) for each in factors], {leg: known.get(leg, INNER) for leg in legs}, network.sizes
    )


def roles_of(network: Network) -> dict[str, str]:
    """The role of each leg of the weight, of any term."""
    roles = ["out", "in", *("kernel" for _ in network.weight[2:])]
    return {leg: role for term in network.terms for role, axis in zip(roles, term.weight, strict=True) for leg in axis}


def _node(network: Network, factor: Factor) -> Node:
    """A core as a product names it."""
    name = factor.reference.core
    stored = next((core for core in network.cores if core.name == name), None)
    core = network.core_of(factor)
    core = core if stored is None else replace(core, shared=stored.shared)
    return Node(factor.label, core, (), (), name, stored is None)


def _diagram(cores: Sequence[Node], role_of: Mapping[str, str], sizes: Mapping[str, int]) -> Diagram:
    holders: dict[str, list[int]] = {}
    for number, node in enumerate(cores):
        for leg in _legs(node):
            holders.setdefault(leg, []).append(number)
    owner: dict[str, int] = {}
    lines: list[Line] = []
    dots: list[str] = []
    bundles, roles = _bundles(holders, role_of), role_of
    sizes = {bundle: math.prod(sizes[leg] for leg in bundle.split()) for bundle in bundles}
    first = {bundle.split()[0]: bundle for bundle in bundles}
    role_of = {first[leg]: role for leg, role in role_of.items() if leg in first}
    for leg, at in bundles.items():
        if leg in role_of and len(at) == 1:
            owner[leg] = at[0]
        elif leg not in role_of and len(at) == 2:
            lines.append(Line((at[0], at[1]), leg, sizes[leg]))
        else:
            owner[leg] = len(cores) + len(dots)
            lines += [Line((owner[leg], core), leg, sizes[leg]) for core in at]
            dots.append(leg)
    stubs = [Stub(owner[leg], leg, sizes[leg], role) for leg, role in role_of.items() if leg in owner]
    kept: list[set[str]] = [set() for _ in range(len(cores) + len(dots))]
    for stub in stubs:
        kept[stub.node].add(stub.role)
    nodes = [replace(node, roles=_ordered(roles.get(leg) for leg in _legs(node))) for node in cores]
    nodes += [Node(leg, None, _ordered([role_of.get(leg)]), ()) for leg in dots]
    nodes = [replace(node, own=_ordered(own, (*ROLES, INNER))) for node, own in zip(nodes, kept, strict=True)]
    return Diagram(tuple(nodes), tuple(lines), tuple(stubs))


def _bundles(holders: Mapping[str, list[int]], role_of: Mapping[str, str]) -> dict[str, list[int]]:
    """The nodes of each index; hyperedges with the same cores and the same role are one, with all their names."""
    together: dict[tuple[tuple[int, ...], str | None], list[str]] = {}
    for leg, at in holders.items():
        role = role_of.get(leg)
        alone = len(at) == 1 or (len(at) == 2 and role is None)
        together.setdefault((tuple(at), f"{role} {leg}" if alone else role), []).append(leg)
    return {" ".join(legs): list(at) for (at, _), legs in together.items()}


def _legs(node: Node) -> tuple[str, ...]:
    return node.core.legs if node.core is not None else ()


def _ordered(roles: Iterable[str | None], order: Sequence[str] = ROLES) -> tuple[str, ...]:
    found = set(roles)
    return tuple(role for role in order if role in found)


def sides(diagram: Diagram) -> list[int | None]:
    """Where each node belongs: -1 left, 1 right, 0 in the middle, None for nodes without open legs of their own.

    The left is the input's side. A core with only kernel legs is on the side that is fewer bonds away; a dot may be
    anywhere.
    """
    graph = diagram.graph
    to_in, to_out = (_distances(graph, diagram, role) for role in ("in", "out"))
    found: list[int | None] = []
    for number, node in enumerate(diagram.nodes):
        open_roles = [role for role in node.own if role != INNER]
        if not open_roles or (node.core is None and open_roles == ["kernel"]):
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

    Only a few are kept: those with the fewest nodes on the axis that reverse the order of the kernel's legs come first.
    The search stops early, because a picture needs no complete list, and graphs of many equal cores have millions.
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
