"""Plans: the best path where it can be had, a good one in time for any graph, the same one in every process."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import networkx
import opt_einsum
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import GRAPHS, hyperedge, make_network, network_of_graph, networks

import tnpeft
from tnpeft.errors import BindError, TnpeftError
from tnpeft.network import Network
from tnpeft.planning import find_path
from tnpeft.planning.last_step_cost import SLACK
from tnpeft.planning.path import count_connected_subsets
from tnpeft.schedule import MODES, plan

LORA = {"up": "o r", "down": "r i"}


def lora(**sizes: int) -> Network:
    return make_network(LORA, "o i", {"o": 64, "i": 32, "r": 4, **sizes})


@pytest.mark.parametrize("shape", [*GRAPHS, "hyperedge"])
def test_forty_cores_of_any_shape_plan_in_time(shape: str) -> None:
    network = hyperedge(40) if shape == "hyperedge" else network_of_graph(GRAPHS[shape])
    find_path.cache_clear()
    start = time.process_time()
    found = plan(network)
    assert time.process_time() - start < 5
    assert len(found.path) == 39
    inputs = network.einsum.split("->")[0].split(",")
    if shape in ("chain", "ring", "tree", "star", "disconnected"):  # where a greedy path is known to be good
        greedy, information = opt_einsum.contract_path(
            network.einsum, *[core.shape for core in network.cores], shapes=True, optimize="greedy"
        )
        assert len(greedy) == len(inputs) - 1
        assert found.flops <= information.opt_cost


@pytest.mark.parametrize("name", ["lora", "lora_conv2d", "locon_tucker", "tenvoo_l", "tenvoo_q", "quanta"])
def test_shipped_specs_get_the_path_of_fewest_operations(name: str) -> None:
    spec = tnpeft.load_spec(name)
    kind = "Linear" if "Linear" in spec.layers else spec.layers[-1]
    kernel = {} if kind == "Linear" else {"kernel_size": 3}
    network = spec.bind(kind, in_channels=128, out_channels=64, **kernel)
    shapes = [core.shape for core in network.cores]
    found = plan(network)
    best = opt_einsum.contract_path(network.einsum, *shapes, shapes=True, optimize="dp")[1]
    assert found.flops <= best.opt_cost  # at these sizes no other path is worth its operations
    again = opt_einsum.contract_path(network.einsum, *shapes, shapes=True, optimize=[*found.path])[1]
    assert found.flops == again.opt_cost
    assert found.largest_intermediate == again.largest_intermediate


@pytest.mark.parametrize("channels", [(128, 256), (256, 512), (512, 512), (96, 32)])
@pytest.mark.parametrize("name", ["tenvoo_l", "tenvoo_q"])
def test_a_few_more_operations_buy_a_last_step_that_writes_the_weight_well(
    name: str, channels: tuple[int, int]
) -> None:
    """The last step's operands alternate at most twice along the weight, and end in nine columns or more."""
    inputs, outputs = channels
    network = tnpeft.load_spec(name).bind("Conv3d", in_channels=inputs, out_channels=outputs, kernel_size=3)
    found = plan(network)
    shapes = [core.shape for core in network.cores]
    best = opt_einsum.contract_path(network.einsum, *shapes, shapes=True, optimize="dp")[1]
    assert found.flops <= float(best.opt_cost) * (1 + SLACK)
    left = set(found.steps[-1].left)
    runs = [list(run) for _, run in itertools.groupby(network.open_legs, key=lambda leg: leg in left)]
    assert len(runs) <= 3
    assert min(math.prod(network.sizes[leg] for leg in run) for run in runs[-2:]) >= 9


@settings(max_examples=150)
@given(network=networks())
def test_steps_follow_the_path_and_cost_what_opt_einsum_says(network: Network) -> None:
    found = plan(network)
    assert len(found.steps) == len(network.cores) - 1
    if not found.steps:
        assert found.flops == 0
        assert found.largest_intermediate == network.cores[0].numel
        return
    shapes = [core.shape for core in network.cores]
    information = opt_einsum.contract_path(network.einsum, *shapes, shapes=True, optimize=[*found.path])[1]
    assert found.flops == information.opt_cost
    assert set(found.steps[-1].output) == set(network.open_legs)
    assert [step.number for step in found.steps] == list(range(len(shapes), 2 * len(shapes) - 1))
    used = sorted(number for step in found.steps for number in step.operands)
    assert used == list(range(2 * len(shapes) - 2))
    assert str(found).count("\n") == len(found.steps)


@st.composite
def index_sets(draw: st.DrawFn) -> list[frozenset[str]]:
    return [draw(st.frozensets(st.sampled_from("abcdefg"), max_size=3)) for _ in range(draw(st.integers(1, 7)))]


@given(inputs=index_sets(), output=st.frozensets(st.sampled_from("abcdefg"), max_size=2), bound=st.integers(0, 150))
def test_connected_subsets_are_counted(inputs: list[frozenset[str]], output: frozenset[str], bound: int) -> None:
    graph = networkx.Graph()
    graph.add_nodes_from(range(len(inputs)))
    graph.add_edges_from(
        (a, b) for a, b in itertools.combinations(range(len(inputs)), 2) if (inputs[a] & inputs[b]) - output
    )
    subsets = itertools.chain.from_iterable(itertools.combinations(graph, size) for size in range(2, len(inputs) + 1))
    expected = sum(networkx.is_connected(graph.subgraph(subset)) for subset in subsets)
    neighbours = [sum(1 << other for other in graph[core]) for core in graph]
    assert count_connected_subsets(neighbours, bound) == min(expected, bound + 1)


@pytest.mark.slow
def test_paths_are_the_same_in_every_process() -> None:
    code = (
        "import test_plan as t; from tnpeft.schedule import plan; "
        "print([plan(t.network_of_graph(t.GRAPHS[name])).path for name in ('cubic', 'quartic', 'disconnected')], "
        "[plan(t.hyperedge(cores)).path for cores in (5, 8, 14)], "
        "plan(t.tnpeft.load_spec('tenvoo_q').bind('Conv3d', in_channels=64, out_channels=64, kernel_size=3)).path)"
    )
    answers = set()
    for seed, threads in (("0", "1"), ("1", "2")):
        paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads, "PYTHONPATH": paths}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        answers.add(run.stdout)
    assert len(answers) == 1


def test_planning_needs_neither_torch_nor_a_search_for_shipped_specs() -> None:
    bind = "bind('Conv3d', in_channels=64, out_channels=64, kernel_size=3)"
    code = (
        "import sys, tnpeft.schedule as s; from tnpeft.network import load_spec; "
        f"[s.plan(load_spec(name).{bind}) for name in ('tenvoo_l', 'tenvoo_q')]; "
        "assert not {'torch', 'cotengra'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_mode_is_an_error() -> None:
    with pytest.raises(TnpeftError) as caught:
        plan(lora(), mode="dens")
    known = "the execution mode: expected one of `dense`, `factored`, `hybrid`, `auto`"
    assert str(caught.value) == f"{known}, found `dens`. Did you mean `dense`?"
    with pytest.raises(TnpeftError) as caught:
        plan(lora(), mode="quick")
    assert str(caught.value) == f"{known}, found `quick`. Leave `mode` out for the default."
    assert list(MODES) == ["dense", "factored", "hybrid", "auto"]


def test_sizes_that_opt_einsum_would_broadcast_are_an_error() -> None:
    network = lora()
    up, down = network.cores
    broken = dataclasses.replace(network, cores=(up, dataclasses.replace(down, shape=(1, 32))))
    with pytest.raises(BindError) as caught:
        plan(broken)
    assert str(caught.value) == (
        "core 'down', index 'r': expected size 4, found size 1. Give every end of the index the same size."
    )
    assert caught.value.problems[0].core == "down"
    assert caught.value.problems[0].index == "r"


def test_a_dangling_index_is_an_error() -> None:
    network = make_network({"up": "o r", "down": "s i"}, "o i", {"o": 4, "i": 4, "r": 2, "s": 2})
    with pytest.raises(BindError) as caught:
        plan(network)
    assert str(caught.value) == (
        "index 'r': expected two places or more among cores and `weight`, found one. Add it to another core, or to "
        "`weight`.\n"
        "index 's': expected two places or more among cores and `weight`, found one. Add it to another core, or to "
        "`weight`."
    )


def test_costs_of_a_plan_by_hand() -> None:
    found = plan(lora())
    assert found.flops == 2 * 64 * 32 * 4
    assert found.largest_intermediate == 64 * 32
    cores, weight = 64 * 4 + 4 * 32, 64 * 32
    # Frozen copies of the cores, and nothing else: the only step makes the delta weight, which has a gradient.
    assert found.peak_bytes == 4 * (2 * cores + 2 * weight)
    assert str(found) == (
        "by hand on Linear(32, 64): dense, 1 step, 16.4 kFLOP, largest 2.05 kelements, peak 19.5 kB\n"
        "  #1 = up * down: (o r) (r i) -> (o i)  16.4 kFLOP"
    )
    chain = make_network({"a": "o r", "b": "r s", "c": "s i"}, "o i", {"o": 64, "i": 64, "r": 4, "s": 4}, start="zero")
    found = plan(chain)
    assert found.flops == 2 * (64 * 4 * 4 + 64 * 64 * 4)
    assert found.peak_bytes == 4 * (2 * 64 * 4 + 4 * 4 + 64 * 4 + 2 * 64 * 64)


def test_one_core_has_no_steps() -> None:
    found = plan(make_network({"full": "i o"}, "o i", {"o": 4, "i": 6}))
    assert (found.path, found.steps, found.flops, found.largest_intermediate) == ((), (), 0, 24)
    assert found.peak_bytes == 4 * (2 * 24 + 2 * 24)
    assert str(found) == "by hand on Linear(6, 4): dense, 0 steps, 0 FLOP, largest 24 elements, peak 384 B"


def test_scalars_alone_make_a_scalar() -> None:
    scalars = {f"core{number}": "" for number in range(9)}
    found = plan(make_network({**scalars, "one": "o i"}, "o i", {"o": 1, "i": 1}))
    assert len(found.path) == 9
    assert found.flops == 9


def test_more_indices_than_the_alphabet_has_letters() -> None:
    chain = network_of_graph(networkx.path_graph(50))
    assert len(chain.symbols) == 56
    assert len(plan(chain).path) == 49


def test_plans_are_cached_and_equal_by_signature_not_by_name() -> None:
    sizes = {"a": 12, "b": 10, "c": 3}
    one = make_network({"up": "a c", "down": "c b"}, "a b", sizes)
    other = make_network({"left": "o r", "right": "r i"}, "o i", {"o": 12, "i": 10, "r": 3})
    assert one.signature == other.signature
    first = plan(one)
    hits = find_path.cache_info().hits
    second = plan(other)
    assert find_path.cache_info().hits == hits + 1
    assert first == second
    assert hash(first) == hash(second)
    assert second.network is other
    assert second.steps[0].left == ("o", "r")
    assert first != plan(lora())
    assert math.isfinite(find_path.cache_info().maxsize)
