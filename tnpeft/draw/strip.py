"""Several networks side by side, all at one scale, with a caption above each and one legend below."""

from __future__ import annotations

from collections.abc import Sequence

from tnpeft.draw.page import (
    GAP,
    LEGEND,
    MARGIN,
    MARK,
    ROW,
    Group,
    Page,
    Placed,
    Text,
    diagrams_in,
    flowed,
    group_width,
    marks_in,
    reach_of,
    scene_in,
)
from tnpeft.draw.shapes import Quality
from tnpeft.draw.text import text_size
from tnpeft.network import Network

__all__ = ["strip_of"]

_CAPTION = 8.5  # points
_ABOVE = 0.22  # of a caption


def strip_of(networks: Sequence[tuple[str, Network]], width: float) -> Page:
    """Networks with their captions, in as many rows as this width in inches needs."""
    drawn: list[tuple[str, Group]] = []
    marks: dict[tuple[str, str], None] = {}
    for caption, network in networks:
        terms, derived = diagrams_in(network, True)
        drawn.append((caption, [(scene_in(diagram, True), sign) for diagram, sign in terms]))
        marks |= dict.fromkeys(marks_in(network, terms, derived))
    rows = _rows(drawn, width - 2 * MARGIN)
    legend = flowed([*marks], width - 2 * MARGIN)
    foot = ROW * (1 + max((row for _, _, row in legend), default=-1))
    heights = [_ABOVE + sum(_row_reach(row)) for row in rows]
    height = MARGIN + foot + sum(heights) + GAP * len(rows)
    texts, placed, top = [], Placed(), height - MARGIN
    for row, row_height in zip(rows, heights, strict=True):
        widths = [_width(each) for each in row]
        space = (width - 2 * MARGIN - sum(widths)) / len(row)
        x = MARGIN + space / 2
        middle = top - _ABOVE - _row_reach(row)[1]
        for (caption, group), own in zip(row, widths, strict=True):
            texts.append(Text(caption, x + (own - text_size(caption, _CAPTION)[0]) / 2, top - 0.08, _CAPTION))
            placed.add([group], x + (own - group_width(group)) / 2, middle)
            x += own + space
        top -= row_height + GAP
    places = []
    for (kind, text), at, number in legend:
        y = foot - ROW * (number + 0.5)
        places.append((kind, MARGIN + at, y))
        texts.append(Text(text, MARGIN + at + MARK + 0.05, y, LEGEND))
    quality = sum((scene.quality for scene, _, _ in placed.panels), Quality(0, 0, 0, 0))
    return Page(width, height, (*texts, *placed.signs), tuple(placed.panels), tuple(places), quality)


Captioned = tuple[str, Group]


def _rows(drawn: Sequence[Captioned], width: float) -> list[list[Captioned]]:
    rows: list[list[Captioned]] = [[]]
    for each in drawn:
        if rows[-1] and sum(map(_width, [*rows[-1], each])) + GAP * len(rows[-1]) > width:
            rows.append([])
        rows[-1].append(each)
    return rows


def _width(captioned: Captioned) -> float:
    caption, group = captioned
    return max(group_width(group), text_size(caption, _CAPTION)[0])


def _row_reach(row: Sequence[Captioned]) -> tuple[float, float]:
    """How far the networks of a row reach below and above its middle."""
    below, above = zip(*(reach_of(group) for _, group in row), strict=True)
    return max(below), max(above)
