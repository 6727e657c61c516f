"""From the clusters of a factored chain to the delta weight: what a hybrid layer's forward pass convolves with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tnpeft.planning.steps import Contraction
from tnpeft.program.kernels import contract, reorder
from tnpeft.program.observers import is_recorded
from tnpeft.program.weight_layout import WeightLayout
from tnpeft.schedule.chain_legs import ChainLayout, merge_steps
from tnpeft.schedule.leg_order import Instruction, lay_out_steps
from tnpeft.schedule.pairwise import View, reordering

__all__ = ["TermMerge", "merge_clusters"]


@dataclass(frozen=True)
class TermMerge:
    """One term: the contraction of its clusters, dual forms where there are some, to the stored weight."""

    instructions: tuple[Instruction, ...]
    only: View
    weight_layout: WeightLayout

    def __call__(self, clusters: Sequence[Tensor]) -> Tensor:
        """The delta weight in its memory order, a tensor of its own."""
        tensors = list(clusters)
        plain = is_recorded()
        for step in self.instructions:
            tensors.append(contract(step.forward, tensors[step.left], tensors[step.right], plain))
        if not self.instructions:
            tensors.append(reorder(tensors[0], self.only, True).clone())
        return self.weight_layout.apply(tensors[-1])


def merge_clusters(plan: Contraction, layout: ChainLayout, memory_order: tuple[int, ...]) -> TermMerge:
    """How the clusters of one term become its delta weight; `memory_order` as in `build_program`."""
    weight_layout = WeightLayout.of(plan.network, memory_order)
    orders, steps = merge_steps(layout, plan.copies, weight_layout.legs)
    given = dict(enumerate(orders))
    if steps:
        given[steps[-1].number] = weight_layout.legs
    only = reordering(orders[0], orders[0] if steps else weight_layout.legs, layout.sizes)
    letters = {letter: letter for letter in layout.sizes}
    return TermMerge(lay_out_steps(steps, given, letters, layout.sizes)[0], only, weight_layout)
