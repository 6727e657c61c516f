"""The clusters of cores that may be absorbed into a layer's input, and the time to contract each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from tnpeft.planning.bitsets import Bitsets, connected_sets
from tnpeft.planning.device_model import DeviceModel

__all__ = ["Candidate", "candidates"]

# Clusters to consider, at most; where connected sets of cores are more, only the smaller ones are.
CLUSTERS = 800


class Candidate(NamedTuple):
    """A connected set of cores: the time to contract it, its legs without the kernel's, and their elements.

    `axes` are the kernel axes that it has, `entries` the entries of their legs.
    """

    cores: int
    time: float
    legs: int
    elements: float
    entries: float
    axes: tuple[int, ...]


def candidates(sets: Bitsets, prices: DeviceModel) -> tuple[list[Candidate], bool]:
    """The clusters, smaller ones first, and whether these are all.

    A cluster has all cores of each kernel axis that it touches: else the axis could not be summed when it is absorbed.
    """
    connected, complete = _connected(sets)
    times = _contraction_times(sets, prices, sorted(connected, key=lambda cores: (cores.bit_count(), cores)))
    found = []
    for cores, time in times.items():
        axes = tuple(axis for axis, holders in enumerate(sets.axes) if holders & cores)
        if all(not sets.axes[axis] & ~cores for axis in axes):
            opened = sets.opened(cores)
            legs, kernel = opened & ~sets.kernel, opened & sets.kernel
            found.append(Candidate(cores, time, legs, sets.product(legs), sets.product(kernel), axes))
    return found, complete and len(times) == len(connected)


def _connected(sets: Bitsets) -> tuple[list[int], bool]:
    """Connected sets up to the largest size of which there are few enough, and whether these are all."""
    found: list[int] = []
    most = max(CLUSTERS, len(sets.legs))
    for largest in range(1, len(sets.legs) + 1):
        wider = list(itertools.islice(connected_sets(sets.neighbours, largest), most + 1))
        if len(wider) > most:
            return found, False
        if len(wider) == len(found):  # none is larger
            break
        found = wider
    return found, True


def _contraction_times(sets: Bitsets, prices: DeviceModel, clusters: Sequence[int]) -> dict[int, float]:
    """The least time to contract each cluster, from those of the two parts that its last step joins."""
    times: dict[int, float] = {}
    opened = {cores: sets.opened(cores) for cores in clusters}
    for cores in clusters:
        if not cores & (cores - 1):
            times[cores] = 0.0
            continue
        best = math.inf
        for part in _parts(cores, times):
            other = cores ^ part
            if part in times and other in times:
                joint = sets.product(opened[part] | opened[other])
                own = prices.cluster + prices.link_multiply * joint
                own += prices.cluster_move * sets.product(opened[cores])
                best = min(best, times[part] + times[other] + own)
        if best < math.inf:
            times[cores] = best
    return times


def _parts(cores: int, known: Collection[int]) -> Iterator[int]:
    """The larger numbers of the pairs that make up `cores`; of large sets those that are known, which are fewer."""
    if 1 << (cores.bit_count() - 1) > len(known):
        yield from (part for part in known if not part & ~cores and part > cores ^ part)
        return
    part = (cores - 1) & cores
    while part > cores ^ part:
        yield part
        part = (part - 1) & cores
