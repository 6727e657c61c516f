"""The space of networks: every draw is a valid spec within the budget, and equal networks have one hash."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from torch import nn

from tnpeft.errors import TnpeftError
from tnpeft.network import Layer
from tnpeft.searching.known import known_topologies
from tnpeft.searching.space import Space, Topology
from tnpeft.searching.task import Task
from tnpeft.spec.pattern import KINDS

SIDES = {"Linear": (), "Conv1d": (3,), "Conv2d": (2, 3), "Conv3d": (3, 1, 2), "ConvTranspose2d": (2, 2)}


@st.composite
def drawn(draw: st.DrawFn) -> tuple[str, Topology]:
    kind = draw(st.sampled_from([*SIDES]))
    space = Space(KINDS[kind], draw(st.integers(2, 8)))
    return kind, space.topology(space.drawn(lambda _, options: draw(st.sampled_from(options))))


@settings(deadline=None, max_examples=60)
@given(
    drawn(), st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=3), st.integers(1, 3000)
)
def test_every_network_is_a_valid_spec_within_the_budget(drawn: tuple[str, Topology], channels: list, params: int):
    kind, topology = drawn
    layers = {f"{place}": Layer(kind, *sides, SIDES[kind]) for place, sides in enumerate(channels)}
    spec = topology.spec([kind])
    task = Task(layers, (kind,), (), params)
    try:
        ranks = task.within_budget(spec, [*spec.params]).settings
    except TnpeftError as error:
        if error.problems[0].expected != "room for the smallest adapter":
            raise
        ranks, params = dict.fromkeys(spec.params, 1), math.inf
    assert min(ranks.values()) >= 1
    final = topology.spec([kind], ranks)
    count = 0
    for layer in layers.values():
        network = final.bind(layer)
        assert network.layer.weight_shape[0] == layer.out_channels
        count += sum(math.prod(core.shape) for core in network.cores)
    assert count <= params
    assert final.canonical().hash == topology.spec([kind], {**ranks}).canonical().hash


@settings(deadline=None, max_examples=40)
@given(drawn(), st.randoms(use_true_random=False))
def test_the_order_of_cores_does_not_change_the_hash(drawn: tuple[str, Topology], random):
    kind, topology = drawn
    places = [*range(len(topology.legs))]
    random.shuffle(places)  # core n goes to places[n]
    legs = [topology.legs[places.index(place)] for place in range(len(places))]
    bonds = sorted((tuple(sorted(places[core] for core in members)), width) for members, width in topology.bonds)
    turned = Topology(topology.sides, tuple(legs), tuple(bonds))
    assert turned.spec([kind]).canonical() == topology.spec([kind]).canonical()


@settings(deadline=None, max_examples=60)
@given(drawn())
def test_nothing_hangs_loose(drawn: tuple[str, Topology]):
    kind, topology = drawn
    count = len(topology.legs)
    assert count >= 2
    assert topology.bonds
    open_legs = [leg for legs in topology.legs for leg in legs]
    assert len(open_legs) == len(set(open_legs)) == sum(topology.sides) + KINDS[kind]
    for core, legs in enumerate(topology.legs):
        assert legs or sum(core in members for members, _ in topology.bonds) > 1
    for members, _ in topology.bonds:
        assert len(set(members)) == len(members) > 1
        assert set(members) <= set(range(count))


@pytest.mark.parametrize("axes", [0, 1, 2, 3])
def test_the_known_networks_are_in_the_space(axes: int):
    space = Space(axes)
    known = known_topologies(axes, 8)
    assert {"lora"} <= {*known}
    for topology in known.values():
        assert space.topology(space.choices(topology)) == topology
    assert {*known_topologies(3, 2)} == {"lora"}


def test_the_known_networks_are_those_that_ship():
    known = known_topologies(3, 8)
    layer = nn.Conv3d(6, 5, (3, 2, 4), device="meta")
    cp = known["cp"].spec(["Conv3d"], {"r0": 7}).bind(layer)
    assert cp.num_parameters == 7 * (6 + 5 + 3 + 2 + 4)
    lora = known["lora"].spec(["Conv3d"], {"r0": 2}).bind(layer)
    assert lora.num_parameters == 2 * (6 * 24 + 5)
    tucker = known["tucker"].spec(["Conv3d"], {f"r{number}": 2 for number in range(5)}).bind(layer)
    assert tucker.num_parameters == 2 * 20 + 2**5
