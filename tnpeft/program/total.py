"""The delta weight of a whole network: of its one term, or the sum of its terms, and the gradient of that."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tnpeft.program.difference import Code

__all__ = ["Constants", "Delta", "Term", "Total", "autocast_dtype", "without_autocast"]

Constants = tuple[tuple[Tensor, ...], ...]
"""What the difference needs of the frozen copy, for each term."""


class Term(NamedTuple):
    """One term: its code, its cores by their number in the network, and its scale without the network's."""

    code: Code
    cores: tuple[int, ...]
    scale: float

    def of_term(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of its cores, from one tensor for each core of the network."""
        return [tensors[core] for core in self.cores]

    def update(
        self, cores: Sequence[Tensor], start: Sequence[Tensor] | None, constants: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The term's delta weight, scaled, and every tensor of T(cores) on the way."""
        if start is None:
            return self.code.value(self.of_term(cores))
        return self.code.difference(self.of_term(cores), self.of_term(start), constants)


@dataclass(frozen=True)
class Total:
    """The sum of one term or more over `cores` cores; a core may stand in several terms."""

    terms: tuple[Term, ...]
    cores: int

    def value(self, cores: Sequence[Tensor]) -> Tensor:
        """The sum of the terms' own scales times T(cores): the network without its scale."""
        weights = []
        for term in self.terms:
            weight = term.code.layout.apply(term.code.last(term.code.values(term.of_term(cores))))
            weights.append(weight if term.scale == 1.0 else weight * term.scale)
        return _sum(weights)

    def constants(self, start: Sequence[Tensor]) -> Constants:
        return tuple(term.code.constants(term.of_term(start)) for term in self.terms)

    def delta(self, cores: Sequence[Tensor], start: Sequence[Tensor] | None, constants: Constants) -> Tensor:
        """The delta weight by plain operations, for whoever looks on."""
        return _sum([term.update(cores, start, known)[0] for term, known in self._with(constants)])

    def forward(
        self, cores: Sequence[Tensor], start: Sequence[Tensor] | None, constants: Constants
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The delta weight, and the results that the backward pass reads again, term after term (None: made anew)."""
        total: Tensor | None = None
        kept: list[Tensor | None] = []
        for term, known in self._with(constants):
            weight, tensors = term.update(cores, start, known)
            results = tensors[len(term.cores) :]
            kept += [result if keep else None for result, keep in zip(results, term.code.kept, strict=True)]
            total = weight if total is None else total.add_(weight)  # nobody else holds it
        assert total is not None
        return total, kept

    def backward(
        self, cores: Sequence[Tensor], kept: Sequence[Tensor | None], gradient: Tensor, needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradients of the cores that need one: a core of several terms has their sum."""
        totals: list[Tensor | None] = [None] * self.cores
        place = 0
        for term in self.terms:
            code = term.code
            results = kept[place : place + len(code.kept)]
            place += len(code.kept)
            # Where the gradient is to be differentiated, the results must hang on the cores: none that was kept does.
            known = () if torch.is_grad_enabled() else results
            tensors = code.values(code.scale_one(term.of_term(cores)), known)
            grads = code.gradients(tensors, gradient, [needed[core] for core in term.cores])
            for core, grad in zip(term.cores, grads, strict=True):
                total = totals[core]
                totals[core] = grad if total is None or grad is None else total + grad
        return totals

    def _with(self, constants: Constants) -> list[tuple[Term, tuple[Tensor, ...]]]:
        return list(zip(self.terms, constants or ((),) * len(self.terms), strict=True))


def _sum(weights: Sequence[Tensor]) -> Tensor:
    total = weights[0]
    for weight in weights[1:]:
        total = total + weight
    return total


class Delta(torch.autograd.Function):
    """The delta weight in eager mode: keeps the cores and the small results for a backward pass on full values."""

    @staticmethod
    def forward(ctx: Any, total: Total, start: Sequence[Tensor] | None, constants: Constants, *cores: Tensor) -> Tensor:
        with without_autocast(cores[0]):
            weight, kept = total.forward(cores, start, constants)
        ctx.save_for_backward(*cores, *kept)
        ctx.total = total
        return weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        total: Total = ctx.total
        saved = ctx.saved_tensors  # once: activation checkpointing unpacks no tensor twice
        cores, kept = saved[: total.cores], saved[total.cores :]
        with without_autocast(cores[0]):
            grads = total.backward(cores, kept, gradient, ctx.needs_input_grad[3:])
        return (None, None, None, *grads)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The type in which autocast calls a layer with this input; the input's own where there is none."""
    device = x.device.type
    autocast = x.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Contractions run in the cores' own dtype, whatever autocast says."""
    device = tensor.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
