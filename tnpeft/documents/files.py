"""Files written whole or not at all, with the permissions that they had."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

__all__ = ["replace_files", "sync_folder"]


def replace_files(contents: Mapping[Path, bytes], failed: Callable[[Path, str], Exception]) -> None:
    """Write each file beside its place, then move all of them there, the last one last.

    After a crash at any moment a path is what it was, or complete. A link is written through. A file that was there
    keeps its permissions, and its owner and group where they can be given; a new one gets those of the process.
    Raises `failed(path, reason)`, leaving no temporary file.
    """
    waiting: dict[Path, Path] = {}
    path = next(iter(contents))
    try:
        try:
            for path, data in contents.items():
                target = Path(os.path.realpath(path))  # through a link, not over it
                temporary = target.with_name(f".{target.name[:40]}.{secrets.token_hex(4)}.tmp")
                waiting[temporary] = target
                with _opened(temporary, target) as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            for temporary, target in waiting.items():
                temporary.replace(target)
            for folder in {target.parent for target in waiting.values()}:
                sync_folder(folder)
        finally:
            for temporary in waiting:
                temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise failed(path, getattr(error, "strerror", None) or str(error)) from error


def _opened(temporary: Path, target: Path) -> BinaryIO:
    """A new file with the permissions of the file that it will replace, from its first byte on."""
    try:
        before = target.stat()
    except FileNotFoundError:
        return temporary.open("xb")
    file = open(temporary, "xb", opener=_private)  # noqa: SIM115 - it is handed on
    try:
        _give(file, before)
    except BaseException:
        file.close()
        raise
    return file


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _give(file: BinaryIO, before: os.stat_result) -> None:
    """Give a file another's owner, group and permissions. If the group cannot be set, it gets what others have."""
    mode = stat.S_IMODE(before.st_mode)
    if hasattr(os, "fchown"):
        own = os.fstat(file.fileno())
        if own.st_uid != before.st_uid:
            _try_to_own(file, before.st_uid, -1)
        if own.st_gid != before.st_gid and not _try_to_own(file, -1, before.st_gid):
            mode = mode & ~0o070 | (mode & 0o007) << 3
    if hasattr(os, "fchmod"):
        os.fchmod(file.fileno(), mode)


def _try_to_own(file: BinaryIO, user: int, group: int) -> bool:
    try:
        os.fchown(file.fileno(), user, group)
    except OSError:  # only the superuser gives files away
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, on systems where folders can be synced."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
