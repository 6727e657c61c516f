"""The middle slices of a volume as radiologists look at them: three planes in their convention, with letters."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["CONVENTION", "PLANES", "Slice", "draw_slice", "middle_slices", "wrapped"]

PLANES = ("axial", "coronal", "sagittal")
CONVENTION = (
    "Middle axial, coronal and sagittal slices in radiological convention: the patient's right, or front, is on the "
    "left. Voxels are drawn as they are, without interpolation."
)
LETTER = "#ffd166"
EDGES = {"left": (0.02, 0.5), "right": (0.98, 0.5), "top": (0.5, 0.98), "bottom": (0.5, 0.02)}


@dataclass(frozen=True)
class Slice:
    """One plane: `pixels` row by row from the top, what lies at the four edges, and a pixel's height by its width."""

    pixels: np.ndarray[Any, Any]
    left: str
    right: str
    top: str
    bottom: str
    aspect: float


def middle_slices(volume: Any, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> tuple[Slice, Slice, Slice]:
    """Axial, coronal and sagittal, of a volume whose axes run to R, A and S; `spacing` is the size of its voxels."""
    voxels = np.asarray(volume)
    right, anterior, superior = (size // 2 for size in voxels.shape)
    wide, deep, high = spacing
    # What lies first along an axis is drawn last, so that R, A and S are on the left and at the top.
    axial, coronal, sagittal = (
        plane[::-1, ::-1].T for plane in (voxels[:, :, superior], voxels[:, anterior], voxels[right])
    )
    return (
        Slice(axial, "R", "L", "A", "P", deep / wide),
        Slice(coronal, "R", "L", "S", "I", high / wide),
        Slice(sagittal, "A", "P", "S", "I", high / deep),
    )


def draw_slice(axes: Any, piece: Slice, low: float, high: float, size: float = 6.5) -> None:
    """Draw it in grey from `low`, black, to `high`, white, with its letters of `size` points."""
    axes.imshow(piece.pixels, cmap="gray", vmin=low, vmax=high, interpolation="nearest", aspect=piece.aspect)
    for edge, (x, y) in EDGES.items():
        across = edge if edge in ("left", "right") else "center"
        along = edge if edge in ("top", "bottom") else "center"
        letter = getattr(piece, edge)
        axes.text(x, y, letter, transform=axes.transAxes, ha=across, va=along, fontsize=size, color=LETTER)
    axes.set_axis_off()


def wrapped(text: str, inches: float, size: float) -> str:
    """A text of letters of `size` points on lines that are at most so long."""
    return textwrap.fill(text, max(8, int(inches * 72 / (0.56 * size))), break_on_hyphens=False)
