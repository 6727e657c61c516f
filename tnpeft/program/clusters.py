"""The clusters of a factored chain, contracted for one layer or for a group of layers of one signature at once.

With a frozen copy each cluster has, beside its value C, its change dC = C - C0, made of differences, and a *paired*
form with which a chain carries values and changes together: the pair (v, d) goes to (C v, dC v + C0 d). The first
link's form makes a pair of one tensor, the last one's leaves the change alone:

    first [C; dC]    middle [[C, 0], [dC, C0]]    last [dC, C0]

A chain of these is T - T0 without any subtraction of large values, exactly zero while nothing has changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tnpeft.plan import Plan
from tnpeft.program.contraction import View, reordering
from tnpeft.program.execute import is_watched, reorder
from tnpeft.program.layout import Instruction, lay_out_steps
from tnpeft.program.route import GROUP, Route, routes
from tnpeft.program.total import without_autocast
from tnpeft.program.tree import core_changes, core_gradients, run_changes, run_gradients, run_values, scaled_cores

__all__ = ["ClusterProgram", "LayerClusters", "StartValues", "build_clusters"]


class LayerClusters(NamedTuple):
    """One layer's clusters, of all terms in turn: values, which carry gradients, and paired forms (empty: no copy)."""

    values: tuple[Tensor, ...]
    paired: tuple[Tensor, ...]


StartValues = tuple[tuple[tuple[Tensor, ...], tuple[Tensor, ...]], ...]
"""Of each term its cores in the frozen copy, and every tensor that its clusters are contracted by; () without one."""


class _Cluster(NamedTuple):
    """The number of a cluster's tensor, and how it is put in the order of its route if it is a core as it stands.

    `split` are the elements before, between and after the places of the pair legs; the last two are one where one of
    the legs is missing. `first` and `last` say which.
    """

    number: int
    ordered: View | None
    back: View | None
    split: tuple[int, int, int]
    first: bool
    last: bool


@dataclass(frozen=True)
class _Term:
    """One term's clusters: its cores by their number in the network, and the code that contracts them."""

    cores: tuple[int, ...]
    frozen: tuple[bool, ...]
    scale: float
    scaled: int
    instructions: tuple[Instruction, ...]
    clusters: tuple[_Cluster, ...]
    orders: tuple[tuple[int, ...] | None, ...]

    def own(self, flags: Sequence[bool]) -> list[bool]:
        return [flags[core] for core in self.cores]

    def stacked(self, layers: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Each of its cores for all layers, in the order of legs in which it is contracted."""
        if len(layers) == 1:
            return [layers[0][core].contiguous() for core in self.cores]
        found = []
        for core, order in zip(self.cores, self.orders, strict=True):
            own = [layer[core] for layer in layers]
            # Contiguous, for a stack takes on a memory format that all of its permuted tensors seem to have.
            seen = own if order is None else [tensor.permute(order) for tensor in own]
            found.append(torch.stack(seen).contiguous())
        return found

    def unordered(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of stacked cores in the cores' own orders of legs."""
        found: list[Tensor | None] = []
        for gradient, order in zip(gradients, self.orders, strict=True):
            if gradient is not None and order is not None:
                gradient = gradient.permute(0, *(1 + order.index(axis) for axis in range(len(order))))
            found.append(gradient)
        return found

    def ordered(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The clusters' tensors in the orders of their routes."""
        plain = is_watched()
        found = []
        for cluster in self.clusters:
            tensor = tensors[cluster.number]
            found.append(tensor if cluster.ordered is None else reorder(tensor, cluster.ordered, plain))
        return found


class ClusterProgram:
    """The clusters of all terms of a network, for `count` layers at once."""

    def __init__(self, plan: Plan, count: int) -> None:
        self.count = count
        self.cores = len(plan.network.cores)
        numbers = {core.name: number for number, core in enumerate(plan.network.cores)}
        self.terms = tuple(_term(part, route, numbers, count) for part, route in routes(plan))
        self.places = sum(len(term.clusters) for term in self.terms)

    def start_values(self, start: Sequence[Sequence[Tensor]]) -> StartValues:
        """What the changes need of the layers' frozen copies."""
        with torch.no_grad(), without_autocast(start[0][0]):
            found = []
            for term in self.terms:
                cores = term.stacked(start)
                values = run_values(term.instructions, scaled_cores(cores, term.scaled, term.scale), ())
                found.append((tuple(cores), tuple(values)))
            return tuple(found)

    def __call__(self, cores: Sequence[Sequence[Tensor]], known: StartValues) -> list[LayerClusters]:
        """The clusters of each layer, from its cores and, with a frozen copy, the `start_values`."""
        return self.split(self.flat([core for own in cores for core in own], known))

    def flat(self, cores: Sequence[Tensor], known: StartValues) -> tuple[Tensor, ...]:
        """The values of all layers, then their paired forms; `cores` are those of one layer after the other."""
        found: tuple[Tensor, ...] = Contracted.apply(self, known, *cores)  # type: ignore[no-untyped-call]
        return found

    def split(self, found: Sequence[Tensor]) -> list[LayerClusters]:
        """The clusters of each layer, from those of all."""
        places = self.places
        values, paired = tuple(found[: places * self.count]), tuple(found[places * self.count :])
        return [
            LayerClusters(values[layer * places : (layer + 1) * places], paired[layer * places : (layer + 1) * places])
            for layer in range(self.count)
        ]

    def contracted(
        self, cores: Sequence[Tensor], known: StartValues
    ) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
        """For all layers together: values, paired forms, and for each term the tensors that gradients need."""
        grouped = [cores[first : first + self.cores] for first in range(0, len(cores), self.cores)]
        values: list[Tensor] = []
        paired: list[Tensor] = []
        kept = []
        for place, term in enumerate(self.terms):
            stacked = term.stacked(grouped)
            scaled = scaled_cores(stacked, term.scaled, term.scale)
            if not known:
                tensors = run_values(term.instructions, scaled, ())
                values += term.ordered(tensors)
            else:
                start, constants = known[place]
                changes = core_changes(stacked, start, term.frozen, term.scaled, term.scale)
                tensors, found = run_changes(term.instructions, scaled, changes, constants, True)
                own = term.ordered(tensors)
                values += own
                paired += _paired_forms(term, own, found, term.ordered(constants))
            kept.append(tensors)
        return values, paired, kept

    def gradients(
        self, kept: Sequence[list[Tensor]], gradients: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> list[list[Tensor | None]]:
        """For each layer, those of its cores, from those of every layer's clusters (None: zero).

        A layer whose clusters have none was not called, and its cores have none.
        """
        totals: list[Tensor | None] = [None] * self.cores
        wanted = [any(needed[core :: self.cores]) for core in range(self.cores)]
        place = 0
        for term, tensors in zip(self.terms, kept, strict=True):
            found: list[Tensor | None] = [None] * len(tensors)
            for cluster in term.clusters:
                own = self._group(gradients[place :: self.places])
                if own is not None and cluster.back is not None:
                    own = reorder(own, cluster.back, is_watched())
                found[cluster.number] = own
                place += 1
            run_gradients(term.instructions, tensors, found, term.own(wanted))
            own_cores = core_gradients(found, tensors[: len(term.cores)], term.scaled, term.scale)
            for core, one in zip(term.cores, term.unordered(own_cores), strict=True):
                before = totals[core]
                totals[core] = one if before is None or one is None else before + one
        if self.count == 1:
            return [totals]
        pieces = [(None,) * self.count if total is None else total.unbind(0) for total in totals]
        return [
            [piece[layer] if any(one is not None for one in gradients[first : first + self.places]) else None
             for piece in pieces]
            for layer, first in enumerate(range(0, self.count * self.places, self.places))
        ]  # fmt: skip

    def _group(self, gradients: Sequence[Tensor | None]) -> Tensor | None:
        if all(one is None for one in gradients):
            return None
        if self.count == 1:
            return gradients[0]
        like = next(one for one in gradients if one is not None)
        return torch.stack([torch.zeros_like(like) if one is None else one for one in gradients])


@lru_cache(maxsize=1024)
def _built(key: object, count: int, holder: _Hidden) -> ClusterProgram:
    return ClusterProgram(holder.plan, count)


class _Hidden(NamedTuple):
    """A plan that is no part of a cache's key."""

    plan: Plan

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return True


def build_clusters(plan: Plan, count: int) -> ClusterProgram:
    """The program of a factored plan's clusters, cached; it is the same for all calls with the same links."""
    return _built(plan.cluster_key, count, _Hidden(plan))


def _term(plan: Plan, route: Route, numbers: dict[str, int], count: int) -> _Term:
    network = plan.network
    batch = GROUP if count > 1 else ""
    sizes = dict(route.sizes) | {GROUP: count}
    own = [network.symbols_of(core) for core in network.cores]
    # Stacking the cores of a group copies them, in any order.
    orders = {} if batch else dict(enumerate(own))
    clusters = []
    for stop in route.stops:
        wanted, number = stop.cluster(False), stop.link.cluster
        ordered = back = None
        if stop.link.steps or batch:
            orders[number] = wanted
        elif orders[number] != wanted:
            ordered = reordering(batch + orders[number], batch + wanted, sizes)
            back = reordering(batch + wanted, batch + orders[number], sizes)
        outer, between, rest = (math.prod(sizes[letter] for letter in piece) for piece in stop.pieces)
        clusters.append(_Cluster(number, ordered, back, (outer * count, between, rest), stop.first, stop.last))
    elements = [core.numel for core in network.cores]
    instructions, orders = lay_out_steps(plan.steps, orders, network.symbols, sizes, batch)
    chosen = [orders[number] for number in range(len(own))]
    return _Term(
        cores=tuple(numbers[core.name] for core in network.cores),
        frozen=tuple(core.frozen for core in network.cores),
        scale=network.scale,
        scaled=elements.index(min(elements)),
        instructions=instructions,
        clusters=tuple(clusters),
        orders=tuple(_permutation(legs, order) for legs, order in zip(own, chosen, strict=True)),
    )


def _permutation(legs: str, order: str) -> tuple[int, ...] | None:
    """The axes of a core stored as `legs`, in another order; None where that is its own."""
    return None if legs == order else tuple(legs.index(letter) for letter in order)


def _paired_forms(
    term: _Term, values: Sequence[Tensor], changes: Sequence[Tensor | None], start: Sequence[Tensor]
) -> Iterator[Tensor]:
    plain = is_watched()
    for cluster, value, first in zip(term.clusters, values, start, strict=True):
        change = changes[cluster.number]
        if change is None:
            change = value.new_zeros(()).expand(cluster.split)
        elif cluster.ordered is not None:
            change = reorder(change, cluster.ordered, plain)
        value, change, first = (one.reshape(cluster.split) for one in (value, change, first))
        if cluster.first:
            yield torch.stack((value, change), 1)
        elif cluster.last:
            yield torch.stack((change, first), 2)
        else:
            nothing = value.new_zeros(()).expand(cluster.split)
            yield torch.stack((torch.stack((value, nothing), 2), torch.stack((change, first), 2)), 1)


class Contracted(torch.autograd.Function):
    """The clusters of a group of layers: values layer by layer, then paired forms, which carry no gradient."""

    @staticmethod
    def forward(ctx: Any, program: ClusterProgram, known: StartValues, *cores: Tensor) -> tuple[Tensor, ...]:
        with without_autocast(cores[0]):
            values, paired, kept = program.contracted(cores, known)
        ctx.set_materialize_grads(False)
        if program.count == 1:
            ctx.save_for_backward(*cores)  # for the check that nothing wrote to them; those of groups are copied
        ctx.program, ctx.kept = program, kept
        found, forms = _layers(values, program.count), _layers(paired, program.count)
        ctx.mark_non_differentiable(*forms)
        return (*found, *forms)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        program: ClusterProgram = ctx.program
        # Of a group nothing is freed with the graph of one layer: others may have a backward pass of their own.
        if program.count == 1:
            _ = ctx.saved_tensors
        with without_autocast(ctx.kept[0][0]):
            found = program.gradients(ctx.kept, gradients[: program.places * program.count], ctx.needs_input_grad[2:])
        return (None, None, *(one for own in found for one in own))


def _layers(stacked: Sequence[Tensor], count: int) -> list[Tensor]:
    """Every layer's own tensors, one layer after the other."""
    if count == 1:
        return [tensor.detach() for tensor in stacked]  # never a core itself
    # Flat pieces of what was stacked: their shape is for those who use them.
    pieces = [tensor.reshape(count, -1).unbind(0) for tensor in stacked]
    return [piece[layer] for layer in range(count) for piece in pieces]
