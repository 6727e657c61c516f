"""A page as SVG, PNG or PDF, by matplotlib's objects: no pyplot, no global state."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from tnpeft.draw.derivation import ABOVE, MAP_POINTS, Arrow
from tnpeft.draw.labels import Box
from tnpeft.draw.page import Page
from tnpeft.draw.scene import LABEL_POINTS
from tnpeft.draw.shapes import THICKEST, Disc, Scene, Stroke
from tnpeft.draw.text import FONT, text_size

__all__ = ["draw_page", "figure_of", "figure_settings", "rendered"]

# Tints of Okabe and Ito's colours, which stay apart for every kind of colour vision; lines have the full colour.
_FILLS = {"in": "#b3d9f2", "out": "#f9d9a4", "kernel": "#a8dccb", "inner": "#ffffff"}
_COLOURS = {"in": "#0072b2", "out": "#b85400", "kernel": "#007a58", "inner": "#404040", None: "#404040"}
_INK, _LINE, _FROZEN, _WEIGHT, _FRAME = "#1a1a1a", "#707070", "#8a8a8a", "#d9d9d9", "#c4c4c4"
_DPI, _MOST_PIXELS = 200, 6_000


def rendered(page: Page, suffix: str, title: str, digest: str) -> bytes:
    """The file's bytes: the same page gives the same bytes in every process.

    `digest` goes into the metadata as `sha256:...`.
    """
    with figure_settings():
        file = io.BytesIO()
        dpi = min(_DPI, _MOST_PIXELS / max(page.width, page.height))
        figure_of(page).savefig(file, format=suffix, dpi=dpi, metadata=_metadata(suffix, title, digest))
    return file.getvalue()


def figure_of(page: Page) -> Any:
    """The page as a matplotlib figure, with inches as units."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(page.width, page.height), facecolor="white")
    FigureCanvasAgg(figure)
    draw_page(figure, page)
    return figure


@contextmanager
def figure_settings() -> Iterator[None]:
    """Inside, matplotlib has tnpeft's settings, not the user's, and does not warn of letters that a font lacks."""
    import matplotlib

    mine = {
        "svg.hashsalt": "tnpeft",
        "svg.fonttype": "none",
        "pdf.fonttype": 42,
        "font.family": [FONT],
        "hatch.linewidth": 0.6,
    }
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if key.split(".")[0] in _USED}
    with matplotlib.rc_context({**defaults, **mine}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield


# What a user's own settings could change in a picture.
_USED = ("font", "text", "svg", "pdf", "patch", "hatch", "lines", "path", "savefig", "figure", "axes", "mathtext")


def _metadata(suffix: str, title: str, digest: str) -> dict[str, str | None]:
    if suffix == "svg":
        return {"Title": title, "Identifier": f"sha256:{digest}", "Creator": "tnpeft", "Date": None}
    if suffix == "pdf":  # for LaTeX: text stays text, in a font of the file
        return {
            "Title": title,
            "Keywords": f"sha256:{digest}",
            "Creator": "tnpeft",
            "Producer": None,
            "CreationDate": None,
        }
    return {"Title": title, "Description": f"sha256:{digest}", "Software": "tnpeft"}


def draw_page(figure: Any, page: Page, y: float = 0.0) -> None:
    """A page on a figure, `y` inches above its lower edge."""
    sheet = _Sheet(figure, y)
    for scene, left, bottom in page.panels:
        _scene(sheet, scene, left, bottom)
    for text in page.texts:
        weight = "bold" if text.strong else "normal"
        sheet.write(text.x, text.y, text.text, fontsize=text.points, fontweight=weight, color=_INK, va="center")
    for frame in page.frames:
        _frame(sheet, frame)
    for arrow, left, middle in page.arrows:
        _arrow(sheet, arrow, left, middle)
    for kind, left, middle in page.legend:
        _legend_mark(sheet, kind, left + 0.1, middle)


class _Sheet:
    """A figure in inches. Axes would take half of the time, and clip what never reaches their edge."""

    def __init__(self, figure: Any, y: float) -> None:
        from matplotlib.transforms import Affine2D

        self._figure = figure
        self._inches = Affine2D().translate(0, y) + figure.dpi_scale_trans

    def add(self, artist: Any) -> Any:
        artist.set_transform(self._inches)
        return self._figure.add_artist(artist)

    def line(self, xs: Any, ys: Any, **style: Any) -> None:
        from matplotlib.lines import Line2D

        self.add(Line2D(xs, ys, **style))

    def write(self, x: float, y: float, text: str, **style: Any) -> None:
        from matplotlib.text import Text

        self.add(Text(x, y, text, parse_math=False, **style))


def _scene(sheet: _Sheet, scene: Scene, x: float, y: float) -> None:
    from matplotlib.patches import Rectangle

    for stroke in scene.strokes:
        _stroke(sheet, stroke, x, y)
    for disc in scene.discs:
        _disc(sheet, disc, x, y)
    for label in scene.labels:
        left, bottom, right, top = label.box
        ground: dict[str, Any] = {"facecolor": "white", "linewidth": 0, "alpha": 0.8, "zorder": 5.5}
        sheet.add(Rectangle((left + x, bottom + y), right - left, top - bottom, **ground))
        sheet.write(
            (left + right) / 2 + x,
            (bottom + top) / 2 + y,
            label.text,
            fontsize=LABEL_POINTS,
            color=_COLOURS[label.role],
            ha="center",
            va="center_baseline",
            zorder=6,
            gid=f"label {label.text}",
        )


def _stroke(sheet: _Sheet, stroke: Stroke, x: float, y: float) -> None:
    width = 0.7 + 0.55 * math.log2(min(stroke.size, THICKEST))
    colour = _LINE if stroke.role in (None, "inner") else _COLOURS[stroke.role]
    xs, ys = (stroke.thinned + np.array([x, y])).T
    zorder = 1 if stroke.role is None else 2
    sheet.line(xs, ys, color=colour, linewidth=width, solid_capstyle="butt", zorder=zorder)


def _disc(sheet: _Sheet, disc: Disc, x: float, y: float) -> None:
    from matplotlib.patches import Circle

    place = (disc.x + x, disc.y + y)
    core = disc.node.core
    if core is None:
        colour = _COLOURS[disc.node.roles[0] if disc.node.roles else None]
        sheet.add(Circle(place, disc.radius, facecolor=colour, edgecolor="white", linewidth=0.5, zorder=4))
        return
    square = core.origin == "weight"
    frozen = core.frozen and not square
    fills = [_FILLS[role] for role in disc.node.roles or ("inner",)]
    _core(sheet, place, disc.radius, fills, square, frozen, bool(core.shared), disc.node.derived)
    sheet.write(
        *place,
        "\n".join(disc.lines),
        fontsize=disc.points,
        color=_INK,
        ha="center",
        va="center_baseline" if len(disc.lines) == 1 else "center",
        linespacing=1.0,
        zorder=3.8 if frozen else 5,  # its bright ground stays inside the outline
        bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "linewidth": 0, "alpha": 0.85} if frozen else None,
    )


def _core(
    sheet: _Sheet,
    place: tuple[float, float],
    radius: float,
    fills: Sequence[str],
    square: bool,
    frozen: bool,
    shared: bool,
    derived: bool = False,
) -> None:
    """A disc with a sector for each role of its legs; derived: a hexagon.

    Frozen: hatched and dashed; shared: a second outline.
    """
    from matplotlib.patches import Rectangle, Wedge

    x, y = place
    outline: dict[str, Any] = {"edgecolor": _INK, "linewidth": 1.0, "zorder": 4}
    if square:
        sheet.add(Rectangle((x - radius, y - radius), 2 * radius, 2 * radius, facecolor=_WEIGHT, **outline))
        return
    if derived:
        hexagon = sheet.add(_shape(place, radius, derived, facecolor="none", linewidth=0, zorder=3))
    for number, fill in enumerate(fills):
        first = 90 + 360 * number / len(fills)  # the input's sector lies on the left
        reach = radius / _FLAT if derived else radius
        sector = Wedge(place, reach, first, first + 360 / len(fills), facecolor=fill, linewidth=0, zorder=3)
        sheet.add(sector)
        if derived:
            sector.set_clip_path(hexagon)
    if frozen:
        sheet.add(
            _shape(place, radius, derived, facecolor="none", edgecolor=_FROZEN, hatch="////", linewidth=0, zorder=3.5)
        )
    style = (0, (3, 2)) if frozen else "solid"
    sheet.add(_shape(place, radius, derived, facecolor="none", linestyle=style, **outline))
    if shared:
        inner = {**outline, "linewidth": 0.7}
        sheet.add(_shape(place, radius * 0.88, derived, facecolor="none", linestyle=style, **inner))


_FLAT = math.cos(math.pi / 6)  # of a hexagon: from the middle to a side, against to a corner


def _shape(place: tuple[float, float], radius: float, derived: bool, **style: Any) -> Any:
    """A circle, or the hexagon about it."""
    from matplotlib.patches import Circle, RegularPolygon

    if derived:
        return RegularPolygon(place, 6, radius=radius / _FLAT, orientation=math.pi / 6, **style)
    return Circle(place, radius, **style)


def _frame(sheet: _Sheet, frame: Box) -> None:
    """A faint line about the panels of a derived core."""
    from matplotlib.patches import Rectangle

    left, bottom, right, top = frame
    sheet.add(
        Rectangle(
            (left, bottom), right - left, top - bottom, facecolor="none", edgecolor=_FRAME, linewidth=0.7, zorder=0
        )
    )


def _arrow(sheet: _Sheet, arrow: Arrow, x: float, y: float) -> None:
    """The maps stand above it, the first on top; the index cores that they read below."""
    from matplotlib.patches import FancyArrowPatch

    end, line = x + arrow.width, text_size("x", MAP_POINTS)[1]
    style: dict[str, Any] = {
        "arrowstyle": "-|>",
        "mutation_scale": 10,
        "color": _INK,
        "linewidth": 1.0,
        "shrinkA": 0,
        "shrinkB": 0,
    }
    sheet.add(FancyArrowPatch((x, y), (end, y), **style, zorder=2))
    middle = (x + end) / 2
    words: dict[str, Any] = {"fontsize": MAP_POINTS, "color": _INK, "ha": "center", "va": "center"}
    for number, word in enumerate(reversed(arrow.maps)):
        sheet.write(middle, y + ABOVE + line * (number + 0.5), word, **words)
    for number, word in enumerate(arrow.indices):
        below = y - 2 * ABOVE - (line + ABOVE) * (number + 0.5)
        sheet.write(middle, below, word, bbox=_INDEX, zorder=5, **words)
        sheet.line([middle, middle], [y, below], color=_LINE, linewidth=0.8, linestyle=":", zorder=1)


_INDEX = {"boxstyle": "round,pad=0.2", "facecolor": "#ececec", "edgecolor": _INK, "linewidth": 0.7}


def _legend_mark(sheet: _Sheet, kind: str, x: float, y: float) -> None:
    from matplotlib.patches import Circle, Rectangle

    if kind == "dot":
        sheet.line([x - 0.1, x + 0.1], [y, y], color=_LINE, linewidth=1.2, zorder=1)
        sheet.add(Circle((x, y), 0.04, facecolor=_COLOURS[None], edgecolor="white", linewidth=0.5, zorder=2))
        return
    if kind == "line":
        for below, height in ((0.04, 0.017), (-0.06, 0.055)):
            sheet.add(Rectangle((x - 0.1, y + below), 0.2, height, facecolor=_LINE, linewidth=0))
        return
    if kind == "index":
        face: dict[str, Any] = {"facecolor": _INDEX["facecolor"], "edgecolor": _INK, "linewidth": 0.7}
        sheet.add(Rectangle((x - 0.08, y - 0.05), 0.16, 0.1, **face))
        return
    fill = _FILLS.get(kind, "#ffffff")
    derived = kind == "derived"
    _core(sheet, (x, y), 0.075, [fill], kind == "weight", kind == "frozen", kind == "shared", derived)
