"""The page: title, a panel for each term with signs between them, and a legend of the marks that occur."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from tnpeft.draw.derivation import MOST_DERIVED, SIGN_POINTS, Arrow, Sign, diagrams_of_derived, sign_of
from tnpeft.draw.diagram import Diagram, Node, diagram_of
from tnpeft.draw.labels import Box
from tnpeft.draw.placing import Places, place
from tnpeft.draw.scene import scene_of
from tnpeft.draw.shapes import THICKEST, Quality, Scene
from tnpeft.draw.text import clean, text_size, wrapped
from tnpeft.network import Network
from tnpeft.spec.pattern import ELLIPSIS, kernel_indices

__all__ = [
    *("GAP", "LEGEND", "MARGIN", "MARK", "ROW", "Group", "Page", "Placed", "Text"),
    *("diagrams_in", "flowed", "group_width", "marks_in", "page_of", "reach_of", "scene_in"),
]

MOST_TERMS = 24  # a sum of more is drawn as far as that
MARGIN, GAP = 0.15, 0.3
_TITLE, _SUBTITLE, LEGEND = 11.0, 8.0, 7.0  # points
_NARROWEST, _WIDEST = 3.4, 9.0  # without the margins
ROW = 0.2  # a line of the legend
_FRAME = 0.1  # from a derived core's panels to the line about them
MARK = 0.2  # the width of a legend's mark

Item = tuple[Scene, Sign]  # a panel and what stands before it
Group = list[Item]  # the terms of a row, or a derived core
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
    """Everything in inches from the lower left corner; `panels` are scenes, each with its origin.

    Panels of terms come first, then those of derived cores, each in a frame (left, bottom, right, top) with an arrow,
    whose left end is given.
    """

    width: float
    height: float
    texts: tuple[Text, ...]
    panels: tuple[tuple[Scene, float, float], ...]
    legend: tuple[tuple[str, float, float], ...]  # mark, x, y
    quality: Quality
    arrows: tuple[tuple[Arrow, float, float], ...] = ()
    frames: tuple[Box, ...] = ()


def page_of(network: Network, with_sizes: bool, placer: Callable[[Diagram], Places] = place) -> Page:
    """Lay out a network, term by term, with its derived cores below; `placer` places the nodes of each diagram."""

    def scenes(diagrams: Diagrams) -> Group:
        return [(scene_in(diagram, with_sizes, placer), sign) for diagram, sign in diagrams]

    terms, derived = diagrams_in(network, with_sizes)
    blocks = [[[row] for row in _rows(scenes(terms))], _rows_of_groups([scenes(group) for group in derived])]
    rows = [row for block in blocks for row in block]
    inner = max(map(_row_width, rows))
    width = max(inner, _NARROWEST) + 2 * MARGIN
    head = list(_head(network, with_sizes, width - 2 * MARGIN))
    marks = flowed(marks_in(network, terms, derived), width - 2 * MARGIN)
    body = sum(sum(_row_reach(row)) for row in rows) + GAP * (len(rows) - 1)
    foot = ROW * (1 + max((row for _, _, row in marks), default=-1))
    head_height = sum(text_size(line, points)[1] for line, points, _ in head) + 0.04
    height = 2 * MARGIN + head_height + body + foot + 0.3

    texts, y = [], height - MARGIN
    for line, points, strong in head:
        step = text_size(line, points)[1]
        texts.append(Text(line, MARGIN, y - step / 2, points, strong))
        y -= step
    placed, top = Placed(), MARGIN + foot + 0.15 + body
    for block in blocks:
        left = (width - max(map(_row_width, block), default=0.0)) / 2
        for row in block:
            below, above = _row_reach(row)
            placed.add(row, left, top - above)
            top -= above + below + GAP
    legend = []
    for (kind, text), at, line_number in marks:
        line_y = MARGIN + foot - ROW * (line_number + 0.5)
        legend.append((kind, MARGIN + at, line_y))
        texts.append(Text(text, MARGIN + at + MARK + 0.05, line_y, LEGEND))
    quality = sum((scene.quality for scene, _, _ in placed.panels), Quality(0, 0, 0, 0))
    texts += placed.signs
    panels, arrows, frames = tuple(placed.panels), tuple(placed.arrows), tuple(placed.frames)
    return Page(width, height, tuple(texts), panels, tuple(legend), quality, arrows, frames)


class Placed:
    """Rows as they go onto the page."""

    def __init__(self) -> None:
        self.panels: list[tuple[Scene, float, float]] = []
        self.signs: list[Text] = []
        self.arrows: list[tuple[Arrow, float, float]] = []
        self.frames: list[Box] = []

    def add(self, row: Sequence[Group], x: float, middle: float) -> None:
        """The groups of a row from `x` on, with what they are anchored by at the height `middle`."""
        for group in row:
            first, (below, above) = x, reach_of(group)
            x += _frame_of(group)
            for scene, sign in group:
                if sign.text:
                    self.signs.append(Text(sign.text, x, middle, SIGN_POINTS, True))
                if sign.arrow is not None:
                    self.arrows.append((sign.arrow, x, middle))
                x += sign.width + GAP if sign.width else 0.0
                left, _, right, _ = scene.bounds
                self.panels.append((scene, x - left, middle - _anchor(scene, bool(_frame_of(group)))))
                x += right - left + GAP
            x += _frame_of(group) - GAP
            if _frame_of(group):
                self.frames.append((first, middle - below, x, middle + above))
            x += GAP


Diagrams = list[tuple[Diagram, Sign]]


def diagrams_in(network: Network, with_sizes: bool) -> tuple[Diagrams, list[Diagrams]]:
    """Those of the terms, and of each derived core, with what stands before each."""
    any_kernel = not with_sizes and len(network.layer.kernel_size) == 1

    def named(diagram: Diagram) -> Diagram:
        return _with_any_kernel(diagram) if any_kernel else diagram

    parts = network.plain.parts[:MOST_TERMS]
    signs = (Sign(sign_of(number, term.scale)) for number, term in enumerate(network.terms))
    terms = [(named(diagram_of(part, network)), sign) for part, sign in zip(parts, signs, strict=False)]
    derived = [[(named(diagram), sign) for diagram, sign in group] for group in diagrams_of_derived(network)]
    return terms, derived


def _with_any_kernel(diagram: Diagram) -> Diagram:
    """A diagram in which the index of the one kernel axis has the name of those of any kernel."""
    (only,) = kernel_indices(1)

    def named(index: str) -> str:
        return " ".join(ELLIPSIS if leg == only else leg for leg in index.split())

    lines = tuple(replace(line, index=named(line.index)) for line in diagram.lines)
    return replace(diagram, lines=lines, stubs=tuple(replace(stub, index=named(stub.index)) for stub in diagram.stubs))


def scene_in(diagram: Diagram, with_sizes: bool, placer: Callable[[Diagram], Places] = place) -> Scene:
    return scene_of(diagram, placer(diagram), with_sizes)


def _rows(items: Sequence[Item]) -> list[Group]:
    """The terms, each with its sign, in as many rows as keep the page narrow enough to read."""
    rows: list[Group] = [[]]
    for item in items:
        if rows[-1] and group_width([*rows[-1], item]) > _WIDEST:
            rows.append([])
        rows[-1].append(item)
    return rows


def _rows_of_groups(groups: Sequence[Group]) -> list[list[Group]]:
    """Derived cores beside each other while there is room."""
    rows: list[list[Group]] = []
    for group in groups:
        if rows and _row_width([*rows[-1], group]) <= _WIDEST:
            rows[-1].append(group)
        else:
            rows.append([group])
    return rows


def _frame_of(group: Group) -> float:
    """How far the frame of a derived core is from its panels: terms have none."""
    return _FRAME if group[-1][1].arrow is not None else 0.0


def group_width(group: Group) -> float:
    signs = sum(sign.width + GAP for _, sign in group if sign.width)
    scenes = sum(scene.bounds[2] - scene.bounds[0] for scene, _ in group)
    return scenes + signs + GAP * (len(group) - 1) + 2 * _frame_of(group)


def _row_width(row: Sequence[Group]) -> float:
    return sum(map(group_width, row)) + GAP * (len(row) - 1)


def _anchor(scene: Scene, derived: bool) -> float:
    """The height in a scene that goes onto the middle of its row: an arrow points to the middle of a core."""
    if not derived:
        return (scene.bounds[1] + scene.bounds[3]) / 2
    cores = [disc.y for disc in scene.discs if disc.node.core is not None]
    return (min(cores) + max(cores)) / 2


def reach_of(group: Group) -> tuple[float, float]:
    """How far panels and signs reach below and above the middle of their row, in inches."""
    frame = _frame_of(group)
    below = max(max(_anchor(scene, bool(frame)) - scene.bounds[1], sign.reach[0]) for scene, sign in group)
    above = max(max(scene.bounds[3] - _anchor(scene, bool(frame)), sign.reach[1]) for scene, sign in group)
    return below + frame, above + frame


def _row_reach(row: Sequence[Group]) -> tuple[float, float]:
    below, above = zip(*map(reach_of, row), strict=True)
    return max(below), max(above)


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
    for most, count, what in (
        (MOST_TERMS, len(network.terms), "terms"),
        (MOST_DERIVED, len(network.derived), "derived cores"),
    ):
        if count > most:
            facts.append(f"the first {most} of {count} {what}")
    if network.compose == "dora":
        facts.append(
            "compose: dora, the sum with the base weight is normalised per output channel, its magnitude trained"
        )
    for fact in facts:
        for line in wrapped(clean(fact, 400), _SUBTITLE, width):
            yield line, _SUBTITLE, False


def marks_in(network: Network, terms: Diagrams, derived: list[Diagrams]) -> list[tuple[str, str]]:
    """The kinds of marks in the picture, each with its meaning."""
    found: dict[str, str] = {}
    diagrams = [diagram for diagram, _ in itertools.chain(terms, *derived)]
    nodes = [node for diagram in diagrams for node in diagram.nodes]
    roles = {stub.role for diagram in diagrams for stub in diagram.stubs}
    found.update({role: text for role, text in ROLE_TEXTS.items() if role in roles and role != "inner"})
    if any(node.core and not node.roles for node in nodes):
        found["inner"] = ROLE_TEXTS["inner"]
    for node in nodes:
        found.update(_core_marks(node))
    if any(node.core is None for node in nodes):
        found["dot"] = "one index of several cores"
    if len({size for diagram in diagrams for size in _sizes(diagram)}) > 1:
        found["line"] = "the thicker, the larger the index"
    if network.derived:
        found["derived"] = "made of other cores"
    if any(sign.arrow and sign.arrow.indices for group in derived for _, sign in group):
        found["index"] = "index core, places in whole numbers"
    order = (*ROLE_TEXTS, "line", "dot", "frozen", "shared", "weight", "derived", "index")
    return sorted(found.items(), key=lambda item: order.index(item[0]))


def _sizes(diagram: Diagram) -> Iterator[int]:
    """The sizes that its lines have the thickness of."""
    yield from (min(line.size, THICKEST) for line in diagram.lines)
    yield from (min(stub.size, THICKEST) for stub in diagram.stubs)


def _core_marks(node: Node) -> Iterator[tuple[str, str]]:
    core = node.core
    if core is None:
        return
    if core.origin == "weight":
        yield "weight", "the base weight"
    elif core.frozen:
        yield "frozen", "frozen"
    if core.shared:
        yield "shared", "shared between layers"


def flowed(marks: Sequence[tuple[str, str]], width: float) -> list[tuple[tuple[str, str], float, int]]:
    """Each mark of the legend with its place: x and row."""
    placed, x, row = [], 0.0, 0
    for mark in marks:
        needed = MARK + 0.05 + text_size(mark[1], LEGEND)[0]
        if x and x + needed > width:
            x, row = 0.0, row + 1
        placed.append((mark, x, row))
        x += needed + 0.2
    return placed
