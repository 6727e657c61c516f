"""Instructions run over numbered tensors, cores first: values, changes from a frozen copy, and gradients.

With A = A0 + dA for every tensor, d(A B) = dA B0 + A dB: the difference of two networks close to each other is made
of differences all the way, never by subtraction of large values. The A0 are constants. The gradient needs no pairs, for
d(T - T0)/d(cores) = dT/d(cores): the backward pass is that of the plain network.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tnpeft.program.kernels import contract, contract_difference, reorder
from tnpeft.program.leg_order import Instruction
from tnpeft.program.observers import is_recorded

__all__ = ["core_changes", "core_gradients", "run_changes", "run_gradients", "run_values", "scaled_cores"]

Instructions = Sequence[Instruction]


def run_values(instructions: Instructions, cores: Sequence[Tensor], known: Sequence[Tensor | None]) -> list[Tensor]:
    """The cores and every result; results that are `known` are not made again."""
    tensors = [core.contiguous() for core in cores]
    plain = is_recorded()
    for place, step in enumerate(instructions):
        found = known[place] if known else None
        if found is None:
            found = contract(step.forward, tensors[step.left], tensors[step.right], plain)
        tensors.append(found)
    return tensors


def run_changes(
    instructions: Instructions,
    cores: Sequence[Tensor],
    changes: Sequence[Tensor | None],
    constants: Sequence[Tensor],
    last: bool,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Values and changes of cores and results; the last result's value only if it is wanted."""
    tensors, found = list(cores), list(changes)
    plain = is_recorded()
    for place, step in enumerate(instructions):
        left, right = step.left, step.right
        change = contract_difference(
            step.forward, (tensors[left], found[left]), (constants[right], found[right]), plain
        )
        found.append(change)
        if last or place + 1 < len(instructions):
            constant = constants[step.number]
            tensors.append(constant if change is None else constant + change)
    return tensors, found


def run_gradients(
    instructions: Instructions, tensors: Sequence[Tensor], found: list[Tensor | None], wanted: list[bool]
) -> None:
    """Fill in the gradients of operands, from those of results in `found`; `wanted` says of each core if it needs one.

    Plain operations where autograd looks on, and so differentiable again.
    """
    for step in instructions:
        wanted.append(wanted[step.left] or wanted[step.right])
    plain = is_recorded()
    for step in reversed(instructions):
        own = found[step.number]
        if own is not None and step.back is not None:
            own = reorder(own, step.back, plain)
        if own is not None and wanted[step.left]:
            found[step.left] = contract(step.to_left, own, tensors[step.right], plain)
        if own is not None and wanted[step.right]:
            found[step.right] = contract(step.to_right, own, tensors[step.left], plain)


def scaled_cores(cores: Sequence[Tensor], scaled: int, scale: float) -> list[Tensor]:
    """The cores, contiguous, with the network's scale in the core `scaled`."""
    found = [core.contiguous() for core in cores]
    if scale != 1.0:
        found[scaled] = found[scaled] * scale
    return found


def core_changes(
    cores: Sequence[Tensor], start: Sequence[Tensor], frozen: Sequence[bool], scaled: int, scale: float
) -> list[Tensor | None]:
    """What has changed of each core since the frozen copy, scaled; None of frozen cores. All are contiguous."""
    changes: list[Tensor | None] = [
        None if fixed else core - first for core, first, fixed in zip(cores, start, frozen, strict=True)
    ]
    change = changes[scaled]
    if scale != 1.0 and change is not None:
        changes[scaled] = change * scale
    return changes


def core_gradients(
    found: Sequence[Tensor | None], cores: Sequence[Tensor], scaled: int, scale: float
) -> list[Tensor | None]:
    """The gradients of the cores in their own shapes, from those of the scaled ones."""
    shaped = [None if one is None else one.reshape(core.shape) for one, core in zip(found, cores, strict=False)]
    change = shaped[scaled]
    if scale != 1.0 and change is not None:
        shaped[scaled] = change * scale
    return shaped
