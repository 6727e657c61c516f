"""How long do planning, attaching and the first step take, and how do these times grow?

    python benchmarks/plan_time.py --rounds 3

* With the cores: networks of 10 to 40 cores of many shapes. Beside the time to plan the contraction to the delta weight
  stand the operations of opt_einsum's `auto-hq` (which draws random numbers) over those of tnpeft's path: above 1,
  tnpeft's path is the cheaper. All modes together take the search for the order in which a layer's input absorbs the
  cores, and the contraction of its clusters to the delta weight, besides.
* With the layers: stacks of 60 to 600 small layers of four signatures, each in a fresh process.
* With the rank: one layer, ranks 2 to 16.

`first` is the first training step, without the optimiser, which plans the calls; `later` is a step after that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, cast

import common
import networkx
import opt_einsum
import torch
from torch import Tensor, nn

import tnpeft
from tnpeft.network import BoundCore, BoundInit, BoundTerm, Layer, Network
from tnpeft.planning import Call, find_path
from tnpeft.planning.chain_search import find_chain
from tnpeft.schedule import feasible_plans, plan

BOND = 4
OPEN_LEGS = 7
ROWS = 64
ONCE = 1.0  # seconds: what takes as long is timed no more
# Spec and kind of layer.
STACKS = (("tenvoo_l", "Conv3d"), ("lora", "Conv3d"), ("quanta", "Linear"))
WIDTHS = (8, 16, 24, 32)
SIDE = 4
# Spec, channels, kind of layer.
RANKED = (("tenvoo_l", 64, "Conv3d"), ("tenvoo_q", 64, "Conv3d"), ("lora", 64, "Conv3d"), ("lora", 256, "Linear"))
RANKED_SIDE = 8


def main() -> None:
    options = common.parser(__doc__, "plan_time.json")
    options.add_argument("--cores", nargs="*", type=int, default=[10, 14, 20, 30, 40])
    options.add_argument("--layers", nargs="*", type=int, default=[60, 120, 300, 600])
    options.add_argument("--ranks", nargs="*", type=int, default=[2, 4, 8, 16])
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument(
        "--stack", nargs=3, metavar=("SPEC", "KIND", "LAYERS"), help="measure this stack only, in this process"
    )
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.stack:
        spec, kind, layers = arguments.stack
        sys.stdout.write(json.dumps(measure_stack(spec, kind, int(layers))))
        return
    results = {"cores": with_cores(arguments), "layers": with_layers(arguments), "ranks": with_ranks(arguments)}
    common.write(arguments.out, results)


def with_cores(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for shape in SHAPES:
        for cores in arguments.cores:
            found = measure(SHAPES[shape](cores), arguments.rounds)
            rows.append({"shape": shape, "cores": cores, **found})
            print(f"{shape}, {cores} cores: {found['seconds']:.2f} s, all modes {_all_modes(rows[-1])}", flush=True)
    columns = ["shape", *(f"{cores} cores" for cores in arguments.cores)]

    def table(title: str, cell: Callable[[dict[str, Any]], str]) -> None:
        cells = [[shape, *(cell(row) for row in rows if row["shape"] == shape)] for shape in SHAPES]
        common.show(title, columns, cells)

    title = "Time to plan, and operations of auto-hq over those of the plan"
    table(title, lambda row: f"{1e3 * row['seconds']:.0f} ms, {row['auto_hq_over_tnpeft']:.2f}")
    table("Time to plan all modes, and links of the factored one (none: there is none)", _all_modes)
    return rows


def measure(network: Network, rounds: int) -> dict[str, Any]:
    seconds, found = timed(lambda: plan(network), rounds)
    # The last one is the factored plan, where there is one.
    all_seconds, last = timed(lambda: feasible_plans(network, Call(ROWS))[-1], rounds)
    inputs, output = network.einsum.split("->")
    sizes = {network.symbols[leg]: size for leg, size in network.sizes.items()}
    path = opt_einsum.paths.auto_hq([frozenset(term) for term in inputs.split(",")], frozenset(output), sizes)
    shapes = [core.shape for core in network.cores]
    other = opt_einsum.contract_path(network.einsum, *shapes, shapes=True, optimize=path)[1]
    return {
        "seconds": seconds,
        "flops": found.flops,
        "auto_hq_over_tnpeft": float(other.opt_cost) / found.flops,
        "all_modes_seconds": all_seconds,
        "links": len(last.links),
    }


def timed(make: Callable[[], tnpeft.Plan], rounds: int) -> tuple[float, tnpeft.Plan]:
    """Median seconds to plan with nothing cached, and the plan; what takes long is timed once."""
    times: list[float] = []
    while len(times) < rounds and sum(times) < ONCE:
        find_path.cache_clear()
        find_chain.cache_clear()
        start = time.perf_counter()
        found = make()
        times.append(time.perf_counter() - start)
    return statistics.median(times), found


def with_layers(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for spec, kind in STACKS:
        for layers in arguments.layers:
            command = [
                sys.executable,
                __file__,
                "--threads",
                str(arguments.threads),
                "--stack",
                spec,
                kind,
                str(layers),
            ]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            rows.append({"spec": spec, "kind": kind, "layers": layers, **found})
    columns = ("spec", "layer", "layers", "attach, ms", "again, ms", "first, ms", "later, ms", "modes")
    cells = [[row["spec"], row["kind"], row["layers"], *_milliseconds(row), _modes(row["modes"])] for row in rows]
    common.show("Attaching to a stack of layers, and its steps", columns, cells)
    return rows


def measure_stack(spec: str, kind: str, layers: int) -> dict[str, Any]:
    """Attaching to fresh models twice, then the steps of the second."""
    attaching = []
    for _ in range(2):
        model = stack(kind, layers)
        start = time.perf_counter()
        tnpeft.attach(model, spec, match=r"^\d+$", mode="auto")
        attaching.append(time.perf_counter() - start)
    first, later = steps(model, input_of(kind, WIDTHS[0], SIDE))
    return {"attach": attaching[0], "again": attaching[1], "first": first, "later": later, "modes": modes(model)}


def stack(kind: str, layers: int) -> nn.Sequential:
    """Layers of four signatures, in turn."""
    widths = [(WIDTHS[number % len(WIDTHS)], WIDTHS[(number + 1) % len(WIDTHS)]) for number in range(layers)]
    return nn.Sequential(*(layer_of(kind, *pair) for pair in widths))


def layer_of(kind: str, inputs: int, outputs: int) -> nn.Module:
    return nn.Conv3d(inputs, outputs, 3, padding=1) if kind == "Conv3d" else nn.Linear(inputs, outputs)


def input_of(kind: str, channels: int, side: int) -> Tensor:
    return torch.randn(1, channels, side, side, side) if kind == "Conv3d" else torch.randn(side**3, channels)


def with_ranks(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = [
        {"spec": spec, "kind": kind, "channels": channels, "rank": rank}
        | measure_rank(spec, layer_of(kind, channels, channels), rank, arguments.rounds)
        for spec, channels, kind in RANKED
        for rank in arguments.ranks
    ]
    columns = ("spec", "layer", "rank", "dense, ms", "factored, ms", "compile, ms", "first, ms", "later, ms", "mode")
    keys = ("plan_dense", "plan_factored", "compile", "first", "later")
    cells = [[row["spec"], _layer(row), row["rank"], *_milliseconds(row, keys), _modes(row["modes"])] for row in rows]
    common.show("Planning one layer in each mode, compiling it, and its steps", columns, cells)
    return rows


def measure_rank(name: str, layer: nn.Module, rank: int, rounds: int) -> dict[str, Any]:
    network = tnpeft.load_spec(name).bind(layer, r=rank)
    found = {
        "plan_dense": timed(lambda: plan(network), rounds)[0],
        "plan_factored": timed(lambda: plan(network, "factored"), rounds)[0],
    }
    find_path.cache_clear()
    find_chain.cache_clear()
    model = nn.Sequential(layer)
    start = time.perf_counter()
    tnpeft.attach(model, name, match=["0"], mode="auto", r=rank)
    found["compile"] = time.perf_counter() - start
    x = input_of(network.layer.kind, network.layer.in_channels, RANKED_SIDE)
    found["first"], found["later"] = steps(model, x)
    return {**found, "modes": modes(model)}


def steps(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Seconds of the first forward and backward pass, and of a later one (the second groups layers)."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        model(x).sum().backward()
        times.append(time.perf_counter() - start)
    return times[0], statistics.median(times[2:])


def modes(model: nn.Sequential) -> dict[str, int]:
    """In which modes the layers ran."""
    lasts = [layer.calls("default").last for layer in cast(Any, model)]
    names = ["dense" if last is None else last.mode for last in lasts]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def _milliseconds(row: Mapping[str, Any], keys: tuple[str, ...] = ("attach", "again", "first", "later")) -> list[str]:
    return [f"{1e3 * row[key]:.1f}" for key in keys]


def _all_modes(row: Mapping[str, Any]) -> str:
    return f"{1e3 * row['all_modes_seconds']:.0f} ms, {row['links'] or 'none'}"


def _layer(row: Mapping[str, Any]) -> str:
    return f"{row['kind']}({row['channels']}, {row['channels']})"


def _modes(found: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {mode}" for mode, number in found.items())


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
