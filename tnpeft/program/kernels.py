"""Lowered contractions run on tensors: few operations, all of them differentiable and traceable where `plain`.

Otherwise, under an autograd function of tnpeft's own, views are made by `as_strided` and sums in place: with forty
adapted layers of small cores, the number of operations to launch is what counts. For the same reason a contraction
becomes one function of its operands, with everything decided, the first time that it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from tnpeft.schedule.pairwise import Lowered, View

__all__ = ["contract", "contract_difference", "is_lasting", "kept", "reorder", "specialised", "versions"]

Product: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"


def is_lasting(found: object) -> bool:
    """Whether tensors, also in tuples and lists, may be kept: not the stand-ins of a mode that is on for now."""
    if isinstance(found, Tensor):
        return type(found) in (Tensor, torch.nn.Parameter)
    return all(map(is_lasting, found)) if isinstance(found, (tuple, list)) else True


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each tensor was written to, as autograd counts it."""
    try:
        return [tensor._version for tensor in tensors]  # every layer of a pass asks: no call for each tensor
    except RuntimeError:  # one was made in inference mode
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def kept(tables: dict[Hashable, Tensor], key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """The index table `tables[key]`, computed by `make()` where it is missing.

    It outlives the call: inference mode, autograd and the default device of the moment have no part in it.
    """
    table = tables.get(key)
    if table is None:
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            table = make()
        if is_lasting(table):
            tables[key] = table
    return table


def contract(product: Lowered, left: Tensor, right: Tensor, plain: bool) -> Tensor:
    """The product of two stored tensors, contiguous in the order that it was lowered for; reshape it before use."""
    if not plain:
        return (product.__dict__.get("_quick") or specialised(product))(left, right)
    result = _multiply_plainly(product, left, right)
    return result if product.result is None else reorder(result, product.result, True)


def contract_difference(
    product: Lowered, left: tuple[Tensor, Tensor | None], right: tuple[Tensor, Tensor | None], plain: bool
) -> Tensor | None:
    """The change of a product whose factors change: d(A B) = dA B0 + A dB, with `left` (A, dA) and `right` (B0, dB).

    None stands for a change of zero.
    """
    (left_value, left_change), (right_start, right_change) = left, right
    if left_change is None:
        return None if right_change is None else contract(product, left_value, right_change, plain)
    if right_change is None:
        return contract(product, left_change, right_start, plain)
    if product.double:
        change = _doubled(product, (left_change, right_start), (left_value, right_change), plain)
    elif plain:
        change = _multiply_plainly(product, left_change, right_start)
        change = change + _multiply_plainly(product, left_value, right_change)
    else:
        change = _added(product, (left_change, right_start), (left_value, right_change))
    return change if product.result is None else reorder(change, product.result, plain)


def reorder(tensor: Tensor, view: View, plain: bool) -> Tensor:
    """The tensor as `view` has it, made contiguous."""
    return _view_of(tensor, view, 0, plain).contiguous()


def specialised(product: Lowered) -> Product:
    """`contract` for this product alone where it is not plain, kept on it."""
    quick: Product | None = product.__dict__.get("_quick")
    if quick is None:
        quick = product.__dict__["_quick"] = _specialised(product)
    return quick


def _specialised(product: Lowered) -> Product:
    first, second = _strided(product.first, product.expand[0]), _strided(product.second, product.expand[1])
    if first is None or second is None:
        return partial(_multiply_stored, product)
    multiply = {"mm": torch.mm, "bmm": torch.bmm}.get(product.product) or partial(_multiply, product)
    (rows, row_strides), (columns, column_strides) = first, second

    def multiplied(left: Tensor, right: Tensor) -> Tensor:
        return multiply(left.as_strided(rows, row_strides), right.as_strided(columns, column_strides))

    def swapped(left: Tensor, right: Tensor) -> Tensor:
        return multiply(right.as_strided(rows, row_strides), left.as_strided(columns, column_strides))

    quick, result = swapped if product.swapped else multiplied, product.result
    return quick if result is None else lambda left, right: reorder(quick(left, right), result, False)


def _strided(view: View, expand: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Sizes and strides that make the view; None if it takes a copy."""
    if view.sizes != view.final:
        return None
    return ((expand, *view.final), (0, *view.strides)) if expand else (view.final, view.strides)


def _multiply_stored(product: Lowered, left: Tensor, right: Tensor) -> Tensor:
    result = _multiply(product, *_factors(product, left, right, False))
    return result if product.result is None else reorder(result, product.result, False)


def _multiply_plainly(product: Lowered, left: Tensor, right: Tensor) -> Tensor:
    first, second = _factors(product, left, right, True)
    if product.product in ("mm", "bmm", "mul"):
        return _multiply(product, first, second)
    # A sum over the batch is one product of matrices: tracers, exporters and `torch.func` all know how to follow that.
    batch, rows, inner = first.shape
    return torch.mm(first.permute(1, 0, 2).reshape(rows, batch * inner), second.reshape(batch * inner, -1))


def _factors(product: Lowered, left: Tensor, right: Tensor, plain: bool) -> tuple[Tensor, Tensor]:
    """Two stored tensors as the product takes them."""
    if product.swapped:
        left, right = right, left
    first, second = product.expand
    return _view_of(left, product.first, first, plain), _view_of(right, product.second, second, plain)


def _view_of(tensor: Tensor, view: View, expand: int, plain: bool) -> Tensor:
    """A contiguous tensor as `view` has it, repeated `expand` times along a new first axis (0: as it is)."""
    if not plain:
        if view.sizes != view.final:
            tensor = tensor.as_strided(view.sizes, view.strides).reshape(view.final)
            return tensor.expand(expand, *view.final) if expand else tensor
        if expand:
            return tensor.as_strided((expand, *view.final), (0, *view.strides))
        return tensor.as_strided(view.final, view.strides)
    seen = tensor.reshape(view.shape)
    if view.permutation is not None:
        seen = seen.permute(view.permutation)
    seen = seen.reshape(view.final)
    return seen.expand(expand, *view.final) if expand else seen


def _multiply(product: Lowered, first: Tensor, second: Tensor) -> Tensor:
    if product.product == "mm":
        return torch.mm(first, second)
    if product.product == "mul":
        return (first * second).contiguous()  # it takes on the operands' order, where they share one
    if product.product == "addbmm" and first.device.type == "cpu":
        return torch.addbmm(first.new_empty(()), first, second, beta=0)
    result = torch.bmm(first, second)
    # On a GPU `addbmm` starts one kernel for each matrix of the batch: 256 of 390 for Conv3d(512, 256, 3) of TenVOO-L.
    return result if product.product == "bmm" else result.sum(0)


def _added(product: Lowered, pair: tuple[Tensor, Tensor], added: tuple[Tensor, Tensor]) -> Tensor:
    """The sum of two products of stored tensors, the second added to the first in place."""
    if product.swapped:
        pair, added = pair[::-1], added[::-1]
    (rows, columns), (in_first, in_second) = (product.first, product.second), product.expand
    total = _multiply(product, _view_of(pair[0], rows, in_first, False), _view_of(pair[1], columns, in_second, False))
    first, second = _view_of(added[0], rows, in_first, False), _view_of(added[1], columns, in_second, False)
    if product.product == "mm":
        return total.addmm_(first, second)
    if product.product == "bmm":
        return total.baddbmm_(first, second)
    if product.product == "mul":
        return total.addcmul_(first, second)
    return total.addbmm_(first, second) if first.device.type == "cpu" else total.add_(_multiply(product, first, second))


def _doubled(product: Lowered, pair: tuple[Tensor, Tensor], added: tuple[Tensor, Tensor], plain: bool) -> Tensor:
    """The sum of two products of stored tensors as one product over a doubled bond."""
    if product.swapped:
        pair, added = pair[::-1], added[::-1]
    first = torch.cat([_view_of(part[0], product.first, 0, plain) for part in (pair, added)], -1)
    second = torch.cat([_view_of(part[1], product.second, 0, plain) for part in (pair, added)], -2)
    if product.product == "mm":
        return torch.mm(first, second)
    first, second = (
        part.expand(number, *part.shape) if number else part
        for part, number in zip((first, second), product.expand, strict=True)
    )
    return torch.bmm(first, second)
