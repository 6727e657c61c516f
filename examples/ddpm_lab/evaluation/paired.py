"""Whether one method is better than another: paired differences over seeds and volumes, with an interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

__all__ = ["Difference", "Numbers", "compare", "mean_difference"]

Numbers = Mapping[int, Mapping[str, float]]  # one method's, by seed and by volume


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, and the interval in which it lies."""

    mean: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def compare(one: Numbers, other: Numbers, confidence: float = 0.95) -> Difference | None:
    """`one` less `other` on the seeds that both have; None for fewer than two, or for other volumes."""
    seeds = sorted(set(one) & set(other))
    names = {frozenset(numbers[seed]) for numbers in (one, other) for seed in seeds}
    if len(seeds) < 2 or len(names) != 1:
        return None
    volumes = sorted(next(iter(names)))
    if not volumes:
        return None
    rows = [[one[seed][volume] - other[seed][volume] for volume in volumes] for seed in seeds]
    return mean_difference(np.array(rows), confidence)


def mean_difference(differences: np.ndarray, confidence: float = 0.95) -> Difference:
    """The mean of differences (seeds, volumes) with an interval for other seeds and other volumes.

    Each is the mean, plus what its seed adds, plus what its volume adds, plus noise. So the mean's variance is that of
    both margins, less the noise that stands in both. The quantile is Student's, with Satterthwaite's degrees of
    freedom for the two margins; of one volume it is Student's interval over seeds.
    """
    seeds, volumes = differences.shape
    mean = float(differences.mean())
    by_seed = float(differences.mean(1).var(ddof=1)) / seeds
    if volumes == 1:
        variance, freedom = by_seed, float(seeds - 1)
    else:
        by_volume = float(differences.mean(0).var(ddof=1)) / volumes
        rest = differences - differences.mean(1, keepdims=True) - differences.mean(0, keepdims=True) + mean
        noise = float((rest**2).sum()) / ((seeds - 1) * (volumes - 1)) / (seeds * volumes)
        variance = max(by_seed + by_volume - noise, by_seed, by_volume)
        spread = by_seed**2 / (seeds - 1) + by_volume**2 / (volumes - 1)
        freedom = variance**2 / spread if spread > 0 else float(seeds - 1)
    half = float(student.ppf((1 + confidence) / 2, freedom)) * math.sqrt(variance)
    return Difference(mean, mean - half, mean + half)
