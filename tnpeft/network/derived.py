"""Derived cores of a bound spec, and its factors: the tensors that execution modes contract.

turn(n x y) = cayley(skew(R(n e)))      a derived core: summands, whose legs maps change in order
turn((c u) (q m) (v t))                 a factor: one tensor, a core under the legs of a reference
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["BoundMap", "BoundReference", "BoundSummand", "DerivedCore", "Factor"]


@dataclass(frozen=True)
class BoundReference:
    """A core with these legs: its axes, in order, are split into them."""

    core: str
    legs: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def sizes(self) -> tuple[tuple[str, int], ...]:
        """Each leg with its size."""
        return tuple(zip(self.legs, self.shape, strict=True))

    def __str__(self) -> str:
        return f"{self.core}({' '.join(self.legs)})"


@dataclass(frozen=True)
class BoundSummand:
    """`scale` times the product of some cores."""

    references: tuple[BoundReference, ...]
    scale: float = 1.0

    @property
    def legs(self) -> tuple[str, ...]:
        """All legs of its cores, each once."""
        return tuple(dict.fromkeys(leg for reference in self.references for leg in reference.legs))

    def __str__(self) -> str:
        product = " * ".join(map(str, self.references))
        return product if self.scale == 1 else f"{self.scale:g} * {product}"


@dataclass(frozen=True)
class BoundMap:
    """A map whose legs have sizes; `at` is its index core. A linear map acts on differences as it does on values."""

    name: str
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    shape: tuple[int, ...]  # of `gives`
    arguments: tuple[tuple[str, float | str], ...] = ()
    at: str | None = None
    linear: bool = False

    def __str__(self) -> str:
        """As a file writes it, with its arguments worked out."""
        legs = " ".join(self.takes)
        if self.gives != self.takes and self.gives:
            legs += f" -> {' '.join(self.gives)}"
        values = [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in self.arguments]
        values += [f"at={self.at}"] if self.at is not None else []
        inside = ", ".join([*([legs] if legs else []), *values])
        return f"{self.name}({inside})" if inside else self.name


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
        """The cores that it is made of, each once, without index cores."""
        return tuple(dict.fromkeys(each.core for summand in self.summands for each in summand.references))

    @property
    def mapped(self) -> int:
        """The number of elements that all its maps make."""
        sizes = {leg: size for summand in self.summands for each in summand.references for leg, size in each.sizes}
        legs, made = list(self.before), 0
        for call in self.maps:
            if call.takes != call.gives:
                legs = [*(leg for leg in legs if leg not in call.takes), *call.gives]
            sizes |= dict(zip(call.gives, call.shape, strict=True))
            made += math.prod(sizes[leg] for leg in legs)
        return made

    def __str__(self) -> str:
        """`turn(n x y) = skew(e -> x y), neumann(x y, terms=5) of R(n e)`."""
        made = " + ".join(map(str, self.summands)).replace("+ -", "- ")
        maps = f"{', '.join(map(str, self.maps))} of " if self.maps else ""
        return f"{self.name}({' '.join(self.legs)}) = {maps}{made}"


@dataclass(frozen=True)
class Factor:
    """One tensor of the contraction: a core as a term names it."""

    label: str
    reference: BoundReference
