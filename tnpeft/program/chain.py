"""The factored chain as code: the products with which a layer's input absorbs the clusters, one after the other.

Everything is stored contiguously, in the orders of its layout. A product is `mm` or `bmm` on views of that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from tnpeft.planning import Call
from tnpeft.planning.steps import Contraction
from tnpeft.program.im2col import AxisIm2col, Im2col, Positions
from tnpeft.program.kernels import contract
from tnpeft.program.observers import is_recorded
from tnpeft.schedule.chain import LinkSizes, link_sizes
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

    plain: Products  # with the cluster's values
    dual: Products  # with its dual form; `to_cluster` takes the pair's gradient and the value of the input
    outer: int  # elements before the pair leg that `dual.to_cluster` leaves to be summed; 0: it leaves none
    read: Im2col  # from the input to what the product takes; it does nothing if the link scatters
    written: Im2col  # from the product to the next input; it does nothing if the link gathers
    received: Im2col  # the adjoint of `written`
    passed_on: Im2col  # the adjoint of `read`


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
    call = plan.call
    assert call is not None
    inputs = tuple(axis.inputs for axis in call.axes)
    # Axes without legs move the input first.
    legless = [axis for axis, legs in enumerate(plan.network.weight[2:]) if not legs]
    entry, leave = (_im2col(call, inputs, legless, adjoint, adjoint, None) for adjoint in (False, True))
    both = zip(layout.links, link_sizes(plan, call), strict=True)
    return Chain(tuple(_absorb(legs, layout, sizes, call) for legs, sizes in both), entry, leave)


def _absorb(legs: LinkLayout, layout: ChainLayout, sizes: LinkSizes, call: Call) -> Absorb:
    link = legs.link
    if link.gather:
        staying = legs.before[: -len(legs.passing) or None]
        before = None if legs.first else math.prod(layout.sizes[letter] for letter in staying)
    else:
        before = None if legs.last else 1
    forward = _im2col(call, sizes.space_before, link.axes, False, not link.gather, before)
    back = _im2col(call, sizes.space_before, link.axes, True, link.gather, before)
    moves = (forward, NOTHING, NOTHING, back) if link.gather else (NOTHING, forward, back, NOTHING)
    voxels = math.prod(sizes.space_after if link.gather else sizes.space_before)
    lengths = tuple((dict(layout.sizes) | {BATCH: call.batch, VOXELS: voxels}).items())
    outer = math.prod(layout.sizes[letter] for letter in legs.pieces[0])
    plain, dual = (_products(legs, lengths, dual) for dual in (False, True))
    return Absorb(plain, dual, 0 if legs.last else outer, *moves)


NOTHING = Im2col((), False)


def _im2col(
    call: Call, space: Sequence[int], axes: Sequence[int], back: bool, adjoint: bool, before: int | None
) -> Im2col:
    """Im2col along some kernel axes, where the input has the voxels `space`; with `adjoint` col2im.

    Forward it leads from the input's side to the output's, with `back` the other way. Axes along which nothing moves
    are left out. With `before` a tensor is (batch, voxels, `before` elements of channels, kernel, channels), with None
    it is (batch, channels, kernel, voxels).
    """
    sizes = list(space)
    for axis in axes:
        sizes[axis] = call.axes[axis].outputs if back else call.axes[axis].inputs
    moved: dict[int, AxisIm2col] = {}
    for axis in reversed(axes) if adjoint else axes:
        known = call.axes[axis]
        if not known.plain:
            # Kernel axes before this one stand before it.
            others = math.prod(call.axes[other].kernel for other in axes[: axes.index(axis)])
            place = None if before is None else (call.batch, before * others)
            moved[axis] = AxisIm2col.of(known, call.transposed, sizes[:axis], sizes[axis + 1 :], back, place)
        sizes[axis] = known.inputs if back else known.outputs
    positions = None
    if before is not None:
        along = [(size, size, None) if axis not in moved else moved[axis].ends for axis, size in enumerate(space)]
        positions = Positions(call.batch, tuple(along), before)
    return Im2col([moved[axis] for axis in axes if axis in moved], adjoint, positions)


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
