"""The tangent space of an adapter: the directions in which a small change of its parameters moves the delta weight.

J = d(dW)/d(parameters) is never built. Products with its transpose (gradients) and with J itself (gradients of
gradients) are used instead, in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tnpeft.adapters import Adapter
from tnpeft.execution import compile
from tnpeft.fitting.arguments import checked
from tnpeft.network import Layer, Network, Spec
from tnpeft.spec.maps import registered_map

__all__ = ["TangentSpace", "rank_on", "tangent_space", "tangent_space_of"]

PRECISION = 1e-9  # of singular values, relative to the largest; columns have a norm of one
NOTHING = 1e-12  # of a gradient's numbers, relative to the largest: rounding
SPARE = 16  # random rows of J beyond as many as there are columns
LARGEST_SIDE = 2048  # of one matrix with its singular values, or of several that take as long
LARGEST_WORK = 2**37  # operations of all gradients that one count takes
BATCH = 2**20  # entries of such gradients that are held at once
SEED = 918_273  # of random rows: one by which a user draws weights would give rows that are no strangers to them
STEPS, TOLERANCE = 500, 1e-10  # of conjugate gradients


class Blocks(NamedTuple):
    """Blocks of J with equally many columns: entries of the weight that no other block's parameters move."""

    columns: Tensor  # (blocks, columns of each), by their number in J
    entries: int  # of all of them
    counted: bool  # small enough for singular values

    @property
    def side(self) -> int:
        return self.columns.shape[1]


@dataclass(frozen=True)
class TangentSpace:
    """The image of J = d(dW)/d(parameters) at the values that an adapter has, on one layer.

    `parameters` train; `live` of them move the delta weight at all. The weight has `entries` entries. `rank` is the
    rank of J; where `counted` is false, J is too large to count it, and `rank` is an upper bound.
    """

    layer: str
    parameters: int
    entries: int
    live: int
    rank: int
    counted: bool
    _jacobian: _Jacobian = field(repr=False, compare=False)
    _blocks: tuple[Blocks, ...] = field(repr=False, compare=False)

    @property
    def share(self) -> float:
        """The share of all directions, rank / entries: the expected share of white noise's energy that it captures."""
        return self.rank / self.entries

    def captured(self, delta: Tensor) -> float:
        """The share of the energy of `delta` (its squared norm) in the space; `delta` has the weight's shape.

        Where the rank is not counted, conjugate gradients may end early: the share is then a lower bound.
        """
        delta = checked(delta, self._jacobian.shape).detach().double().to(self._jacobian.value.device).flatten()
        norm = float(delta.norm())
        return min(1.0, float(self._projected(delta / norm).square().sum())) if norm and self.rank else 0.0

    def _projected(self, delta: Tensor) -> Tensor:
        """J x of the least squares |delta - J x|, by conjugate gradients where J's columns are nearly orthonormal."""
        inside, left = torch.zeros_like(delta), delta
        direction = image = self._transposed(left)
        size = float(image.square().sum())
        enough = TOLERANCE**2 * size
        for _ in range(STEPS):
            moved = self._applied(direction)
            along = float(moved.square().sum())
            if size <= enough or along <= 0:
                break
            inside, left = inside + size / along * moved, left - size / along * moved
            image, before = self._transposed(left), size
            size = float(image.square().sum())
            direction = image + size / before * direction
        return inside

    def _transposed(self, weight: Tensor) -> Tensor:
        gradient = self._jacobian.transposed(weight[None])[0]
        return torch.cat([(gradient[columns][:, None] @ basis).flatten() for columns, basis in self._bases])

    def _applied(self, coordinates: Tensor) -> Tensor:
        move = coordinates.new_zeros(self.parameters)
        parts = torch.split(coordinates, [columns.numel() for columns, _ in self._bases])
        for part, (columns, basis) in zip(parts, self._bases, strict=True):
            move[columns] = (basis @ part.reshape(*columns.shape, 1)).squeeze(-1)
        return self._jacobian.applied(move)

    @cached_property
    def _bases(self) -> list[tuple[Tensor, Tensor]]:
        """The columns of each kind of block, and moves of these parameters whose images are nearly orthonormal."""
        bases = [(blocks.columns, _basis(rows)) for blocks, rows in _sketches(self._jacobian, self._blocks, 2)]
        for blocks in self._blocks:
            if not blocks.counted:
                eye = torch.eye(1, dtype=torch.float64, device=blocks.columns.device)
                bases.append((blocks.columns.reshape(-1, 1), eye.expand(blocks.columns.numel(), 1, 1)))
        return bases


def tangent_space(
    spec: Spec | Network | str, layer: Any, *, seed: int | None = None, name: str = "", **params: Any
) -> TangentSpace:
    """The tangent space at the start of a spec on a layer; arguments are those of `compile`.

    Raises SpecError and BindError.
    """
    adapter = compile(spec, layer, seed=seed, name=name, **params)
    return tangent_space_of(adapter, getattr(layer, "base", layer).weight)


def tangent_space_of(adapter: Adapter, weight: Tensor) -> TangentSpace:
    """The tangent space of an adapter at the values that its cores have; `weight` is its layer's base weight.

    Cores that layers share count as if they were this layer's alone. The rank is that of random combinations of J's
    rows, a few more than J has columns: with probability one it equals J's. If parameters move only some slices of the
    weight (in LoRA's second core, a row each), the rank is counted block by block.
    """
    with torch.inference_mode(False), torch.enable_grad():
        jacobian = _Jacobian(adapter, weight)
        blocks = tuple(_blocks(jacobian))
        rank = sum(_rank(rows) for _, rows in _sketches(jacobian, blocks, 1))
    rank += sum(min(each.columns.numel(), each.entries) for each in blocks if not each.counted)
    live = sum(each.columns.numel() for each in blocks)
    counted = all(each.counted for each in blocks)
    layer = str(adapter.network.layer)
    return TangentSpace(layer, jacobian.parameters, jacobian.entries, live, rank, counted, jacobian, blocks)


def rank_on(spec: Spec, layer: Layer) -> int:
    """In how many directions a spec's first steps can move the weight of a layer with random values, or an upper bound.

    Raises BindError.
    """
    numbers = [layer.in_channels, layer.out_channels, *([layer.kernel_size] if layer.kernel_size else [])]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        base = getattr(nn, layer.kind)(*numbers, **({"groups": layer.groups} if layer.groups > 1 else {}))
    return tangent_space(spec, base, name="layer").rank


class _Jacobian:
    """J at a float64 copy of an adapter's values, by its products."""

    def __init__(self, adapter: Adapter, weight: Tensor) -> None:
        adapter = copy.deepcopy(adapter).double()
        trained = dict(adapter.trained)
        for name, holder in adapter.shared.items():
            if (core := holder.double().trained.get(name)) is not None:
                trained[name] = core
        value = _delta(adapter, weight.detach().double())
        self.trained = tuple(trained.values())
        self.parameters = sum(core.numel() for core in self.trained)
        self.shape, self.value = tuple(value.shape), value.reshape(-1)
        self.entries = len(self.value)
        self.work = adapter.plan.flops + 10 * self.entries  # of one gradient
        # A user's function may have a gradient that cannot be taken of many at once.
        self._alone = any(registered_map(each.name) for core in adapter.network.derived for each in core.maps)

    def transposed(self, weights: Tensor) -> Tensor:
        """J^T of each of some weights: (weights, entries) -> (weights, parameters)."""
        if not self.value.requires_grad:
            return weights.new_zeros(len(weights), self.parameters)
        parts = []
        for chosen in torch.split(weights, 1 if self._alone else max(1, BATCH // self.entries)):
            together = len(chosen) > 1
            gradients = torch.autograd.grad(
                self.value,
                self.trained,
                chosen if together else chosen[0],
                retain_graph=True,
                is_grads_batched=together,
                allow_unused=True,
                materialize_grads=True,
            )
            parts.append(torch.cat([gradient.reshape(len(chosen), -1) for gradient in gradients], 1))
        return torch.cat(parts)

    def applied(self, move: Tensor) -> Tensor:
        """J of a move of the parameters, (entries,): J^T u is linear in u, and J its gradient."""
        with torch.inference_mode(False), torch.enable_grad():
            weight = torch.zeros_like(self.value).requires_grad_()
            gradients = torch.autograd.grad(
                self.value, self.trained, weight, create_graph=True, allow_unused=True, materialize_grads=True
            )
            image = torch.cat([gradient.reshape(-1) for gradient in gradients])
            return torch.autograd.grad(image, weight, move, allow_unused=True, materialize_grads=True)[0]


def _delta(adapter: Adapter, weight: Tensor) -> Tensor:
    """The delta weight, by operations whose gradients can be taken of many at once, and again."""
    network = adapter.network
    value = network.scale * adapter.network_weight(weight)
    if network.compose is None:
        return value  # what a frozen copy makes is a constant
    inputs = adapter.delta_inputs(weight)
    (delta,) = adapter.program_for(weight).plain_deltas(
        inputs[: len(adapter.plan.network.cores)], adapter.program_for(weight).start(adapter.start_tensors(weight))
    )
    return adapter.with_magnitude(delta.detach() + (value - value.detach()), weight, inputs)


def _blocks(jacobian: _Jacobian) -> Iterator[Blocks]:
    """J's columns that are not zero, apart where they meet different slices of the weight along one of its axes."""
    generator = torch.Generator().manual_seed(SEED)
    row = jacobian.transposed(_random(1, jacobian, generator))[0].abs()
    nothing = NOTHING * float(row.max()) if len(row) else 0.0
    live = (row > nothing).nonzero().flatten()
    parts = [(torch.zeros_like(live), torch.full_like(live, jacobian.entries))]
    if sum(jacobian.shape) * jacobian.work <= LARGEST_WORK:
        met = [_slices_met(jacobian, axis, live, nothing, generator) for axis in range(len(jacobian.shape))]
        parts = [_parts(touched) for touched in met]
    labels = torch.stack([label for label, _ in parts], 1)
    entries = torch.stack([size for _, size in parts]).prod(0)  # of each column's block
    _, block, sizes = torch.unique(labels, dim=0, return_inverse=True, return_counts=True)
    order, first = block.argsort(stable=True), sizes.cumsum(0) - sizes
    for side in sizes.unique().tolist():
        starts = first[sizes == side]
        columns = order[starts[:, None] + torch.arange(side, device=order.device)]  # (blocks, side)
        counted = len(columns) * side**3 <= LARGEST_SIDE**3 and (side + SPARE) * jacobian.work <= LARGEST_WORK
        yield Blocks(live[columns], int(entries[columns[:, 0]].sum()), counted)


def _slices_met(jacobian: _Jacobian, axis: int, live: Tensor, nothing: float, generator: torch.Generator) -> Tensor:
    """Which slices of the weight along an axis each live parameter moves, (slices, live)."""
    met = []
    for place in range(jacobian.shape[axis]):
        weight = _random(1, jacobian, generator).reshape(jacobian.shape)
        slice_alone = torch.zeros_like(weight)
        slice_alone.select(axis, place).copy_(weight.select(axis, place))
        met.append(jacobian.transposed(slice_alone.reshape(1, -1))[0, live].abs() > nothing)
    return torch.stack(met)


def _parts(met: Tensor) -> tuple[Tensor, Tensor]:
    """Which columns are joined by slices that they both meet: the first such slice, and how many there are."""
    slices = torch.arange(len(met), device=met.device)
    none = len(met)
    while True:
        columns = torch.where(met, slices[:, None], none).amin(0)  # (live,)
        joined = torch.minimum(slices, torch.where(met, columns, none).amin(1)) if len(columns) else slices
        if torch.equal(joined, slices):
            return columns, torch.bincount(slices, minlength=none + 1)[columns]
        slices = joined


def _random(rows: int, jacobian: _Jacobian, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(rows, jacobian.entries, generator=generator) - 0.5
    return drawn.to(jacobian.value.device, torch.float64)


def _sketches(jacobian: _Jacobian, blocks: Sequence[Blocks], more: int) -> Iterator[tuple[Blocks, Tensor]]:
    """Blocks that are counted, each with random combinations of its rows of J: (blocks, rows, columns)."""
    counted = [each for each in blocks if each.counted]
    rows = max((more * each.side + SPARE for each in counted), default=0)
    generator = torch.Generator().manual_seed(SEED + 1)
    step = max(1, BATCH // jacobian.entries)
    sketches: list[list[Tensor]] = [[] for _ in counted]
    for start in range(0, rows, step):
        gradients = jacobian.transposed(_random(min(step, rows - start), jacobian, generator))
        for each, sketch in zip(counted, sketches, strict=True):
            missing = max(0, more * each.side + SPARE - start)
            sketch.append(gradients[:missing, each.columns].transpose(0, 1))
    for each, sketch in zip(counted, sketches, strict=True):
        yield each, torch.cat(sketch, 1)


def _rank(rows: Tensor) -> int:
    """The rank of all blocks together."""
    values = torch.linalg.svdvals(rows / rows.norm(dim=1, keepdim=True))
    return int((values > PRECISION * values[:, :1]).sum())


def _basis(rows: Tensor) -> Tensor:
    """Moves (blocks, columns, columns) whose images are nearly orthonormal; those beyond the rank are zero."""
    norms = rows.norm(dim=1, keepdim=True)
    _, values, right = torch.linalg.svd(rows / norms, full_matrices=False)
    inverse = torch.where(values > PRECISION * values[:, :1], 1 / values, 0.0)
    basis: Tensor = right.mT * inverse[:, None] / norms.mT
    return basis
