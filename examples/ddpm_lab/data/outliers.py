"""Volumes in which a few voxels lie so far from the rest that scaling by minimum and maximum makes the rest vanish."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Outliers", "find_outliers", "warnings_of"]

FEW = 0.001  # of the voxels, at either end
LEAST = 0.25  # of the range: what the others have to keep
MOST_NAMED = 8  # files in a warning
CUTS = (0.1, 0.5, 1.0, 2.0, 5.0)  # percent of the voxels at one end: what is proposed


@dataclass(frozen=True)
class Outliers:
    """A few voxels far from all others: how many lie below and above, of how many, and what the others keep."""

    below: int
    above: int
    voxels: int
    lowest: float
    highest: float
    low: float  # between these two lie the others
    high: float

    def __str__(self) -> str:
        count = self.below + self.above
        ends = [f"{self.lowest:g}"] * (self.below > 0) + [f"{self.highest:g}"] * (self.above > 0)
        verb = "voxels reaches" if count == 1 else "voxels reach"
        kept = (self.high - self.low) / (self.highest - self.lowest)
        return (
            f"{count:,} of {self.voxels:,} {verb} {' and '.join(ends)}, all others lie from {self.low:g} to "
            f"{self.high:g}: scaled by minimum and maximum they keep {kept:.2g} of the range"
        )

    def cut_off_by(self, percentiles: tuple[float, float] | None) -> bool:
        """Whether scaling between these percentiles leaves the outliers out."""
        low, high = percentiles or (0.0, 100.0)
        return low >= _needed(self.below, self.voxels) and 100 - high >= _needed(self.above, self.voxels)


def find_outliers(voxels: np.ndarray[Any, Any]) -> Outliers | None:
    """The outliers of a volume, or None where all but a few voxels fill a quarter of the range and more."""
    flat = voxels.ravel(order="K")  # a copy in another order would take its time
    few = max(1, math.ceil(FEW * flat.size))
    if flat.size < 4 * few:
        return None
    ordered = np.partition(flat, (0, few, flat.size - 1 - few, flat.size - 1))
    lowest, low, high, highest = (float(ordered[place]) for place in (0, few, flat.size - 1 - few, flat.size - 1))
    if high - low >= LEAST * (highest - lowest):
        return None
    reach = high - low
    near = flat[(flat >= low - reach) & (flat <= high + reach)]
    low, high = float(near.min()), float(near.max())
    if high - low >= LEAST * (highest - lowest):
        return None
    return Outliers(int((flat < low).sum()), int((flat > high).sum()), flat.size, lowest, highest, low, high)


def warnings_of(volumes: Mapping[Path, Outliers], percentiles: tuple[float, float] | None) -> list[str]:
    """Lines that name the first few files with outliers which these percentiles do not cut off, and how to do so."""
    left = {path: each for path, each in volumes.items() if not each.cut_off_by(percentiles)}
    if not left:
        return []
    lines = [f"Warning: {path}: {each}." for path, each in list(left.items())[:MOST_NAMED]]
    if len(left) > MOST_NAMED:
        lines.append(f"Warning: {len(left) - MOST_NAMED} more files have such voxels.")
    below = max(_cut(each.below, each.voxels) for each in left.values())
    above = max(_cut(each.above, each.voxels) for each in left.values())
    return [
        *lines,
        f"Cut such voxels off with `--set data.percentiles=[{below:g},{100 - above:g}]`, or mend the files.",
    ]


def _needed(count: int, voxels: int) -> float:
    """Percent of the voxels that have to be cut off at one end for the percentile to lie among the others."""
    return 100 * count / (voxels - 1)


def _cut(count: int, voxels: int) -> float:
    """The same, rounded up to a number for people; 0 where none is to be cut."""
    needed = _needed(count, voxels)
    return 0.0 if count == 0 else next((cut for cut in CUTS if cut >= needed), math.ceil(needed))
