"""Drawings of hundreds of lines: their quality is counted on straight lines, many at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tnpeft.draw.labels import Points
from tnpeft.draw.placing import passed_by
from tnpeft.draw.shapes import Disc, Label, Quality, Stroke

__all__ = ["quality_of_many"]

_ROWS = 64  # lines compared with all others at a time


def quality_of_many(discs: Sequence[Disc], strokes: Sequence[Stroke], labels: Sequence[Label]) -> Quality:
    """Crossings and overlaps, with each line taken as straight."""
    bonds = [stroke.ends for stroke in strokes if len(stroke.ends) == 2]
    places = np.array([(disc.x, disc.y) for disc in discs])
    radius = max((disc.radius for disc in discs), default=0.0)
    through = passed_by(places, [(ends[0], ends[1]) for ends in bonds], radius)
    lines = np.array([(*stroke.path[0], *stroke.path[-1]) for stroke in strokes])
    boxes = np.array([label.box for label in labels]).reshape(-1, 4)
    rounds = np.array(
        [(disc.x - disc.radius, disc.y - disc.radius, disc.x + disc.radius, disc.y + disc.radius) for disc in discs]
    )
    overlaps = (_overlaps(boxes, boxes) - len(boxes)) // 2 + _overlaps(boxes, rounds)
    middles = (lines[:, :2] + lines[:, 2:]) / 2
    crossed = _overlaps(boxes, np.concatenate([middles, middles], axis=1))
    return Quality(_crossings(lines), through, overlaps, crossed)


def _overlaps(boxes: Points, others: Points) -> int:
    """Pairs of boxes, one of each, that overlap."""
    count = 0
    for box in boxes:
        apart = (others[:, :2] >= box[2:]) | (others[:, 2:] <= box[:2])
        count += int((~apart.any(1)).sum())
    return count


def _crossings(lines: Points) -> int:
    """Pairs of lines, each (x, y, x, y), that cross between their ends."""
    start, end = lines[:, :2], lines[:, 2:]
    count = 0
    for first in range(0, len(lines), _ROWS):
        here = slice(first, first + _ROWS)
        parts = _sides(start[here, None], end[here, None], start[None], end[None])
        parts &= _sides(start[None], end[None], start[here, None], end[here, None])
        count += int(parts.sum())
    return count // 2


def _sides(start: Points, end: Points, one: Points, other: Points) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Whether two points lie on both sides of a line."""
    way = end - start
    areas = [way[..., 0] * (point - start)[..., 1] - way[..., 1] * (point - start)[..., 0] for point in (one, other)]
    return np.asarray(areas[0] * areas[1] < -1e-12)
