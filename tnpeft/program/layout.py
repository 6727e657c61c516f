"""In which order of legs each intermediate is stored, and every step of a plan lowered for it.

The order of the last result is the weight's memory order; the orders of the others follow from the last step to the
first. A step's two operands are ordered so that it and its two gradients need few copies. Torch is not needed here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from tnpeft.plan import Plan, Step
from tnpeft.program.contraction import Contraction, Legs, Sizes, lower, lower_copy

__all__ = ["Instruction", "lay_out"]

# Summed legs are tried in every order up to this number of them.
PERMUTED_LEGS = 3


@dataclass(frozen=True)
class Instruction:
    """A step to run: tensors by number (cores first, in file order), the product and the products for its gradients."""

    number: int
    left: int
    right: int
    forward: Contraction
    to_left: Contraction
    to_right: Contraction
    elements: int


def lay_out(plan: Plan, output: Legs) -> tuple[Instruction, ...]:
    """The plan's steps with the last result stored in the order `output`."""
    network = plan.network
    orders: dict[int, Legs] = {number: core.legs for number, core in enumerate(network.cores)}
    made = {step.number: step for step in plan.steps}
    instructions: list[Instruction] = []
    if plan.steps:
        orders[plan.steps[-1].number] = output
    for step in reversed(plan.steps):
        left, right = _operand_orders(step, orders, made, network.sizes)
        for number, legs in zip(step.operands, (left, right), strict=True):
            orders[number] = legs
        forward, to_left, to_right = _lowered(left, right, orders[step.number], network.sizes)
        instructions.append(Instruction(step.number, *step.operands, forward, to_left, to_right, step.elements))
    return tuple(reversed(instructions))


def _lowered(left: Legs, right: Legs, output: Legs, sizes: Sizes) -> tuple[Contraction, Contraction, Contraction]:
    return lower(left, right, output, sizes), lower(output, right, left, sizes), lower(output, left, right, sizes)


def _operand_orders(step: Step, orders: dict[int, Legs], made: dict[int, Step], sizes: Sizes) -> tuple[Legs, Legs]:
    """The cheapest orders of the operands' legs; those of cores are given."""
    output = orders[step.number]

    def cost(pair: tuple[Legs, Legs]) -> float:
        own = sum(product.cost for product in _lowered(*pair, output, sizes))
        return own + sum(
            _cost_of_making(made[number], legs, orders, sizes)
            for number, legs in zip(step.operands, pair, strict=True)
            if number in made
        )

    return min(_candidates(step, orders, output), key=cost)


def _candidates(step: Step, orders: dict[int, Legs], output: Legs) -> Iterator[tuple[Legs, Legs]]:
    left, right = (orders.get(number) for number in step.operands)
    if left and right:
        yield left, right
        return
    for summed in _summed_orders(step, left, right):
        lefts = [left] if left is not None else list(_placements(step.left, summed, output))
        rights = [right] if right is not None else list(_placements(step.right, summed, output))
        yield from itertools.product(lefts, rights)


def _summed_orders(step: Step, left: Legs | None, right: Legs | None) -> list[Legs]:
    """Orders for the summed legs: a core's own, else any."""
    summed = step.summed
    for legs in (left, right):
        if legs is not None:
            return [tuple(leg for leg in legs if leg in summed)]
    if len(summed) <= PERMUTED_LEGS:
        return list(itertools.permutations(summed))
    return [tuple(leg for leg in legs if leg in summed) for legs in (step.left, step.right)]


def _placements(legs: Legs, summed: Legs, output: Legs) -> Iterator[Legs]:
    """The operand's kept legs in the result's order, and the summed legs first, last, or where others intervene."""
    kept = tuple(leg for leg in output if leg in legs)
    places = {0, len(kept)}
    for place in range(1, len(kept)):
        if output.index(kept[place]) != output.index(kept[place - 1]) + 1:
            places.add(place)
    for place in sorted(places):
        yield (*kept[:place], *summed, *kept[place:])


def _cost_of_making(step: Step, output: Legs, orders: dict[int, Legs], sizes: Sizes) -> float:
    """The copy that a step needs to store its result as `output`, if its operands cannot bring it into that order."""
    runs = [leg in step.left for leg in output if sizes[leg] > 1]
    changes = sum(before != after for before, after in itertools.pairwise(runs))
    return lower_copy(step.elements) if changes > 2 else 0.0
