"""Products of tensors with named legs, summed index by index."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor

__all__ = ["Legged", "sum_out"]

Legged = tuple[Tensor, tuple[str, ...]]


def sum_out(operands: Iterable[Legged], kept: Sequence[str]) -> Tensor:
    """The product of all operands, summed over every leg that is not kept; its axes are `kept`, in that order.

    One leg at a time: the operands that have it are multiplied by broadcasting, then it is summed.
    """
    live = [(tensor, legs) for tensor, legs in operands]
    sizes = {leg: size for tensor, legs in live for leg, size in zip(legs, tensor.shape, strict=True)}
    joints = {leg: _joint(live, leg) for leg in sizes if leg not in kept}
    costs = {leg: math.prod(sizes[other] for other in joint) for leg, joint in joints.items()}
    while joints:
        leg = min(joints, key=costs.__getitem__)
        joint = joints.pop(leg)
        product = _product([one for one in live if leg in one[1]], joint)
        left = tuple(other for other in joint if other != leg)
        live = [one for one in live if leg not in one[1]]
        live.append((product.sum(joint.index(leg)), left))
        for other in left:
            if other in joints:  # the only ones whose operands changed
                joints[other] = _joint(live, other)
                costs[other] = math.prod(sizes[one] for one in joints[other])
    return _product(live, tuple(kept))


def _joint(live: Sequence[Legged], leg: str) -> tuple[str, ...]:
    """Every leg of the operands that have this one."""
    return tuple(dict.fromkeys(other for _, legs in live if leg in legs for other in legs))


def _product(operands: Sequence[Legged], order: tuple[str, ...]) -> Tensor:
    made: Tensor | None = None
    for tensor, legs in operands:
        moved = tensor.permute([legs.index(leg) for leg in order if leg in legs])
        shape = iter(moved.shape)
        moved = moved.reshape([next(shape) if leg in legs else 1 for leg in order])
        made = moved if made is None else made * moved
    assert made is not None
    return made
