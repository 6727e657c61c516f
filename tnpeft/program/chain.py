"""The factored chain as code: the products with which a layer's input absorbs the clusters, one after the other.

Everything is stored contiguously, in the orders of its layout. A product is `mm` or `bmm` on views of that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from tnpeft.planning import Call
from tnpeft.planning.steps import Contraction
from tnpeft.program.im2col import AxisIm2col, Im2col, Positions
from tnpeft.program.kernels import contract
from tnpeft.program.observers import is_recorded
from tnpeft.schedule.chain_legs import BATCH, VOXELS, ChainLayout, LinkLayout
from tnpeft.schedule.pairwise import Lowered, lower

__all__ = ["Chain", "lower_chain"]


@dataclass(frozen=True)
class Products:
    """Of one link: the product with the cluster, and those for the gradients of the input and of the cluster."""

    forward: Lowered
    to_input: Lowered
    to_cluster: Lowered


@dataclass(frozen=True)
class Absorb:
    """One link, Y = C X for each voxel, with im2col of the input before the product or col2im of the product after it.

    With a frozen copy X is a pair of the value and its change, and C the cluster's dual form.
    """

    gather: bool  # im2col before the product; else col2im after it
    plain: Products  # with the cluster's values
    dual: Products  # with its dual form; `to_cluster` takes the pair's gradient and the value of the input
    outer: int  # elements before the pair leg that `dual.to_cluster` leaves to be summed; 0: it leaves none
    forward: Im2col
    back: Im2col  # its adjoint, for gradients

    def read(self, x: Tensor, plain: bool) -> Tensor:
        """The input as the product takes it."""
        return self.forward(x, plain) if self.gather else x

    def written(self, product: Tensor, plain: bool) -> Tensor:
        """The next input from the product."""
        return product if self.gather else self.forward(product, plain)

    def received(self, gradient: Tensor, plain: bool) -> Tensor:
        """The product's gradient from that of the next input."""
        return gradient if self.gather else self.back(gradient, plain)

    def passed_on(self, gradient: Tensor, plain: bool) -> Tensor:
        """The input's gradient from that of what the product took."""
        return self.back(gradient, plain) if self.gather else gradient


@dataclass(frozen=True)
class Chain:
    """One term's links; input, gradients and clusters are of one dtype."""

    links: tuple[Absorb, ...]
    entry: Im2col  # along kernel axes that have no legs: it moves the input before the first link
    leave: Im2col  # its adjoint

    def output(self, x: Tensor, clusters: Sequence[Tensor], dual: bool) -> Tensor:
        """The update of the layer's output, by the clusters' values or, with a frozen copy, by their dual forms."""
        plain = is_recorded()
        x = self.entry(x, plain)
        for link, cluster in zip(self.links, clusters, strict=True):
            products = link.dual if dual else link.plain
            x = link.written(contract(products.forward, link.read(x, plain), cluster, plain), plain)
        return x

    def gradients(
        self, x: Tensor, values: Sequence[Tensor], dual: Sequence[Tensor], gradient: Tensor, wanted: Sequence[bool]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The VJP: of the input, then of the clusters' values; `wanted` says which, in the same order.

        With `dual` forms the input's is made of differences. The sum of a pair's two gradients is that of the plain
        value, so that the clusters' need no other chain.
        """
        plain = is_recorded()
        inputs = self._inputs(x, values, plain)
        grads: list[Tensor | None] = [None] * len(values)
        differing = bool(dual) and wanted[0]
        for place in reversed(range(len(self.links))):
            link = self.links[place]
            products = link.dual if differing else link.plain
            received = link.received(gradient, plain)
            if wanted[1 + place]:
                grad = contract(products.to_cluster, received, inputs[place], plain)
                if differing and link.outer:
                    grad = grad.reshape(link.outer, 2, -1).sum(1)
                grads[place] = grad
            if place or wanted[0]:
                cluster = (dual if differing else values)[place]
                gradient = link.passed_on(contract(products.to_input, received, cluster, plain), plain)
        return self.leave(gradient, plain) if wanted[0] else None, grads

    def _inputs(self, x: Tensor, values: Sequence[Tensor], plain: bool) -> list[Tensor]:
        """What each link's product takes, of the value."""
        x = self.entry(x, plain)
        inputs = []
        for link, value in zip(self.links, values, strict=True):
            inputs.append(link.read(x, plain))
            if link is not self.links[-1]:
                x = link.written(contract(link.plain.forward, inputs[-1], value, plain), plain)
        return inputs


def lower_chain(plan: Contraction, layout: ChainLayout) -> Chain:
    """The chain of a factored plan of one term."""
    assert plan.call is not None
    space = _Space(plan.call)
    # Axes without legs move the input first.
    legless = [axis for axis, legs in enumerate(plan.network.weight[2:]) if not legs]
    entry, leave = space.im2col(legless, False, False, None), space.im2col(legless, True, True, None)
    space.absorb(legless)
    links = tuple(_absorb(link, layout, space) for link in layout.links)
    return Chain(links, entry, leave)


class _Space:
    """The input's voxels along each axis on its way through the chain."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.sizes = [axis.inputs for axis in call.axes]

    @property
    def voxels(self) -> int:
        return math.prod(self.sizes)

    def absorb(self, axes: Sequence[int]) -> None:
        """The axes have their output's size from here on."""
        for axis in axes:
            self.sizes[axis] = self.call.axes[axis].outputs

    def im2col(self, axes: Sequence[int], backward: bool, adjoint: bool, before: int | None) -> Im2col:
        """Of some kernel axes; with `adjoint` it is col2im.

        Forward it leads from the input's side to the output's, backward the other way. Axes along which nothing moves
        are left out. With `before` a tensor is (batch, voxels, `before` elements of channels, kernel, channels), with
        None it is (batch, channels, kernel, voxels).
        """
        sizes = list(self.sizes)
        for axis in axes:
            known = self.call.axes[axis]
            sizes[axis] = known.outputs if backward else known.inputs
        found: dict[int, AxisIm2col] = {}
        for axis in reversed(axes) if adjoint else axes:
            known = self.call.axes[axis]
            if not known.plain:
                around = sizes[:axis], sizes[axis + 1 :]
                # Kernel axes before this one stand before it.
                others = math.prod(self.call.axes[other].kernel for other in axes[: axes.index(axis)])
                place = None if before is None else (self.call.batch, before * others)
                found[axis] = AxisIm2col.of(known, self.call.transposed, *around, backward, place)
            sizes[axis] = known.inputs if backward else known.outputs
        positions = None if before is None else self._positions(found, backward, before)
        return Im2col([found[axis] for axis in axes if axis in found], adjoint, positions)

    def _positions(self, found: Mapping[int, AxisIm2col], backward: bool, before: int) -> Positions:
        axes = []
        for axis, size in enumerate(self.sizes):
            moved = found.get(axis)
            axes.append((size, size, None) if moved is None else (moved.read, moved.written, moved.pairs))
        return Positions(self.call.batch, tuple(axes), before)


def _absorb(legs: LinkLayout, layout: ChainLayout, space: _Space) -> Absorb:
    link = legs.link
    if link.gather:
        staying = legs.before[: -len(legs.passing) or None]
        before = None if legs.first else math.prod(layout.sizes[letter] for letter in staying)
    else:
        before = None if legs.last else 1
    forward = space.im2col(link.axes, False, not link.gather, before)
    back = space.im2col(link.axes, True, link.gather, before)
    inputs = space.voxels
    space.absorb(link.axes)
    sizes = dict(layout.sizes) | {BATCH: space.call.batch, VOXELS: space.voxels if link.gather else inputs}
    outer = math.prod(layout.sizes[letter] for letter in legs.pieces[0])
    plain, dual = (_products(legs, tuple(sizes.items()), dual) for dual in (False, True))
    return Absorb(link.gather, plain, dual, 0 if legs.last else outer, forward, back)


@lru_cache(maxsize=8192)
def _products(legs: LinkLayout, sizes: tuple[tuple[str, int], ...], dual: bool) -> Products:
    """The products of a link, cached: lowering them is what a chain takes."""
    known = dict(sizes)
    cluster, reads, writes = legs.cluster(dual), legs.reads(dual), legs.writes(dual)
    # The clusters' gradients need the input's value alone.
    gradient = legs.pieces[0] + (legs.pair_out if dual else "") + "".join(legs.pieces[1:])
    return Products(
        forward=lower(reads, cluster, writes, known),
        to_input=lower(writes, cluster, reads, known),
        to_cluster=lower(writes, legs.reads(False), gradient, known),
    )
