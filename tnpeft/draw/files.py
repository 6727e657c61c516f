"""Pictures on disk: written atomically, and whether they are current."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from pathlib import Path

from tnpeft.documents.files import replace_files
from tnpeft.errors import DrawError, Problem, clip, need, shown_path
from tnpeft.spec import Declaration

__all__ = ["SUFFIXES", "checked_path", "digest_of", "is_current", "need_matplotlib", "write"]

SUFFIXES = (".svg", ".png", ".pdf")
_IDENTIFIER = re.compile(r"sha256:([0-9a-f]{64})")
_HEAD = 8192  # the metadata stand at the start, or in a PDF at the end


def digest_of(spec: Declaration) -> str:
    """The sha256 of a spec's text."""
    return hashlib.sha256(spec.text.encode()).hexdigest()


def is_current(path: str | Path, spec: Declaration) -> bool:
    """Whether the picture at `path` was drawn from this very spec; false if there is none."""
    try:
        with Path(path).open("rb") as file:
            head = file.read(_HEAD)
            file.seek(max(0, file.seek(0, os.SEEK_END) - _HEAD))
            text = (head + b"\n" + file.read(_HEAD)).decode("utf-8", errors="replace")
    except (OSError, ValueError):
        return False
    found = _IDENTIFIER.search(text)
    return found is not None and found[1] == digest_of(spec)


def need_matplotlib() -> None:
    """Raises DrawError where matplotlib is not installed."""
    need("matplotlib", "pictures", DrawError)


def checked_path(path: str | Path) -> Path:
    """The path. Raises DrawError if its suffix is none of .svg, .png and .pdf."""
    checked = Path(path)
    if checked.suffix.lower() not in SUFFIXES:
        found = clip(checked.suffix) if checked.suffix else "no suffix"
        fix = "Name the file like `picture.svg`."
        raise DrawError(
            Problem(
                "picture", f"a name in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}", found, fix, shown_path(checked)
            )
        )
    return checked


def write(path: Path, data: bytes) -> None:
    """Write one file atomically: `path` is what it was, or complete. Raises DrawError."""
    replace_files({path: data}, _unwritten)


def _unwritten(path: Path, reason: str) -> DrawError:
    fix = "Choose a folder that exists and can be written to."
    # A reason that the system does not have comes from Python, which refuses some characters in names.
    names = os.strerror(errno.ENAMETOOLONG), os.strerror(errno.EINVAL)
    if reason in names or reason not in map(os.strerror, errno.errorcode):
        fix = "Choose a shorter name of plain characters."
    return DrawError(Problem("picture", "to be written", reason, fix, shown_path(path)))
