"""The pictures of a report: loss curves, Figure 4's two plots and a montage of samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from ddpm_lab.data.slices import PLANES, draw_slice, middle_slices, wrapped
from ddpm_lab.training.plots import DARK, LIGHT, smooth

__all__ = ["DARK_THEME", "LIGHT_THEME", "Line", "Panel", "Theme", "plot_montage_page", "plot_panels"]


@dataclass(frozen=True)
class Theme:
    """The colours of a chart; `lines` can be told apart by those who see fewer colours (Okabe and Ito)."""

    ink: str
    soft: str
    paper: str
    grid: str
    lines: tuple[str, ...]


LIGHT_THEME = Theme(
    ink="#1f2933",
    soft="#52606d",
    paper="#ffffff",
    grid="#e4e8ec",
    lines=("#0072b2", "#d55e00", "#009e73", "#a8508a", "#b38600", "#3b9bd1", "#5f6b76", "#7a4a1e"),
)
DARK_THEME = Theme(
    ink="#e6e9ed",
    soft="#a9b4bf",
    paper="#161b22",
    grid="#2d343d",
    lines=("#56b4e9", "#ff8a3d", "#2fc79b", "#e39ac8", "#f0c419", "#9ad1f5", "#a9b4bf", "#d0a077"),
)
LEAST = 7.6  # points of the smallest letters: more than ten pixels
NARROW = 3.65  # inches that a phone shows without making them smaller
STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))


@dataclass(frozen=True)
class Line:
    """One curve: its name, its points, and what lies around them (half of an interval, or none)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    half: Sequence[float] | None = None
    faint: Sequence[float] | None = None  # drawn thin behind it: what `y` smooths
    colour: int = 0  # the same for a method in all panels
    dots: bool = False  # points that no line joins
    names: Sequence[str] = ()  # of the points, written beside them


@dataclass(frozen=True)
class Panel:
    """One plot with its lines, each named where it ends."""

    title: str
    xlabel: str
    lines: Sequence[Line]
    log: bool = False
    marks: bool = False  # a dot at each point
    ticks: Sequence[float] | None = None
    zero: bool = False  # the axis begins at zero
    labels: bool = True
    sizes: bool = False  # `x` are sizes over several powers of ten, and zero
    format: str = "{x:g}"
    log_x: bool = False


def plot_panels(
    path: Path, panels: Sequence[Panel], theme: Theme = LIGHT_THEME, share: bool = False, narrow: bool = False
) -> None:
    """Panels two in a row, for a narrow screen one; `share` gives all of them one vertical axis."""
    across = 1 if narrow else min(2, len(panels))
    down = math.ceil(len(panels) / across)
    size = (NARROW, 3.2 * down) if narrow else (4.9 * across + 1.2, 4.3 * down)
    with matplotlib.rc_context(_style(theme)):
        figure = Figure(figsize=size, dpi=144, layout="constrained")
        axes = figure.subplots(down, across, squeeze=False, sharey=share).flatten()
        for each in axes[len(panels) :]:
            each.set_visible(False)
        for each, panel in zip(axes, panels, strict=False):
            _draw(each, panel, theme)
        for each, panel in zip(axes, panels, strict=False):
            if panel.labels:
                _label_ends(each, panel, theme)  # once all axes have their final range
        figure.savefig(path)


def _style(theme: Theme) -> dict[str, Any]:
    return {
        "font.size": 10,
        "text.color": theme.ink,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.grid,
        "axes.labelcolor": theme.soft,
        "axes.titlecolor": theme.ink,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlepad": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "xtick.color": theme.soft,
        "ytick.color": theme.soft,
        "ytick.left": False,
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
    }


def _draw(axes: Any, panel: Panel, theme: Theme) -> None:
    axes.set(title=panel.title, xlabel=panel.xlabel)
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
    axes.yaxis.set_major_formatter(panel.format)
    for line in panel.lines:
        colour = theme.lines[line.colour % len(theme.lines)]
        style = STYLES[line.colour // 2 % len(STYLES)] if not panel.marks else "-"
        if line.faint is not None:
            axes.plot(line.x, line.faint, color=colour, alpha=0.22, linewidth=0.7)
        if line.half is not None:
            low, high = np.subtract(line.y, line.half), np.add(line.y, line.half)
            axes.fill_between(line.x, low, high, color=colour, alpha=0.15, linewidth=0)
        mark = "o" if panel.marks else None
        width, size = (0, 3.5) if line.dots else (2, 5)
        axes.plot(line.x, line.y, color=colour, linewidth=width, linestyle=style, marker=mark, markersize=size)
        for x, y, name in zip(line.x, line.y, line.names, strict=False):
            axes.annotate(name, (x, y), (4, -9), textcoords="offset points", color=colour, fontsize=7)
    if panel.log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    elif panel.sizes:
        axes.set_xscale("symlog", linthresh=0.1, linscale=0.5)
        axes.xaxis.set_major_formatter("{x:g}")
    elif panel.ticks is not None:
        axes.set_xticks(list(panel.ticks))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    if panel.zero:
        axes.set_ylim(0, None)


def _label_ends(axes: Any, panel: Panel, theme: Theme) -> None:
    """Each line's name at its end, moved up or down where names would lie on each other."""
    lines = [line for line in panel.lines if len(line.y)]
    if not lines:
        return
    low, high = axes.get_ylim()

    def place(value: float) -> float:  # the share of the axis' height
        if panel.log:
            return math.log(max(value, low) / low) / math.log(high / low)
        return float((value - low) / (high - low))

    order = sorted(lines, key=lambda line: line.y[-1])
    places = spread([place(line.y[-1]) for line in order], 0.068)
    right = max(max(line.x) for line in lines)
    for line, height in zip(order, places, strict=True):
        colour = theme.lines[line.colour % len(theme.lines)]
        axes.annotate(
            line.name,
            xy=(right, height),
            xycoords=("data", "axes fraction"),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=9,
            annotation_clip=False,
        )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Rising places, moved as little as that goes so that neighbours are `gap` apart."""
    clusters: list[list[float]] = []  # the places of each, which then stand around their mean
    for place in places:
        clusters.append([place])
        while len(clusters) > 1 and _start(clusters[-1], gap) < _end(clusters[-2], gap) + gap - 1e-12:
            last = clusters.pop()
            clusters[-1] += last
    return [_start(cluster, gap) + gap * number for cluster in clusters for number in range(len(cluster))]


def _start(cluster: Sequence[float], gap: float) -> float:
    return sum(cluster) / len(cluster) - gap * (len(cluster) - 1) / 2


def _end(cluster: Sequence[float], gap: float) -> float:
    return _start(cluster, gap) + gap * (len(cluster) - 1)


def smoothed(name: str, losses: Sequence[float], colour: int) -> Line:
    """A training loss over its steps, smoothed before what it was."""
    return Line(name, range(1, len(losses) + 1), smooth(losses), faint=losses, colour=colour)


def plot_montage_page(
    path: Path,
    rows: Sequence[str],
    columns: Sequence[str],
    volumes: Mapping[tuple[str, str], Sequence[np.ndarray]],
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    narrow: bool = False,
) -> None:
    """As the paper's Figure 3: a row for each method, some samples of each data set; `CONVENTION` says how.

    `volumes` maps (row, column) to volumes in [0, 1], axes R, A, S; what is missing stays dark. On a narrow screen data
    sets stand below each other, and a row's name above it.
    """
    each = max((len(found) for found in volumes.values()), default=1)
    label, gap, group, head = (0.35, 0.36, 0.0, 0.5) if narrow else (1.75, 0.12, 0.28, 0.55)  # inches
    cell = (NARROW - label - 0.1) / each if narrow else 0.95
    across = 1 if narrow else len(columns)
    block = head + len(rows) * (len(PLANES) * cell + gap)
    width = label + across * each * cell + (across - 1) * group + 0.15
    height = block * math.ceil(len(columns) / across) + 0.1
    with matplotlib.rc_context({"font.size": 10, "text.color": LIGHT}):
        figure = Figure(figsize=(width, height), dpi=144, facecolor=DARK)
        for place, column in enumerate(columns):
            left = label + place % across * (each * cell + group)
            start = height - place // across * block
            name = wrapped(column, each * cell, 11)
            figure.text(left / width, (start - 0.5 * head) / height, name, fontsize=11, weight="bold", va="center")
            for number, row in enumerate(rows):
                top = start - head - number * (len(PLANES) * cell + gap) - gap * narrow
                if narrow:
                    figure.text(left / width, (top + 0.1) / height, row, va="center")
                elif place == 0:
                    middle = (top - len(PLANES) * cell / 2) / height
                    figure.text(0.12 / width, middle, wrapped(row, label - 0.5, 10), va="center", linespacing=1.35)
                for line, plane in enumerate(PLANES if place % across == 0 else ()):
                    spot = ((left - 0.14) / width, (top - (line + 0.5) * cell) / height)
                    figure.text(*spot, plane, fontsize=LEAST, rotation=90, ha="center", va="center")
                for index, volume in enumerate(volumes.get((row, column), ())):
                    for line, piece in enumerate(middle_slices(volume, spacing)):
                        corner = ((left + index * cell) / width, (top - (line + 1) * cell) / height)
                        axes = figure.add_axes((*corner, 0.97 * cell / width, 0.97 * cell / height))
                        draw_slice(axes, piece, 0, 1, size=LEAST)
        figure.savefig(path, facecolor=DARK)
