"""How PEFT and LyCORIS split channel counts for LoKr, as far as a file must meet it.

Both read a LoKr file by building modules whose sizes follow from a `factor` and a rank, and then copying the tensors
into them. So a product with other sizes must not be written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Sizes", "common_factor", "lycoris_rebuilds", "split"]


class Sizes(NamedTuple):
    """`small` is (a, c) and `large` (b, d, k...) in out = a b, in = c d."""

    a: int
    c: int
    b: int
    d: int


def split(channels: int, factor: int, ordered: bool) -> tuple[int, int]:
    """(m, n) with product `channels`: m is `factor` if that divides, else the largest divisor up to it and the root.

    -1 is no bound. With `ordered` the smaller one is first even if `factor` divides, as in LyCORIS; not so in PEFT.
    """
    if factor > 0 and channels % factor == 0:
        pair = (factor, channels // factor)
        return (min(pair), max(pair)) if ordered else pair
    bound = channels if factor < 0 else factor
    small = max(m for m in range(1, math.isqrt(channels) + 1) if m == 1 or (m <= bound and channels % m == 0))
    return small, channels // small


def common_factor(sizes: Sequence[Sizes]) -> int | None:
    """PEFT's one `decompose_factor` that splits every layer in this way, if there is one."""
    factors = (-1, *sorted({number for size in sizes for number in size if number > 0}))
    return next((factor for factor in factors if all(_splits(size, factor, ordered=False) for size in sizes)), None)


def _splits(size: Sizes, factor: int, ordered: bool) -> bool:
    outs, ins = split(size.a * size.b, factor, ordered), split(size.c * size.d, factor, ordered)
    return (outs, ins) == ((size.a, size.b), (size.c, size.d))


def lycoris_rebuilds(size: Sizes, columns: int) -> bool:
    """Whether LyCORIS gets these sizes again from a file; `columns` is the length of the second axis of w2 or w2_b.

    LyCORIS takes `columns` for d, although it includes a flattened kernel, and guesses the factor from that.
    """
    seen = size._replace(d=columns)
    if (size.a, size.c) == (split(size.a * size.b, -1, True)[0], split(size.c * columns, -1, True)[0]):
        factor = -1
    else:
        larger = (max(size.a, size.c), max(size.b, columns))
        fits = [number for number in larger if number in (seen.a, seen.b) and number in (seen.c, seen.d)]
        factor = fits[0] if fits else min(larger)
    return _splits(size, factor, ordered=True)
