"""A contraction tree run on tensors by number, cores first: its value, its change from a frozen copy, and its VJP.

With A = A0 + dA for every tensor, d(A B) = dA B0 + A dB: the difference of two networks close to each other is made
of differences all the way, never by subtraction of large values. The A0 are constants. The VJP is that of the plain
network, for d(T - T0)/d(cores) = dT/d(cores).
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
    """The cores and every result; results that are `known` are not computed again."""
    tensors = [core.contiguous() for core in cores]
    plain = is_recorded()
    for place, step in enumerate(instructions):
        result = known[place] if known else None
        if result is None:
            result = contract(step.forward, tensors[step.left], tensors[step.right], plain)
        tensors.append(result)
    return tensors


def run_changes(
    instructions: Instructions,
    cores: Sequence[Tensor],
    changes: Sequence[Tensor | None],
    constants: Sequence[Tensor],
    last: bool,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Values and changes of cores and results; the last result's value only if it is wanted."""
    tensors, changes = list(cores), list(changes)
    plain = is_recorded()
    for place, step in enumerate(instructions):
        left, right = step.left, step.right
        change = contract_difference(
            step.forward, (tensors[left], changes[left]), (constants[right], changes[right]), plain
        )
        changes.append(change)
        if last or place + 1 < len(instructions):
            constant = constants[step.number]
            tensors.append(constant if change is None else constant + change)
    return tensors, changes


def run_gradients(
    instructions: Instructions, tensors: Sequence[Tensor], grads: list[Tensor | None], wanted: list[bool]
) -> None:
    """Fill in `grads` of operands, from that of the result; `wanted` says of each core if it needs one.

    Plain operations where autograd looks on, and so differentiable again.
    """
    for step in instructions:
        wanted.append(wanted[step.left] or wanted[step.right])
    plain = is_recorded()
    for step in reversed(instructions):
        grad = grads[step.number]
        if grad is not None and step.back is not None:
            grad = reorder(grad, step.back, plain)
        if grad is not None and wanted[step.left]:
            grads[step.left] = contract(step.to_left, grad, tensors[step.right], plain)
        if grad is not None and wanted[step.right]:
            grads[step.right] = contract(step.to_right, grad, tensors[step.left], plain)


def scaled_cores(cores: Sequence[Tensor], scaled: int, scale: float) -> list[Tensor]:
    """The cores, contiguous, with the network's scale in the core `scaled`."""
    contiguous = [core.contiguous() for core in cores]
    if scale != 1.0:
        contiguous[scaled] = contiguous[scaled] * scale
    return contiguous


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
    grads: Sequence[Tensor | None], cores: Sequence[Tensor], scaled: int, scale: float
) -> list[Tensor | None]:
    """The gradients of the cores in the cores' shapes, from those of the scaled cores."""
    shaped = [None if grad is None else grad.reshape(core.shape) for grad, core in zip(grads, cores, strict=False)]
    grad = shaped[scaled]
    if scale != 1.0 and grad is not None:
        shaped[scaled] = grad * scale
    return shaped
