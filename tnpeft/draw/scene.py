"""One term of a network as a drawing in inches: discs, strokes, labels, and how readable they are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from tnpeft.draw.crowd import quality_of_many
from tnpeft.draw.diagram import Diagram, Node
from tnpeft.draw.labels import Box, Choice, Obstacles, Points, choose, contains, overlap
from tnpeft.draw.objective import ASPECT, bulge
from tnpeft.draw.shapes import Disc, Label, Quality, Scene, Stroke, cross_product
from tnpeft.draw.text import clean, fitted, text_size

__all__ = ["LABEL_POINTS", "Disc", "Label", "Quality", "Scene", "Stroke", "scene_of"]

LABEL_POINTS = 7.0
_RADIUS, _DERIVED_RADIUS, _DOT_RADIUS, _COLUMN = 0.3, 0.28, 0.05, 1.2
_SCALES = (1.0, 1.12, 1.25, 1.4, 1.6, 1.9, 2.3, 2.8, 3.4, 4.2)
# Lines, with open legs: from here on few scales are tried, labels are not moved apart, bonds are not named.
_SEVERAL, _MANY, _MOST_NAMED = 35, 120, 400
_MOST_POINTS, _POINTS_OF_MANY = 500, 12  # of a line, and where there are many
_ENOUGH = 1.6  # from here on labels may stand on lines, if they must
_STEP = 0.03  # between two points of a line
_TOLERANCE = 1e-6  # of a piece of a line, at its ends
_NEAR = 1e-4  # inches between the boxes of lines that may meet
_STUBS, _STUB_FROM_DOT, _DIRECTIONS = (0.2, 0.45, 0.8), 0.16, 24
_STEP_OF_FAN = math.radians(30)  # between two open legs of one core
_WAY = {"in": math.pi, "out": 0.0, "kernel": -math.pi / 2, "inner": math.pi / 2}  # where the open legs of a role point


def scene_of(diagram: Diagram, places: Sequence[tuple[float, float]], with_sizes: bool) -> Scene:
    """The drawing of nodes at `places`, spread as far as its labels need."""
    if len(diagram.lines) + len(diagram.stubs) > _MANY:
        return _at_scale(diagram, places, with_sizes, 1.0)
    best: Scene | None = None
    for scale in _SCALES if len(diagram.lines) <= _SEVERAL else _SCALES[::3]:
        scene = _at_scale(diagram, places, with_sizes, scale)
        if best is None or _badness(scene) < _badness(best):
            best = scene
        if _badness(best) == (0, 0) or (scale >= _ENOUGH and not best.quality.label_overlaps):
            break
    assert best is not None
    return best


def _badness(scene: Scene) -> tuple[int, int]:
    return scene.quality.label_overlaps, scene.quality.label_crossings


def _at_scale(diagram: Diagram, places: Sequence[tuple[float, float]], with_sizes: bool, scale: float) -> Scene:
    discs = tuple(
        _disc(node, column * _COLUMN * scale, row * _COLUMN / ASPECT * scale)
        for node, (column, row) in zip(diagram.nodes, places, strict=True)
    )
    bonds = _bonds(diagram, discs)
    many = len(bonds) + len(diagram.stubs) > _MANY
    items: list[list[Choice]] = []
    texts: list[tuple[str, str | None]] = []
    named = _named_once(diagram, bonds)
    for number, stroke in enumerate(bonds):
        if len(bonds) > _MOST_NAMED or (diagram.nodes[stroke.ends[0]].core is None and named[stroke.index] != number):
            continue
        texts.append((_text(stroke.index, stroke.size, with_sizes), None))
        items.append(_beside(stroke.path, texts[-1][0]))
    first_stub = len(items)
    for stub, way in zip(diagram.stubs, _ways(diagram), strict=True):
        texts.append((_text(stub.index, stub.size, with_sizes), stub.role))
        items.append(_stub_choices(discs[stub.node], way, texts[-1][0], _STUBS if scale > 1 else _STUBS[:1]))
    obstacles = Obstacles([(disc.x, disc.y, disc.radius) for disc in discs], [bond.path for bond in bonds])
    chosen = [min(item, key=lambda choice: choice.price) for item in items] if many else choose(items, obstacles)
    labels = [Label(text, choice.box, role) for (text, role), choice in zip(texts, chosen, strict=True)]
    stubs = [
        Stroke(_from_disc(choice.tail, discs[stub.node]), stub.index, stub.size, (stub.node,), stub.role)
        for stub, choice in zip(diagram.stubs, chosen[first_stub:], strict=True)
        if choice.tail is not None
    ]
    strokes = (*bonds, *stubs)
    quality = quality_of_many(discs, strokes, labels) if many else _quality(discs, strokes, labels)
    return Scene(discs, strokes, tuple(labels), quality)


def _disc(node: Node, x: float, y: float) -> Disc:
    if node.core is None:
        return Disc(x, y, _DOT_RADIUS, node, (), LABEL_POINTS)
    marks = []
    if node.core.shared:
        marks.append(f"({node.core.shared})")
    if node.core.origin == "weight":
        return Disc(x, y, 0.9 * _RADIUS, node, ("W", *marks), 11.0)
    if node.core.origin and not node.derived:
        marks.append(f"({node.core.origin})")
    radius = _DERIVED_RADIUS if node.derived else _RADIUS
    lines, points = fitted(node.text, marks, 0.88 * radius if node.core.shared else radius)
    return Disc(x, y, radius, node, tuple(lines), points)


def _text(index: str, size: int, with_sizes: bool) -> str:
    name = clean(index, 24)
    return f"{name}={size}" if with_sizes else name


def _named_once(diagram: Diagram, bonds: Sequence[Stroke]) -> dict[str, int]:
    """At which line a hyperedge is named: none where it has an open leg, else its longest."""
    named: dict[str, int] = {}
    for number, stroke in enumerate(bonds):
        best = bonds[named[stroke.index]] if stroke.index in named else None
        if best is None or (len(stroke.path), -stroke.ends[1]) > (len(best.path), -best.ends[1]):
            named[stroke.index] = number
    return named | dict.fromkeys((stub.index for stub in diagram.stubs), -1)


def _bonds(diagram: Diagram, discs: Sequence[Disc]) -> list[Stroke]:
    """Straight lines from disc to disc; parallel bonds bulge to both sides."""
    most = _POINTS_OF_MANY if len(diagram.lines) > _MANY else _MOST_POINTS
    count = Counter(frozenset(line.ends) for line in diagram.lines)
    seen: Counter[frozenset[int]] = Counter()
    bonds = []
    for line in diagram.lines:
        pair = frozenset(line.ends)
        away = bulge(seen[pair], count[pair]) * _COLUMN / ASPECT
        seen[pair] += 1
        one, other = (discs[end] for end in sorted(line.ends))
        bonds.append(Stroke(_curve(one, other, away, most), line.index, line.size, line.ends))
    return bonds


def _curve(one: Disc, other: Disc, away: float, most: int) -> Points:
    """A quadratic curve whose middle is `away` from the straight line, without what the discs cover.

    It has at most so many points.
    """
    start, end = np.array([one.x, one.y]), np.array([other.x, other.y])
    way = end - start
    length = float(np.hypot(*way))
    control = (start + end) / 2 + 2 * away * np.array([-way[1], way[0]]) / length
    at = np.linspace(0, 1, min(max(8, round(length / _STEP)), most))[:, None]
    path = (1 - at) ** 2 * start + 2 * at * (1 - at) * control + at**2 * end
    seen = (np.hypot(*(path - start).T) > one.radius) & (np.hypot(*(path - end).T) > other.radius)
    return np.asarray(path[seen] if seen.sum() > 1 else path)


def _beside(path: Points, text: str) -> list[Choice]:
    """A label on either side of a line, the middle preferred."""
    width, height = text_size(text, LABEL_POINTS)
    choices = []
    for rank, at in enumerate((0.5, 0.42, 0.58, 0.34, 0.66, 0.26, 0.74, 0.18, 0.82)):
        here = round(at * (len(path) - 1))
        way = path[min(here + 1, len(path) - 1)] - path[max(here - 1, 0)]
        across = np.array([-way[1], way[0]]) / np.hypot(*way)
        if across[1] < -1e-9 or (abs(across[1]) < 1e-9 and across[0] < 0):
            across = -across  # up, or to the right
        for side, price in ((1, 0.0), (-1, 0.15)):
            gap = abs(across[0]) * width / 2 + abs(across[1]) * height / 2 + 0.045
            choices.append(Choice(_box(path[here] + side * gap * across, width, height), None, 0.3 * rank + price))
    return choices


def _ways(diagram: Diagram) -> list[float]:
    """The direction that each open leg likes best: a node's legs of one role make a fan, the first on top or left."""
    ways = []
    fans = Counter((stub.node, stub.role) for stub in diagram.stubs)
    seen: Counter[tuple[int, str]] = Counter()
    for stub in diagram.stubs:
        fan = (stub.node, stub.role)
        turn = (seen[fan] - (fans[fan] - 1) / 2) * _STEP_OF_FAN
        seen[fan] += 1
        ways.append(_WAY[stub.role] + (-turn if stub.role == "out" else turn))
    return ways


_ANGLES = tuple(2 * math.pi * number / _DIRECTIONS for number in range(_DIRECTIONS))
_UNITS = tuple(np.array([math.cos(angle), math.sin(angle)]) for angle in _ANGLES)


def _stub_choices(disc: Disc, liked: float, text: str, lengths: Sequence[float]) -> list[Choice]:
    """An open leg in any direction, with its label at the end; short, and near the direction that it likes."""
    width, height = text_size(text, LABEL_POINTS)
    centre = np.array([disc.x, disc.y])
    begin = max(disc.radius + 0.02, _STUB_FROM_DOT)
    choices = []
    for rank, length in enumerate(lengths):
        end = max(disc.radius, 0.1) + length
        along = np.linspace(begin, end, 8)[:, None]
        for angle, way in zip(_ANGLES, _UNITS, strict=True):
            away = abs(math.remainder(angle - liked, 2 * math.pi))
            gap = end + abs(way[0]) * width / 2 + abs(way[1]) * height / 2 + 0.03
            box = _box(centre + gap * way, width, height)
            choices.append(Choice(box, centre + along * way, 2.0 * away**2 + 1.5 * rank))
    return choices


def _box(centre: Points, width: float, height: float) -> Box:
    x, y = float(centre[0]), float(centre[1])
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _from_disc(tail: Points, disc: Disc) -> Points:
    """A leg's visible line: from the edge of its disc to its end."""
    centre = np.array([disc.x, disc.y])
    way = (tail[-1] - centre) / np.hypot(*(tail[-1] - centre))
    return np.linspace(centre + disc.radius * way, tail[-1], 8)


def _quality(discs: Sequence[Disc], strokes: Sequence[Stroke], labels: Sequence[Label]) -> Quality:
    boxes = [label.box for label in labels]
    overlaps = sum(overlap(one, other) for number, one in enumerate(boxes) for other in boxes[number + 1 :])
    overlaps += sum(_on_disc(box, disc) for box in boxes for disc in discs)
    through, crossed = 0, 0
    rounds, sides = np.array([(disc.x, disc.y, disc.radius) for disc in discs]), np.array(boxes).reshape(-1, 4)
    for stroke in strokes:
        away = stroke.path[None] - rounds[:, None, :2]
        met = (np.hypot(away[..., 0], away[..., 1]) < rounds[:, None, 2]).any(1)
        met[list(stroke.ends)] = False
        through += int(met.sum())
        crossed += int(contains(sides, stroke.path).any(1).sum())
    return Quality(_crossings([stroke.thinned for stroke in strokes]), through, overlaps, crossed)


def _crossings(paths: Sequence[Points]) -> int:
    """Pairs of lines that meet; only those whose boxes do are looked at piece by piece."""
    if not paths:
        return 0
    low, high = (np.array([side(path, axis=0) for path in paths]) for side in (np.min, np.max))
    near = ((low[:, None] <= high[None] + _NEAR) & (low[None] <= high[:, None] + _NEAR)).all(-1)
    return sum(_cross(paths[one], paths[other]) for one, other in zip(*np.nonzero(np.triu(near, 1)), strict=True))


def _on_disc(box: Box, disc: Disc) -> bool:
    away_x = max(box[0] - disc.x, disc.x - box[2], 0)
    away_y = max(box[1] - disc.y, disc.y - box[3], 0)
    return math.hypot(away_x, away_y) < disc.radius


def _cross(one: Points, other: Points) -> bool:
    """Whether two lines meet between their ends (those of a dot may touch there)."""
    start, way = one[:-1, None], np.diff(one, axis=0)[:, None]
    begin, other_way = other[None, :-1], np.diff(other, axis=0)[None]
    area = cross_product(way, other_way)
    slanted = np.abs(area) > 1e-12  # parallel pieces do not cross
    area = np.where(slanted, area, 1.0)
    apart = begin - start
    at, other_at = cross_product(apart, other_way) / area, cross_product(apart, way) / area
    # Points of both lines may coincide where they cross, as on a rectangle's diagonals: rounding must not hide it.
    within = (np.abs(at - 0.5) < 0.5 + _TOLERANCE) & (np.abs(other_at - 0.5) < 0.5 + _TOLERANCE)
    return bool((slanted & within).any())
