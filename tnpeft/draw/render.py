"""A page as SVG or PNG, by matplotlib's objects: no pyplot, no global state."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from tnpeft.draw.page import Page
from tnpeft.draw.scene import LABEL_POINTS
from tnpeft.draw.shapes import Disc, Scene, Stroke
from tnpeft.draw.text import FONT

__all__ = ["figure_of", "rendered"]

# Tints of Okabe and Ito's colours, which stay apart for every kind of colour vision; lines have the full colour.
_FILLS = {"in": "#b3d9f2", "out": "#f9d9a4", "kernel": "#a8dccb", "inner": "#ffffff"}
_COLOURS = {"in": "#0072b2", "out": "#b85400", "kernel": "#007a58", None: "#404040"}
_INK, _LINE, _FROZEN, _WEIGHT = "#1a1a1a", "#707070", "#8a8a8a", "#d9d9d9"
_DPI, _MOST_PIXELS = 200, 6_000
_THICKEST = 64  # sizes from here on have one thickness


def rendered(page: Page, suffix: str, title: str, digest: str) -> bytes:
    """The file's bytes: the same page gives the same bytes in every process.

    `digest` goes into the metadata as `sha256:...`.
    """
    with _settings():
        file = io.BytesIO()
        dpi = min(_DPI, _MOST_PIXELS / max(page.width, page.height))
        figure_of(page).savefig(file, format=suffix, dpi=dpi, metadata=_metadata(suffix, title, digest))
    return file.getvalue()


def figure_of(page: Page) -> Any:
    """The page as a matplotlib figure, a unit for each inch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(page.width, page.height), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, page.width), ylim=(0, page.height))
    axes.axis("off")
    _draw(axes, page)
    return figure


@contextmanager
def _settings() -> Iterator[None]:
    """Our own settings, whatever the user's are; and no words about letters of a title that the font lacks."""
    import matplotlib

    mine = {"svg.hashsalt": "tnpeft", "svg.fonttype": "none", "font.family": [FONT], "hatch.linewidth": 0.6}
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if key.split(".")[0] in _USED}
    with matplotlib.rc_context({**defaults, **mine}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield


# What a user's own settings could change in a picture.
_USED = ("font", "text", "svg", "patch", "hatch", "lines", "path", "savefig", "figure", "axes", "mathtext")


def _metadata(suffix: str, title: str, digest: str) -> dict[str, str | None]:
    if suffix == "svg":
        return {"Title": title, "Identifier": f"sha256:{digest}", "Creator": "tnpeft", "Date": None}
    return {"Title": title, "Description": f"sha256:{digest}", "Software": "tnpeft"}


def _draw(axes: Any, page: Page) -> None:
    for scene, x, y in page.panels:
        _scene(axes, scene, x, y)
    for text in page.texts:
        weight = "bold" if text.strong else "normal"
        axes.text(
            text.x,
            text.y,
            text.text,
            fontsize=text.points,
            fontweight=weight,
            color=_INK,
            va="center",
            parse_math=False,
        )
    for kind, x, y in page.legend:
        _legend_mark(axes, kind, x + 0.1, y)


def _scene(axes: Any, scene: Scene, x: float, y: float) -> None:
    for stroke in scene.strokes:
        _stroke(axes, stroke, x, y)
    for disc in scene.discs:
        _disc(axes, disc, x, y)
    for label in scene.labels:
        left, bottom, right, top = label.box
        axes.text(
            (left + right) / 2 + x,
            (bottom + top) / 2 + y,
            label.text,
            fontsize=LABEL_POINTS,
            color=_COLOURS[label.role],
            ha="center",
            va="center_baseline",
            zorder=6,
            parse_math=False,
            bbox={"boxstyle": "square,pad=0", "facecolor": "white", "linewidth": 0, "alpha": 0.8},
            gid=f"label {label.text}",
        )


def _stroke(axes: Any, stroke: Stroke, x: float, y: float) -> None:
    width = 0.7 + 0.55 * math.log2(min(stroke.size, _THICKEST))
    colour = _LINE if stroke.role is None else _COLOURS[stroke.role]
    path = stroke.path + np.array([x, y])
    axes.plot(*path.T, color=colour, linewidth=width, solid_capstyle="butt", zorder=1 if stroke.role is None else 2)


def _disc(axes: Any, disc: Disc, x: float, y: float) -> None:
    from matplotlib.patches import Circle

    place = (disc.x + x, disc.y + y)
    core = disc.node.core
    if core is None:
        colour = _COLOURS[disc.node.roles[0] if disc.node.roles else None]
        axes.add_patch(Circle(place, disc.radius, facecolor=colour, edgecolor="white", linewidth=0.5, zorder=4))
        return
    square = core.origin == "weight"
    frozen = core.frozen and not square
    fills = [_FILLS[role] for role in disc.node.roles or ("inner",)]
    _core(axes, place, disc.radius, fills, square, frozen, bool(core.shared))
    axes.text(
        *place,
        "\n".join(disc.lines),
        fontsize=disc.points,
        color=_INK,
        ha="center",
        va="center_baseline" if len(disc.lines) == 1 else "center",
        linespacing=1.0,
        zorder=3.8 if frozen else 5,  # its bright ground stays inside the outline
        parse_math=False,
        bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "linewidth": 0, "alpha": 0.85} if frozen else None,
    )


def _core(
    axes: Any, place: tuple[float, float], radius: float, fills: Sequence[str], square: bool, frozen: bool, shared: bool
) -> None:
    """A disc with a sector for each role of its legs; frozen: hatched and dashed; shared: a second outline."""
    from matplotlib.patches import Circle, Rectangle, Wedge

    x, y = place
    outline: dict[str, Any] = {"edgecolor": _INK, "linewidth": 1.0, "zorder": 4}
    if square:
        axes.add_patch(Rectangle((x - radius, y - radius), 2 * radius, 2 * radius, facecolor=_WEIGHT, **outline))
        return
    for number, fill in enumerate(fills):
        first = 90 + 360 * number / len(fills)  # the input's sector lies on the left
        sector = Wedge(place, radius, first, first + 360 / len(fills), facecolor=fill, linewidth=0, zorder=3)
        axes.add_patch(sector)
    if frozen:
        axes.add_patch(
            Circle(place, radius, facecolor="none", edgecolor=_FROZEN, hatch="////", linewidth=0, zorder=3.5)
        )
    style = (0, (3, 2)) if frozen else "solid"
    axes.add_patch(Circle(place, radius, facecolor="none", linestyle=style, **outline))
    if shared:
        axes.add_patch(Circle(place, radius * 0.88, facecolor="none", linestyle=style, **{**outline, "linewidth": 0.7}))


def _legend_mark(axes: Any, kind: str, x: float, y: float) -> None:
    from matplotlib.patches import Circle

    if kind == "dot":
        axes.plot([x - 0.1, x + 0.1], [y, y], color=_LINE, linewidth=1.2, zorder=1)
        axes.add_patch(Circle((x, y), 0.04, facecolor=_INK, linewidth=0, zorder=2))
        return
    _core(axes, (x, y), 0.075, [_FILLS.get(kind, "#ffffff")], kind == "weight", kind == "frozen", kind == "shared")
