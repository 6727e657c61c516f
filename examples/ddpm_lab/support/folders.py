"""Folders of results: made and listed."""

from __future__ import annotations

import os
from pathlib import Path

from ddpm_lab.support.faults import fault, reason

__all__ = ["files_in", "make_folder"]


def make_folder(path: Path) -> None:
    """Make the folder of results; raises LabError where that cannot be, or nothing can be written to it."""
    found = "one that is read-only"
    try:
        path.mkdir(parents=True, exist_ok=True)
        if os.access(path, os.W_OK):
            return
    except OSError as error:
        found = reason(error)
    raise fault(path, "`--out`", "a folder to write to", found, "Choose another.")


def files_in(folder: Path) -> list[str]:
    """The names of what a command leaves in a folder: hidden files, such as its lock, are none of it."""
    return sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
