"""From the clusters of a factored chain to the delta weight: what a hybrid layer's forward pass convolves with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tnpeft.planning import Plan, find_path, steps_of
from tnpeft.program.contraction import View, reordering
from tnpeft.program.execute import contract, reorder
from tnpeft.program.finish import Finish
from tnpeft.program.layout import Instruction, lay_out_steps
from tnpeft.program.observers import is_watched
from tnpeft.program.route import Route

__all__ = ["Completion", "complete"]


@dataclass(frozen=True)
class Completion:
    """One term: the contraction of its clusters, paired forms where there are some, to the stored weight."""

    instructions: tuple[Instruction, ...]
    only: View
    finish: Finish

    def __call__(self, clusters: Sequence[Tensor]) -> Tensor:
        """The delta weight in its memory order, a tensor of its own."""
        tensors = list(clusters)
        plain = is_watched()
        for step in self.instructions:
            tensors.append(contract(step.forward, tensors[step.left], tensors[step.right], plain))
        if not self.instructions:
            tensors.append(reorder(tensors[0], self.only, True).clone())
        return self.finish.apply(tensors[-1])


def complete(plan: Plan, route: Route, memory_order: tuple[int, ...]) -> Completion:
    """The completion of a factored plan of one term; `memory_order` as in `build_program`."""
    network = plan.network
    paired = network.start == "frozen_copy"
    finish = Finish.of(network, memory_order)
    orders = dict(enumerate(stop.cluster(paired) for stop in route.stops))
    letters = {letter: letter for order in orders.values() for letter in order}
    sizes = {letter: route.sizes[letter] for letter in letters}
    tensors = [(number, tuple(order)) for number, order in orders.items()]
    path = find_path(tuple(orders.values()), finish.legs, tuple(sizes.items()))
    steps = tuple(steps_of(tensors, finish.legs, path, sizes))
    if steps:
        orders[steps[-1].number] = finish.legs
    only = reordering(orders[0], finish.legs if not steps else orders[0], sizes)
    return Completion(lay_out_steps(steps, orders, letters, sizes)[0], only, finish)
