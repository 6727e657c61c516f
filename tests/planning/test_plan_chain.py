"""Searching the order in which a layer's input absorbs the cores: in time for any graph, honest about giving up."""

from __future__ import annotations

import math
import time
from pathlib import Path

import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import GRAPHS, hyperedge, make_network, network_of_graph, networks
from terminal import data, text

import tnpeft
from tnpeft.network import Network
from tnpeft.planning import chain_search, find_path, nominal_call
from tnpeft.planning.bitsets import Bitsets, Graph
from tnpeft.planning.candidates import CLUSTERS, candidates
from tnpeft.planning.chain_search import WHOLE_WEIGHT, find_chain
from tnpeft.planning.device_model import DEVICE_MODELS, device_model
from tnpeft.schedule import Plan, feasible_plans, plan
from tnpeft.schedule.plans import obstacle

GAVE_UP = "the search for an order gave up: its 40 cores can be joined in too many ways"


@pytest.fixture
def _nothing_known():
    find_path.cache_clear()
    find_chain.cache_clear()


def follow(found: Plan) -> None:
    """Each link has the legs that the definition gives it, and every core and result of a step is used once."""
    network = found.network
    used = [number for link in found.links for step in link.steps for number in step.operands]
    used += [link.cluster for link in found.links]
    assert sorted(used) == list(range(len(network.cores) + len(found.steps)))
    kernel = {leg for axis in network.weight[2:] for leg in axis}
    waiting = [set(core.legs) for core in network.cores]
    tensor = set(network.weight[1])
    for link in found.links:
        absorbed = [set(core.legs) for core in network.cores if core.name in found.cores_of(link)]
        waiting = [legs for legs in waiting if legs not in absorbed or absorbed.remove(legs)]
        later = set(network.weight[0]).union(*waiting)
        assert set(link.before) == tensor
        assert set(link.kernel) == {leg for axis in link.axes for leg in network.weight[2 + axis]}
        assert not kernel & set().union(*waiting) & set(link.kernel)
        tensor = (tensor | set(link.kept)) & later - kernel
        assert set(link.after) == tensor
    assert not waiting
    assert tensor == set(network.weight[0])


@pytest.mark.usefixtures("_nothing_known")
@pytest.mark.parametrize("shape", [*GRAPHS, "hyperedge"])
def test_forty_cores_of_any_shape_plan_in_time_in_all_modes(shape: str) -> None:
    network = hyperedge(40) if shape == "hyperedge" else network_of_graph(GRAPHS[shape])
    start = time.process_time()
    dense, hybrid, chain = feasible_plans(network, nominal_call(network.layer))
    assert time.process_time() - start < 5
    assert [found.mode for found in (dense, hybrid, chain)] == ["dense", "hybrid", "factored"]
    follow(chain)
    assert len(hybrid.path) == 39


@pytest.mark.usefixtures("_nothing_known")
@pytest.mark.parametrize("cores", [10, 14, 20])
def test_dense_graphs_of_any_size_plan_in_time(cores: int) -> None:
    start = time.process_time()
    for network in (hyperedge(cores), network_of_graph(networkx.complete_graph(cores))):
        follow(plan(network, "factored"))
    assert time.process_time() - start < 5


@pytest.mark.usefixtures("_nothing_known")
@pytest.mark.parametrize("spec", ["tenvoo_l", "tenvoo_q", "cp", "tucker5", "hierarchical_tucker"])
def test_following_a_few_sets_finds_what_following_all_does(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = tnpeft.load_spec(spec).bind("Conv3d", in_channels=64, out_channels=128, kernel_size=3)
    best = plan(network, "factored")
    monkeypatch.setattr(chain_search, "WAYS", 0)
    find_chain.cache_clear()
    assert plan(network, "factored") == best
    follow(best)


@settings(max_examples=100)
@given(network=networks(groups=False), ways=st.integers(0, 30))
def test_any_order_absorbs_each_core_once(network: Network, ways: int) -> None:
    """Cut short or not; where an order exists, the whole search finds one."""
    if obstacle(network):
        return
    whole = plan(network, "factored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain_search, "WAYS", ways)
        find_chain.cache_clear()
        short = plan(network, "factored")
    find_chain.cache_clear()
    for found in (whole, short):
        if found.mode == "factored":
            follow(found)
    assert whole.reason in (None, WHOLE_WEIGHT)
    assert (short.reason is None) <= (whole.reason is None)


def split_kernel() -> tuple[dict[str, str], dict[str, int]]:
    """A grid of 5 x 8 cores that has the two legs of its kernel axis at opposite corners."""
    legs = {core: [] for core in GRAPHS["grid"]}
    for number, edge in enumerate(GRAPHS["grid"].edges):
        for core in edge:
            legs[core].append(f"b{number}")
    for core, leg in ((0, "kx"), (39, "ky"), (7, "o"), (32, "i")):
        legs[core].append(leg)
    sizes = {leg: 2 if leg.startswith("b") else 3 for own in legs.values() for leg in own}
    return {f"c{core}": " ".join(own) for core, own in legs.items()}, sizes


@pytest.mark.parametrize("mode", ["factored", "hybrid", "auto"])
def test_a_search_that_gave_up_says_so(mode: str) -> None:
    """A kernel axis is summed in one link: that takes a cluster from corner to corner, larger than those tried."""
    cores, sizes = split_kernel()
    found = plan(make_network(cores, ["o", "i", "kx ky"], sizes), mode)
    assert (found.mode, found.reason) == ("dense", GAVE_UP)


def test_show_tells_that_a_search_gave_up(tmp_path: Path) -> None:
    cores, sizes = split_kernel()
    given = {"o": "out_channels", "i": "in_channels", "kx ky": "factorize(kernel_size[0], 2)"}
    lines = ["tnpeft: 1", "name: corners", "layers: [Conv1d]", "sizes:"]
    lines += [f"  {legs}: {size}" for legs, size in {**sizes, **given}.items() if legs not in ("kx", "ky")]
    lines += ["cores:", *(f"  {name}: {legs}" for name, legs in cores.items())]
    lines += ["weight: o i (kx ky)", "start: frozen_copy", ""]
    path = tmp_path / "corners.yaml"
    path.write_text("\n".join(lines))
    shown = data("show", path, "--layer", "Conv1d:3,3,9")
    assert shown["execution"]["modes"]["factored"]["reason"] == GAVE_UP
    printed = text("show", path, "--layer", "Conv1d:3,3,9", "--input", "2,3,16")
    assert f"as dense ({GAVE_UP})" in " ".join(printed.split())  # the table wraps it


def test_a_search_through_everything_names_the_obstacle() -> None:
    network = make_network({"full": "o i"}, "o i", {"o": 3, "i": 4})
    assert plan(network, "factored").reason == WHOLE_WEIGHT


def sets_of(graph: networkx.Graph) -> Bitsets:
    network = network_of_graph(graph)
    outputs, inputs = network.weight
    sizes = tuple(network.sizes.items())
    return Bitsets(Graph(tuple(core.legs for core in network.cores), outputs, inputs, (), sizes))


@pytest.mark.parametrize(("cores", "complete", "largest"), [(8, True, 8), (14, False, 3), (40, False, 1)])
def test_of_many_clusters_the_smaller_ones_are_tried(cores: int, complete: bool, largest: int) -> None:
    found, all_of_them = candidates(sets_of(networkx.complete_graph(cores)), device_model("cpu"))
    assert len(found) == sum(math.comb(cores, size) for size in range(1, largest + 1)) <= CLUSTERS
    assert all_of_them is complete


def test_products_of_sizes() -> None:
    sets = sets_of(networkx.complete_graph(40))
    assert sets.product(0) == 1
    assert sets.product(sets.of(["o0", "o1", "b0", "b1", "b2"])) == 3**2 * 4**3
    assert sets.product(sets.union(sets.everything)) == math.inf  # 780 legs of 4


def test_a_device_without_prices_has_those_of_a_gpu() -> None:
    assert device_model("cpu") is DEVICE_MODELS["cpu"]
    assert device_model("mps") is DEVICE_MODELS["cuda"]


@pytest.mark.parametrize("device", DEVICE_MODELS)
def test_copies_are_dearer_where_no_cache_holds_them(device: str) -> None:
    model = device_model(device)
    assert model.distance(model.cached) == 1
    assert model.distance(model.cached + 1) == model.far
