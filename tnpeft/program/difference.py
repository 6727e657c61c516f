"""The delta weight, as the network's value or as its difference from a frozen copy, and its gradient.

With A = A0 + dA for every tensor, d(A B) = dA B0 + A dB: the difference of two networks close to each other is made
of differences all the way, never by subtraction of large values. The A0 are constants. The gradient needs no pairs, for
d(T - T0)/d(cores) = dT/d(cores): the backward pass is that of the plain network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tnpeft.program.contraction import View
from tnpeft.program.execute import contract, contract_difference, is_watched, reorder
from tnpeft.program.finish import Finish
from tnpeft.program.layout import Instruction

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
    finish: Finish
    scale: float
    scaled: int
    only: View
    only_back: View

    def values(self, cores: Sequence[Tensor], known: Sequence[Tensor | None] = ()) -> list[Tensor]:
        """Every tensor but the last result; results that are `known` are not made again."""
        tensors = [core.contiguous() for core in cores]
        plain = is_watched()
        for place, step in enumerate(self.instructions[:-1]):
            found = known[place] if known else None
            if found is None:
                found = contract(step.forward, tensors[step.left], tensors[step.right], plain)
            tensors.append(found)
        return tensors

    def last(self, tensors: Sequence[Tensor]) -> Tensor:
        if not self.instructions:
            return reorder(tensors[0], self.only, True).clone()  # never the core itself
        step = self.instructions[-1]
        return contract(step.forward, tensors[step.left], tensors[step.right], is_watched())

    def scale_one(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """The cores with the scale in one of them."""
        scaled = [core.contiguous() for core in cores]
        if self.scale != 1.0:
            scaled[self.scaled] = scaled[self.scaled] * self.scale
        return scaled

    def value(self, cores: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """scale * T(cores) as the stored weight, and every tensor on the way."""
        tensors = self.values(self.scale_one(cores))
        return self.finish.apply(self.last(tensors)), tensors

    def constants(self, start: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the difference needs of the frozen copy: its cores, scaled, and its results but the last."""
        return tuple(self.values(self.scale_one(start)))

    def difference(
        self, cores: Sequence[Tensor], start: Sequence[Tensor], constants: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """scale * (T(cores) - T(start)) as the stored weight, and every tensor of T(cores) on the way."""
        tensors = self.scale_one(cores)
        changes: list[Tensor | None] = [
            None if frozen else (core - first).contiguous()
            for core, first, frozen in zip(cores, start, self.frozen, strict=True)
        ]
        change = changes[self.scaled]
        if self.scale != 1.0 and change is not None:
            changes[self.scaled] = change * self.scale
        plain = is_watched()
        for step in self.instructions:
            left, right = step.left, step.right
            change = contract_difference(
                step.forward, (tensors[left], changes[left]), (constants[right], changes[right]), plain
            )
            changes.append(change)
            if step is not self.instructions[-1]:
                constant = constants[step.number]
                tensors.append(constant if change is None else constant + change)
        change = changes[-1]
        if change is None:  # every core is frozen
            change = torch.zeros_like(self.last(tensors))
        elif not self.instructions:
            change = reorder(change, self.only, True)
        return self.finish.apply(change), tensors

    def gradients(self, tensors: Sequence[Tensor], gradient: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
        """Those of the cores that need one; plain operations, and so differentiable again."""
        wanted = list(needed)
        for step in self.instructions:
            wanted.append(wanted[step.left] or wanted[step.right])
        plain = is_watched()
        found: list[Tensor | None] = [None] * len(wanted)
        found[-1] = self.finish.undo(gradient)
        for step in reversed(self.instructions):
            own = found[step.number]
            if own is not None and wanted[step.left]:
                found[step.left] = contract(step.to_left, own, tensors[step.right], plain)
            if own is not None and wanted[step.right]:
                found[step.right] = contract(step.to_right, own, tensors[step.left], plain)
        if not self.instructions:
            found = [reorder(self.finish.undo(gradient), self.only_back, True)]
        pairs = zip(found[: self.cores], tensors[: self.cores], strict=True)
        shaped = [None if one is None else one.reshape(core.shape) for one, core in pairs]
        change = shaped[self.scaled]
        if self.scale != 1.0 and change is not None:
            shaped[self.scaled] = change * self.scale
        return shaped
