"""The delta weight, as the network's value or as its difference from a frozen copy, and its gradient.

The differences are made as `tree` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tnpeft.program.kernels import contract, reorder
from tnpeft.program.leg_order import Instruction
from tnpeft.program.observers import is_recorded
from tnpeft.program.pairwise import View
from tnpeft.program.tree import core_changes, core_gradients, run_changes, run_gradients, run_values, scaled_cores
from tnpeft.program.weight_layout import WeightLayout

__all__ = ["Code"]


@dataclass(frozen=True)
class Code:
    """A program's instructions and what is known of its tensors, by number: cores first, then the results.

    `frozen`: cores that never change. `kept`: results that the backward pass reads again instead of making them anew.
    The scale is multiplied into the core `scaled`. A network of one core has no instructions; `only` reorders it and
    `only_back` its gradient.
    """

    cores: int
    frozen: tuple[bool, ...]
    kept: tuple[bool, ...]
    instructions: tuple[Instruction, ...]
    layout: WeightLayout
    scale: float
    scaled: int
    only: View
    only_back: View

    def values(self, cores: Sequence[Tensor], known: Sequence[Tensor | None] = ()) -> list[Tensor]:
        """Every tensor but the last result; results that are `known` are not made again."""
        return run_values(self.instructions[:-1], cores, known)

    def last(self, tensors: Sequence[Tensor]) -> Tensor:
        if not self.instructions:
            return reorder(tensors[0], self.only, True).clone()  # never the core itself
        step = self.instructions[-1]
        return contract(step.forward, tensors[step.left], tensors[step.right], is_recorded())

    def scale_one(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """The cores with the scale in one of them."""
        return scaled_cores(cores, self.scaled, self.scale)

    def value(self, cores: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """scale * T(cores) as the stored weight, and every tensor on the way."""
        tensors = self.values(self.scale_one(cores))
        return self.layout.apply(self.last(tensors)), tensors

    def constants(self, start: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the difference needs of the frozen copy: its cores, scaled, and its results but the last."""
        return tuple(self.values(self.scale_one(start)))

    def difference(
        self, cores: Sequence[Tensor], start: Sequence[Tensor], constants: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """scale * (T(cores) - T(start)) as the stored weight, and every tensor of T(cores) on the way."""
        tensors = self.scale_one(cores)
        changes = core_changes([*map(Tensor.contiguous, cores)], start, self.frozen, self.scaled, self.scale)
        tensors, changes = run_changes(self.instructions, tensors, changes, constants, False)
        change = changes[-1]
        if change is None:  # every core is frozen
            change = torch.zeros_like(self.last(tensors))
        elif not self.instructions:
            change = reorder(change, self.only, True)
        return self.layout.apply(change), tensors

    def gradients(self, tensors: Sequence[Tensor], gradient: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
        """The VJP: of the cores that need one; plain operations, and so differentiable again."""
        grads: list[Tensor | None] = [None] * (self.cores + len(self.instructions))
        grads[-1] = self.layout.undo(gradient)
        run_gradients(self.instructions, tensors, grads, list(needed))
        if not self.instructions:
            grads = [reorder(self.layout.undo(gradient), self.only_back, True)]
        return core_gradients(grads, tensors[: self.cores], self.scaled, self.scale)
