"""How much room a text takes, and how a name fits into a disc."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache

__all__ = ["FONT", "clean", "fitted", "text_size", "wrapped"]

FONT = "DejaVu Sans"  # matplotlib's own
_LARGEST, _SMALLEST = 8.5, 4.5  # points
_MOST_LINES, _LEADING = 3, 1.15
_POINTS = 72.0  # in an inch


@lru_cache(maxsize=4096)
def text_size(text: str, points: float, strong: bool = False) -> tuple[float, float]:
    """Width and height in inches, as matplotlib sets its own font."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family=FONT, size=points, weight="bold" if strong else "normal")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a letter that the font lacks
        width, _, _ = text_to_path.get_text_width_height_descent(text, font, False)
    return float(width) / _POINTS, _LEADING * points / _POINTS


def clean(text: str, most: int) -> str:
    """The text with at most `most` characters, all printable; if it is longer, its middle is left out."""
    short = text if len(text) <= most else f"{text[: most * 2 // 3]}…{text[-(most // 3 - 1) :]}"
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in short)


def wrapped(text: str, points: float, width: float, strong: bool = False) -> list[str]:
    """`text` in lines of at most `width` inches; a longer word has a line of its own."""
    lines: list[str] = []
    for word in text.split():
        if lines and text_size(f"{lines[-1]} {word}", points, strong)[0] <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def fitted(name: str, marks: Sequence[str], radius: float) -> tuple[list[str], float]:
    """A core's name in lines, its marks below, and the largest font size at which they fit inside a disc.

    A name breaks after underscores, or anywhere if that is not enough; a name that is still too long is cut.
    """
    points = _LARGEST
    while points >= _SMALLEST:
        for lines in _breaks(name):
            if _inside([*lines, *marks], points, radius):
                return [*lines, *marks], points
        points -= 0.5
    short = clean(name, 24)
    third = math.ceil(len(short) / _MOST_LINES)
    return [*(short[at : at + third] for at in range(0, len(short), third)), *marks], _SMALLEST


def _breaks(name: str) -> list[list[str]]:
    """The name whole, then in two and three parts at its underscores, the most even first."""
    words = [f"{word}_" for word in name.split("_")]
    words[-1] = words[-1][:-1]
    cuts = [[cut] for cut in range(1, len(words))]
    cuts += [[one, two] for one in range(1, len(words)) for two in range(one + 1, len(words))]
    parts = [["".join(words[a:b]) for a, b in zip([0, *cut], [*cut, len(words)], strict=True)] for cut in cuts[:200]]
    return [[name], *sorted(parts, key=lambda found: (len(found), max(map(len, found))))]


def _inside(lines: Sequence[str], points: float, radius: float) -> bool:
    """Whether lines about the middle of a disc keep within it."""
    for number, line in enumerate(lines):
        width, height = text_size(line, points)
        middle = abs(number - (len(lines) - 1) / 2) * height
        if math.hypot(width / 2, middle + height * 0.35) > radius * 0.95:
            return False
    return True
