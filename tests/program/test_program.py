"""Programs against the dense einsum: values, differences, gradients, layout, tracing."""

from __future__ import annotations

import networkx
import opt_einsum
import pytest
import torch
from hypothesis import given, settings
from networks import (
    dense_delta,
    dense_weight,
    hyperedge,
    make_network,
    memory_orders,
    network_of_graph,
    networks,
    random_cores,
    relative_error,
    strides_of,
)
from torch import Tensor

import tnpeft
from tnpeft.network import Network
from tnpeft.program import Program, build_program, counting
from tnpeft.schedule import plan


def program_of(network: Network) -> Program:
    return build_program(plan(network), memory_orders(network)[0])


def moved(start: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [core + 0.01 * torch.randn(core.shape, generator=generator).to(core) for core in start]


@settings(max_examples=300)
@given(network=networks())
def test_value_delta_and_gradients_equal_the_dense_einsum(network: Network) -> None:
    start = random_cores(network, dtype=torch.float64)
    changes = random_cores(network, seed=1, dtype=torch.float64)
    cores = [
        core if bound.frozen else (core + 0.1 * change).requires_grad_()
        for bound, core, change in zip(network.cores, start, changes, strict=True)
    ]
    copy = start if network.start == "frozen_copy" else None
    trainable = [core for core in cores if core.requires_grad]
    for order in memory_orders(network):
        program = build_program(plan(network), order)
        constants = program.start(start)
        torch.testing.assert_close(program.value(cores), dense_weight(network, cores))
        delta = program.deltas(cores, constants)[0]
        expected = dense_delta(network, cores, copy)
        torch.testing.assert_close(delta, expected)
        assert delta.shape == network.layer.stored_shape
        assert delta.stride() == strides_of(delta.shape, order)
        weights = torch.randn(delta.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        found = torch.autograd.grad(delta, trainable, weights, allow_unused=True, materialize_grads=True)
        wanted = torch.autograd.grad(expected, trainable, weights, allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("shape", ["chain", "ring", "cubic", "grid", "star", "hyperedge", "unconnected"])
def test_large_networks_run(shape: str) -> None:
    """More indices than letters, and paths that are not the best: opt_einsum's own contraction is the oracle."""
    graphs = {
        "chain": networkx.path_graph(60),
        "ring": networkx.cycle_graph(40),
        "cubic": networkx.random_regular_graph(3, 24, seed=2),
        "grid": networkx.convert_node_labels_to_integers(networkx.grid_2d_graph(4, 10)),
        "star": networkx.star_graph(11),
        "unconnected": networkx.empty_graph(30),
    }
    network = hyperedge(20) if shape == "hyperedge" else network_of_graph(graphs[shape], bond=2, open_legs=6)
    start = random_cores(network, dtype=torch.float64)
    cores = [core.requires_grad_() for core in moved(start)]
    program = program_of(network)

    def oracle(tensors: list[Tensor]) -> Tensor:
        path = [*plan(network).path]
        return opt_einsum.contract(network.einsum, *tensors, optimize=path).reshape(network.padded_shape)

    expected = oracle(cores) - oracle(start)
    found = program.deltas(cores, program.start(start))[0]
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9 * float(oracle(start).abs().max()))
    upstream = torch.ones_like(found)
    wanted = torch.autograd.grad(expected, cores, upstream)
    for one, other in zip(torch.autograd.grad(found, cores, upstream), wanted, strict=True):
        assert relative_error(one, other) <= 1e-7


@settings(max_examples=25)
@given(network=networks(max_cores=4))
def test_double_backward_is_right(network: Network) -> None:
    start = random_cores(network, dtype=torch.float64)
    frozen_copy = start if network.start == "frozen_copy" else None
    program = program_of(network)
    constants = program.start(start)
    cores = [
        old if bound.frozen else new.requires_grad_()
        for bound, old, new in zip(network.cores, start, moved(start), strict=True)
    ]
    inputs = [core for core in cores if core.requires_grad]

    def penalties(delta: Tensor) -> tuple[Tensor, ...]:
        """Gradients of a gradient penalty: every second derivative enters."""
        gradients = torch.autograd.grad((delta**3).sum(), inputs, create_graph=True, materialize_grads=True)
        penalty = sum(((gradient**2).sum() for gradient in gradients), torch.zeros(()))
        return torch.autograd.grad(penalty, inputs, allow_unused=True, materialize_grads=True)

    found = penalties(program.deltas(cores, constants)[0])
    expected = penalties(dense_delta(network, cores, frozen_copy))
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "autocast"),
    [
        ("tenvoo_l", {"in_channels": 8, "out_channels": 4, "kernel_size": 3, "r": 2}, True),
        ("loha", {"in_channels": 8, "out_channels": 4, "kernel_size": 3}, False),
    ],
)
def test_a_program_compiles_as_one_graph(name: str, arguments: dict[str, int], autocast: bool) -> None:
    network = tnpeft.load_spec(name).bind("Conv3d", **arguments)
    start = random_cores(network)
    frozen_copy = start if network.start == "frozen_copy" else None
    program = program_of(network)
    constants = program.start(start)
    cores = [core.requires_grad_() for core in moved(start)]

    def update(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return program.deltas(tensors, constants)[0], program.value(tensors)

    torch.compiler.reset()
    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")(*cores)
    eager = update(*cores)
    for one, other in zip(compiled, eager, strict=True):
        assert one.dtype == torch.float32
        assert one.stride() == other.stride()
        assert relative_error(one.detach(), other.detach().double()) <= 1e-6
        upstream = torch.ones_like(one)
        for first, second in zip(
            torch.autograd.grad(one, cores, upstream, retain_graph=True),
            torch.autograd.grad(other, cores, upstream, retain_graph=True),
            strict=True,
        ):
            assert relative_error(first, second.double()) <= 1e-5
    still = torch.compile(update, fullgraph=True, backend="aot_eager")(*start)[0]
    assert frozen_copy is None or still.count_nonzero() == 0


@pytest.mark.parametrize("name", ["tenvoo_l", "tenvoo_q"])
def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass(name: str) -> None:
    network = tnpeft.load_spec(name).bind("Conv3d", in_channels=32, out_channels=64, kernel_size=3)
    start = random_cores(network)
    cores = [core.requires_grad_() for core in moved(start)]
    program = program_of(network)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        program.deltas(cores, program.start(start))[0]
    assert len(kept) >= len(cores)
    assert max(tensor.numel() for tensor in kept) < network.layer.numel / 2


def test_results_of_the_weights_size_are_made_anew() -> None:
    network = tnpeft.load_spec("loha").bind("Linear", in_features=48, out_features=64, r=3)
    cores = [core.requires_grad_() for core in random_cores(network)]
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        delta = program_of(network).deltas(cores, None)[0]
    assert len(kept) == len(cores)
    exact = [core.detach().double().requires_grad_() for core in cores]
    wanted = torch.autograd.grad(dense_delta(network, exact, None).sum(), exact)
    for one, other in zip(torch.autograd.grad(delta.sum(), cores), wanted, strict=True):
        assert relative_error(one, other) <= 1e-5


def test_only_the_gradients_that_are_needed_are_made() -> None:
    sizes = {"o": 50, "i": 60, "r": 3, "s": 4}
    network = make_network({"a": "o r", "b": "r s", "c": "s i"}, "o i", sizes, frozen=["b"])
    start = random_cores(network, dtype=torch.float64)
    cores = [moved(start)[0], start[1], moved(start)[2]]
    cores[2].requires_grad_()
    program = program_of(network)
    delta = program.deltas(cores, program.start(start))[0]
    with torch.profiler.profile() as profile:
        delta.backward(torch.ones_like(delta))
    assert [core.grad is not None for core in cores] == [False, False, True]
    products = {event.key: event.count for event in profile.key_averages()}
    assert products["aten::mm"] <= 2  # of the four that all gradients take
    assert not program.deltas([core.detach() for core in cores], program.start(start))[0].requires_grad


def test_cores_may_be_stored_in_any_way() -> None:
    network = tnpeft.load_spec("tenvoo_l").bind("Conv3d", in_channels=12, out_channels=8, kernel_size=3, r=3)
    start = random_cores(network)
    cores = moved(start)
    program = program_of(network)
    expected = program.deltas(cores, program.start(start))[0]
    value = program.value(cores)
    odd = [core.transpose(0, -1).contiguous().transpose(0, -1) for core in cores]
    assert not odd[0].is_contiguous()
    odd_start = [core.transpose(0, -1).contiguous().transpose(0, -1) for core in start]
    for core in odd:
        core.requires_grad_()
    found = program.deltas(odd, program.start(odd_start))[0]
    assert torch.equal(found, expected)
    assert torch.equal(program.value(odd), value)
    with torch.no_grad():
        assert torch.equal(program.value(odd), value)
    found.sum().backward()
    assert all(core.grad is not None and core.grad.shape == core.shape for core in odd)


def test_meta_tensors_have_shapes_and_strides() -> None:
    network = tnpeft.load_spec("tenvoo_l").bind("Conv3d", in_channels=8, out_channels=4, kernel_size=3, r=2)
    start = [core.to("meta") for core in random_cores(network)]
    cores = [core.clone().requires_grad_() for core in start]
    order = (0, 2, 3, 4, 1)
    program = build_program(plan(network), order)
    with torch.autocast("cpu"):
        delta = program.deltas(cores, program.start(start))[0]
    assert delta.device.type == "meta"
    assert delta.shape == (4, 8, 3, 3, 3)
    assert delta.stride() == strides_of(delta.shape, order)
    delta.sum().backward()
    assert [core.grad.shape for core in cores] == [core.shape for core in cores]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_agrees() -> None:
    network = tnpeft.load_spec("tenvoo_l").bind("Conv3d", in_channels=32, out_channels=64, kernel_size=3)
    start = [core.cuda() for core in random_cores(network)]
    cores = [core.requires_grad_() for core in moved(start)]
    program = program_of(network)
    with torch.autocast("cuda"):
        delta = program.deltas(cores, program.start(start))[0]
    expected = dense_delta(network, [core.detach() for core in cores], start)
    assert relative_error(delta.detach(), expected) <= 1e-5
    delta.sum().backward()


def test_one_core_is_never_handed_out_itself() -> None:
    network = make_network({"full": "o i"}, "o i", {"o": 4, "i": 6}, start="zero")
    core = torch.zeros(4, 6, requires_grad=True)
    program = program_of(network)
    delta = program.deltas([core], None)[0]
    assert delta.data_ptr() != core.data_ptr()
    assert program.value([core]).data_ptr() != core.data_ptr()
    delta.sum().backward()
    assert torch.equal(core.grad, torch.ones(4, 6))


def test_a_network_of_frozen_cores_alone_changes_nothing() -> None:
    network = make_network({"a": "o r", "b": "r i"}, "o i", {"o": 4, "i": 6, "r": 2}, frozen=["a", "b"])
    start = random_cores(network)
    program = program_of(network)
    assert program.deltas(start, program.start(start))[0].count_nonzero() == 0


def test_programs_are_cached_by_signature_and_memory_order() -> None:
    sizes = {"o": 4, "i": 6, "r": 2}
    one = make_network({"a": "o r", "b": "r i"}, "o i", sizes)
    other = make_network({"up": "x s", "down": "s y"}, "x y", {"x": 4, "y": 6, "s": 2})
    assert build_program(plan(one), (0, 1)) is build_program(plan(other), (0, 1))
    assert build_program(plan(one), (1, 0)) is not build_program(plan(one), (0, 1))
    assert build_program(plan(one), (0, 1)).start(None) is None


def test_contractions_are_counted_while_somebody_counts() -> None:
    network = tnpeft.load_spec("lora").bind("Linear", in_features=8, out_features=6)
    cores, weight = random_cores(network), program_of(network).weight
    with counting() as outer:
        program_of(network).deltas(cores, None)
        with counting() as inner:
            Program(weight, 3).deltas([core for core in cores for _ in range(3)], None)
        torch.func.vmap(lambda core: program_of(network).deltas([core, *cores[1:]], None))(torch.stack([cores[0]] * 2))
    program_of(network).deltas(cores, None)
    assert (outer, inner) == ({"deltas": [1, 3]}, {"deltas": [3]})
