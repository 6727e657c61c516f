"""Lowered contractions run on tensors: plain operations only, differentiable and traceable."""

from __future__ import annotations

import torch
from torch import Tensor

from tnpeft.program.contraction import Contraction, View

__all__ = ["contract", "contract_difference", "reorder"]


def contract(product: Contraction, left: Tensor, right: Tensor) -> Tensor:
    """The product of two stored tensors, contiguous in the order that it was lowered for; its shape is arbitrary."""
    first, second = _factors(product, left, right)
    return _finish(product, _multiply(product, first, second))


def contract_difference(
    product: Contraction, left: tuple[Tensor, Tensor | None], right: tuple[Tensor | None, Tensor | None]
) -> Tensor | None:
    """The change of a product whose factors change: d(A B) = dA B0 + A dB, with `left` (A, dA) and `right` (B0, dB).

    None stands for a change of zero. Both terms are one product over a doubled bond.
    """
    (whole, left_change), (start, right_change) = left, right
    if left_change is None:
        return None if right_change is None else contract(product, whole, right_change)
    assert start is not None
    if right_change is None:
        return contract(product, left_change, start)
    terms = [_factors(product, left_change, start), _factors(product, whole, right_change)]
    (a, b), (c, d) = terms
    if product.product == "mul":
        return _finish(product, torch.addcmul(_multiply(product, a, b), c, d))
    return _finish(product, _multiply(product, torch.cat((a, c), -1), torch.cat((b, d), -2)))


def _factors(product: Contraction, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    first, second = (right, left) if product.swapped else (left, right)
    return _see(first, product.first), _see(second, product.second)


def _see(tensor: Tensor, view: View) -> Tensor:
    seen = tensor.reshape(view.shape)
    if view.permutation is not None:
        seen = seen.permute(view.permutation)
    if view.final is not None:
        seen = seen.reshape(view.final)
    return seen


def _multiply(product: Contraction, first: Tensor, second: Tensor) -> Tensor:
    if product.product == "mul":
        return first * second
    if product.product == "mm":
        return torch.mm(first, second)
    copies_of_first, copies_of_second = product.expand
    if copies_of_first:
        first = first.expand(copies_of_first, -1, -1)
    if copies_of_second:
        second = second.expand(copies_of_second, -1, -1)
    return torch.bmm(first, second)


def _finish(product: Contraction, made: Tensor) -> Tensor:
    if product.fold:
        made = made.sum(0)
    if product.result is not None:
        made = reorder(made, product.result)
    return made


def reorder(tensor: Tensor, view: View) -> Tensor:
    """The tensor as `view` has it, made contiguous."""
    return _see(tensor, view).contiguous()
