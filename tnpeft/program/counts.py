"""Counts of the contractions that run while a context is open, for tests and benchmarks."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator

__all__ = ["OPEN", "counting", "note"]

OPEN: list[dict[str, list[int]]] = []


@contextlib.contextmanager
def counting() -> Iterator[dict[str, list[int]]]:
    """For each contraction of the body, in any thread, how many layers it was for.

    `deltas` counts cores to delta weights, `clusters` cores to clusters, `merges` clusters to delta weights.
    Contractions on the plain path are not counted.
    """
    found: dict[str, list[int]] = defaultdict(list)
    OPEN.append(found)
    try:
        yield found
    finally:
        OPEN[:] = [other for other in OPEN if other is not found]


def note(what: str, layers: int) -> None:
    """One contraction; callers ask whether `OPEN` is empty, which costs no call."""
    for found in OPEN:
        found[what].append(layers)
