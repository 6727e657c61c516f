"""Folders of results: made, listed, and JSON written to them whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddpm_lab.support.faults import fault, reason

__all__ = ["files_in", "make_folder", "write_json"]


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


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write data whole or not at all; raises LabError where the disk is full or the place cannot be written."""
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        fix = "Free space, or choose another `--out`."
        raise fault(path, "a file of results", "a place to write it", reason(error), fix) from None
