"""Watching files for changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tnpeft.documents.paths import is_folder

__all__ = ["changes"]

_PAUSE = 0.2  # seconds between two looks
_SUFFIXES = (".yaml", ".yml")

State = dict[str, tuple[int, int, int]]


def changes(paths: Iterable[str], pause: Callable[[], None] = lambda: time.sleep(_PAUSE)) -> Iterator[frozenset[str]]:
    """The paths, at first all, then each time those that changed, came or went; of folders the YAML files below them.

    A file that is being written is told of when it rests for one look, so that nobody reads half of it.
    """
    named = tuple(paths)
    told = before = _state(named)
    yield frozenset(told) | frozenset(named)
    while True:
        pause()
        now = _state(named)
        if now == before != told:
            yield frozenset(path for path in now.keys() | told.keys() if now.get(path) != told.get(path))
            told = now
        before = now


def _state(paths: Iterable[str]) -> State:
    """When each file was written last, how long it is, and which file it is."""
    state: State = {}
    for path in paths:
        files = (
            sorted(file for file in Path(path).rglob("*") if file.suffix in _SUFFIXES) if is_folder(path) else [path]
        )
        for file in files:
            try:
                found = Path(file).stat()
            except (OSError, ValueError):
                continue
            state[str(file)] = (found.st_mtime_ns, found.st_size, found.st_ino)
    return state
