"""The sizes along a factored chain: how large the layer's input is before and after each link."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from tnpeft.planning.call import Call
from tnpeft.planning.steps import Contraction, Link

__all__ = ["LinkSizes", "link_sizes"]


class LinkSizes(NamedTuple):
    """The layer's input at one link: its voxels, and what it has for each voxel, the batch times its channels.

    `entries` are those of the link's kernel axes together.
    """

    link: Link
    voxels_before: int
    voxels_after: int
    channels_before: int
    channels_after: int
    entries: int

    @property
    def before(self) -> int:
        """Elements that the link reads."""
        return self.channels_before * self.voxels_before

    @property
    def after(self) -> int:
        """Elements that the link leaves."""
        return self.channels_after * self.voxels_after

    @property
    def copied(self) -> int:
        """Elements with one copy for each kernel entry: of the input where it is gathered, else of the product."""
        if self.link.gather:
            return self.entries * self.channels_before * self.voxels_after
        return self.entries * self.channels_after * self.voxels_before


def link_sizes(plan: Contraction, call: Call) -> Iterator[LinkSizes]:
    """Of each link of a factored plan of one term in turn, for any call of its layer."""
    sizes = [axis.inputs for axis in call.axes]
    for link in plan.links:
        inputs = math.prod(sizes)
        for axis in link.axes:
            sizes[axis] = call.axes[axis].outputs
        before, after = (call.batch * plan.elements(legs) for legs in (link.before, link.after))
        yield LinkSizes(link, inputs, math.prod(sizes), before, after, plan.elements(link.kernel))
