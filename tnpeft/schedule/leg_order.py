"""The order of legs in which each intermediate is stored, and every step of a plan lowered for it.

The order of the last result is the weight's memory order; the orders of the others follow from the last step to the
first. A step's two operands are ordered so that it and its two gradients need few copies.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tnpeft.planning import Step
from tnpeft.schedule.pairwise import Lowered, Sizes, View, copy_time, lower, lowering_time, reordering

__all__ = ["Instruction", "lay_out_steps"]

# Summed legs are tried in every order up to this number of them.
PERMUTED_LEGS = 3


@dataclass(frozen=True)
class Instruction:
    """A step to run: tensors by number (cores first, in file order), the product and the products for its gradients.

    `back` reorders the result's gradient for these gradients (None: they take it as it is stored).
    """

    number: int
    left: int
    right: int
    forward: Lowered
    back: View | None
    to_left: Lowered
    to_right: Lowered


def lay_out_steps(
    steps: Sequence[Step], orders: Mapping[int, str], sizes: Sizes, batch: str = ""
) -> tuple[tuple[Instruction, ...], dict[int, str]]:
    """Steps, whose legs are letters, with the order of the last result given, and the orders of all tensors.

    Orders of first operands are given, or chosen as those of results are. Every tensor has the legs `batch` before its
    own.
    """
    orders = dict(orders)
    made_by = {step.number: step for step in steps}
    instructions: list[Instruction] = []
    for step in reversed(steps):
        left, right = _operand_orders(step, orders, made_by, sizes, batch)
        orders.update(zip(step.operands, (left, right), strict=True))
        stored = (batch + left, batch + right, batch + orders[step.number])
        instructions.append(_lowered(step, *stored, sizes))
    return tuple(reversed(instructions)), orders


def _lowered(step: Step, left: str, right: str, output: str, sizes: Sizes) -> Instruction:
    forward = lower(left, right, output, sizes)
    back, taken = None, output
    # A result that is copied to its order: one copy of its gradient may serve both products that read it.
    if forward.result is not None and _copied_once(left, right, output, forward.made, sizes):
        back, taken = reordering(output, forward.made, sizes), forward.made
    to_left, to_right = lower(taken, right, left, sizes), lower(taken, left, right, sizes)
    return Instruction(step.number, *step.operands, forward, back, to_left, to_right)


def _copied_once(left: str, right: str, output: str, made: str, sizes: Sizes) -> bool:
    def time(stored: str) -> float:
        return lowering_time(stored, right, left, sizes) + lowering_time(stored, left, right, sizes)

    return copy_time(output, made, sizes) + time(made) < time(output)


def _operand_orders(
    this: Step, orders: Mapping[int, str], steps: Mapping[int, Step], sizes: Sizes, batch: str
) -> tuple[str, str]:
    """The cheapest orders of the operands' legs; those of cores are given."""
    output = orders[this.number]
    given = [orders.get(number) for number in this.operands]
    made = [steps.get(number) for number in this.operands]
    cheapest, best = math.inf, ("", "")
    candidates = _candidates(this, given, output)
    for pair in candidates:
        if len(candidates) == 1:
            return pair
        left, right, result = batch + pair[0], batch + pair[1], batch + output
        time = lowering_time(left, right, result, sizes) + lowering_time(result, right, left, sizes)
        time += lowering_time(result, left, right, sizes)
        making = 0.0
        for step, legs in zip(made, pair, strict=True):
            making += 0.0 if step is None else _cost_of_making(step, legs, sizes)
        if time + making < cheapest:
            cheapest, best = time + making, pair
    return best


def _candidates(this: Step, given: Sequence[str | None], output: str) -> list[tuple[str, str]]:
    left, right = given
    if left is not None and right is not None:
        return [(left, right)]
    pairs: list[tuple[str, str]] = []
    for summed in _summed_orders(this, given):
        lefts = [left] if left is not None else _placements(this.left, summed, output)
        rights = [right] if right is not None else _placements(this.right, summed, output)
        pairs += itertools.product(lefts, rights)
    return pairs


def _summed_orders(this: Step, given: Sequence[str | None]) -> list[str]:
    """Orders for the summed legs: a core's own, else any."""
    summed = this.summed
    for legs in given:
        if legs is not None:
            return ["".join(leg for leg in legs if leg in summed)]
    if len(summed) <= PERMUTED_LEGS:
        return ["".join(order) for order in itertools.permutations(summed)]
    return ["".join(leg for leg in legs if leg in summed) for legs in (this.left, this.right)]


def _placements(legs: Sequence[str], summed: str, output: str) -> list[str]:
    """The operand's kept legs in the result's order, and the summed legs first, last, or where others intervene."""
    kept = "".join(filter(legs.__contains__, output))
    placements = [summed + kept]
    for place in range(1, len(kept)):
        if kept[place - 1 : place + 1] not in output:
            placements.append(kept[:place] + summed + kept[place:])
    return [*placements, kept + summed] if kept else placements


def _cost_of_making(this: Step, output: str, sizes: Sizes) -> float:
    """The copy that a step needs to store its result as `output`, if its operands cannot bring it into that order."""
    changes, before = 0, None
    for leg in output:
        if sizes[leg] > 1:
            owner = leg in this.left
            changes += before not in (None, owner)
            before = owner
    return copy_time("".join(this.output), output, sizes) if changes > 2 else 0.0
