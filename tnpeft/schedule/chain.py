"""A factored chain on a call: the sizes at its links, and the tensors that pass through them forward and backward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from tnpeft.planning.call import Axis, Call
from tnpeft.planning.steps import Contraction, Link

__all__ = ["ChainRuns", "LinkSizes", "Run", "link_sizes", "runs_of"]


class LinkSizes(NamedTuple):
    """The layer's input at one link: its voxels along each axis, and its elements before and after the link.

    `copied` counts elements with one copy for each kernel entry: of the input if it is gathered, else of the product.
    `moving` are the link's axes along which voxels move. `rows` is the smaller side of the product's cluster.
    """

    link: Link
    space_before: tuple[int, ...]
    space_after: tuple[int, ...]
    before: int
    after: int
    copied: int
    moving: tuple[Axis, ...]
    rows: int


def link_sizes(plan: Contraction, call: Call) -> Iterator[LinkSizes]:
    """The sizes at each link of a factored plan of one term, for any call of its layer."""
    # Axes without legs move the input before the first link.
    axes = zip(call.axes, plan.network.weight[2:], strict=True)
    space = tuple(axis.inputs if legs else axis.outputs for axis, legs in axes)
    for link in plan.links:
        later = tuple(axis.outputs if place in link.axes else space[place] for place, axis in enumerate(call.axes))
        moving = tuple(call.axes[axis] for axis in link.axes if not call.axes[axis].plain)
        voxels_before, voxels_after, entries = math.prod(space), math.prod(later), plan.elements(link.kernel)
        before, after = call.batch * plan.elements(link.before), call.batch * plan.elements(link.after)
        copied = entries * (before * voxels_after if link.gather else after * voxels_before)
        new = plan.elements(tuple(leg for leg in link.after if leg not in link.before))
        summed = plan.elements(tuple(leg for leg in link.before if leg not in link.after))
        rows = min(new, summed * entries) if link.gather else min(new * entries, summed)
        yield LinkSizes(link, space, later, before * voxels_before, after * voxels_after, copied, moving, rows)
        space = later


class Run(NamedTuple):
    """One tensor's way through a link: an input's, or with `back` a gradient's from the output's side.

    `pair_in` and `pair_out` are 2 where the input or output is a pair of a value and its change. `own`: what it starts
    from is the layer's input or its output's gradient.
    """

    sizes: LinkSizes
    own: bool
    pair_in: int = 1
    pair_out: int = 1
    back: bool = False

    @property
    def copied(self) -> int:
        """Elements with one copy for each kernel entry."""
        return self.sizes.copied * (self.pair_in if self.sizes.link.gather else self.pair_out)

    @property
    def arrived(self) -> int:
        """Elements of what it starts from; none where that is the layer's."""
        if self.own:
            return 0
        return self.pair_out * self.sizes.after if self.back else self.pair_in * self.sizes.before

    @property
    def taken(self) -> int:
        """Elements of what the product takes, where they are no more the layer's."""
        return self.copied if self._spreads else self.arrived

    @property
    def taking(self) -> int:
        """Elements alive until the product: the copies, stacked axis by axis, and the last axis's padded input."""
        if not self._spreads:
            return self.arrived
        *others, last = self.sizes.moving
        return self.arrived + self.copied + self.copied // last.kernel * ((last.stride == 1) + bool(others))

    @property
    def alive(self) -> int:
        """Elements alive at once: products are added up axis by axis, each sum beside the one before and the first."""
        if self.sizes.moving and not self._spreads:
            sums = [self.copied]
            for axis in reversed(self.sizes.moving):
                sums.append(sums[-1] // axis.kernel)
            return self.arrived + sum(sums[:3])
        made = self.pair_in * self.sizes.before if self.back else self.pair_out * self.sizes.after
        return max(self.taking, self.arrived + (self.copied if self._spreads else 0) + made)

    @property
    def _spreads(self) -> bool:
        """Whether the copies are made before the product, and not added up after it."""
        return bool(self.sizes.moving) and self.sizes.link.gather is not self.back


class ChainRuns(NamedTuple):
    """All tensors that pass through one term's chain.

    `outputs` make the update. The backward pass makes each link's input anew (`values`), then the gradients of
    `clusters` and of `inputs`, from the last link on.
    """

    outputs: list[Run]
    values: list[Run]
    clusters: list[Run]
    inputs: list[Run]


def runs_of(part: Contraction, call: Call, hybrid: bool) -> ChainRuns:
    """What runs for one term of a factored plan; in hybrid mode values alone, and no gradient of the layer's input.

    With a frozen copy what passes between two links is a pair.
    """
    pair = 2 if part.copies and not hybrid else 1
    runs = ChainRuns([], [], [], [])
    for place, sizes in enumerate(link_sizes(part, call)):
        first, last = place == 0, place == len(part.links) - 1
        pair_in, pair_out = 1 if first else pair, 1 if last else pair
        runs.values.append(Run(sizes, first))
        runs.clusters.append(Run(sizes, last, 1, pair_out, True))
        if not hybrid:
            runs.outputs.append(Run(sizes, first, pair_in, pair_out))
        if not (hybrid and first):
            runs.inputs.append(Run(sizes, last, pair_in, pair_out, True))
    return runs
