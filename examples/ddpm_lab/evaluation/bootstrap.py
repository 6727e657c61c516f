"""How far a number may be off because volumes are few: bootstrap intervals, by weights in place of copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Estimate", "estimate", "resampled"]


@dataclass(frozen=True)
class Estimate:
    """A number and its interval; None where volumes are too few for it."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def as_data(self) -> dict[str, float | None]:
        return {"value": self.value, "low": self.low, "high": self.high}


def resampled(sizes: Sequence[int], resamples: int, seed: int) -> Iterator[list[torch.Tensor]]:
    """For each resample how often each item of each set was drawn, with replacement; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(resamples):
        yield [
            torch.bincount(torch.randint(size, (size,), generator=generator), minlength=size).double() for size in sizes
        ]


def estimate(
    statistic: Callable[..., float], sizes: Sequence[int], resamples: int = 0, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """A statistic of sets of these sizes with its interval; it takes a weight for each item of each set.

    The interval has the bootstrap's width around the value itself: volumes that are drawn twice lower the rank of a
    covariance, which moves every resampled FID up, and this move is no spread. The bias that FID has with few volumes
    stays in the value. A statistic that is not a number where too few different items are drawn leaves those
    draws out; there is no interval where they are more than half.
    """
    value = statistic(*(torch.ones(size, dtype=torch.float64) for size in sizes))
    if value != value:
        return Estimate(None)
    drawn = [statistic(*weights) for weights in resampled(sizes, resamples, seed)] if max(sizes) > 1 else []
    found = torch.tensor([each for each in drawn if each == each], dtype=torch.float64)
    if len(found) < 2 or 2 * len(found) < len(drawn):
        return Estimate(value)
    tail = (1 - confidence) / 2
    low, high = (found - found.mean()).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Estimate(value, value + low, value + high)
