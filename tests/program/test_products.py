"""Products of derived cores beside numpy's einsum, however their factors lie in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import tnpeft
from tnpeft.program import products as module
from tnpeft.program.products import LAYERS, contract, contract_with_start

LEGS = "abcdef"


@st.composite
def products(draw):
    """Factors (legs, and the order in which they lie in memory), sizes, and the legs of the result."""
    sizes = {leg: draw(st.integers(1, 4)) for leg in LEGS} | {LAYERS: draw(st.integers(1, 3))}
    count = draw(st.integers(1, 3))
    of_factors = [draw(st.lists(st.sampled_from(LEGS), max_size=4, unique=True)) for _ in range(count)]
    stored = [draw(st.permutations((LAYERS, *legs))) for legs in of_factors]
    present = sorted({leg for legs in of_factors for leg in legs})
    kept = draw(st.lists(st.sampled_from(present), unique=True)) if present else []
    return sizes, of_factors, stored, (LAYERS, *kept)


def einsum(arrays, of_factors, legs):
    numbers = {leg: number for number, leg in enumerate((*LEGS, LAYERS))}
    arguments = [
        part for array, of in zip(arrays, of_factors, strict=True) for part in (array, [numbers[leg] for leg in of])
    ]
    return np.einsum(*arguments, [numbers[leg] for leg in legs])


@given(products(), st.integers(0, 2**31 - 1))
def test_value_and_gradients(product, seed):
    sizes, of_factors, stored, legs = product
    generator = torch.Generator().manual_seed(seed)
    factors = []
    for of, order in zip(of_factors, stored, strict=True):
        lying = torch.randn([sizes[leg] for leg in order], dtype=torch.float64, generator=generator).requires_grad_()
        factors.append((lying.permute([order.index(leg) for leg in (LAYERS, *of)]), (LAYERS, *of)))
    found = contract(factors, legs)
    every = [of for _, of in factors]
    arrays = [tensor.detach().numpy() for tensor, _ in factors]
    np.testing.assert_allclose(found.detach().numpy(), einsum(arrays, every, legs), rtol=1e-12, atol=1e-12)
    upstream = torch.randn(found.shape, dtype=torch.float64, generator=generator)
    for place, gradient in enumerate(torch.autograd.grad(found, [tensor for tensor, _ in factors], upstream)):
        others = [*arrays[:place], *arrays[place + 1 :], upstream.numpy(), np.ones(gradient.shape)]
        of_others = [*every[:place], *every[place + 1 :], legs, every[place]]
        wanted = einsum(others, of_others, every[place])
        np.testing.assert_allclose(gradient.numpy(), wanted, rtol=1e-12, atol=1e-12)


@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    turned=st.booleans(),
    last=st.booleans(),
    seed=st.integers(0, 999),
)
def test_blocks_of_a_large_factors_rows_are_summed_or_joined(sizes, turned, last, seed):
    """Without gradients, however the larger factor lies, and where its rows are no whole number of blocks."""
    generator = torch.Generator().manual_seed(seed)
    layers, rows, summed, columns = sizes
    left = torch.randn(layers, rows, summed, dtype=torch.float64, generator=generator)
    lying = (layers, columns, summed) if turned else (layers, summed, columns)
    right = torch.randn(lying, dtype=torch.float64, generator=generator)
    right, legs = right.mT if turned else right, (LAYERS, *("rc" if last else "cr"))
    before = module.LARGE, module.BLOCK
    module.LARGE, module.BLOCK = 0, 2
    try:
        found = contract([(left, (LAYERS, *"rs")), (right, (LAYERS, *"sc"))], legs)
    finally:
        module.LARGE, module.BLOCK = before
    wanted = np.einsum(f"lrs,lsc->l{'rc' if last else 'cr'}", left.numpy(), right.numpy())
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12, atol=1e-12)


class _Largest(TorchDispatchMode):
    """The elements of the largest tensor that an operation made, views of what there was aside."""

    def __init__(self, known: torch.Tensor) -> None:
        super().__init__()
        self.known, self.elements = known.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() != self.known:
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_a_factor_as_large_as_the_weight_is_never_copied(layout):
    weight = torch.randn(160, 64, 3, 3, 3).to(memory_format=layout)[None]
    assert weight.numel() >= module.LARGE
    columns = torch.randn(1, 64, 3, 3, 3, 2).requires_grad_()
    with _Largest(weight) as largest:
        contract([(weight, (LAYERS, *"oiabc")), (columns, (LAYERS, *"iabcr"))], (LAYERS, "o", "r")).sum().backward()
    assert largest.elements == columns.numel()
    first = columns.detach()
    with _Largest(weight) as largest:
        pair = contract_with_start(
            (weight, (LAYERS, *"oiabc")), first, (columns, (LAYERS, *"iabcr")), False, (LAYERS, "o", "r")
        )
        pair[1].sum().backward()
    assert largest.elements == 2 * columns.numel()


@pytest.mark.parametrize("changed", [False, True])
def test_a_start_and_its_change_are_made_together_and_walked_back_again(changed):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 5, 4, 3, dtype=torch.float64, generator=generator)
    first, change = torch.randn(2, 2, 4, 3, 2, dtype=torch.float64, generator=generator)
    now = (change if changed else first + change).requires_grad_()
    fixed, legs = (weight, (LAYERS, *"oik")), (LAYERS, *"or")
    both = contract_with_start(fixed, first, (now, (LAYERS, *"ikr")), changed, legs)
    arrays = [tensor.detach().numpy() for tensor in (weight, first, change)]
    for found, factor in zip(both, arrays[1:], strict=True):
        np.testing.assert_allclose(found.detach(), np.einsum("loik,likr->lor", arrays[0], factor), rtol=1e-13)
    assert not both[0].requires_grad
    upstream = torch.randn(2, 5, 2, dtype=torch.float64, generator=generator)
    wanted = np.einsum("loik,lor->likr", arrays[0], upstream)
    for _ in range(2):  # nothing is freed
        (gradient,) = torch.autograd.grad(both[1], now, upstream)
        np.testing.assert_allclose(gradient, wanted, rtol=1e-13)

    def squares(now: torch.Tensor) -> torch.Tensor:
        return contract_with_start(fixed, first, (now, (LAYERS, *"ikr")), changed, legs)[1].square()

    assert torch.autograd.gradgradcheck(squares, [now])
    weight.add_(1)
    with pytest.raises(tnpeft.ExecutionError) as caught:
        torch.autograd.grad(both[1], now, upstream)
    assert str(caught.value) == (
        "a base weight of which derived cores are made: expected its values of the forward pass, "
        "found values that were written since. Write to base weights after the backward pass."
    )
