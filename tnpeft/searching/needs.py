"""What a search needs before it begins, and how its files are written."""

from __future__ import annotations

from pathlib import Path

from tnpeft.documents.files import replace_files
from tnpeft.documents.paths import is_folder
from tnpeft.errors import Problem, TnpeftError, clip, need, shown_path

__all__ = ["check_target", "need_optuna", "unwritten", "write"]


def need_optuna() -> None:
    """Raises TnpeftError where Optuna is not installed."""
    need("optuna", "search")


def check_target(path: Path) -> None:
    """Raises TnpeftError, before the search runs, for a path that no spec can be written to."""
    fix = "For example -o found.yaml."
    if path.suffix not in (".yaml", ".yml"):
        raise TnpeftError(Problem("--output", "a name in .yaml", clip(path.name), fix))
    if is_folder(path) or not is_folder(path.parent):
        found = "a folder" if is_folder(path) else f"no folder '{shown_path(path.parent)}'"
        raise TnpeftError(Problem("--output", "a file name in a folder that exists", found, fix))


def write(path: Path, text: str) -> None:
    """Write a text file, whole or not at all. Raises TnpeftError."""
    replace_files({path: text.encode()}, unwritten)


def unwritten(path: Path, reason: str) -> TnpeftError:
    """The error for a file that could not be written."""
    fix = "Choose a folder that exists and can be written to."
    return TnpeftError(Problem("search", "to be written", reason, fix, shown_path(path)))
