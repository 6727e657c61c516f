"""Where labels and open legs go, so that nothing overlaps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Box", "Choice", "Obstacles", "choose", "contains", "overlap"]

Box = tuple[float, float, float, float]  # left, bottom, right, top in inches
Points = NDArray[np.float64]  # (n, 2)

_HARD, _TAIL_ON_DISC, _LABEL_ON_LINE, _TAIL_ON_LINE, _TAIL_ON_LABEL = 100.0, 60.0, 8.0, 10.0, 20.0
_MARGIN = 0.012  # between a label and what is beside it
_TAIL_GAP = 0.085  # between an open leg and a line or another leg
_ROUNDS, _SWEEPS = 6, 12
_AT_ONCE = 4096  # pairs of open legs that are compared at once


@dataclass(frozen=True)
class Choice:
    """One way to place a label: its box, the open leg that leads to it, and its penalty."""

    box: Box
    tail: Points | None
    price: float


@dataclass(frozen=True)
class Obstacles:
    """What is already placed: discs as (x, y, radius), and lines as points along them."""

    discs: Sequence[tuple[float, float, float]]
    lines: Sequence[Points]


def overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def choose(items: Sequence[Sequence[Choice]], obstacles: Obstacles) -> list[Choice]:
    """One choice for each item, so that labels, open legs, lines and discs keep clear of each other.

    Coordinate descent from a few orders with a fixed seed: each item in turn takes its best choice given the others.
    """
    if not items:
        return []
    choices, own, first = _sifted(items, obstacles)
    pairs = _pair_prices(choices)
    order, source = list(range(len(items))), random.Random(0)
    best: tuple[float, list[int]] | None = None
    for _ in range(_ROUNDS):
        taken = [int(first[item] + own[first[item] : first[item + 1]].argmin()) for item in range(len(items))]
        for _ in range(_SWEEPS):
            before = list(taken)
            for item in order:
                others = [choice for number, choice in enumerate(taken) if number != item]
                here = slice(first[item], first[item + 1])
                taken[item] = int(first[item] + np.round(own[here] + pairs[here][:, others].sum(1), 6).argmin())
            if taken == before:
                break
        price = float(own[taken].sum() + pairs[np.ix_(taken, taken)].sum() / 2)
        if best is None or price < best[0] - 1e-6:
            best = (price, taken)
        source.shuffle(order)
    assert best is not None
    return [choices[number] for number in best[1]]


def _sifted(items: Sequence[Sequence[Choice]], obstacles: Obstacles) -> tuple[list[Choice], Points, list[int]]:
    """Choices that are not hopeless from the start, their own prices, and where each item's choices begin."""
    choices: list[Choice] = []
    prices: list[float] = []
    first = [0]
    for item, own in zip(items, _own_prices_of(items, obstacles), strict=True):
        kept = np.flatnonzero(own < own.min() + _HARD / 2).tolist()
        choices += [item[number] for number in kept]
        prices += own[kept].tolist()
        first.append(len(choices))
    return choices, np.array(prices), first


def _own_prices_of(items: Sequence[Sequence[Choice]], obstacles: Obstacles) -> list[Points]:
    """What each item's choices cost; those with open legs, and those without, are looked at together."""
    found: dict[int, Points] = {}
    for has_tail in (False, True):
        alike = [number for number, item in enumerate(items) if (item[0].tail is not None) == has_tail]
        if alike:
            together = _own_prices([choice for number in alike for choice in items[number]], obstacles)
            ends = np.cumsum([len(items[number]) for number in alike])[:-1]
            found.update(zip(alike, np.split(together, ends), strict=True))
    return [found[number] for number in range(len(items))]


def _boxes(choices: Sequence[Choice], margin: float) -> Points:
    grown = np.array([choice.box for choice in choices])
    grown[:, :2] -= margin
    grown[:, 2:] += margin
    return grown


def _own_prices(choices: Sequence[Choice], obstacles: Obstacles) -> Points:
    """What each choice costs whatever the others are."""
    price = np.array([choice.price for choice in choices])
    boxes = _boxes(choices, _MARGIN)
    for x, y, radius in obstacles.discs:
        away_x = np.maximum(np.maximum(boxes[:, 0] - x, x - boxes[:, 2]), 0)
        away_y = np.maximum(np.maximum(boxes[:, 1] - y, y - boxes[:, 3]), 0)
        price += _HARD * (np.hypot(away_x, away_y) < radius)
    for line in obstacles.lines:
        price += _LABEL_ON_LINE * contains(boxes, line).any(1)
    if all(choice.tail is None for choice in choices):
        return price
    tails = np.array([choice.tail for choice in choices])  # an item's choices all have a tail, or none has
    for x, y, radius in obstacles.discs:
        price += _TAIL_ON_DISC * (np.hypot(*np.moveaxis(tails - (x, y), -1, 0)) < radius).any(1)
    for line in obstacles.lines:
        price += _TAIL_ON_LINE * _close(tails, line)
    return price


def contains(boxes: Points, points: Points) -> NDArray[np.bool_]:
    """Which boxes have which points inside."""
    x, y = points[None, :, 0], points[None, :, 1]
    left, bottom, right, top = (boxes[:, side, None] for side in range(4))
    return (left < x) & (x < right) & (bottom < y) & (y < top)


def _close(tails: Points, points: Points) -> NDArray[np.bool_]:
    """Which open legs, given as points, come too near to a line or another leg."""
    low, high = points.min(0) - _TAIL_GAP, points.max(0) + _TAIL_GAP
    near = ((tails.max(1) >= low) & (tails.min(1) <= high)).all(1)  # the others are not compared point by point
    away_x, away_y = (tails[near, :, None, side] - points[:, side] for side in (0, 1))
    close = np.zeros(len(tails), dtype=bool)
    close[near] = (away_x**2 + away_y**2 < _TAIL_GAP**2).any((1, 2))
    return close


def _pair_prices(choices: Sequence[Choice]) -> Points:
    """What two choices cost each other."""
    boxes = _boxes(choices, _MARGIN / 2)
    one, other = boxes[:, None], boxes[None]
    meet = (one[..., 0] < other[..., 2]) & (other[..., 0] < one[..., 2])
    meet &= (one[..., 1] < other[..., 3]) & (other[..., 1] < one[..., 3])
    price: Points = np.where(meet, _HARD, 0.0)
    numbers = [number for number, choice in enumerate(choices) if choice.tail is not None]
    if not numbers:
        return price
    tails = np.array([choices[number].tail for number in numbers])  # (t, samples, 2)
    low, high = tails.min(1), tails.max(1)
    near = (boxes[:, None, :2] < high) & (low < boxes[:, None, 2:])
    over = near[..., 0] & near[..., 1]  # only these are compared point by point
    at, tail = np.nonzero(over)
    x, y = np.moveaxis(tails[tail], -1, 0)
    left, bottom, right, top = boxes[at].T[..., None]
    inside = ((left < x) & (x < right) & (bottom < y) & (y < top)).any(1)
    at, tail = at[inside], np.array(numbers)[tail[inside]]
    price[at, tail] += _TAIL_ON_LABEL
    price[tail, at] += _TAIL_ON_LABEL
    one, other = (np.array(numbers)[ends] for ends in np.nonzero(_close_pairs(tails)))
    price[one, other] += _TAIL_ON_LINE
    return price


def _close_pairs(tails: Points) -> NDArray[np.bool_]:
    """Which two open legs come too near to each other; each does to itself."""
    low, high = tails.min(1), tails.max(1)
    near = (high[:, None] >= low - _TAIL_GAP) & (low[:, None] <= high + _TAIL_GAP)
    near = near[..., 0] & near[..., 1]  # `all` over so short an axis is slow
    one, other = np.nonzero(np.triu(near))
    close = np.zeros(near.shape, dtype=bool)
    for begin in range(0, len(one), _AT_ONCE):
        these = slice(begin, begin + _AT_ONCE)
        away_x, away_y = (tails[one[these], :, None, side] - tails[other[these], None, :, side] for side in (0, 1))
        close[one[these], other[these]] = (away_x**2 + away_y**2 < _TAIL_GAP**2).any((1, 2))
    return close | close.T
