"""From an adapter and a full update to the least-squares problem that fits one to the other."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from tnpeft.adapters import Adapter
from tnpeft.adapters.inits import canonical_weight
from tnpeft.fitting.contract import Labels, Operand
from tnpeft.fitting.mapped import MappedProblem, factors_of, linear_cores
from tnpeft.fitting.problem import Cores, Problem, Term
from tnpeft.network import BoundTerm, Network

__all__ = ["FACTOR", "build_problem", "build_problem_with_factor", "vector_of_channels"]

FACTOR = "the factor of each output channel"  # no core can be called so


def build_problem(adapter: Adapter, weight: Tensor, delta: Tensor, start: Cores) -> Problem:
    """The problem of the adapter's trainable cores for `delta`, on the base `weight`, both as the layer stores them.

    `start` is the frozen copy, if the spec has one: the target is then `delta` plus what the copy makes.
    """
    network = adapter.network
    axes = _Axes(network.plain, delta.device)
    base = canonical_weight(network.layer, weight.detach()).to(delta.device, torch.float64)
    stored = {name: _wide(core.detach().to(delta.device)) for name, core in adapter.cores.items()}
    stored |= {core.name: base.reshape(core.shape) for core in network.cores if core.origin == "weight"}
    shapes = {core.name: core.shape for core in network.cores if not core.frozen}
    fixed = {name: core for name, core in stored.items() if name not in shapes}
    known = _constant(network, stored) if network.factors else fixed
    terms = tuple(axes.term(term, known) for term in network.terms)
    target = axes.rows_of(canonical_weight(network.layer, delta)) / network.scale
    norm = float(torch.linalg.vector_norm(delta)) / abs(network.scale)
    problem = Problem(axes.rows, target, norm, terms, shapes)
    if network.factors:
        problem = MappedProblem(axes.rows, target, norm, terms, shapes, network, fixed, linear_cores(network))
    if network.start == "frozen_copy":
        with torch.no_grad():
            problem = replace(problem, target=target + problem.value(start))
    return problem


def _wide(core: Tensor) -> Tensor:
    """In float64; places stay whole numbers."""
    return core.double() if core.is_floating_point() else core


def _constant(network: Network, stored: Cores) -> Cores:
    """The factors that no trained core is part of."""
    frozen = {core.name: core.frozen for core in network.plain.cores}
    with torch.no_grad():
        return {label: tensor for label, tensor in factors_of(network, stored).items() if frozen[label]}


def build_problem_with_factor(adapter: Adapter, weight: Tensor, delta: Tensor, start: Cores) -> Problem:
    """The problem of `compose: dora`: W + delta is a factor of each output channel times (W + the network's update).

    The factor is one more core, and the problem stays linear in each: the factor is in every term, and in one more term
    with the base weight (minus what a frozen copy makes).
    """
    network = adapter.network
    plain = build_problem(adapter, weight, delta, start)
    axes = _Axes(network.plain, delta.device)
    base = axes.rows_of(canonical_weight(network.layer, weight.detach()).to(delta.device, torch.float64))
    change = axes.rows_of(canonical_weight(network.layer, delta))
    kept = base - (plain.target * network.scale - change)
    labels = axes.axes[0]
    terms = [
        replace(term, scale=term.scale * network.scale, free={**term.free, FACTOR: labels}) for term in plain.terms
    ]
    terms.append(Term(1.0, {FACTOR: labels}, ((kept, axes.rows),)))
    sizes = tuple(kept.shape[: len(labels)])
    norm = float(torch.linalg.vector_norm(delta))
    shapes = {**plain.shapes, FACTOR: sizes}
    return replace(plain, target=base + change, norm=norm, terms=tuple(terms), shapes=shapes)


def vector_of_channels(network: Network, rows: Tensor) -> Tensor:
    """A tensor over the rows of the output channels as one vector, without padding."""
    return rows.reshape(-1)[: network.layer.out_channels]


class _Axes:
    """How the legs of each term make the rows of the target.

    If all terms build an axis from the same legs, these are the rows; a mask drops the entries of a padded axis. Else
    the axis is one row, and each term has an identity, reshaped to its legs, for it.
    """

    def __init__(self, network: Network, device: torch.device) -> None:
        self.network = network
        self.device = device
        self.shape = network.layer.weight_shape
        self.axes: list[Labels] = []
        for number in range(len(self.shape)):
            ways = {term.weight[number] for term in network.terms}
            self.axes.append(ways.pop() if len(ways) == 1 else (f"axis {number}",))
        self.rows: Labels = tuple(label for axis in self.axes for label in axis)

    def rows_of(self, canonical: Tensor) -> Tensor:
        """The canonical weight by rows; padded axes get zeros."""
        sizes = [
            [self.network.sizes.get(label, size) for label in axis]
            for axis, size in zip(self.axes, self.shape, strict=True)
        ]
        padded = canonical.new_zeros([math.prod(part) for part in sizes], dtype=torch.float64)
        padded[tuple(slice(size) for size in self.shape)] = canonical
        return padded.reshape([size for part in sizes for size in part])

    def term(self, term: BoundTerm, fixed: Cores) -> Term:
        renamed: dict[str, str] = {}
        extra: list[Operand] = []
        for axis, legs, size in zip(self.axes, term.weight, self.shape, strict=True):
            sizes = [self.network.sizes[leg] for leg in legs]
            places = torch.arange(math.prod(sizes), device=self.device)
            if legs == axis:
                if len(places) > size:
                    extra.append(((places < size).double().reshape(sizes), legs))
            elif sizes == [size]:
                renamed[legs[0]] = axis[0]
            else:
                eye = (places[:size, None] == places).double()
                extra.append((eye.reshape(size, *sizes), (*axis, *legs)))
        labels = {
            core.name: tuple(renamed.get(leg, leg) for leg in core.legs)
            for core in self.network.cores
            if core.name in term.cores
        }
        known = [(fixed[name], own) for name, own in labels.items() if name in fixed]
        free = {name: own for name, own in labels.items() if name not in fixed}
        return Term(term.scale, free, (*known, *extra))
