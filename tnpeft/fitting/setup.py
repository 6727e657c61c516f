"""From an adapter and a full update to the least-squares problem that fits one to the other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tnpeft.fitting.contract import Labels, Operand
from tnpeft.fitting.problem import Cores, Problem, Term
from tnpeft.modules import Adapter
from tnpeft.modules.inits import canonical_weight
from tnpeft.network import Network

__all__ = ["pose"]


def pose(adapter: Adapter, delta: Tensor) -> Problem:
    """The problem of the adapter's trainable cores for `delta`, in the shape of the layer's weight and in float64.

    With `start: frozen_copy` the network itself must make the update and what the copy makes.
    """
    network = adapter.network
    axes = _Axes(network)
    fixed = {
        core.name: adapter.cores[core.name].detach().to(delta.device, torch.float64)
        for core in network.cores
        if core.frozen
    }
    shapes = {core.name: core.shape for core in network.cores if not core.frozen}
    terms = tuple(axes.term(1.0, [core.name for core in network.cores], network.weight, fixed) for _ in range(1))
    target = axes.rows_of(canonical_weight(network.layer, delta)) / network.scale
    norm = float(torch.linalg.vector_norm(delta)) / abs(network.scale)
    problem = Problem(axes.rows, target, norm, terms, shapes)
    if network.start == "frozen_copy":
        start = {name: core.detach().to(delta.device, torch.float64) for name, core in adapter.start.items()}
        problem = Problem(axes.rows, target + problem.value(start), norm, terms, shapes)
    return problem


class _Axes:
    """How the legs of each term make the rows of the target.

    Where all terms build an axis of the same legs, these are the rows; a mask drops the entries of a padded axis. Else
    the axis is one row, and a term meets it through an identity reshaped to its legs.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.shape = network.layer.weight_shape
        self.axes: list[Labels] = []
        rows: list[str] = []
        for number in range(len(self.shape)):
            ways = {axes[number] for axes in (network.weight,)}
            labels = ways.pop() if len(ways) == 1 else (f"axis {number}",)
            self.axes.append(labels)
            rows += labels
        self.rows = tuple(rows)

    def _sizes(self, number: int) -> list[int]:
        labels = self.axes[number]
        return [self.network.sizes.get(label, self.shape[number]) for label in labels]

    def rows_of(self, canonical: Tensor) -> Tensor:
        """The canonical weight by rows; padded axes get zeros."""
        sizes = [self._sizes(number) for number in range(len(self.shape))]
        padded = canonical.new_zeros([math.prod(part) for part in sizes])
        padded[tuple(slice(size) for size in self.shape)] = canonical.to(torch.float64)
        return padded.reshape([size for part in sizes for size in part])

    def term(self, scale: float, names: Sequence[str], weight: Sequence[Labels], fixed: Cores) -> Term:
        renamed: dict[str, str] = {}
        extra: list[Operand] = []
        device = next((tensor.device for tensor in fixed.values()), None)
        for number, legs in enumerate(weight):
            size = self.shape[number]
            sizes = [self.network.sizes[leg] for leg in legs]
            whole = torch.arange(math.prod(sizes), device=device)
            if legs == self.axes[number]:
                if len(whole) > size:
                    extra.append(((whole < size).double().reshape(sizes), legs))
            elif len(legs) == 1 and sizes[0] == size:
                renamed[legs[0]] = self.axes[number][0]
            else:
                eye = (whole[:size, None] == whole).double()
                extra.append((eye.reshape(size, *sizes), (*self.axes[number], *legs)))
        cores = {core.name: core for core in self.network.cores}
        labels = {name: tuple(renamed.get(leg, leg) for leg in cores[name].legs) for name in names}
        known = [(fixed[name], labels[name]) for name in names if name in fixed]
        return Term(scale, {name: labels[name] for name in names if name not in fixed}, (*known, *extra))
