"""The factored chain as code: the products with which a layer's input absorbs the clusters, one after the other.

Everything is stored contiguously, in the orders of its route. A product is `mm` or `bmm` on views of that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from tnpeft.planning import Call, Plan
from tnpeft.program.contraction import Contraction, lower
from tnpeft.program.execute import contract
from tnpeft.program.observers import is_watched
from tnpeft.program.route import BATCH, VOXELS, Route, Stop
from tnpeft.program.window import Positions, Window, Windows

__all__ = ["Chain", "lower_chain"]


@dataclass(frozen=True)
class Products:
    """Of one link: the product with the cluster, and those for the gradients of the input and of the cluster."""

    forward: Contraction
    to_input: Contraction
    to_cluster: Contraction


@dataclass(frozen=True)
class Absorb:
    """One link, with the cluster's values (`plain`) and with its paired form (`paired`).

    With `gather` the windows spread the input before the product, else they collect the product; `back` are the same
    windows for gradients. `paired.to_cluster` takes the pair's gradient and the input's value, and leaves the pair leg
    to be summed, after `outer` entries (0: there is none).
    """

    gather: bool
    plain: Products
    paired: Products
    outer: int
    windows: Windows
    back: Windows

    def seen(self, x: Tensor, plain: bool) -> Tensor:
        """The input as the product takes it."""
        return self.windows(x, plain) if self.gather else x

    def made(self, product: Tensor, plain: bool) -> Tensor:
        """The next input from the product."""
        return product if self.gather else self.windows(product, plain)

    def received(self, gradient: Tensor, plain: bool) -> Tensor:
        """The product's gradient from that of the next input."""
        return gradient if self.gather else self.back(gradient, plain)

    def passed_on(self, gradient: Tensor, plain: bool) -> Tensor:
        """The input's gradient from that of what the product took."""
        return self.back(gradient, plain) if self.gather else gradient


@dataclass(frozen=True)
class Chain:
    """One term's links; input, gradients and clusters are of one type.

    `entry` are windows of kernel axes without legs, which move the input before anything else, `leave` the same for its
    gradient.
    """

    links: tuple[Absorb, ...]
    entry: Windows
    leave: Windows

    def output(self, x: Tensor, clusters: Sequence[Tensor], paired: bool) -> Tensor:
        """The update of the layer's output, by the clusters' values or, with a frozen copy, by their paired forms."""
        plain = is_watched()
        x = self.entry(x, plain)
        for link, cluster in zip(self.links, clusters, strict=True):
            products = link.paired if paired else link.plain
            x = link.made(contract(products.forward, link.seen(x, plain), cluster, plain), plain)
        return x

    def gradients(
        self, x: Tensor, values: Sequence[Tensor], paired: Sequence[Tensor], gradient: Tensor, wanted: Sequence[bool]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The input's gradient, then those of the clusters' values; `wanted` says which, in the same order.

        With `paired` forms the input's is made of differences. The sum of a pair's two gradients is that of the plain
        value, so that the clusters' need no other chain.
        """
        plain = is_watched()
        inputs = self._inputs(x, values, plain)
        found: list[Tensor | None] = [None] * len(values)
        differing = bool(paired) and wanted[0]
        for place in reversed(range(len(self.links))):
            link = self.links[place]
            products = link.paired if differing else link.plain
            received = link.received(gradient, plain)
            if wanted[1 + place]:
                made = contract(products.to_cluster, received, inputs[place], plain)
                if differing and link.outer:
                    made = made.reshape(link.outer, 2, -1).sum(1)
                found[place] = made
            if place or wanted[0]:
                cluster = (paired if differing else values)[place]
                gradient = link.passed_on(contract(products.to_input, received, cluster, plain), plain)
        return self.leave(gradient, plain) if wanted[0] else None, found

    def _inputs(self, x: Tensor, values: Sequence[Tensor], plain: bool) -> list[Tensor]:
        """What each link's product takes, of the value."""
        x = self.entry(x, plain)
        found = []
        for link, value in zip(self.links, values, strict=True):
            found.append(link.seen(x, plain))
            if link is not self.links[-1]:
                x = link.made(contract(link.plain.forward, found[-1], value, plain), plain)
        return found


def lower_chain(plan: Plan, route: Route) -> Chain:
    """The chain of a factored plan of one term."""
    assert plan.call is not None
    space = _Space(plan.call)
    # Axes without legs move the input first.
    legless = [axis for axis, legs in enumerate(plan.network.weight[2:]) if not legs]
    entry, leave = space.windows(legless, False, False, None), space.windows(legless, True, True, None)
    space.absorb(legless)
    links = tuple(_absorb(stop, route, space) for stop in route.stops)
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

    def windows(self, axes: Sequence[int], backward: bool, collects: bool, before: int | None) -> Windows:
        """Of some axes, to spread them or to collect them.

        Forward they lead from the input's side to the output's, backward the other way. Axes along which nothing moves
        need none. Kernel legs stand after so many elements of the channels' legs, which follow the voxels, or (None)
        before the voxels, and the channels' legs before them.
        """
        sizes = list(self.sizes)
        for axis in axes:
            known = self.call.axes[axis]
            sizes[axis] = known.outputs if backward else known.inputs
        found: dict[int, Window] = {}
        for axis in reversed(axes) if collects else axes:
            known = self.call.axes[axis]
            if not known.plain:
                around = sizes[:axis], sizes[axis + 1 :]
                # Kernel axes before this one stand before it.
                others = math.prod(self.call.axes[other].kernel for other in axes[: axes.index(axis)])
                place = None if before is None else (self.call.batch, before * others)
                found[axis] = Window.of(known, self.call.transposed, *around, backward, place)
            sizes[axis] = known.inputs if backward else known.outputs
        positions = None if before is None else self._positions(found, backward, before)
        return Windows([found[axis] for axis in axes if axis in found], collects, positions)

    def _positions(self, found: Mapping[int, Window], backward: bool, before: int) -> Positions:
        axes = []
        for axis, size in enumerate(self.sizes):
            window = found.get(axis)
            known = (size, size, None) if window is None else (window.read, window.written, window.pairs)
            axes.append(known)
        return Positions(self.call.batch, tuple(axes), before)


def _absorb(stop: Stop, route: Route, space: _Space) -> Absorb:
    link = stop.link
    if link.gather:
        staying = stop.before[: -len(stop.passing) or None]
        before = None if stop.first else math.prod(route.sizes[letter] for letter in staying)
    else:
        before = None if stop.last else 1
    forward = space.windows(link.axes, False, not link.gather, before)
    back = space.windows(link.axes, True, link.gather, before)
    inputs = space.voxels
    space.absorb(link.axes)
    sizes = dict(route.sizes) | {BATCH: space.call.batch, VOXELS: space.voxels if link.gather else inputs}
    outer = math.prod(route.sizes[letter] for letter in stop.pieces[0])
    plain, paired = (_products(stop, tuple(sizes.items()), paired) for paired in (False, True))
    return Absorb(link.gather, plain, paired, 0 if stop.last else outer, forward, back)


@lru_cache(maxsize=8192)
def _products(stop: Stop, sizes: tuple[tuple[str, int], ...], paired: bool) -> Products:
    """The products of a link, cached: lowering them is what a chain takes."""
    known = dict(sizes)
    cluster, seen, made = stop.cluster(paired), stop.seen(paired), stop.made(paired)
    # The clusters' gradients need the input's value alone.
    total = stop.pieces[0] + (stop.pair_out if paired else "") + "".join(stop.pieces[1:])
    return Products(
        forward=lower(seen, cluster, made, known),
        to_input=lower(made, cluster, seen, known),
        to_cluster=lower(made, stop.seen(False), total, known),
    )
