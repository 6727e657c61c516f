"""Everything tnpeft raises on purpose.

* TnpeftError
  * SpecError        a spec or recipe that cannot be compiled
  * BindError        a spec that does not fit a layer
  * AttachError      surgery on a model that is refused
  * AdapterFileError an adapter file that cannot be read or written
  * ExecutionError   an adapted model that cannot run as asked
  * DrawError        a picture that cannot be drawn or written

Callers read `error.problems`; the text is for people. What is allowed and probably a mistake is a TnpeftWarning.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = [
    "AdapterFileError",
    "AttachError",
    "BindError",
    "DrawError",
    "ExecutionError",
    "Position",
    "Problem",
    "SpecError",
    "TnpeftError",
    "TnpeftWarning",
    "near_miss",
]


@dataclass(frozen=True)
class Position:
    """A place in a text file; `line` and `column` count from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Problem:
    """One mistake: where it is, what was expected, what was found and how to mend it.

    `what` names the thing that is wrong, `fix` is a full sentence. `where` is a position in a
    file, or the name of a layer or file when there is no position.
    """

    what: str
    expected: str
    found: str
    fix: str
    where: Position | str | None = None
    core: str | None = None
    index: str | None = None

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where is not None else ""
        return f"{where}{self.what}: expected {self.expected}, found {self.found}. {self.fix}"


class TnpeftError(Exception):
    """A mistake that the user can mend; `problems` holds one `Problem` for each."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__(*problems)
        self.problems: tuple[Problem, ...] = problems

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class TnpeftWarning(UserWarning):
    """What is done all the same, and probably is a mistake; `problems` holds one `Problem` for each."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__(*problems)
        self.problems: tuple[Problem, ...] = problems

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class SpecError(TnpeftError, ValueError):
    """A spec or recipe that cannot be compiled."""


class BindError(TnpeftError, ValueError):
    """A spec that does not fit a layer, or parameters that do not fit a spec."""


class AttachError(TnpeftError, ValueError):
    """Surgery on a model that is refused; the model is as it was."""


class AdapterFileError(TnpeftError, ValueError):
    """An adapter file that cannot be read or written; model and file are as they were."""


class ExecutionError(TnpeftError, RuntimeError):
    """An adapted model that cannot run as asked."""


class DrawError(TnpeftError, ValueError):
    """A picture that cannot be drawn or written."""


# Of two names that may be meant for each other: the share of letters in common, and how many are compared in full.
CLOSE, COMPARED = 0.6, 10


def near_miss(word: str, known: Iterable[str]) -> str:
    """The sentence "Did you mean `known`?" for the closest known word, or an empty string."""
    word = word[:80]
    few = list(itertools.islice(known, 200))  # comparing takes time; a file can hold thousands of names
    # Comparing letter by letter takes the square of a name's length: only those of most letters in common.
    matcher = difflib.SequenceMatcher(b=word)
    shared: list[tuple[float, int]] = []
    for place, name in enumerate(few):
        matcher.set_seq1(name)
        if matcher.real_quick_ratio() >= CLOSE and (ratio := matcher.quick_ratio()) >= CLOSE:
            shared.append((-ratio, place))
    nearest = [few[place] for place in sorted(place for _, place in sorted(shared)[:COMPARED])]
    close = difflib.get_close_matches(word, nearest, n=1, cutoff=CLOSE)
    return f"Did you mean `{close[0]}`?" if close else ""
