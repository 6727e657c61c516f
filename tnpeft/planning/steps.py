"""The parts of a plan: pairwise steps, the links of a factored chain, and all decisions on one contraction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from tnpeft.network.model import Network
from tnpeft.planning.call import Call
from tnpeft.planning.path import Path

__all__ = ["Contraction", "Link", "Step", "steps_of"]

# W + ΔW is made again where that takes at most one operation for so many that use it: for LoRA of rank 8 on 256 rows it
# is one for 32, for QuanTA of rank 4 on as many one for 2.
LITTLE = 8


@dataclass(frozen=True)
class Step:
    """One pairwise contraction.

    `operands` and `number` are numbers of tensors: the cores come first, in file order, then the results of the steps.
    `flops` counts multiplications and additions: 2 for each element of the operands' joint index space, 1 where no
    index is summed. `elements` is the size of the result.
    """

    number: int
    operands: tuple[int, int]
    left: tuple[str, ...]
    right: tuple[str, ...]
    output: tuple[str, ...]
    flops: int
    elements: int

    @property
    def summed(self) -> tuple[str, ...]:
        """The indices that the step sums over."""
        return tuple(leg for leg in self.left if leg in self.right and leg not in self.output)

    def __str__(self) -> str:
        left, right, output = (" ".join(legs) or "1" for legs in (self.left, self.right, self.output))
        return f"({left}) ({right}) -> ({output})"


@dataclass(frozen=True)
class Link:
    """One link of a factored chain: a cluster of cores is contracted, and absorbed into the layer's input.

    `cluster` is the number of the cluster's tensor, `steps` make it, `kept` are its legs. `axes` are the kernel axes
    that it has, `kernel` their legs. With `gather` the input is copied once for each kernel entry before the product,
    else there is a product for each entry, and they are added up. `before` and `after` are the input's channel legs
    before and after, `flops` are those of the product.
    """

    cluster: int
    steps: tuple[Step, ...]
    kept: tuple[str, ...]
    axes: tuple[int, ...]
    kernel: tuple[str, ...]
    gather: bool
    before: tuple[str, ...]
    after: tuple[str, ...]
    flops: int


@dataclass(frozen=True, eq=False)
class Contraction:
    """All decisions on one contraction; `Plan` says what each field means."""

    network: Network
    mode: str
    path: Path
    steps: tuple[Step, ...] = field(repr=False)
    terms: tuple[Contraction, ...] = field(default=(), repr=False)
    call: Call | None = None
    links: tuple[Link, ...] = field(default=(), repr=False)
    chain: Contraction | None = field(default=None, repr=False)
    reason: str | None = None

    @property
    def copies(self) -> bool:
        """Whether the cores have a frozen copy."""
        return self.network.start == "frozen_copy"

    @cached_property
    def remade(self) -> bool:
        """Whether the backward pass makes W + ΔW again, rather than to find it saved: in a hybrid Linear.

        That is where merging the clusters takes little beside the product with W + ΔW. A convolution saves it.
        """
        if self.chain is None or self.chain.call is None or self.network.layer.kernel_size:
            return False
        merging = (2 if self.copies else 1) * (_operations(self) - _operations(self.chain))
        return LITTLE * merging <= 2 * self.chain.call.batch * self.network.layer.numel

    def numbers_of(self, link: Link) -> tuple[int, ...]:
        """The cores of a link's cluster, by number."""
        numbers = {number for step in link.steps for number in step.operands} | {link.cluster}
        return tuple(number for number in range(len(self.network.cores)) if number in numbers)

    def elements(self, legs: tuple[str, ...]) -> int:
        """The number of elements of a tensor with these legs."""
        return math.prod(self.network.sizes[leg] for leg in legs)


def _operations(plan: Contraction) -> int:
    """Of all steps to the clusters of a chain, or to the delta weight."""
    return sum(step.flops for part in plan.terms or (plan,) for step in part.steps)


def steps_of(
    tensors: Iterable[tuple[int, tuple[str, ...]]],
    kept: Iterable[str],
    path: Path,
    sizes: Mapping[str, int],
    first: int = 0,
) -> Iterator[Step]:
    """The steps of a path over some cores, given by number and legs; the results count from `first` or the cores on.

    Each result has the operands' legs, left before right, without those that are summed; `kept` never are.
    """
    live = list(tensors)
    first = first or len(live)
    for place, pair in enumerate(path):
        right_number, right = live.pop(max(pair))
        left_number, left = live.pop(min(pair))
        wanted = set(kept).union(*(legs for _, legs in live))
        joint = tuple(dict.fromkeys((*left, *right)))
        output = tuple(leg for leg in joint if leg in wanted)
        operations = math.prod(sizes[leg] for leg in joint) * (2 if len(output) < len(joint) else 1)
        elements = math.prod(sizes[leg] for leg in output)
        yield Step(first + place, (left_number, right_number), left, right, output, operations, elements)
        live.append((first + place, output))
