"""Derived cores of a bound spec, and its factors: what execution modes contract for references and derived cores.

turn(n x y) = cayley(skew(R(n e)))      a derived core: summands, whose legs maps change in order
turn((c u) (q m) (v t))                 a factor: one tensor, a core under the legs of a reference
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["BoundMap", "BoundReference", "BoundSummand", "DerivedCore", "Factor"]


@dataclass(frozen=True)
class BoundReference:
    """A core under these legs: its axes, in order, split into them."""

    core: str
    legs: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class BoundSummand:
    """`scale` times the product of some cores."""

    references: tuple[BoundReference, ...]
    scale: float = 1.0

    @property
    def legs(self) -> tuple[str, ...]:
        """All legs of its cores, each once."""
        return tuple(dict.fromkeys(leg for reference in self.references for leg in reference.legs))


@dataclass(frozen=True)
class BoundMap:
    """A map whose legs have sizes; `at` is its index core. A linear one acts on differences as on values."""

    name: str
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    shape: tuple[int, ...]  # of `gives`
    arguments: tuple[tuple[str, float | str], ...] = ()
    at: str | None = None
    linear: bool = False


@dataclass(frozen=True)
class DerivedCore:
    """A core that is made of others: the sum of its summands with the legs `before`, on which its maps act in order."""

    name: str
    legs: tuple[str, ...]
    shape: tuple[int, ...]
    before: tuple[str, ...]
    summands: tuple[BoundSummand, ...]
    maps: tuple[BoundMap, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def sources(self) -> tuple[str, ...]:
        """The cores that it is made of, each once; index cores are none of them."""
        return tuple(dict.fromkeys(each.core for summand in self.summands for each in summand.references))


@dataclass(frozen=True)
class Factor:
    """One tensor of the contraction: a core as a term names it."""

    label: str
    reference: BoundReference
