"""Locks on folders of results: one command at a time works in `--out`, and the runs of a study are shared out."""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

from ddpm_lab.support.faults import fault, reason
from ddpm_lab.support.folders import make_folder
from tnpeft.documents.paths import is_there

try:
    import fcntl
except ImportError:  # not on Windows: there commands are not kept apart
    fcntl = None  # type: ignore[assignment]

__all__ = ["alone", "alone_in_out", "at_work"]

P = ParamSpec("P")
R = TypeVar("R")

NAME = ".lock"
TAKEN = (errno.EAGAIN, errno.EACCES)
_held: set[int] = set()  # open lock files of this process


def _let_go_in_copies() -> None:
    """A copy of this process, one that loads volumes for instance, must not hold a lock when this one is killed."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_copies)


@contextmanager
def alone(path: Path, wait: bool = False, shared: bool = False, about: str = "") -> Iterator[bool]:
    """Whether this process may work on what `path` stands for; the system lets go of it when a process dies.

    `shared` locks exclude those that are not. The file says `about` while it is held, and is gone afterwards.
    """
    make_folder(path.parent)
    handle = _locked(path, wait, shared)
    if handle is None:
        yield False
        return
    _held.add(handle)
    try:
        with contextlib.suppress(OSError):  # a full disk has no room for a word about who is at work
            os.ftruncate(handle, 0)
            os.write(handle, about.encode())
        yield True
    finally:
        if handle in _held:
            _held.remove(handle)
            _remove(path, handle, shared)
            os.close(handle)


def _remove(path: Path, handle: int, shared: bool) -> None:
    """Remove the file of a lock while it is held, unless others share it: nobody may lock a file without a name."""
    with contextlib.suppress(OSError):
        if shared and fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()


def _locked(path: Path, wait: bool, shared: bool) -> int | None:
    """An open and locked file, or None where another process has it."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise fault(path, "a lock", "a file that can be written", reason(error), "Mend the folder.") from None
        if fcntl is None:
            return handle
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in TAKEN:
                return None
            fix = "Choose an `--out` on another disk."
            raise fault(path, "a lock", "a file system that can lock files", reason(error), fix) from None
        if _still_named(path, handle):
            return handle
        os.close(handle)  # whoever held it has removed it meanwhile


def _still_named(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


@contextmanager
def at_work(command: str, out: Path, shared: bool = False) -> Iterator[None]:
    """Keep the folder of results to this command; raises LabError where another one is at work in it.

    Of several processes the first holds the lock for all. A folder that is still empty at the end is removed again.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    new = [folder for folder in (out, *out.parents) if not is_there(folder)]
    make_folder(out)
    about = f"`{command}` (process {os.getpid()} on {socket.gethostname()})"
    try:
        with alone(out / NAME, shared=shared, about=about) as mine:
            if not mine:
                fix = "Wait for its end, stop it, or choose another `--out`."
                raise fault(out, "the folder of results", "no other command at work in it", _holder(out), fix)
            yield
    finally:
        with contextlib.suppress(OSError):  # the first that is not empty ends it
            for folder in new:
                folder.rmdir()


def _holder(out: Path) -> str:
    """Who is at work, as its lock says."""
    with contextlib.suppress(OSError, ValueError):
        return (out / NAME).read_text(encoding="utf-8").strip() or "another command"
    return "another command"


def alone_in_out(command: str, shared: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function with a parameter `out` a command that is `at_work` there while it runs."""

    def decorated(work: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(work)

        @functools.wraps(work)
        def run(*values: P.args, **named: P.kwargs) -> R:
            with at_work(command, signature.bind(*values, **named).arguments["out"], shared):
                return work(*values, **named)

        return run

    return decorated
