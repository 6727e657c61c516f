"""Paired differences over seeds and volumes, tried on drawn data whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("monai", reason="the example driver needs the `demo` extra")

from ddpm_lab.evaluation.paired import Difference, compare, mean_difference
from scipy import stats


def drawn(
    generator: np.random.Generator, seeds: int, volumes: int, mean: float, by_seed: float, by_volume: float
) -> np.ndarray:
    """Differences with noise of deviation 1 and effects of seeds and volumes of these deviations."""
    noise = generator.normal(size=(seeds, volumes))
    return np.asarray(
        mean + by_seed * generator.normal(size=(seeds, 1)) + by_volume * generator.normal(size=(1, volumes)) + noise
    )


@pytest.mark.parametrize(
    ("by_seed", "by_volume"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.3, 2.0), (2.0, 0.3)]
)
@pytest.mark.parametrize(("seeds", "volumes"), [(5, 20), (5, 6), (3, 20), (8, 8)])
def test_the_interval_covers_the_truth(seeds: int, volumes: int, by_seed: float, by_volume: float) -> None:
    """Of 600 intervals at 95 % no fewer than 92 % cover: the spread of that share is 0.9 points."""
    generator = np.random.default_rng(7)
    covered = 0
    for _ in range(600):
        found = mean_difference(drawn(generator, seeds, volumes, 0.3, by_seed, by_volume))
        covered += found.low <= 0.3 <= found.high
    assert covered >= 0.92 * 600


def test_what_ignores_one_of_the_two_does_not_cover() -> None:
    """Student's interval over all differences as if they were independent: the test above can fail."""
    generator = np.random.default_rng(7)
    covered = 0
    for _ in range(300):
        flat = drawn(generator, 5, 20, 0.0, 1.0, 0.0).ravel()
        low, high = stats.t.interval(0.95, len(flat) - 1, flat.mean(), stats.sem(flat))
        covered += low <= 0 <= high
    assert covered < 0.6 * 300


def test_a_difference_that_is_there_is_found() -> None:
    generator = np.random.default_rng(3)
    found = [mean_difference(drawn(generator, 5, 20, 1.5, 0.3, 0.3)) for _ in range(200)]
    assert sum(each.clear for each in found) > 0.9 * 200
    assert np.mean([each.mean for each in found]) == pytest.approx(1.5, abs=0.05)


def test_of_one_volume_it_is_students_interval_over_seeds() -> None:
    numbers = np.array([0.3, -0.1, 0.8, 0.4])
    found = mean_difference(numbers[:, None], 0.9)
    low, high = stats.t.interval(0.9, 3, numbers.mean(), stats.sem(numbers))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_seeds_and_volumes_are_paired_by_name() -> None:
    one = {0: {"a": 1.0, "b": 2.0}, 1: {"b": 5.0, "a": 4.0}, 7: {"a": 9.0, "b": 9.0}}
    other = {1: {"a": 3.0, "b": 4.0}, 0: {"a": 0.0, "b": 1.0}}
    found = compare(one, other)
    assert found == Difference(1.0, 1.0, 1.0), "each pair differs by one, however far seeds and volumes lie apart"
    assert found.clear
    assert compare(one, {0: {"a": 1.0, "b": 2.0}}) is None  # one seed in common
    assert compare(one, {0: {"a": 1.0}, 1: {"a": 1.0}}) is None  # other volumes
    assert compare({}, {}) is None
    assert not Difference(0.1, -0.1, 0.3).clear
    assert Difference(-0.2, -0.3, -0.1).clear
