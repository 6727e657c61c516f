"""One list of what runs through a factored chain, which its memory, its time and its program read."""

from __future__ import annotations

import math

import pytest
from networks import make_network

import tnpeft
from tnpeft.planning import Axis, Call
from tnpeft.program import build_chain, build_cluster_merge, build_program
from tnpeft.schedule import Plan, plan, predict
from tnpeft.schedule.chain import Run, link_sizes, runs_of
from tnpeft.schedule.chain_legs import chain_layout, merge_steps
from tnpeft.schedule.memory import kept_results

STRIDED = Call(2, tuple(Axis(side, 4, 3, stride=2, before=1) for side in (7, 8, 8)))


def tenvoo(call: Call, mode: str = "factored", width: int = 16) -> Plan:
    network = tnpeft.load_spec("tenvoo_l").bind("Conv3d", in_channels=width, out_channels=32, kernel_size=3)
    return plan(network, mode, call)


@pytest.mark.parametrize("width", [16, 256])
def test_sizes_at_each_link(width: int) -> None:
    planned = tenvoo(STRIDED, width=width)
    network = planned.network
    links = [*link_sizes(planned, STRIDED)]
    assert [sizes.link for sizes in links] == [*planned.links]
    space = [7, 8, 8]
    for sizes in links:
        link, read = sizes.link, math.prod(space)
        assert sizes.space_before == tuple(space)
        for axis in link.axes:
            space[axis] = 4
        left = math.prod(space)
        before, after = (2 * math.prod(network.sizes[leg] for leg in legs) for legs in (link.before, link.after))
        assert sizes.space_after == tuple(space)
        assert (sizes.before, sizes.after) == (before * read, after * left)
        assert len(sizes.moving) == len(link.axes)
        assert sizes.copied == 3 ** len(link.axes) * (before * left if link.gather else after * read)
    assert space == [4, 4, 4]


def test_axes_without_legs_move_the_input_first() -> None:
    network = make_network({"up": "o r", "down": "r i"}, ["o", "i", ""], {"o": 8, "i": 4, "r": 2}, start="zero")
    call = Call(1, (Axis(9, 5, 1, stride=2),))
    first, last = link_sizes(plan(network, "factored", call), call)
    assert first.space_before == first.space_after == last.space_after == (5,)
    assert not first.moving
    assert not last.moving


def test_runs_of_a_chain() -> None:
    planned = tenvoo(STRIDED)
    runs, values = (runs_of(planned, STRIDED, hybrid) for hybrid in (False, True))
    number = len(planned.links)
    assert [len(of) for of in runs] == [number] * 4
    assert [len(of) for of in values] == [0, number, number, number - 1]
    # Pairs of a value and its change pass between two links, values alone where they are made anew and in hybrid mode.
    between = [2] * (number - 1)
    for of in (runs.outputs, runs.inputs):
        assert [run.pair_in for run in of] == [1, *between]
        assert [run.pair_out for run in of] == [*between, 1]
    assert {(run.pair_in, run.pair_out) for run in (*runs.values, *values.values, *values.inputs)} == {(1, 1)}
    assert [run.pair_out for run in runs.clusters] == [*between, 1]
    assert [run.own for run in runs.outputs] == [True] + [False] * (number - 1)
    assert [run.own for run in runs.inputs] == [False] * (number - 1) + [True]


def test_a_gradient_takes_what_an_output_takes_the_other_way() -> None:
    """Where as many voxels come in as go out, im2col and col2im have each other's sizes."""
    same = Call(1, (Axis(6, 6, 3, before=1),) * 3)
    for sizes in link_sizes(tenvoo(same), same):
        forward, back = Run(sizes, False, 1, 1), Run(sizes, False, 1, 1, back=True)
        assert {forward.arrived, back.arrived} == {sizes.before, sizes.after}
        if not sizes.moving:
            assert forward.taken == forward.arrived
            assert forward.alive == back.alive == sizes.before + sizes.after
            continue
        gathering, scattering = (forward, back) if sizes.link.gather else (back, forward)
        assert gathering.taken == gathering.copied == sizes.copied
        assert gathering.taking > gathering.arrived + gathering.copied  # one axis is padded, others are stacked
        assert scattering.taken == scattering.taking == scattering.arrived
        assert scattering.alive > scattering.arrived + scattering.copied


def test_memory_and_program_keep_the_same_results() -> None:
    for name in ("tenvoo_l", "loha", "lokr"):
        network = tnpeft.load_spec(name).bind("Conv3d", in_channels=64, out_channels=48, kernel_size=3)
        dense = plan(network)
        program = build_program(dense, (0, 1, 2, 3, 4))
        assert [term.kept for term in program.weight.terms] == [kept_results(part) for part in dense.terms or (dense,)]
    assert kept_results(dense) == tuple(2 * step.elements < network.layer.numel for step in dense.steps[:-1])


def test_memory_and_program_merge_clusters_alike() -> None:
    planned = tenvoo(STRIDED)
    weight = "".join(planned.network.symbols[leg] for axis in planned.network.weight for leg in axis)
    _, steps = merge_steps(chain_layout(planned), True, weight)
    merge = build_cluster_merge(planned, (0, 1, 2, 3, 4))
    (term,) = merge.terms
    assert [(step.left, step.right) for step in term.instructions] == [step.operands for step in steps]


def test_a_chain_is_moved_as_its_sizes_say() -> None:
    planned = tenvoo(STRIDED)
    ((chain, *_),) = build_chain(planned).terms
    for link, sizes in zip(chain.links, link_sizes(planned, STRIDED), strict=True):
        moved = link.read if sizes.link.gather else link.written
        assert [(axis.read, axis.written) for axis in moved.axes] == [(axis.inputs, 4) for axis in sizes.moving]
        assert not (link.written if sizes.link.gather else link.read).axes


def test_a_larger_batch_takes_more_of_both() -> None:
    twice = Call(2 * STRIDED.batch, STRIDED.axes)
    small, large = tenvoo(STRIDED), tenvoo(twice)
    assert small.memory.peak < large.memory.peak
    assert predict(small, STRIDED).step < predict(large, twice).step
