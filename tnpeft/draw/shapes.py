"""What a drawing is made of, in inches: discs, strokes and labels, and how readable they are."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import cached_property

import numpy as np

from tnpeft.draw.diagram import Node
from tnpeft.draw.labels import Box, Points

__all__ = ["THICKEST", "Disc", "Label", "Quality", "Scene", "Stroke", "cross_product"]

THICKEST = 64  # sizes from here on have one thickness of line
_POINTS_OF_CURVE = 40
_TOLERANCE = 1e-6  # of a piece of a line


@dataclass(frozen=True)
class Disc:
    """A core, or a hyperedge's dot."""

    x: float
    y: float
    radius: float
    node: Node
    lines: tuple[str, ...]
    points: float  # the size of its text


@dataclass(frozen=True)
class Stroke:
    """A bond or an open leg, as points from end to end; `ends` are its discs."""

    path: Points
    index: str
    size: int
    ends: tuple[int, ...]
    role: str | None = None

    @cached_property
    def thinned(self) -> Points:
        """Its two ends where it is straight, every few of its points where it is a curve."""
        way, away = self.path[-1] - self.path[0], self.path - self.path[0]
        if (np.abs(cross_product(way, away)) <= _TOLERANCE * np.hypot(*way)).all():
            return self.path[[0, -1]]
        kept = np.unique(np.linspace(0, len(self.path) - 1, _POINTS_OF_CURVE).round().astype(int))
        return np.asarray(self.path[kept])


@dataclass(frozen=True)
class Label:
    text: str
    box: Box
    role: str | None


@dataclass(frozen=True)
class Quality:
    """What makes a drawing hard to read, counted."""

    crossings: int  # of two lines
    through_cores: int  # lines through a core or dot that is not theirs
    label_overlaps: int  # labels on another label, a core or a dot
    label_crossings: int  # lines through labels

    def __add__(self, other: Quality) -> Quality:
        return Quality(*map(sum, zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Scene:
    discs: tuple[Disc, ...]
    strokes: tuple[Stroke, ...]
    labels: tuple[Label, ...]
    quality: Quality

    @cached_property
    def bounds(self) -> Box:
        boxes = [label.box for label in self.labels]
        boxes += [
            (disc.x - disc.radius, disc.y - disc.radius, disc.x + disc.radius, disc.y + disc.radius)
            for disc in self.discs
        ]
        boxes += [(*stroke.path.min(0), *stroke.path.max(0)) for stroke in self.strokes]
        left, bottom, right, top = zip(*boxes, strict=True)
        return min(left), min(bottom), max(right), max(top)


def cross_product(one: Points, other: Points) -> Points:
    """Of vectors in the plane, along the last axis."""
    return np.asarray(one[..., 0] * other[..., 1] - one[..., 1] * other[..., 0])
