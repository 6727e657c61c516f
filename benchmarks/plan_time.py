"""How long does planning take, and how good is the path? Networks of 10 to 40 cores of many shapes.

Beside the time stand the operations of opt_einsum's `auto-hq` (which draws random numbers) over those of tnpeft's path:
above 1, tnpeft's path is the cheaper.
"""

from __future__ import annotations

import statistics
import time
from types import SimpleNamespace
from typing import Any, cast

import common
import networkx
import opt_einsum

from tnpeft.network import BoundCore, BoundInit, BoundTerm, Layer, Network
from tnpeft.plan import find_path, plan

BOND = 4
OPEN_LEGS = 7


def main() -> None:
    options = common.parser(__doc__, "plan_time.json")
    options.add_argument("--cores", nargs="+", type=int, default=[10, 14, 20, 30, 40])
    options.add_argument("--rounds", type=int, default=3)
    arguments = options.parse_args()
    rows = []
    for shape in SHAPES:
        for cores in arguments.cores:
            rows.append({"shape": shape, "cores": cores, **measure(SHAPES[shape](cores), arguments.rounds)})
    by_shape = {shape: [row for row in rows if row["shape"] == shape] for shape in SHAPES}
    columns = ["shape", *(f"{cores} cores" for cores in arguments.cores)]
    cells = [
        [shape, *(f"{1e3 * row['seconds']:.0f} ms, {row['auto_hq_over_tnpeft']:.2f}" for row in own)]
        for shape, own in by_shape.items()
    ]
    common.show("Time to plan, and operations of auto-hq over those of the plan", columns, cells)
    common.write(arguments.out, rows)


def measure(network: Network, rounds: int) -> dict[str, Any]:
    times = []
    for _ in range(rounds):
        find_path.cache_clear()
        start = time.perf_counter()
        found = plan(network)
        times.append(time.perf_counter() - start)
    inputs, output = network.einsum.split("->")
    sizes = {network.symbols[leg]: size for leg, size in network.sizes.items()}
    path = opt_einsum.paths.auto_hq([frozenset(term) for term in inputs.split(",")], frozenset(output), sizes)
    shapes = [core.shape for core in network.cores]
    other = opt_einsum.contract_path(network.einsum, *shapes, shapes=True, optimize=path)[1]
    return {
        "seconds": statistics.median(times),
        "flops": found.flops,
        "auto_hq_over_tnpeft": float(other.opt_cost) / found.flops,
    }


def of_graph(graph: networkx.Graph) -> Network:
    """A core for each node, a bond for each edge, and an open leg on each of the first nodes."""
    legs: dict[int, list[str]] = {node: [] for node in graph}
    for number, edge in enumerate(graph.edges):
        for node in edge:
            legs[node].append(f"b{number}")
    for node in range(OPEN_LEGS):
        legs[node].append(f"o{node}")
    return _network(legs)


def hyperedge(cores: int) -> Network:
    """One bond through all cores."""
    return _network({core: ["b", f"o{core}"] if core < OPEN_LEGS else ["b"] for core in range(cores)})


def _network(legs: dict[int, list[str]]) -> Network:
    sizes = {leg: BOND if leg.startswith("b") else 3 for own in legs.values() for leg in own}
    opened = [leg for own in legs.values() for leg in own if leg.startswith("o")]
    weight = (tuple(opened[:3]), tuple(opened[3:]))
    layer = Layer("Linear", 3 ** len(weight[1]), 3 ** len(weight[0]))
    cores = tuple(
        BoundCore(f"core{node}", tuple(own), tuple(sizes[leg] for leg in own), BoundInit("normal", {"std": 1.0}))
        for node, own in legs.items()
    )
    spec = cast(Any, SimpleNamespace(name="random", start="zero", compose=None))
    terms = (BoundTerm(tuple(core.name for core in cores), weight),)
    return Network(spec, layer, {}, sizes, cores, terms, 1.0, "")


def _grid(cores: int) -> networkx.Graph:
    rows = max(number for number in range(1, 6) if cores % number == 0)
    return networkx.convert_node_labels_to_integers(networkx.grid_2d_graph(rows, cores // rows))


SHAPES = {
    "chain": lambda cores: of_graph(networkx.path_graph(cores)),
    "ring": lambda cores: of_graph(networkx.cycle_graph(cores)),
    "tree": lambda cores: of_graph(networkx.random_labeled_tree(cores, seed=1)),
    "star": lambda cores: of_graph(networkx.star_graph(cores - 1)),
    "grid": lambda cores: of_graph(_grid(cores)),
    "cubic": lambda cores: of_graph(networkx.random_regular_graph(3, cores, seed=1)),
    "unconnected": lambda cores: of_graph(networkx.empty_graph(cores)),
    "hyperedge": hyperedge,
    "complete": lambda cores: of_graph(networkx.complete_graph(cores)),
}


if __name__ == "__main__":
    main()
