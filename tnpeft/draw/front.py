"""A picture of many networks: error by cost, with the best networks drawn above."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tnpeft.draw.files import need_matplotlib
from tnpeft.draw.page import Page
from tnpeft.draw.render import draw_page, figure_settings
from tnpeft.draw.strip import strip_of
from tnpeft.network import Network

__all__ = ["Point", "draw_front", "front_of"]

_WIDTH, _PLOT, _DPI = 10.0, 4.4, 110  # inches, of the height
_LEFT, _RIGHT, _BOTTOM, _TOP, _BETWEEN = 0.8, 0.2, 0.55, 0.1, 0.3
_MOST_DRAWN = 6
_POINTS, _FRONT, _OTHERS = "#56b4e9", "#0072b2", "#b85400"
_LETTERS = "ABCDEF"
_LEAST = 1e-4  # errors below it stand at the foot of the plot

Cost = Callable[["Point"], float | None]


class Point(NamedTuple):
    """A network by its parameters and its error, and by the time of a step where that is known.

    A `network` is drawn above the panels, with the `label` as its caption.
    """

    parameters: int
    error: float
    label: str = ""
    network: Network | None = None
    step: float | None = None


def draw_front(points: Sequence[Point], others: Sequence[Point] = (), step_title: str = "") -> bytes:
    """An SVG: errors by parameters and, where points have one, by the time of a step, which `step_title` describes.

    In each panel a line joins the points that no cheaper point betters; `others` are crosses with their labels. Of the
    points with a network, those with the smallest errors are drawn above, under letters that the panels repeat. Raises
    DrawError.
    """
    need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    best = sorted((point for point in points if point.network is not None), key=lambda point: point.error)
    drawn = sorted(best[:_MOST_DRAWN], key=lambda point: point[:2])
    letters = dict(zip(_LETTERS, drawn, strict=False))
    panels: list[tuple[str, Cost]] = [("parameters", lambda point: point.parameters)]
    if any(point.step is not None for point in points):
        panels.append((step_title, lambda point: point.step))
    with figure_settings():
        strip = _strip(letters)
        above = strip.height if strip is not None else 0.0
        figure = Figure(figsize=(_WIDTH, _PLOT + above), facecolor="white")
        FigureCanvasAgg(figure)
        if strip is not None:
            draw_page(figure, strip, _PLOT)
        width = (_WIDTH - _LEFT - _RIGHT - _BETWEEN * (len(panels) - 1)) / len(panels)
        limits = _limits([*points, *others])
        for number, (title, cost) in enumerate(panels):
            left, height = _LEFT + number * (width + _BETWEEN), _PLOT + above
            place = (left / _WIDTH, _BOTTOM / height, width / _WIDTH, (_PLOT - _BOTTOM - _TOP) / height)
            axes = figure.add_axes(place, ylim=limits)
            _panel(axes, cost, points, others, letters)
            axes.set_xlabel(title, fontsize=9)
            if number == 0:
                axes.set_ylabel("share of the energy that is not captured", fontsize=9)
                axes.legend(fontsize=8, frameon=False, loc="best")
            else:
                axes.tick_params(labelleft=False, which="both")
        file = io.BytesIO()
        title = " and by the time of a step" if len(panels) > 1 else ""
        metadata = {"Title": f"Networks by their parameters{title}", "Creator": "tnpeft", "Date": None}
        figure.savefig(file, format="svg", dpi=_DPI, metadata=metadata)
    return file.getvalue()


def _strip(letters: dict[str, Point]) -> Page | None:
    named = [(f"{letter}  {point.label}", point.network) for letter, point in letters.items()]
    return strip_of([(label, each) for label, each in named if each is not None], _WIDTH) if named else None


def _panel(axes: Any, cost: Cost, points: Sequence[Point], others: Sequence[Point], letters: dict[str, Point]) -> None:
    """One panel, with errors on a logarithmic axis, because the best are close to zero."""
    known = [point for point in points if cost(point) is not None]
    _scale(axes)
    axes.grid(visible=True, which="major", color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    _plot(axes, known, cost, "evaluated", marker="o", color=_POINTS, linestyle="", markersize=3.5)
    front = front_of(known, cost)
    _plot(axes, front, cost, "not bettered by a cheaper one", color=_FRONT, drawstyle="steps-post", linewidth=1.2)
    _plot(axes, front, cost, None, marker="o", color=_FRONT, linestyle="", markersize=5)
    placed = [other for other in others if cost(other) is not None]
    _plot(axes, placed, cost, "beside it", marker="x", color=_OTHERS, linestyle="", markersize=6)
    labels = [(other.label, other, _OTHERS) for other in placed]
    labels += [(letter, point, _FRONT) for letter, point in letters.items() if cost(point) is not None]
    axes.margins(x=0.08)
    axes.set_xlim(axes.get_xlim())
    _annotate(axes, cost, labels)


def _limits(points: Sequence[Point]) -> tuple[float, float]:
    """From a little below the smallest error to a little above the largest."""
    errors = [_shown(point) for point in points]
    return min(errors) / 1.3, max(errors) * 1.3


def _scale(axes: Any) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    limits = axes.get_ylim()
    axes.set_yscale("log")
    axes.set_ylim(limits)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=20))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(labelsize=8)


def _plot(axes: Any, points: Sequence[Point], cost: Cost, label: str | None, **style: Any) -> None:
    axes.plot([cost(point) for point in points], [_shown(point) for point in points], label=label, **style)


def _shown(point: Point) -> float:
    return max(point.error, _LEAST)


def _annotate(axes: Any, cost: Cost, labels: Sequence[tuple[str, Point, str]]) -> None:
    """Each label on that side of its point where it lies over the fewest points and labels."""
    figure = axes.figure
    scale = figure.dpi / 72
    taken: list[tuple[float, float, float, float]] = []
    for lines in axes.lines:
        for x, y in axes.transData.transform(lines.get_xydata()):
            taken.append((x - 3 * scale, y - 3 * scale, x + 3 * scale, y + 3 * scale))
    frame = axes.get_window_extent()
    for text, point, colour in labels:
        place = cost(point)
        assert place is not None
        x, y = axes.transData.transform((place, _shown(point)))
        bold = colour == _FRONT
        width, height = (5.4 if not bold else 7.5) * len(text) * scale, 9 * scale
        boxes = {}
        for side, dx, dy in _SIDES:
            left = x + dx * 6 * scale - (width if dx < 0 else width / 2 if dx == 0 else 0)
            bottom = y + dy * 6 * scale - (height if dy < 0 else height / 2 if dy == 0 else 0)
            boxes[side] = (left, bottom, left + width, bottom + height)
        side = min(boxes, key=lambda each: (_outside(boxes[each], frame), sum(_overlap(boxes[each], o) for o in taken)))
        taken.append(boxes[side])
        left, bottom, right, top = boxes[side]
        middle = axes.transData.inverted().transform(((left + right) / 2, (bottom + top) / 2))
        weight = "bold" if bold else "normal"
        axes.text(*middle, text, fontsize=8, color=colour, fontweight=weight, ha="center", va="center",
                  parse_math=False)  # fmt: skip


_SIDES = (("left", -1, 0), ("below", 0, -1), ("right", 1, 0), ("above", 0, 1), ("below left", -1, -1),
          ("above right", 1, 1), ("above left", -1, 1), ("below right", 1, -1))  # fmt: skip


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return width * height if width > 0 and height > 0 else 0.0


def _outside(box: tuple[float, float, float, float], frame: Any) -> bool:
    return bool(box[0] < frame.x0 or box[2] > frame.x1 or box[1] < frame.y0 or box[3] > frame.y1)


def front_of(points: Sequence[Point], cost: Cost = lambda point: point.parameters) -> list[Point]:
    """The Pareto front: points that no point of the same or less cost betters, by cost. Unknown costs are left out."""
    front: list[Point] = []
    known = [(value, point.error, point) for point in points if (value := cost(point)) is not None]
    for _, error, point in sorted(known, key=lambda each: each[:2]):
        if not front or error < front[-1].error:
            front.append(point)
    return front
