"""What several processes have to agree on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import gather_object

from tnpeft import TnpeftError

__all__ = ["together"]


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
