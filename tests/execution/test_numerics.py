"""Accuracy: exactly zero at the start, six digits after the smallest steps, gradients of the plain network."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from networks import dense_delta, dense_weight, make_network, memory_orders, networks, random_cores, relative_error
from torch import Tensor

import tnpeft
from tnpeft.network import Network
from tnpeft.program import Program, build_program
from tnpeft.schedule import plan

# DESIGN: the plain difference has an error of 3e-3 after this step, in fp32.
STEP = 1e-5

FROZEN_COPIES = [
    ("tenvoo_l", "Conv3d", {"in_channels": 64, "out_channels": 128, "kernel_size": 3}),
    ("tenvoo_q", "Conv3d", {"in_channels": 64, "out_channels": 128, "kernel_size": 3}),
    ("tenvoo_l", "Conv3d", {"in_channels": 24, "out_channels": 12, "kernel_size": (3, 1, 2), "r": 2}),
    ("quanta", "Linear", {"in_features": 96, "out_features": 128}),
    ("quanta", "Linear", {"in_features": 64, "out_features": 64}),
]


def bound(case: tuple[str, str, dict[str, object]]) -> Network:
    name, kind, arguments = case
    return tnpeft.load_spec(name).bind(kind, **arguments)


def stepped(start: Sequence[Tensor], step: float) -> list[Tensor]:
    """The cores after a step of this size on every entry, as Adam's first is."""
    generator = torch.Generator().manual_seed(5)
    return [core + step * torch.randn(core.shape, generator=generator).sign().to(core) for core in start]


def program_of(network: Network) -> Program:
    return build_program(plan(network), memory_orders(network)[0])


@pytest.mark.parametrize("case", FROZEN_COPIES, ids=lambda case: f"{case[0]}-{len(case[2])}-{case[2]}"[:40])
def test_shipped_frozen_copies_are_exact_at_the_start_and_accurate_afterwards(
    case: tuple[str, str, dict[str, object]],
) -> None:
    network = bound(case)
    start = random_cores(network)
    program = program_of(network)
    constants = program.start(start)
    zero = program.deltas(start, constants)[0]
    assert torch.equal(zero, torch.zeros_like(zero))

    cores = [core.requires_grad_() for core in stepped(start, STEP)]
    delta = program.deltas(cores, constants)[0]
    exact = [core.detach().double().requires_grad_() for core in cores]
    expected = dense_delta(network, exact, start)
    assert relative_error(delta.detach(), expected.detach()) <= 1e-6

    upstream = torch.randn(delta.shape, generator=torch.Generator().manual_seed(6))
    found = torch.autograd.grad(delta, cores, upstream)
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    for one, other in zip(found, wanted, strict=True):
        assert relative_error(one, other) <= 1e-5


@settings(max_examples=150)
@given(network=networks())
def test_differences_of_random_networks_are_accurate(network: Network) -> None:
    """Entry by entry, against what the terms of the sum amount to: no cancellation between network and frozen copy."""
    start = random_cores(network)
    moved = stepped(start, STEP)
    cores = [old if core.frozen else new for core, old, new in zip(network.cores, start, moved, strict=True)]
    program = program_of(with_frozen_copy(network))
    constants = program.start(start)
    delta = program.deltas(cores, constants)[0]
    expected = dense_delta(network, cores, start)
    small = [core.double().abs() for core in start]
    large = [a + (new.double() - old.double()).abs() for a, old, new in zip(small, start, cores, strict=True)]
    terms = abs(network.scale) * (dense_weight(network, large) - dense_weight(network, small))
    assert bool(((delta.double() - expected).abs() <= 1e-6 * terms + 1e-30).all())
    still = program.deltas(start, constants)[0]
    assert torch.equal(still, torch.zeros_like(still))


def with_frozen_copy(network: Network) -> Network:
    return make_network(
        {core.name: " ".join(core.legs) for core in network.cores},
        [" ".join(axis) for axis in network.weight],
        network.sizes,
        network.layer,
        scale=network.scale,
        frozen=[core.name for core in network.cores if core.frozen],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_core_of_zeros_makes_an_exact_zero(dtype: torch.dtype) -> None:
    network = tnpeft.load_spec("lora").bind("Conv2d", in_channels=16, out_channels=24, kernel_size=3)
    assert network.start == "zero"
    cores = random_cores(network, dtype=dtype)
    cores = [
        torch.zeros_like(tensor) if core.init.name == "zeros" else tensor
        for core, tensor in zip(network.cores, cores, strict=True)
    ]
    delta = program_of(network).deltas([core.requires_grad_() for core in cores], None)[0]
    assert delta.dtype == dtype
    assert delta.count_nonzero() == 0
    gradients = torch.autograd.grad(delta.sum(), cores)
    moving = [core.name for core, gradient in zip(network.cores, gradients, strict=True) if gradient.count_nonzero()]
    assert moving == [core.name for core in network.cores if core.init.name == "zeros"]


@pytest.mark.parametrize("name", ["tenvoo_l", "loha"])
def test_autocast_changes_no_bit(name: str) -> None:
    network = tnpeft.load_spec(name).bind("Conv3d", in_channels=16, out_channels=8, kernel_size=3)
    start = random_cores(network)
    cores = [core.requires_grad_() for core in stepped(start, STEP)]
    program = program_of(network)
    answers = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            constants = program.start(start)
            delta = program.deltas(cores, constants)[0]
            value = program.value(cores)
            gradients = torch.autograd.grad(delta.sum(), cores)
        assert {delta.dtype, value.dtype, *(gradient.dtype for gradient in gradients)} == {torch.float32}
        answers.append((delta, value, *gradients))
    for one, other in zip(*answers, strict=True):
        assert torch.equal(one, other)


def test_the_scale_costs_no_accuracy() -> None:
    cores = {"a": "o r", "b": "r s", "c": "s i"}
    sizes = {"o": 48, "i": 40, "r": 4, "s": 5}
    for scale in (0.3, -7.0):
        network = make_network(cores, "o i", sizes, scale=scale)
        start = random_cores(network)
        moved = stepped(start, STEP)
        program = program_of(network)
        delta = program.deltas(moved, program.start(start))[0]
        assert relative_error(delta, dense_delta(network, moved, start)) <= 1e-6


def test_half_precision_keeps_two_digits() -> None:
    network = bound(FROZEN_COPIES[0])
    start = random_cores(network, dtype=torch.bfloat16)
    moved = stepped(start, 2.0**-7)
    program = program_of(network)
    delta = program.deltas(moved, program.start(start))[0]
    assert delta.dtype == torch.bfloat16
    assert relative_error(delta, dense_delta(network, moved, start)) <= 2e-2
