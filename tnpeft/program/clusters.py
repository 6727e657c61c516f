"""The clusters of a factored chain, each contracted for one layer, or at once for all layers with an equal cluster.

With a frozen copy each cluster has, beside its value C, its change dC = C - C0, made of differences, and a *dual*
form with which a chain carries values and changes together: the pair (v, d) goes to (C v, dC v + C0 d). The first
link's form makes a pair of one tensor, the last one's leaves the change alone:

    first [C; dC]    middle [[C, 0], [dC, C0]]    last [dC, C0]    lone dC

A chain of these is T - T0 without any subtraction of large values, exactly zero while nothing has changed.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from tnpeft.planning.steps import Contraction
from tnpeft.program import counts
from tnpeft.program.autocast import without_autocast
from tnpeft.program.batched import BatchedTree, Changed, Start, Tree, together
from tnpeft.program.observers import is_recorded, needs_plain_ops, saved_tensors_are_hooked
from tnpeft.schedule import Plan
from tnpeft.schedule.chain_legs import ChainLayout, LinkLayout, chain_layouts

__all__ = ["BatchedCluster", "Cluster", "ClusterProgram", "ClusterStart", "LayerClusters", "build_clusters"]


class LayerClusters(NamedTuple):
    """One layer's clusters, of all terms in turn: values, which carry gradients, and dual forms (empty: no copy)."""

    values: tuple[Tensor, ...]
    dual: tuple[Tensor, ...]


@dataclass(frozen=True)
class Cluster:
    """All that decides how a cluster is contracted; layers of other sizes may have an equal one."""

    tree: Tree
    form: str | None  # which dual form it has: `first`, `middle`, `last` or `lone`; None: it has no frozen copy
    split: tuple[int, int, int]  # elements before, between and after the pair legs


class ClusterStart(NamedTuple):
    """What a cluster needs of the frozen copies."""

    start: Start  # for its change
    half: Tensor  # what its dual form has of C0: C0 itself, or with form `middle` [0, C0]


class BatchedCluster:
    """A cluster for `count` layers at once."""

    def __init__(self, cluster: Cluster, count: int) -> None:
        self.cluster, self.count = cluster, count
        self.tree = BatchedTree(cluster.tree, count)
        outer, between, rest = cluster.split
        self._split = (outer * count, between, rest)

    def start(self, cores: Sequence[Tensor]) -> ClusterStart | None:
        """What is made of the frozen copies of all layers; None where there are none."""
        if self.cluster.form is None:
            return None
        with torch.no_grad(), without_autocast(cores[0]):
            start = self.tree.start(cores, True, is_recorded())
            half = start.constants[-1].reshape(self._split)
            if self.cluster.form == "middle":
                half = torch.stack((torch.zeros_like(half), half), 1).unsqueeze(3)
            return ClusterStart(start, half)

    def __call__(self, cores: Sequence[Tensor], known: ClusterStart | None) -> tuple[Tensor, ...]:
        """The values for each layer, then its dual forms; `cores`: the first of every layer, then the second."""
        if not needs_plain_ops(*cores):
            found: tuple[Tensor, ...] = Contracted.apply(self, known, *cores)  # type: ignore[no-untyped-call]
            return found
        with without_autocast(cores[0]):
            tensors, dual = self.contracted(cores, known, True)
        return (tensors[-1],) if dual is None else (tensors[-1], dual)

    def contracted(
        self, cores: Sequence[Tensor], known: ClusterStart | None, plain: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        """Every tensor of the tree, and the dual form, for all layers."""
        if known is None:
            return self.tree.run(self.tree.scaled(cores), (), True, plain), None
        changed = self.tree.changed(cores, known.start, True, plain)
        return changed.tensors, self._dual(changed, known.half)

    def _dual(self, changed: Changed, half: Tensor) -> Tensor:
        value, change = changed.tensors[-1].reshape(self._split), changed.changes[-1]
        change = torch.zeros_like(value) if change is None else change.reshape(self._split)
        if self.cluster.form == "lone":
            return change
        if self.cluster.form == "last":
            return torch.stack((change, half), 2)
        pair = torch.stack((value, change), 1)
        return pair if self.cluster.form == "first" else torch.cat((pair.unsqueeze(3), half), 3)

    def gradients(
        self,
        tensors: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        cores: Sequence[Tensor],
        needed: Sequence[bool],
    ) -> list[Tensor | None]:
        """Those of the cores, from those of each layer's values (None: zero).

        A layer whose values have none was not called, and its cores have none.
        """
        called = [gradient is not None for gradient in gradients]
        grads = self.tree.gradients(tensors, together(gradients), cores, needed, is_recorded())
        if all(called):
            return grads
        return [grad if called[place % self.count] else None for place, grad in enumerate(grads)]


class ClusterProgram:
    """All clusters of a network, of its terms in turn: what each is, and its cores by their number in the network."""

    def __init__(self, plan: Plan) -> None:
        self.clusters: list[tuple[Cluster, tuple[int, ...]]] = []
        numbers = {core.name: number for number, core in enumerate(plan.network.cores)}
        for part, layout in chain_layouts(plan):
            for link in layout.links:
                cores = part.numbers_of(link.link)
                places = tuple(numbers[part.network.cores[core].name] for core in cores)
                self.clusters.append((_cluster(part, layout, link, cores), places))
        self.lone = [BatchedCluster(cluster, 1) for cluster, _ in self.clusters]  # the code for one layer

    def start(self, start: Sequence[Tensor]) -> tuple[ClusterStart | None, ...]:
        """What the changes of one layer need of its frozen copy, `start` (empty: there is none)."""
        copies = [[start[core] for core in cores] if start else [] for _, cores in self.clusters]
        return tuple(code.start(of_cluster) for code, of_cluster in zip(self.lone, copies, strict=True))

    def __call__(self, cores: Sequence[Tensor], known: Sequence[ClusterStart | None]) -> LayerClusters:
        """One layer's clusters, from its cores and what `start` made."""
        return self.split(self.flat(cores, known))

    def flat(self, cores: Sequence[Tensor], known: Sequence[ClusterStart | None]) -> tuple[Tensor, ...]:
        """The values and dual forms of one cluster after the other."""
        flat: list[Tensor] = []
        for code, (_, places), start in zip(self.lone, self.clusters, known, strict=True):
            flat += code([cores[place] for place in places], start)
        return tuple(flat)

    def split(self, flat: Sequence[Tensor]) -> LayerClusters:
        """The clusters from values and dual forms in a row."""
        if len(flat) == len(self.clusters):
            return LayerClusters(tuple(flat), ())
        return LayerClusters(tuple(flat[::2]), tuple(flat[1::2]))


_CLUSTERS: WeakValueDictionary[Hashable, ClusterProgram] = WeakValueDictionary()


def build_clusters(plan: Plan) -> ClusterProgram:
    """The clusters of a factored plan, shared as long as anybody holds them; equal for all calls with these links."""
    known = _CLUSTERS.get(plan.cluster_key)
    return _CLUSTERS.setdefault(plan.cluster_key, ClusterProgram(plan)) if known is None else known


def _cluster(plan: Contraction, layout: ChainLayout, link: LinkLayout, cores: Sequence[int]) -> Cluster:
    outer, between, rest = (math.prod(layout.sizes[letter] for letter in piece) for piece in link.pieces)
    copies = plan.copies
    form = ("lone" if link.last else "first") if link.first else "last" if link.last else "middle"
    tree = Tree.of(plan.network, cores, link.link.steps, link.cluster(False), layout.sizes)
    return Cluster(tree, form if copies else None, (outer, between, rest))


class Contracted(torch.autograd.Function):
    """A cluster of some layers: values, then dual forms, which carry no gradient."""

    @staticmethod
    def forward(ctx: Any, code: BatchedCluster, known: ClusterStart | None, *cores: Tensor) -> tuple[Tensor, ...]:
        with without_autocast(cores[0]):
            tensors, dual = code.contracted(cores, known, False)
        if counts.OPEN:
            counts.note("clusters", code.count)
        ctx.set_materialize_grads(False)
        # Of several layers nothing is freed with the graph of one: others may have a backward pass of their own. The
        # cores of one layer are not copied: autograd checks that nothing wrote to them.
        if not code.tree.copied:
            ctx.save_for_backward(*cores)
        ctx.code, ctx.cores = code, cores if code.tree.copied else None
        ctx.start = None if known is None else known.start
        # Hooks see all that is kept: results are made anew from what they give back.
        ctx.tensors = None if saved_tensors_are_hooked() else tensors
        values = _layers(tensors[-1], code.count)
        forms = [] if dual is None else _layers(dual, code.count)
        ctx.mark_non_differentiable(*forms)
        return (*values, *forms)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        code: BatchedCluster = ctx.code
        cores = ctx.cores if code.tree.copied else ctx.saved_tensors
        of_values = gradients[: code.count]  # dual forms have none
        if all(gradient is None for gradient in of_values):
            return (None, None, *(None for _ in cores))
        with without_autocast(cores[0]):
            tensors = ctx.tensors
            if tensors is None:
                tensors = code.tree.run(code.tree.scaled(cores, ctx.start), (), True, is_recorded())
            grads = code.gradients(tensors, of_values, cores, ctx.needs_input_grad[2:])
        return (None, None, *grads)


def _layers(stacked: Tensor, count: int) -> Sequence[Tensor]:
    """Every layer's own tensor."""
    if count == 1:
        return [stacked.detach()]  # never a core itself
    # Flat pieces of what was stacked: their shape is for those who use them.
    return stacked.view(count, -1).unbind(0)
