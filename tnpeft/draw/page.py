"""The page: title, a panel for each term with the signs between, and a legend of what occurs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tnpeft.draw.diagram import diagram_of
from tnpeft.draw.placing import place
from tnpeft.draw.scene import scene_of
from tnpeft.draw.shapes import Quality, Scene
from tnpeft.draw.text import clean, text_size, wrapped
from tnpeft.network import BoundCore, Network

__all__ = ["Page", "Text", "page_of"]

MOST_TERMS = 24  # a sum of more is drawn as far as that
_MARGIN, _GAP = 0.15, 0.3
_TITLE, _SUBTITLE, _SIGN, _LEGEND = 11.0, 8.0, 13.0, 7.0  # points
_NARROWEST, _WIDEST = 3.4, 9.0  # without the margins
_ROW = 0.2  # a line of the legend
_MARK = 0.2  # the width of a legend's mark

Item = tuple[Scene, str]  # a term and the sign before it
ROLE_TEXTS = {"in": "input", "out": "output", "kernel": "kernel", "inner": "no open leg"}


@dataclass(frozen=True)
class Text:
    """A text whose left edge and vertical middle are at (x, y)."""

    text: str
    x: float
    y: float
    points: float
    strong: bool = False


@dataclass(frozen=True)
class Page:
    """Everything in inches from the lower left corner; `panels` are scenes with where their origin goes."""

    width: float
    height: float
    texts: tuple[Text, ...]
    panels: tuple[tuple[Scene, float, float], ...]
    legend: tuple[tuple[str, float, float], ...]  # mark, x, y
    quality: Quality


def page_of(network: Network, with_sizes: bool) -> Page:
    """Lay a network out, term by term."""
    parts = network.parts[:MOST_TERMS]
    signs = itertools.islice(_signs(network), len(parts))
    items = list(zip([_scene(part, with_sizes) for part in parts], signs, strict=True))
    rows = _rows(items)
    inner = max(map(_row_width, rows))
    width = max(inner, _NARROWEST) + 2 * _MARGIN
    head = list(_head(network, with_sizes, width - 2 * _MARGIN))
    marks = _flow(_marks(network), width - 2 * _MARGIN)
    body = sum(map(_row_height, rows)) + _GAP * (len(rows) - 1)
    foot = _ROW * (1 + max((row for _, _, row in marks), default=-1))
    head_height = sum(text_size(line, points)[1] for line, points, _ in head) + 0.04
    height = 2 * _MARGIN + head_height + body + foot + 0.3

    texts, y = [], height - _MARGIN
    for line, points, strong in head:
        step = text_size(line, points)[1]
        texts.append(Text(line, _MARGIN, y - step / 2, points, strong))
        y -= step
    panels, top = [], _MARGIN + foot + 0.15 + body
    for row in rows:
        middle, x = top - _row_height(row) / 2, (width - inner) / 2
        top -= _row_height(row) + _GAP
        for scene, sign in row:
            if sign:
                texts.append(Text(sign, x, middle, _SIGN, True))
                x += text_size(sign, _SIGN, True)[0] + _GAP
            left, bottom, right, upper = scene.bounds
            panels.append((scene, x - left, middle - (bottom + upper) / 2))
            x += right - left + _GAP
    legend = []
    for (kind, text), at, line_number in marks:
        line_y = _MARGIN + foot - _ROW * (line_number + 0.5)
        legend.append((kind, _MARGIN + at, line_y))
        texts.append(Text(text, _MARGIN + at + _MARK + 0.05, line_y, _LEGEND))
    quality = sum((scene.quality for scene, _ in items), Quality(0, 0, 0, 0))
    return Page(width, height, tuple(texts), tuple(panels), tuple(legend), quality)


def _scene(part: Network, with_sizes: bool) -> Scene:
    diagram = diagram_of(part)
    return scene_of(diagram, place(diagram), with_sizes)


def _rows(items: Sequence[Item]) -> list[list[Item]]:
    """The terms, each with its sign, in as many rows as keep the page narrow enough to read."""
    rows: list[list[Item]] = [[]]
    for item in items:
        if rows[-1] and _row_width([*rows[-1], item]) > _WIDEST:
            rows.append([])
        rows[-1].append(item)
    return rows


def _row_width(row: Sequence[Item]) -> float:
    signs = sum(text_size(sign, _SIGN, True)[0] + _GAP for _, sign in row if sign)
    return sum(scene.bounds[2] - scene.bounds[0] for scene, _ in row) + signs + _GAP * (len(row) - 1)


def _row_height(row: Sequence[Item]) -> float:
    return max(scene.bounds[3] - scene.bounds[1] for scene, _ in row)


def _signs(network: Network) -> Iterator[str]:
    """What stands before each panel: nothing, a sign, or a sign and a factor."""
    for number, term in enumerate(network.terms):
        sign = "\N{MINUS SIGN}" if term.scale < 0 else "+" if number else ""
        size = abs(term.scale)
        factor = "" if math.isclose(size, 1) else f"{size:.4g} \N{MULTIPLICATION SIGN}"
        yield f"{sign} {factor}".strip()


def _head(network: Network, with_sizes: bool, width: float) -> Iterator[tuple[str, float, bool]]:
    """Lines of the title and below it, with their size and whether they are bold."""
    spec = network.spec
    title = f"{spec.name}: {' '.join(spec.title.split())}" if spec.title else spec.name
    for line in wrapped(clean(title, 200), _TITLE, width, strong=True):
        yield line, _TITLE, True
    facts = []
    if with_sizes:
        params = [f"{name} = {value:g}" for name, value in network.params.items()]
        scale = [] if math.isclose(network.scale, 1) else [f"scale {network.scale:.4g}"]
        facts.append(", ".join([str(network.layer), *params, *scale]))
        formula = f" = {network.formula}" if network.formula else ""
        facts.append(f"{network.num_parameters:,} parameters{formula}")
    else:
        facts.append(f"parameters: {network.formula}")
    if len(network.terms) > MOST_TERMS:
        facts.append(f"the first {MOST_TERMS} of {len(network.terms)} terms")
    if network.compose == "dora":
        facts.append(
            "compose: dora, the sum with the base weight is normalised per output channel, its magnitude trained"
        )
    for fact in facts:
        for line in wrapped(clean(fact, 400), _SUBTITLE, width):
            yield line, _SUBTITLE, False


def _marks(network: Network) -> list[tuple[str, str]]:
    """The kinds of marks in the picture, each with what it means."""
    found: dict[str, str] = {}
    diagrams = [diagram_of(part) for part in network.parts[:MOST_TERMS]]
    nodes = [node for diagram in diagrams for node in diagram.nodes]
    roles = {stub.role for diagram in diagrams for stub in diagram.stubs}
    found.update({role: text for role, text in ROLE_TEXTS.items() if role in roles})
    if any(node.core and not node.roles for node in nodes):
        found["inner"] = ROLE_TEXTS["inner"]
    for core in network.cores:
        found.update(_core_marks(core))
    if any(node.core is None for node in nodes):
        found["dot"] = "one index of several cores"
    order = (*ROLE_TEXTS, "dot", "frozen", "shared", "weight")
    return sorted(found.items(), key=lambda item: order.index(item[0]))


def _core_marks(core: BoundCore) -> Iterator[tuple[str, str]]:
    if core.origin == "weight":
        yield "weight", "the base weight"
    elif core.frozen:
        yield "frozen", "frozen"
    if core.shared:
        yield "shared", "shared between layers"


def _flow(marks: Sequence[tuple[str, str]], width: float) -> list[tuple[tuple[str, str], float, int]]:
    """Each mark of the legend with its place: x and row."""
    placed, x, row = [], 0.0, 0
    for mark in marks:
        needed = _MARK + 0.05 + text_size(mark[1], _LEGEND)[0]
        if x and x + needed > width:
            x, row = 0.0, row + 1
        placed.append((mark, x, row))
        x += needed + 0.2
    return placed
