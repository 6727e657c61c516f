"""Texts of users as paths: whatever the text, there is a file of that name or there is none.

`Path.is_file` and similar methods raise for names that no file can have: too long, with NUL, or with half a surrogate
pair. `Path.resolve` raises for circular links.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

__all__ = ["is_file", "is_folder", "is_there", "resolved"]


def is_file(path: str | Path) -> bool:
    """Whether a path leads to an ordinary file, through links."""
    return stat.S_ISREG(_mode(path))


def is_folder(path: str | Path) -> bool:
    """Whether a path leads to a folder, through links."""
    return stat.S_ISDIR(_mode(path))


def is_there(path: str | Path) -> bool:
    """Whether a path leads to anything, through links."""
    return _mode(path) != 0


def resolved(path: str | Path) -> Path:
    """The absolute path with links followed, as far as they lead somewhere."""
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError):
        return Path(path)


def _mode(path: str | Path) -> int:
    """The file mode of a path; 0 if nothing is there, or nothing can be."""
    try:
        return os.stat(path).st_mode  # noqa: PTH116 - `Path(path)` refuses NUL in its own way
    except (OSError, ValueError):
        return 0
