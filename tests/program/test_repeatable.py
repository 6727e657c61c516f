"""Operations that several calls of a forward pass share, and may be walked back more than once."""

from __future__ import annotations

import torch
from torch import Tensor

from tnpeft.program.repeatable import repeatable


def made(tensors: list[Tensor]) -> list[Tensor]:
    first, second = tensors
    return [first.sin() * second, second.detach(), (first @ first).exp()]


def leaves() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]


def test_each_result_has_a_backward_pass_of_its_own():
    inputs = leaves()
    results = repeatable(made, inputs)
    expected = made(inputs)
    for place in (0, 2, 0):  # without `retain_graph`
        found = torch.autograd.grad(results[place].sum(), inputs, allow_unused=True)
        right = torch.autograd.grad(expected[place].sum(), inputs, allow_unused=True, retain_graph=True)
        assert [grad is None for grad in found] == [grad is None for grad in right]
        for grad, other in zip(found, right, strict=True):
            assert grad is None or torch.equal(grad, other)
    assert not results[1].requires_grad


def test_gradients_can_be_differentiated():
    inputs = leaves()

    def value(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(result for result in repeatable(made, [*tensors]) if result.requires_grad)

    assert torch.autograd.gradgradcheck(value, inputs)


def test_without_gradients_and_where_saved_tensors_are_watched_they_are_plain():
    inputs = leaves()
    with torch.no_grad():
        assert not any(result.requires_grad for result in repeatable(made, inputs))
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: seen.append(tensor) or tensor, lambda tensor: tensor):
        repeatable(made, inputs)
    assert len(seen) > len(inputs)  # what autograd keeps of each operation, not the inputs alone


def test_another_function_gives_the_gradients():
    inputs = leaves()
    asked = []

    def differences(tensors: list[Tensor]) -> list[Tensor]:
        return [result - 1.0 for result in made(tensors)]

    def values(tensors: list[Tensor]) -> list[Tensor]:
        asked.append(len(tensors))
        return made(tensors)

    results, expected = repeatable(differences, inputs, values), differences(inputs)
    assert asked == [2]
    for found, right in zip(results, expected, strict=True):
        assert torch.equal(found, right)
        assert found.requires_grad == right.requires_grad
    found, right = (torch.autograd.grad(each[0].sum() + each[2].sum(), inputs) for each in (results, expected))
    for grad, other in zip(found, right, strict=True):
        torch.testing.assert_close(grad, other)

    def value(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(each for each in repeatable(differences, [*tensors], values) if each.requires_grad)

    assert torch.autograd.gradgradcheck(value, inputs)
    asked.clear()
    with torch.no_grad():
        repeatable(differences, inputs, values)
    assert not asked
