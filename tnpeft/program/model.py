"""The program of a plan: straight-line code from cores to the delta weight in the weight's own memory order."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tnpeft.planning import Plan
from tnpeft.program.deltas import weight_of
from tnpeft.program.difference import Code
from tnpeft.program.leg_order import lay_out
from tnpeft.program.observers import needs_plain_ops
from tnpeft.program.pairwise import reordering
from tnpeft.program.total import Constants, Delta, Term, Total, without_autocast
from tnpeft.program.weight_layout import WeightLayout

__all__ = ["Program", "build_program"]


class Program:
    """Pairwise contractions, all decided when the program is built.

    Every method takes the cores, frozen ones too, in the network's order; contractions run in the cores' dtype and
    outside autocast. Weights have the shape of torch's `layer.weight` and the strides of `memory_order`.
    """

    def __init__(self, plan: Plan, memory_order: tuple[int, ...]) -> None:
        self.plan = plan
        self.memory_order = memory_order
        self._total = _total(plan, memory_order)
        self.batched = weight_of(plan, memory_order)

    def __reduce__(self) -> tuple[Any, ...]:
        return build_program, (self.plan, self.memory_order)

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self

    def value(self, cores: Sequence[Tensor]) -> Tensor:
        """T(cores), the sum of its terms, without the network's scale; differentiable any number of times."""
        with without_autocast(cores[0]):
            return self._total.value(cores)

    def constants(self, start: Sequence[Tensor] | None) -> Constants:
        """What `delta` needs of the frozen copy and may be kept as long as that does not change; () without one."""
        if start is None or self.plan.network.start == "zero":
            return ()
        # No copy requires a gradient. An exported graph keeps a block for `no_grad`, and cannot be read if it is empty.
        with contextlib.nullcontext() if needs_plain_ops(*start) else torch.no_grad(), without_autocast(start[0]):
            return self._total.constants(start)

    def delta(self, cores: Sequence[Tensor], start: Sequence[Tensor] | None, constants: Constants) -> Tensor:
        """scale * (T(cores) - T(start)), or scale * T(cores) where there is no `start`.

        Exactly zero while the cores equal their start, or while a core of zeros in each term is as it was.
        """
        if not needs_plain_ops(*cores):
            weight: Tensor = Delta.apply(self._total, start, constants, *cores)  # type: ignore[no-untyped-call]
            return weight
        with without_autocast(cores[0]):
            return self._total.delta(cores, start, constants)


@lru_cache(maxsize=1024)
def build_program(plan: Plan, memory_order: tuple[int, ...]) -> Program:
    """The program of `plan`, cached; `memory_order` has the stored weight's axes from slowest to fastest varying."""
    return Program(plan, memory_order)


def _total(plan: Plan, memory_order: tuple[int, ...]) -> Total:
    network = plan.network
    numbers = {core.name: number for number, core in enumerate(network.cores)}
    terms = []
    for part, term in zip(plan.terms or (plan,), network.terms, strict=True):
        cores = tuple(numbers[core.name] for core in part.network.cores)
        terms.append(Term(_compile(part, memory_order), cores, term.scale))
    return Total(tuple(terms), len(network.cores))


def _compile(plan: Plan, memory_order: tuple[int, ...]) -> Code:
    network = plan.network
    layout = WeightLayout.of(network, memory_order)
    sizes = {letter: network.sizes[leg] for leg, letter in network.symbols.items()}
    elements = [core.numel for core in network.cores]
    # A network of one core has no steps, but may have to be reordered.
    core = network.symbols_of(network.cores[0])
    weight = core if plan.steps else layout.legs
    return Code(
        cores=len(network.cores),
        frozen=tuple(core.frozen for core in network.cores),
        kept=tuple(2 * step.elements < network.layer.numel for step in plan.steps[:-1]),
        instructions=lay_out(plan, layout.legs),
        layout=layout,
        scale=network.scale,
        scaled=elements.index(min(elements)),
        only=reordering(core, weight, sizes),
        only_back=reordering(weight, core, sizes),
    )
