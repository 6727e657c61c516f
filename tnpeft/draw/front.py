"""A picture of many networks: what each costs, what it misses, and the best of each size drawn beside its point."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

from tnpeft.draw.files import need_matplotlib
from tnpeft.draw.picture import Picture
from tnpeft.draw.render import figure_settings
from tnpeft.network import Network

__all__ = ["Point", "draw_front"]

_WIDTH, _HEIGHT, _DPI = 10.0, 6.5, 110
_STRIP, _MOST_DRAWN = 0.34, 5  # of the height, for the networks


class Point(NamedTuple):
    """A network by its parameters and its error; a `label` is written beside its point, and a `network` drawn."""

    parameters: int
    error: float
    label: str = ""
    network: Network | None = None


def draw_front(points: Sequence[Point], others: Sequence[Point] = ()) -> bytes:
    """An SVG: the points, a line along those that no smaller network betters, and `others` as labelled crosses.

    The networks of points that have one, the smallest first, are drawn above. Raises DrawError.
    """
    need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = sorted((point for point in points if point.network is not None), key=lambda point: point[:3])[:_MOST_DRAWN]
    with figure_settings():
        figure = Figure(figsize=(_WIDTH, _HEIGHT), facecolor="white")
        FigureCanvasAgg(figure)
        top = 0.98 - _STRIP if drawn else 0.96
        axes = figure.add_axes((0.09, 0.1, 0.88, top - 0.1))
        _plot(axes, points, "evaluated", color="#56b4e9", linestyle="", markersize=3.5)
        _plot(axes, front_of(points), "front", color="#0072b2", drawstyle="steps-post", linewidth=1.2, markersize=6)
        for other in others:
            axes.plot(other.parameters, other.error, "x", color="#b85400")
            axes.annotate(other.label, (other.parameters, other.error), (5, 4), textcoords="offset points", fontsize=8)
        axes.set_xlabel("parameters")
        axes.set_ylabel("share of the energy that is not captured")
        axes.legend(fontsize=8, frameon=False)
        for place, point in enumerate(drawn):
            left = 0.02 + place * 0.96 / len(drawn)
            inset = figure.add_axes((left, top + 0.05, 0.96 / len(drawn) - 0.01, _STRIP - 0.09))
            inset.imshow(_image(point))
            inset.axis("off")
            inset.set_title(point.label, fontsize=8)
            axes.annotate(point.label.partition(":")[0], (point.parameters, point.error), (-4, 6),
                          textcoords="offset points", fontsize=8, color="#0072b2")  # fmt: skip
        file = io.BytesIO()
        metadata = {"Title": "Networks by their parameters", "Creator": "tnpeft", "Date": None}
        figure.savefig(file, format="svg", dpi=_DPI, metadata=metadata)
    return file.getvalue()


def _plot(axes: Any, points: Sequence[Point], label: str, **style: Any) -> None:
    sizes, errors = ([point[place] for point in points] for place in (0, 1))
    axes.plot(sizes, errors, marker="o", label=label, **style)


def front_of(points: Sequence[Point]) -> list[Point]:
    """The points that no network with as few parameters betters, by their parameters."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.parameters, point.error)):
        if not front or point.error < front[-1].error:
            front.append(point)
    return front


def _image(point: Point) -> Any:
    """A network as pixels."""
    from matplotlib.image import imread

    assert point.network is not None
    return imread(io.BytesIO(Picture(point.network, False).data("png")), format="png")
