"""The pictures of a run: curves and a montage of volumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ddpm_lab.data.slices import CONVENTION, PLANES, draw_slice, middle_slices, wrapped
from ddpm_lab.model.diffusion import HeldOutError
from ddpm_lab.training.train import History

__all__ = ["Curve", "plot_curves", "plot_montage", "smooth"]

INK, PAPER, GRID = "#1f2933", "#ffffff", "#d9dee4"
DARK, LIGHT = "#0e1116", "#e6e9ed"
COLOURS = ("#0b6e99", "#d9822b", "#8f99a3", "#5b8c5a", "#9b4f96")
STYLE = {
    "font.size": 10,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
}


@dataclass(frozen=True)
class Curve:
    """One training run in a picture; `before` and `after` are its held-out errors."""

    name: str
    history: History
    before: HeldOutError
    after: HeldOutError

    @property
    def change(self) -> float:
        return self.after.change(self.before)


def plot_curves(path: Path, curves: Sequence[Curve], pretraining: History | None, title: str) -> None:
    """Training losses, held-out errors over the steps, and held-out errors by timestep; the first curve is the run."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(15, 4.4), dpi=140, layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1))
        _losses(left, curves[0], pretraining)
        _held_out(middle, curves)
        _buckets(right, curves[0])
        figure.suptitle(title, x=0.008, ha="left", fontsize=12, color=INK)
        figure.savefig(path)


def _losses(axes: Any, curve: Curve, pretraining: History | None) -> None:
    offset = 0
    runs = [("pretraining on the source", pretraining, COLOURS[2])] if pretraining is not None else []
    for name, history, colour in [*runs, (curve.name, curve.history, COLOURS[0])]:
        steps = [offset + step for step in range(1, len(history.losses) + 1)]
        axes.plot(steps, history.losses, color=colour, alpha=0.25, linewidth=0.7)
        axes.plot(steps, smooth(history.losses), color=colour, linewidth=1.8, label=name)
        offset += len(history.losses)
    axes.set(title="Training loss", xlabel="optimiser step", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend()


def smooth(values: Sequence[float], share: float = 0.94) -> list[float]:
    """An exponential moving average that starts unbiased."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = share * total + (1 - share) * value, share * weight + 1 - share
        out.append(total / weight)
    return out


def _held_out(axes: Any, curves: Sequence[Curve]) -> None:
    for curve, colour in zip(curves, COLOURS, strict=False):
        points = [(0, curve.before), *curve.history.validation, (len(curve.history.losses), curve.after)]
        label = f"{curve.name}  {curve.change:+.1f} %"
        axes.plot(
            [step for step, _ in points],
            [error.mean for _, error in points],
            color=colour,
            marker="o",
            markersize=4,
            linewidth=1.8,
            label=label,
        )
    axes.axhline(curves[0].before.mean, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set(title="Error on held-out target volumes", xlabel="optimiser step", ylim=(0, None))
    axes.legend(loc="lower left")


def _buckets(axes: Any, curve: Curve) -> None:
    count = len(curve.before.buckets)
    places = torch.arange(count).tolist()
    for shift, name, error, colour in (
        (-0.21, "base", curve.before, COLOURS[2]),
        (0.21, curve.name, curve.after, COLOURS[0]),
    ):
        axes.bar([place + shift for place in places], error.buckets, width=0.4, color=colour, label=name)
    axes.set(title="The same, by timestep", xlabel="timestep (0: clean, right: noise)")
    axes.set_xticks([place - 0.5 for place in places], [f"{place / count:.0%}" for place in places])
    axes.grid(visible=False, axis="x")
    axes.legend()


def plot_montage(
    path: Path,
    rows: Mapping[str, torch.Tensor],
    intensity: tuple[float, float],
    title: str,
    columns: int = 8,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> None:
    """Three planes of the first volumes of each row; a row is (N, 1, D, H, W), axes R, A, S, and may be shorter."""
    columns = min(columns, max(len(volumes) for volumes in rows.values()))
    cell, gap, label, edge = 1.3, 0.2, 1.75, 0.12  # inches
    width = max(label + columns * cell + edge, 5.2)
    texts = [(wrapped(title, width - 2 * edge, 12), 12), (wrapped(CONVENTION, width - 2 * edge, 9), 9)]
    heights = [size * 1.5 / 72 * (text.count("\n") + 1) for text, size in texts]
    head = sum(heights) + 2 * edge
    height = head + len(rows) * (len(PLANES) * cell + gap)
    with matplotlib.rc_context({"font.size": 11, "text.color": LIGHT}):
        figure = Figure(figsize=(width, height), dpi=140, facecolor=DARK)
        place = height - edge
        for (text, size), own in zip(texts, heights, strict=True):
            figure.text(edge / width, place / height, text, fontsize=size, va="top", linespacing=1.3)
            place -= own
        for number, (name, volumes) in enumerate(rows.items()):
            top = height - head - number * (len(PLANES) * cell + gap)
            middle = (top - len(PLANES) * cell / 2) / height
            figure.text(edge / width, middle, wrapped(name, label - 0.4, 11), va="center", linespacing=1.4)
            for line, plane in enumerate(PLANES):
                spot = ((label - 0.12) / width, (top - (line + 0.5) * cell) / height)
                figure.text(*spot, plane, fontsize=8, rotation=90, ha="center", va="center")
            for column, volume in enumerate(volumes[:columns]):
                for line, piece in enumerate(middle_slices(volume[0], spacing)):
                    corner = ((label + column * cell) / width, (top - (line + 1) * cell) / height)
                    axes = figure.add_axes((*corner, 0.98 * cell / width, 0.98 * cell / height))
                    draw_slice(axes, piece, *intensity)
        figure.savefig(path, facecolor=DARK)
