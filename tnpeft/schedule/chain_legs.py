"""The order of legs of everything in a factored chain: of the layer's input on its way, and of the clusters it absorbs.

The layer's input and output are stored as (batch, channels' legs, voxels); between two links the input is stored as
(batch, voxels, channels' legs), for products of few channels and many voxels are several times quicker that way. The
legs that the next product sums stand last, so that it is a matrix product. With a frozen copy the input on its way is
a pair, the value and its change, along one leg more: the *pair leg* of a link, which its cluster makes and the next
sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tnpeft.planning import Link, Step, find_path, steps_of
from tnpeft.planning.steps import Contraction

__all__ = [
    "BATCH",
    "GROUP",
    "PAIRS",
    "VOXELS",
    "ChainLayout",
    "LinkLayout",
    "chain_layout",
    "chain_layouts",
    "merge_steps",
]

# Letters of the batch, the voxels, and the layers of a batch; networks have those of `opt_einsum.get_symbol`, which
# are none of these, nor of the pair legs', one for each link from `PAIRS` on, in a part of Unicode that is left free.
BATCH, VOXELS, GROUP = "\u0001", "\u0002", "\u0003"
PAIRS = 0xF0000


@dataclass(frozen=True)
class LinkLayout:
    """The order of the legs at one link, in the network's letters.

    einsum: Y[batch, voxels, shared + new] = X[batch, voxels, shared + summed + kernel] C[shared, new, summed, kernel],
    or with the kernel's legs on Y where the link scatters. `pair_in` and `pair_out` have two entries, the value and its
    change, and are empty at the first and at the last link.
    """

    link: Link
    before: str  # of X, without the kernel's
    after: str  # of Y, without the kernel's
    shared: str  # of X, C and Y
    new: str  # of C and Y
    summed: str  # of X and C
    kernel: str
    pair_in: str
    pair_out: str
    passing: str  # of `before`, those that go; they stand last
    leaving: str  # of `after`, those that the next link sums; they stand last

    @property
    def first(self) -> bool:
        return not self.pair_in

    @property
    def last(self) -> bool:
        return not self.pair_out

    @property
    def pieces(self) -> tuple[str, str, str]:
        """The cluster's legs before the place of the pair leg that it makes, up to that of the one it sums, and after.

        Kernel legs stand where the product's other operand, or its result, has them.
        """
        shared, new, summed, kernel = self.shared, self.new, self.summed, self.kernel
        if self.link.gather:
            return (shared, new, summed + kernel) if self.first else (shared, new + kernel, summed)
        return (shared, new + kernel, summed) if self.last else (shared + kernel, new, summed)

    def cluster(self, dual: bool) -> str:
        """The order of the cluster's legs."""
        before, between, after = self.pieces
        pair_in, pair_out = (self.pair_in, self.pair_out) if dual else ("", "")
        return before + pair_out + between + pair_in + after

    def reads(self, dual: bool) -> str:
        """The order of what the product takes: the input, after im2col if the link gathers."""
        staying, going = self.before[: -len(self.passing) or None], self.passing
        kernel = self.kernel if self.link.gather else ""
        if self.first:
            return BATCH + self.before + kernel + VOXELS
        return BATCH + VOXELS + staying + kernel + (self.pair_in if dual else "") + going

    def writes(self, dual: bool) -> str:
        """The order of what the product makes: the next input, or what col2im adds up to it if the link scatters."""
        kernel = "" if self.link.gather else self.kernel
        if self.last:
            return BATCH + self.after + kernel + VOXELS
        staying, going = self.after[: -len(self.leaving) or None], self.leaving
        return BATCH + VOXELS + kernel + staying + (self.pair_out if dual else "") + going


@dataclass(frozen=True)
class ChainLayout:
    """All links of one term, and the sizes of every letter but the voxels'."""

    links: tuple[LinkLayout, ...]
    sizes: Mapping[str, int]


def chain_layouts(plan: Contraction) -> Iterator[tuple[Contraction, ChainLayout]]:
    """The terms of a factored plan, each with the order of its legs."""
    for part in plan.terms or (plan,):
        yield part, chain_layout(part)


def chain_layout(plan: Contraction) -> ChainLayout:
    """Of a factored plan of one term."""
    letters, links = plan.network.symbols, plan.links
    orders = ["".join(letters[leg] for leg in plan.network.weight[1])]
    orders += [_order_after(plan, place) for place in range(len(links))]
    orders.append(orders[-1])  # the last link leaves nothing to be summed
    pairs = ["", *(chr(PAIRS + place) for place in range(1, len(links))), ""]
    sizes = {letter: plan.network.sizes[leg] for leg, letter in letters.items()} | dict.fromkeys(pairs[1:-1], 2)
    layouts = []
    for place, link in enumerate(links):
        before, after, later = orders[place : place + 3]
        cluster = "".join(letters[leg] for leg in link.kept)
        layouts.append(
            LinkLayout(
                link=link,
                before=before,
                after=after,
                shared="".join(letter for letter in after if letter in before and letter in cluster),
                new="".join(letter for letter in after if letter in cluster and letter not in before),
                summed="".join(letter for letter in before if letter in cluster and letter not in after),
                kernel="".join(letters[leg] for leg in link.kernel),
                pair_in=pairs[place],
                pair_out=pairs[place + 1],
                passing="".join(letter for letter in before if letter not in after),
                leaving="".join(letter for letter in after if letter not in later),
            )
        )
    return ChainLayout(tuple(layouts), sizes)


def _order_after(plan: Contraction, place: int) -> str:
    """The legs that stay longest first; after the last link they stand as in the weight."""
    links, weight = plan.links, plan.network.weight[0]
    letters = plan.network.symbols
    if place == len(links) - 1:
        return "".join(letters[leg] for leg in weight)
    natural = [*weight, *links[place].after]

    def stays(leg: str) -> int:
        gone = (later for later in range(place + 1, len(links)) if leg not in links[later].after)
        return next(gone, len(links))

    ordered = sorted(links[place].after, key=lambda leg: (-stays(leg), natural.index(leg)))
    return "".join(letters[leg] for leg in ordered)


def merge_steps(layout: ChainLayout, dual: bool, weight: str) -> tuple[list[str], tuple[Step, ...]]:
    """The order of each cluster's legs, and the steps that contract them to the delta weight of the legs `weight`."""
    orders = [link.cluster(dual) for link in layout.links]
    sizes = {letter: layout.sizes[letter] for order in orders for letter in order}
    path = find_path(tuple(orders), weight, tuple(sizes.items()))
    tensors = [(number, tuple(order)) for number, order in enumerate(orders)]
    return orders, tuple(steps_of(tensors, weight, path, sizes))
