"""Plans of the factored and hybrid modes: the known methods come out as their chains, and the rest says why not."""

from __future__ import annotations

import itertools
import math

import numpy as np
import opt_einsum
import pytest
import torch
from modes import FAST, adapted, call
from networks import random_cores
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tnpeft
from tnpeft.network import Network, Spec
from tnpeft.planning import Call, Link, nominal_call
from tnpeft.schedule import MODES, Plan, plan, predict

TUCKER = """
tnpeft: 1
name: three_in_a_row
layers: [conv, conv_transpose]
params: {r: 8}
sizes: {o: out_channels, i: in_channels, a b: r}
cores:
  middle: a b k...
  first:  b i
  last:   {legs: o a, init: zeros}
weight: o i k...
start: zero
"""


def bound(spec: str | Spec, kind: str = "Conv3d", inputs: int = 64, outputs: int = 64, **more: object) -> Network:
    spec = tnpeft.load_spec(spec) if isinstance(spec, str) else spec
    more = more if kind == "Linear" else {"kernel_size": 3, **more}
    return spec.bind(kind, in_channels=inputs, out_channels=outputs, **more)


def size(found: Plan, legs: tuple[str, ...]) -> int:
    return math.prod(found.network.sizes[leg] for leg in legs)


def axes(found: Plan) -> list[tuple[int, ...]]:
    return [link.axes for link in found.links]


def channels(found: Plan) -> list[int]:
    """Of the input, from link to link."""
    return [size(found, found.links[0].before), *(size(found, link.after) for link in found.links)]


@pytest.mark.parametrize(("width", "side"), [*itertools.product((64, 128, 256, 512), (8, 16, 32)), (32, 16), (32, 32)])
def test_tenvoo_l_is_three_one_dimensional_convolutions(width: int, side: int):
    """Cin -> (kd) -> r^2 -> (kh) -> r^2 -> (kw) -> Cout; wide layers may split the channels off pointwise, if that
    takes fewer multiplications."""
    found = plan(bound("tenvoo_l", inputs=width, outputs=width, r=4), "factored", call(side))
    moving = [place for place, link in enumerate(found.links) if link.axes]
    assert [link.axes for link in found.links if link.axes] == [(0,), (1,), (2,)]
    first, second, third = moving
    assert (second, third) == (first + 1, first + 2)
    assert channels(found)[second] == channels(found)[third] == 16
    voxel = sum(link.flops for link in found.links) / 2 / side**3
    three = width * 3 * 16 + 16 * 3 * 16 + 16 * 3 * width
    assert voxel <= three
    if len(found.links) == 3:
        assert voxel == three
    assert width > 64 or len(found.links) == 3


def test_locon_is_two_convolutions():
    found = plan(bound("lora", r=8), "factored", call(16))
    assert (axes(found), channels(found)) == ([(0, 1, 2), ()], [64, 8, 64])
    found = plan(bound("lora", "Conv1d", r=2), "factored", call(16, axes=1))
    assert (axes(found), channels(found)) == ([(0,), ()], [64, 2, 64])
    found = plan(bound("lora", "Linear", r=2), "factored", Call(32))
    assert (axes(found), channels(found)) == ([(), ()], [64, 2, 64])


@pytest.mark.parametrize("kind", ["Conv3d", "ConvTranspose3d"])
@pytest.mark.parametrize("spec", ["locon_tucker", Spec.from_yaml(TUCKER)], ids=["shipped", "other order"])
def test_tucker_is_a_small_convolution_between_two_pointwise_ones(spec: str | Spec, kind: str):
    found = plan(bound(spec, kind, 64, 128, r=8), "factored", call(16))
    assert (axes(found), channels(found)) == ([(), (0, 1, 2), ()], [64, 8, 8, 128])


def test_cp_is_its_separable_chain():
    """The one index that joins all five cores stays on the input: depthwise convolutions along one axis each."""
    found = plan(bound("cp", inputs=512, outputs=512, r=64), "factored", call(32))
    assert sorted(axis for axis in axes(found) if axis) == [(0,), (1,), (2,)]
    assert channels(found)[1:-1] == [64] * (len(found.links) - 1)
    moving = [link for link in found.links if link.axes and set(link.kept).isdisjoint({"o", "i"})]
    assert moving
    for link in moving:
        assert link.before == link.after == ("a",)
        assert link.flops == 2 * 64 * 3 * 32**3


@pytest.mark.parametrize("rows", [16, 256, 4096])
def test_quanta_on_a_linear_is_an_einsum_path_through_the_input(rows: int):
    network = bound("quanta", "Linear", 512, 512)
    found = plan(network, "factored", Call(rows))
    assert len(found.links) == 3
    assert [step for link in found.links for step in link.steps] == []
    assert channels(found) == [512] * 4
    assert _einsum_of(found, rows) == sum(link.flops for link in found.links)


@pytest.mark.parametrize("rows", [4, 64])
@pytest.mark.parametrize(
    "name", ["lora", "quanta", "lokr", "loha", "mpo", "tt_lora", "monarch", "krona", "loretta_rep"]
)
def test_paths_are_opt_einsums_with_the_input_as_one_tensor_more(name: str, rows: int):
    found = plan(bound(name, "Linear", 96, 64), "factored", Call(rows))
    if found.mode == "dense":
        assert found.reason == "every order builds the whole weight first"
        return
    assert _einsum_of(found, rows) == found.flops


def _einsum_of(found: Plan, rows: int) -> float:
    """What opt_einsum says that the path costs; its result is that of one einsum over everything."""
    network = found.network
    cores = [core.numpy() for core in random_cores(network, dtype=torch.float64)]
    terms, output = network.einsum.split("->")
    legs = "".join(network.symbols[leg] for leg in network.weight[1])
    x = np.random.default_rng(0).standard_normal((rows, *(network.sizes[leg] for leg in network.weight[1])))
    batch = opt_einsum.get_symbol(500)
    outputs = "".join(network.symbols[leg] for leg in network.weight[0])
    equation = f"{terms},{batch}{legs}->{batch}{outputs}"
    made = opt_einsum.contract(equation, *cores, x, optimize=[*found.path])
    weight = opt_einsum.contract(f"{terms}->{output}", *cores)
    expected = opt_einsum.contract(f"{output},{batch}{legs}->{batch}{outputs}", weight, x)
    np.testing.assert_allclose(made, expected, rtol=1e-9, atol=1e-9)
    shapes = [core.shape for core in cores]
    return opt_einsum.contract_path(equation, *shapes, x.shape, shapes=True, optimize=[*found.path])[1].opt_cost


REASONS = {
    "groups=2: each group has its own input": ("lora", "Conv3d", {"groups": 2}),
    "`compose: dora` needs the whole weight": ("dora", "Linear", {}),
    "a core is the base weight itself": ("hira", "Linear", {}),
    "every order builds the whole weight first": ("full", "Conv3d", {}),
}


@pytest.mark.parametrize("mode", [*FAST, "auto"])
@pytest.mark.parametrize("reason", REASONS)
def test_what_cannot_be_factored_runs_dense_and_says_why(reason: str, mode: str):
    name, kind, more = REASONS[reason]
    network = bound(name, kind, **more)
    found = plan(network, mode)
    assert (found.mode, found.links, found.chain) == ("dense", (), None)
    assert found.steps == plan(network).steps
    assert found.reason == reason


def test_a_sum_says_which_term_cannot_be_factored():
    text = """
tnpeft: 1
name: two
layers: Linear
sizes: {o: out_channels, i: in_channels, a: 2}
cores:
  up: {legs: o a, init: zeros}
  down: a i
  whole: {legs: o i, init: zeros}
terms:
  - {cores: [up, down], weight: o i}
  - {cores: [whole], weight: o i}
start: zero
"""
    network = bound(Spec.from_yaml(text), "Linear")
    assert plan(network, "factored").reason == "term 2: every order builds the whole weight first"
    assert plan(network, "hybrid").reason == "term 2: every order builds the whole weight first"


def test_kernels_that_are_padded_run_dense():
    """The layer has no entry for the last one; padded channels are no obstacle."""
    text = """
tnpeft: 1
name: padded
layers: [Conv1d]
sizes:
  o: out_channels
  i1 i2: factorize(in_channels, 2, pad=true)
  kx ky: factorize(kernel_size[0], 2, pad=true)
bond: 2
cores:
  up: o a
  on: a kx ky b
  down: b i1 i2
weight: o (i1 i2) (kx ky)
start: frozen_copy
"""
    split = Spec.from_yaml(text)
    assert plan(bound(split, "Conv1d", kernel_size=7), "factored").reason == "a kernel axis of 7 is padded to 8"
    assert plan(bound(split, "Conv1d", 7, 5, kernel_size=6), "factored").mode == "factored"


def test_plans_know_their_mode_and_their_call():
    network = bound("tenvoo_l")
    assert list(MODES) == ["dense", "factored", "hybrid", "auto"]
    dense, factored, hybrid = (plan(network, mode, call(16)) for mode in ("dense", "factored", "hybrid"))
    assert [found.mode for found in (dense, factored, hybrid)] == ["dense", "factored", "hybrid"]
    assert dense.links == hybrid.links == ()
    assert hybrid.chain == factored
    assert factored.call == hybrid.call == call(16)
    assert len({dense, factored, hybrid}) == 3
    assert plan(network, "factored", call(16)) == factored
    assert plan(network, "factored") == plan(network, "factored", nominal_call(network.layer))
    assert plan(network, "factored", call(8)) != factored
    assert plan(network, "factored", call(8)).cluster_key == plan(network, "factored", call(32)).cluster_key


def test_auto_is_one_of_the_modes():
    network = bound("tenvoo_l", inputs=512, outputs=512)
    found = plan(network, "auto", call(4))
    assert found == plan(network, found.mode, call(4))
    assert found.mode != "dense"  # where dense takes five times as long
    times = {mode: predict(plan(network, mode, call(4)), call(4)).step for mode in ("dense", *FAST)}
    assert times[found.mode] == min(times.values())


def test_links_absorb_every_core_once():
    for name in ("tenvoo_l", "tenvoo_q", "cp", "tensor_ring", "hierarchical_tucker"):
        found = plan(bound(name), "factored", call(16))
        assert found.mode == "factored", name
        _follow(found)


def _follow(found: Plan) -> None:
    """From link to link: legs come from clusters, every core and every result of a step is used once."""
    used = [number for link in found.links for step in link.steps for number in step.operands]
    used += [link.cluster for link in found.links]
    assert sorted(used) == list(range(len(found.network.cores) + len(found.steps)))
    before = found.network.weight[1]
    for link in found.links:
        assert link.before == before
        assert set(link.after) <= set(link.before) | set(link.kept)
        assert set(link.kernel) == {leg for axis in link.axes for leg in found.network.weight[2 + axis]}
        before = link.after
    assert set(before) == set(found.network.weight[0])


# Wide enough that no shift is done by a product, which would count too.
COUNTED = {
    "locon with stride": ("lora", nn.Conv2d(16, 24, 3, stride=2, padding=1), (3, 16, 33, 31)),
    "locon transposed": ("lora", nn.ConvTranspose2d(16, 24, 3, stride=2, padding=1), (2, 16, 33, 31)),
    "tucker": ("locon_tucker", nn.Conv2d(32, 16, (3, 5), stride=(1, 3), padding=1), (2, 32, 30, 40)),
    "cp": ("cp", nn.Conv3d(16, 16, 3, padding=1), (1, 16, 16, 16, 16)),
    "mpo": ("mpo", nn.Linear(64, 96), (7, 5, 64)),
}


@pytest.mark.parametrize("case", COUNTED)
def test_flops_of_links_are_those_that_torch_counts(case: str):
    """Matrix products of a call beyond the base layer's own, against the closed form; `start: zero` has no pairs."""
    name, layer, shape = COUNTED[case]
    x = torch.randn(shape)
    wrapper = adapted(layer, name, "factored")
    with torch.no_grad(), FlopCounterMode(display=False) as base:
        wrapper.base(x)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        wrapper(x)
    found = wrapper.calls("a").last.plan
    assert found.mode == "factored"
    shared = [link for link in found.links if _is_elementwise(found, link)]
    expected = sum(link.flops for link in found.links if link not in shared)
    clusters = sum(step.flops for step in found.steps if step.summed)
    assert counter.get_total_flops() - base.get_total_flops() == expected + clusters


def _is_elementwise(found: Plan, link: Link) -> bool:
    """Whether nothing is summed over, so that it is no matrix product."""
    summed = set(link.before) - set(link.after)
    return not summed and not (link.gather and link.kernel)
