"""The least-squares problem behind a fit: a sum of networks against a target, linear in each core.

Everything is labelled. The target's axes are the *rows*: one for each open leg if all terms build the weight's axis
from the same legs, else one for the whole axis. A matrix of weight x core is never built. For one core, the rest of the
network is contracted with a copy of itself, which leaves a matrix over the core's summed legs only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tnpeft.fitting.contract import Labels, Operand, contract

__all__ = ["CG_STEPS", "CG_TOLERANCE", "RIDGE", "Cores", "Problem", "Term", "direct"]

Cores = dict[str, Tensor]

LARGEST_GRAM = 2**23  # elements of a core's normal matrices; beyond it they are never built
LARGEST_SIDE = 2048  # and of one of them, whose factor takes the cube of this
RIDGE = 1e-13  # of the normal matrix's mean diagonal: what the others hardly see of a core stays as it was
CG_STEPS, CG_TOLERANCE = 100, 1e-9


@dataclass(frozen=True)
class Term:
    """scale * the network of some free cores, each with its labels in this term, and fixed tensors."""

    scale: float
    free: Mapping[str, Labels]
    fixed: tuple[Operand, ...] = ()

    def operands(self, cores: Cores, without: str | None = None) -> list[Operand]:
        own = [(cores[name], labels) for name, labels in self.free.items() if name != without]
        return [*own, *self.fixed]


@dataclass(frozen=True)
class Problem:
    """Minimise |target - sum of the terms|; relative errors are relative to `norm`.

    `shapes` has the free cores in the order in which they are solved for.
    """

    rows: Labels
    target: Tensor
    norm: float
    terms: tuple[Term, ...]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def solved_for(self) -> tuple[str, ...]:
        """The cores that least squares can solve for; the others are behind nonlinear maps."""
        return tuple(self.shapes)

    @property
    def multilinear(self) -> bool:
        """Whether every term is a product of cores, so that a factor may pass from one core to another."""
        return True

    @property
    def curved(self) -> bool:
        """Whether there are cores that least squares cannot solve for."""
        return len(self.solved_for) < len(self.shapes)

    def value(self, cores: Cores) -> Tensor:
        """The sum of the terms, over the rows."""
        return sum((term.scale * contract(term.operands(cores), self.rows) for term in self.terms), 0 * self._nothing)

    def error(self, cores: Cores) -> float:
        """The relative error; infinite if the cores have overflowed."""
        error = float(torch.linalg.vector_norm(self.target - self.value(cores))) / self.norm
        return error if math.isfinite(error) else math.inf

    def solved(self, cores: Cores, name: str, ridge: float = RIDGE) -> Tensor:
        """The best value of one core while all others stay; a larger ridge keeps it nearer to its last value."""
        return self._sides[name].solved(cores, ridge)

    @property
    def zeros(self) -> Cores:
        """Free cores of zeros."""
        return {name: self.target.new_zeros(shape) for name, shape in self.shapes.items()}

    @cached_property
    def _nothing(self) -> Tensor:
        return self.target.new_zeros(())

    @cached_property
    def _sides(self) -> dict[str, _Side]:
        return {name: _Side.of(self, name) for name in self.shapes}


@dataclass(frozen=True)
class _Side:
    """The problem for one core: it is linear, and separate for each value of the core's `kept` legs.

    `legs` are the core's axes by number. A kept one is a row, the same in every term. `common` kept axes are in the
    rest of the network too, so that each of their values has its own normal matrix. The others are summed.
    """

    problem: Problem
    name: str
    own: tuple[Term, ...]
    others: tuple[Term, ...]
    common: tuple[int, ...]
    alone: tuple[int, ...]
    summed: tuple[int, ...]

    @classmethod
    def of(cls, problem: Problem, name: str) -> _Side:
        own = tuple(term for term in problem.terms if name in term.free)
        others = tuple(term for term in problem.terms if name not in term.free)
        rest = {label for term in own for other, labels in term.free.items() if other != name for label in labels}
        rest |= {label for term in own for _, labels in term.fixed for label in labels}
        common: list[int] = []
        alone: list[int] = []
        summed: list[int] = []
        for axis in range(len(problem.shapes[name])):
            labels = {term.free[name][axis] for term in own}
            if len(labels) == 1 and labels <= set(problem.rows):
                (common if labels <= rest else alone).append(axis)
            else:
                summed.append(axis)
        return cls(problem, name, own, others, tuple(common), tuple(alone), tuple(summed))

    def solved(self, cores: Cores, ridge: float) -> Tensor:
        core = cores[self.name]
        order = (*self.common, *self.summed, *self.alone)
        sizes = [[core.shape[axis] for axis in axes] for axes in (self.common, self.summed, self.alone)]
        flat = [math.prod(part) for part in sizes]
        right = self._right(cores).permute(order).reshape(flat)
        if flat[0] * flat[1] ** 2 <= LARGEST_GRAM and flat[1] <= LARGEST_SIDE:
            gram = self._gram(cores)
            step = direct(gram, right - gram @ core.permute(order).reshape(flat), ridge)
        else:
            right = right - self._applied(cores, core).permute(order).reshape(flat)
            step = self._iterated(cores, right, order, [size for part in sizes for size in part])
        back = [order.index(axis) for axis in range(core.ndim)]
        return core + step.reshape([size for part in sizes for size in part]).permute(back)

    def _labels(self, term: Term) -> Labels:
        return term.free[self.name]

    def _right(self, cores: Cores) -> Tensor:
        """The rest of the network, transposed, on what the other terms leave of the target."""
        problem = self.problem
        total = torch.zeros_like(cores[self.name])
        for term in self.own:
            rest = term.operands(cores, self.name)
            total += term.scale * contract([*rest, (problem.target, problem.rows)], self._labels(term))
            for other in self.others:
                met = [(tensor, self._primed(labels)) for tensor, labels in other.operands(cores)]
                total -= term.scale * other.scale * contract([*rest, *met], self._labels(term))
        return total

    def _pairs(self, cores: Cores) -> Iterator[tuple[float, Term, Term, list[Operand]]]:
        """The rest of each own term beside the rest of each, joined along the rows."""
        for left, right in itertools.product(self.own, repeat=2):
            second = [(tensor, self._primed(labels)) for tensor, labels in right.operands(cores, self.name)]
            yield left.scale * right.scale, left, right, [*left.operands(cores, self.name), *second]

    def _gram(self, cores: Cores) -> Tensor:
        """The normal matrices, (common, summed, summed); one for all where they do not differ."""
        core = cores[self.name]
        total = core.new_zeros(())
        for scale, left, right, operands in self._pairs(cores):
            present = {label for _, labels in operands for label in labels}
            kept = [self._labels(left)[axis] for axis in self.common]
            output = [label for label in kept if label in present]
            for term, mark in ((left, ""), (right, "'")):
                for axis in self.summed:
                    label = self._labels(term)[axis]
                    if label in self.problem.rows:  # a row in this term, summed in another one
                        eye = torch.eye(core.shape[axis], dtype=core.dtype, device=core.device)
                        operands.append((eye, (label, f"{label}|{mark}")))
                        label += "|"
                    output.append(label + mark)
            made = contract(operands, tuple(output)) if operands else core.new_ones(())
            shape = [core.shape[a] if lab in present else 1 for a, lab in zip(self.common, kept, strict=True)]
            total = total + scale * made.reshape([*shape, *(core.shape[axis] for axis in self.summed * 2)])
        side = math.prod(core.shape[axis] for axis in self.summed)
        shape = [core.shape[axis] for axis in self.common]
        return total.expand([*shape, *total.shape[len(shape) :]]).reshape(-1, side, side)

    def _applied(self, cores: Cores, core: Tensor) -> Tensor:
        """The normal matrices times a core, without building them."""
        total = torch.zeros_like(core)
        for scale, left, right, operands in self._pairs(cores):
            operands.append((core, self._primed(self._labels(right))))
            total += scale * contract(operands, self._labels(left))
        return total

    def _iterated(self, cores: Cores, right: Tensor, order: tuple[int, ...], shape: list[int]) -> Tensor:
        """Conjugate gradients on the normal equations."""
        back = [order.index(axis) for axis in range(len(order))]
        flat = right.shape

        def apply(vector: Tensor) -> Tensor:
            return self._applied(cores, vector.reshape(shape).permute(back)).permute(order).reshape(flat)

        step, left = torch.zeros_like(right), right
        direction, size = left, float((left * left).sum())
        enough = CG_TOLERANCE**2 * size
        for _ in range(CG_STEPS):
            if size <= enough:
                break
            image = apply(direction)
            curvature = float((direction * image).sum())
            if curvature <= 0:  # rounding: nothing more can be won
                break
            step = step + size / curvature * direction
            left = left - size / curvature * image
            size, before = float((left * left).sum()), size
            direction = left + size / before * direction
        return step

    def _primed(self, labels: Labels) -> Labels:
        return tuple(label if label in self.problem.rows else label + "'" for label in labels)


def direct(gram: Tensor, right: Tensor, ridge: float) -> Tensor:
    """gram^-1 right. The gram matrix may be singular: the result is zero in its null space."""
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    while ridge < 1:
        factor, failed = torch.linalg.cholesky_ex(gram + (ridge * mean)[:, None, None] * eye)
        solvable = (failed == 0) & (mean > 0)
        if bool((solvable | (mean <= 0)).all()):
            break
        ridge *= 100
    factor = torch.where(solvable[:, None, None], factor, eye)
    step = torch.cholesky_solve(right, factor)
    return torch.where(solvable[:, None, None], step, torch.zeros_like(step))
