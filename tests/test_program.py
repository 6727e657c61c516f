"""Programs against the dense einsum: values, differences, gradients, layout, tracing."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from networks import (
    dense_delta,
    dense_weight,
    memory_orders,
    networks,
    random_cores,
    strides_of,
)

from tnpeft.network import Network
from tnpeft.plan import plan
from tnpeft.program import build_program


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
        constants = program.constants(start)
        torch.testing.assert_close(program.value(cores), dense_weight(network, cores))
        delta = program.delta(cores, copy, constants)
        expected = dense_delta(network, cores, copy)
        torch.testing.assert_close(delta, expected)
        assert delta.shape == network.layer.stored_shape
        assert delta.stride() == strides_of(delta.shape, order)
        weights = torch.randn(delta.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        found = torch.autograd.grad(delta, trainable, weights, allow_unused=True, materialize_grads=True)
        wanted = torch.autograd.grad(expected, trainable, weights, allow_unused=True, materialize_grads=True)
        torch.testing.assert_close(found, wanted)
