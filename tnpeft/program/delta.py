"""Delta weights: the plain and the fast way from the cores of one layer or more to scale * (T(cores) - T(start)).

A network is a sum of one term or more; each is a contraction tree. What the differences need of the frozen copies is
made once, by `Program.start`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tnpeft.errors import ExecutionError, Problem
from tnpeft.program import counts
from tnpeft.program.autocast import without_autocast
from tnpeft.program.batched import BatchedTree, Start, Tree, together
from tnpeft.program.kernels import versions
from tnpeft.program.observers import is_recorded, needs_plain_ops
from tnpeft.program.weight_layout import WeightLayout
from tnpeft.schedule import Plan

__all__ = ["Delta", "Program", "Starts", "Term", "Weight", "build_program"]

Starts = tuple[Start, ...]
"""What the differences need of the frozen copies, for each term."""


class Term(NamedTuple):
    """One term of a network."""

    tree: Tree
    layout: WeightLayout  # how the tree's result becomes the stored weight
    kept: tuple[bool, ...]  # for each result but the last: the backward pass reads it, instead of computing it anew
    cores: tuple[int, ...]  # by their number in the network
    scale: float  # without the network's


@dataclass(frozen=True)
class Weight:
    """All that decides how a delta weight is contracted. A core may stand in several terms."""

    terms: tuple[Term, ...]
    cores: int
    copies: bool  # there is a frozen copy

    @classmethod
    def of(cls, plan: Plan, memory_order: tuple[int, ...]) -> Weight:
        """Of a dense plan, for stored weights of this memory order."""
        network = plan.network
        numbers = {core.name: number for number, core in enumerate(network.cores)}
        terms = []
        for part, term in zip(plan.terms or (plan,), network.terms, strict=True):
            layout = WeightLayout.of(part.network, memory_order)
            sizes = {letter: part.network.sizes[leg] for leg, letter in part.network.symbols.items()}
            tree = Tree.of(part.network, range(len(part.network.cores)), part.steps, layout.legs, sizes)
            kept = tuple(2 * step.elements < network.layer.numel for step in part.steps[:-1])
            cores = tuple(numbers[core.name] for core in part.network.cores)
            terms.append(Term(tree, layout, kept, cores, term.scale))
        return cls(tuple(terms), len(network.cores), network.start == "frozen_copy")


class Program:
    """The delta weights of `count` layers at once, all decided when it is built.

    Every method takes one flat list of cores, frozen ones too: the first core of every layer, then the second of every
    layer. Contractions run in the cores' dtype and outside autocast. Weights have the shape of torch's `layer.weight`
    and the strides of the memory order.
    """

    def __init__(self, weight: Weight, count: int = 1) -> None:
        self.weight, self.count = weight, count
        self.terms = [(term, BatchedTree(term.tree, count)) for term in weight.terms]

    def value(self, cores: Sequence[Tensor]) -> Tensor:
        """T(cores) of one layer, the sum of its terms, without the network's scale; differentiable any number of times.

        einsum: T = sum over terms of scale * einsum(cores of the term)
        """
        total: Tensor | None = None
        plain = is_recorded()
        with without_autocast(cores[0]):
            for term, tree in self.terms:
                tensors = tree.run(tree.stack(self.of_term(term, cores))[1], (), True, plain)
                value = term.layout.apply(tensors[-1] if tree.instructions else tensors[0].clone())
                value = value if term.scale == 1.0 else value * term.scale
                total = value if total is None else total + value
        assert total is not None
        return total

    def start(self, copies: Sequence[Tensor]) -> Starts | None:
        """What `deltas` needs of the frozen copies, and may be kept as long as they do not change; None without any."""
        if not copies or not self.weight.copies:
            return None
        plain = needs_plain_ops(*copies)
        # No copy requires a gradient. An exported graph keeps a block for `no_grad`, and cannot be read if it is empty.
        with contextlib.nullcontext() if plain else torch.no_grad(), without_autocast(copies[0]):
            return tuple(tree.start(self.of_term(term, copies), False, plain) for term, tree in self.terms)

    def deltas(self, cores: Sequence[Tensor], start: Starts | None) -> tuple[Tensor, ...]:
        """scale * (T(cores) - T(start)) of each layer, or scale * T(cores) with no `start`; nobody else holds them.

        Exactly zero while the cores equal their start, or while a core of zeros in each term is as it was.
        """
        if not needs_plain_ops(*cores):
            deltas: tuple[Tensor, ...] = Delta.apply(self, start, *cores)  # type: ignore[no-untyped-call]
            return deltas
        return self.plain_deltas(cores, start)

    def plain_deltas(self, cores: Sequence[Tensor], start: Starts | None) -> tuple[Tensor, ...]:
        """As `deltas`, by differentiable operations of torch only, for the plain path."""
        totals: list[Tensor] = []
        with without_autocast(cores[0]):
            for place, (term, tree) in enumerate(self.terms):
                term_cores = self.of_term(term, cores)
                if start is None:
                    tensors = tree.run(tree.scaled(term_cores), (), True, True)
                    result = tensors[-1] if tree.instructions else tensors[0].clone()  # never the core itself
                else:
                    result, _ = tree.change(term_cores, start[place], True)
                deltas = term.layout.apply_all(result, self.count)
                totals = [total + delta for total, delta in zip(totals, deltas, strict=True)] if place else [*deltas]
        return tuple(totals)

    def of_term(self, term: Term, tensors: Sequence[Any]) -> Sequence[Any]:
        """From a list with one entry for each core and layer, the entries of this term's cores."""
        if len(self.terms) == 1:
            return tensors
        return [tensors[core * self.count + layer] for core in term.cores for layer in range(self.count)]

    def gradients(
        self,
        cores: Sequence[Tensor],
        kept: Sequence[Tensor | None],
        gradients: Sequence[Tensor | None],
        needed: Sequence[bool],
        start: Starts | None,
    ) -> list[Tensor | None]:
        """Those of the cores that need one, from those of the delta weights (None: the layer was not called).

        A core of several terms has their sum.
        """
        totals: list[Tensor | None] = [None] * len(cores)
        plain, count, place = is_recorded(), self.count, 0
        for number_of_term, (term, tree) in enumerate(self.terms):
            own, stacked = self.of_term(term, cores), tree.size if tree.copied else 0
            known = kept[place : place + stacked + len(term.kept)]
            place += len(known)
            # Where the gradient is to be differentiated, the results must hang on the cores: none that was kept does.
            anew = not stacked or torch.is_grad_enabled()
            copies = None if start is None else start[number_of_term]
            first = tree.scaled(own, copies) if anew else [tensor for tensor in known[:stacked] if tensor is not None]
            tensors = tree.run(first, () if torch.is_grad_enabled() else known[stacked:], False, plain)
            grads = tree.gradients(tensors, self._undone(term, gradients), own, self.of_term(term, needed), plain)
            for number, grad in enumerate(grads):
                core = term.cores[number // count] * count + number % count
                total = totals[core]
                if grad is not None and gradients[number % count] is not None:
                    totals[core] = grad if total is None else total + grad
        return totals

    def _undone(self, term: Term, gradients: Sequence[Tensor | None]) -> Tensor:
        """The gradient of a tree's result."""
        if self.count == 1 and gradients[0] is not None:
            return term.layout.undo(gradients[0])
        return together([None if grad is None else term.layout.undo(grad).reshape(-1) for grad in gradients])


class Delta(torch.autograd.Function):
    """The delta weights of some layers: keeps the small results for a backward pass on full values."""

    @staticmethod
    def forward(ctx: Any, program: Program, start: Starts | None, *cores: Tensor) -> tuple[Tensor, ...]:
        totals: Sequence[Tensor] = ()
        kept: list[Tensor | None] = []
        copied = program.count > 1
        with without_autocast(cores[0]):
            for place, (term, tree) in enumerate(program.terms):
                term_cores = program.of_term(term, cores)
                if start is None:
                    tensors = tree.run(tree.scaled(term_cores), (), True, False)
                    result = tensors.pop() if tree.instructions else tensors[0].clone()
                else:
                    result, tensors = tree.change(term_cores, start[place], False)
                kept += tensors[: tree.size] if copied else ()
                for tensor, keep in zip(tensors[tree.size :], term.kept, strict=True):
                    kept.append(tensor if keep else None)
                deltas = term.layout.apply_all(result, program.count)
                for total, delta in zip(totals, deltas, strict=False):
                    total.add_(delta)  # nobody else holds it
                totals = totals or deltas
        if counts.OPEN:
            counts.note("deltas", program.count)
        ctx.set_materialize_grads(False)
        ctx.program, ctx.start = program, start
        if not copied:
            ctx.save_for_backward(*cores, *kept)
            return tuple(totals)
        # Nothing is freed with the graph of one layer: others may have a backward pass of their own.
        ctx.kept, ctx.cores, ctx.writes = kept, cores, versions(cores)
        # Tensors that know nothing of each other: writing to one is no change of the others.
        return tuple([delta.data for delta in totals])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        program: Program = ctx.program
        number = program.weight.cores * program.count
        if all(gradient is None for gradient in gradients):
            return (None,) * (2 + number)
        if program.count == 1:
            saved = ctx.saved_tensors  # once: activation checkpointing unpacks no tensor twice
            cores, kept = saved[:number], saved[number:]
        else:
            cores, kept = ctx.cores, ctx.kept
            if torch.is_grad_enabled() and ctx.writes != versions(cores):
                what, wrong = "double backward through delta weights", "values that were written since"
                fix = "Step the optimiser after the last backward pass."
                raise ExecutionError(Problem(what, "the cores of the forward pass", wrong, fix))
        with without_autocast(cores[0]):
            return (None, None, *program.gradients(cores, kept, gradients, ctx.needs_input_grad[2:], ctx.start))


@lru_cache(maxsize=1024)
def build_program(plan: Plan, memory_order: tuple[int, ...]) -> Program:
    """The program of `plan`, cached; `memory_order` has the stored weight's axes from slowest to fastest varying."""
    return Program(Weight.of(plan, memory_order))
