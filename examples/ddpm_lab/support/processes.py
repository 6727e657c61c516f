"""What several processes have to agree on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import gather_object

from ddpm_lab.support.faults import fault
from tnpeft import TnpeftError

__all__ = ["missing", "together"]

GONE = ("Connection closed by peer", "Connection reset by peer", "remote process exited")  # as gloo and NCCL say it


@contextmanager
def together() -> Iterator[None]:
    """Raise what goes wrong inside, in whichever process, in all of them: none waits for one that is gone.

    Every process must come here, and only once there is an accelerator.
    """
    own: TnpeftError | None = None
    try:
        yield
    except TnpeftError as error:
        own = error
    found: list[TnpeftError | None] = gather_object([own])
    for one in found:
        if one is not None:
            raise one


@contextmanager
def missing() -> Iterator[None]:
    """Say as LabError that another process has ended while this one waited for it."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in GONE):
            raise
        fix = "Its own message says why. The same command goes on from the last checkpoint."
        raise fault("the processes", "another process", "at work", "gone", fix) from error
