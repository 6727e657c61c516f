"""`factorize(n, k)`: a channel count as a product of k balanced factors; and products, within bounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache

__all__ = ["MAX_FACTORS", "MAX_NUMBER", "Table", "bounded_product", "factorize", "times"]

MAX_NUMBER = 1 << 20
MAX_FACTORS = 8
MAX_SHOWN = 12  # factors in a message
CACHED = 1 << 14  # results; a file of 64 kB may ask for some thousand, for each kind of layer again

Table = Mapping[int, tuple[int, ...]]


def factorize(
    n: int, k: int, *, at_most: int | None = None, pad: bool = False, table: Table | None = None
) -> tuple[int, ...]:
    """k factors with product exactly `n`, non-increasing, of smallest sum, then of smallest maximum.

    An entry of `table` for `n` with k numbers comes first. `at_most` bounds all factors but the
    largest. With `pad`, the number factored is the m in n..2n with the smallest sum of factors,
    then the smallest m; otherwise m is `n`. A 1 always divides, so there is always an answer.
    """
    bound = max(1, min(at_most if at_most is not None else n, 2 * n))
    if pad:
        return _padded(n, k, bound)
    entry = (table or {}).get(n, ())
    if len(entry) == k and all(factor <= bound for factor in sorted(entry)[:-1]):
        return entry
    return _exact(n, k, bound)


@lru_cache(maxsize=CACHED)
def _padded(n: int, k: int, bound: int) -> tuple[int, ...]:
    """Try the sums in rising order: the first one that some product of at least `n` has is the smallest."""
    even = math.ceil(k * n ** (1 / k) - 1e-6)
    capped = math.ceil((k - 1) * bound + n / bound ** (k - 1) - 1e-6)
    total = even if n ** (1 / k) <= bound else capped
    while True:
        found = [parts for parts in _splits(k, total, total, bound, n) if math.prod(parts) <= 2 * n]
        if found:
            return min(found, key=lambda parts: (math.prod(parts), parts[0], parts))
        total += 1


def _splits(k: int, total: int, largest: int, bound: int, need: int) -> Iterator[tuple[int, ...]]:
    """Non-increasing k-tuples of sum `total` with product at least `need`; only the first may exceed `bound`."""
    if k == 1:
        if need <= total <= largest:
            yield (total,)
        return
    for first in range(min(largest, total - k + 1), -(-total // k) - 1, -1):
        rest, cap = total - first, min(first, bound)
        if rest > cap * (k - 1):
            break
        share, extra = divmod(rest, k - 1)
        if first * (share + 1) ** extra * share ** (k - 1 - extra) >= need:
            for tail in _splits(k - 1, rest, cap, cap, -(-need // first)):
                yield (first, *tail)


@lru_cache(maxsize=CACHED)
def _exact(n: int, k: int, bound: int) -> tuple[int, ...]:
    return _best(n, k, bound)  # its own steps are kept apart: they are many more


@lru_cache(maxsize=4096)
def _best(n: int, k: int, bound: int) -> tuple[int, ...]:
    if k == 1:
        return (n,)
    best: tuple[int, int, tuple[int, ...]] | None = None
    for last in reversed([divisor for divisor in _divisors(n) if divisor <= bound and divisor**k <= n]):
        # The others are no smaller in sum than if they were equal, and the less so the smaller the last one is.
        if best is not None and last + (k - 1) * (n // last) ** (1 / (k - 1)) > best[0] + 1e-6:
            break
        factors = tuple(sorted((*_best(n // last, k - 1, bound), last), reverse=True))
        candidate = (sum(factors), factors[0], factors)
        best = candidate if best is None else min(best, candidate)
    assert best is not None  # 1 divides
    return best[2]


@lru_cache(maxsize=4096)
def _divisors(n: int) -> tuple[int, ...]:
    low = [divisor for divisor in range(1, math.isqrt(n) + 1) if n % divisor == 0]
    return tuple(low + [n // divisor for divisor in reversed(low) if divisor * divisor != n])


def bounded_product(sizes: Iterable[int], most: int) -> int:
    """The product, worked out only until it exceeds `most`: that of thousands of sizes has thousands of digits."""
    product = 1
    for size in sizes:
        product *= size
        if product > most:
            break
    return product


def times(sizes: Sequence[int]) -> str:
    """A few sizes as `2 x 3 x 5`."""
    shown = [str(size) for size in sizes[:MAX_SHOWN]]
    return " x ".join([*shown, "..."] if len(sizes) > MAX_SHOWN else shown)
