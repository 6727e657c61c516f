"""The mistakes a user can make, found before training starts, and how they are worded."""

from __future__ import annotations

from collections.abc import Iterable

from tnpeft.errors import Position, Problem, TnpeftError

__all__ = ["DivergenceError", "LabError", "fault", "known_cause", "raise_all", "reason"]

MOST = 8


class LabError(TnpeftError):
    """A configuration, a folder, a volume or a checkpoint that the driver refuses."""


class DivergenceError(LabError):
    """A training whose numbers grew beyond all bounds: its rate was too large."""


def fault(where: object, what: str, expected: str, found: str, fix: str) -> LabError:
    """One mistake as an exception; `where` is a path, a position in a file or an option."""
    place = where if isinstance(where, Position) else str(where)
    return LabError(Problem(what, expected, found, fix, place))


def raise_all(problems: Iterable[Problem], whole: str) -> None:
    """Raise `LabError` with the first few problems and the number of all; do nothing when there are none."""
    found = list(problems)
    if len(found) > MOST:
        rest = Problem(
            f"{len(found) - MOST} more like these", "none", f"{len(found)} in all", "Mend or move them.", whole
        )
        found = [*found[:MOST], rest]
    if found:
        raise LabError(*found)


def known_cause(error: BaseException) -> LabError | None:
    """The LabError behind another library's exception, which says more than that."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, LabError):
        cause = cause.__cause__
    return cause


def reason(error: BaseException) -> str:
    """Another library's message as a few plain words on one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    line = " ".join(text.split())
    return line if len(line) <= 120 else line[:117] + "..."
