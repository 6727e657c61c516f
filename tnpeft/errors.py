"""Everything tnpeft raises on purpose.

* TnpeftError
  * SpecError        a spec or recipe that cannot be compiled
  * BindError        a spec that does not fit a layer
  * AttachError      surgery on a model that is refused
  * AdapterFileError an adapter file that cannot be read or written
  * ExecutionError   an adapted model that cannot run as asked
  * DrawError        a picture that cannot be drawn or written

Code reads `error.problems`; the text is for people. What is allowed but probably a mistake is a TnpeftWarning.
"""

from __future__ import annotations

import difflib
import heapq
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

__all__ = [
    "INSTALLED_BY",
    "MAX_PROBLEMS",
    "AdapterFileError",
    "AttachError",
    "BindError",
    "DrawError",
    "ExecutionError",
    "Position",
    "Problem",
    "Problems",
    "SpecError",
    "TnpeftError",
    "TnpeftWarning",
    "clip",
    "closest",
    "in_one_line",
    "listed",
    "near_miss",
    "need",
    "needing",
    "shown_path",
    "ticked",
]

MAX_PROBLEMS = 50

_SHOWN = 5  # names listed in a sentence
_PATH_SHOWN = 200  # characters


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
    """One mistake: where it is, what was expected, what was found and how to fix it.

    `what` names the thing that is wrong, `fix` is a full sentence. `where` is a position in a file, or the name of a
    file or parameter when there is no position. `layers` are the names of all layers that have this mistake, `on` is
    the kind and sizes of these layers.
    """

    what: str
    expected: str
    found: str
    fix: str
    where: Position | str | None = None
    core: str | None = None
    index: str | None = None
    layers: tuple[str, ...] = ()
    on: str | None = None

    def __str__(self) -> str:
        places = [str(self.where)] if self.where is not None else []
        if self.layers:
            places.append(f"layer{'s' * (len(self.layers) > 1)} {listed(self.layers)}")
        if what := ", on ".join(filter(None, (self.what, self.on))):
            places.append(what)
        return f"{': '.join(places)}: expected {self.expected}, found {self.found}. {self.fix}"


def clip(value: object, limit: int = 60) -> str:
    """`value` as one short line of plain ASCII, fit for an error message."""
    text = ascii(value)
    return text if len(text) <= limit else text[: limit - 4] + "..." + text[-1]


def ticked(value: object) -> str:
    """`clip`, a text in backticks instead of quotes."""
    return f"`{clip(value)[1:-1]}`" if isinstance(value, str) else clip(value)


def shown_path(path: str | Path) -> str:
    """A path for a message of one line."""
    text = str(path)
    return text if text.isprintable() and len(text) <= _PATH_SHOWN else clip(text, _PATH_SHOWN)


def in_one_line(text: str, limit: int = 120) -> str:
    """The message of another library as one short ASCII line."""
    line = " ".join(text.split()).encode("ascii", "backslashreplace").decode()
    return line if len(line) <= limit else line[: limit - 3] + "..."


def listed(names: Sequence[str], shown: int = _SHOWN) -> str:
    """The first names, in quotes, and how many more there are."""
    first = ", ".join(f"'{name}'" for name in names[:shown])
    return f"{first} and {len(names) - shown:,} more" if len(names) > shown else first


def _folded(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """Each problem once, with all layers that have it."""
    layers: dict[Problem, dict[str, None]] = {}
    signatures: dict[Problem, set[str | None]] = {}
    for problem in problems:
        bare = replace(problem, layers=(), on=None)
        layers.setdefault(bare, {}).update(dict.fromkeys(problem.layers))
        signatures.setdefault(bare, set()).add(problem.on)
    return tuple(
        replace(bare, layers=tuple(names), on=signatures[bare].pop() if len(signatures[bare]) == 1 else None)
        for bare, names in layers.items()
    )


class TnpeftError(Exception):
    """Mistakes that the user can fix; `problems` has a `Problem` for each, with equal ones of several layers as one."""

    def __init__(self, *problems: Problem) -> None:
        self.problems: tuple[Problem, ...] = _folded(problems)
        super().__init__(*self.problems)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class TnpeftWarning(UserWarning):
    """What is done as asked but is probably a mistake; `problems` has a `Problem` for each such thing."""

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
    """A change to a model that is refused: attaching, switching, merging, detaching; the model is as it was."""


class AdapterFileError(TnpeftError, ValueError):
    """An adapter file that cannot be read or written; model and file are as they were."""


class ExecutionError(TnpeftError, RuntimeError):
    """An adapted model that cannot run as asked."""


class DrawError(TnpeftError, ValueError):
    """A picture that cannot be drawn or written."""


# Every package that tnpeft imports and does not depend on, with what pip installs it by.
INSTALLED_BY: Mapping[str, str] = MappingProxyType(
    {
        "hypothesis": "'tnpeft[testing]'",
        "matplotlib": "'tnpeft[draw]'",
        "monai": "'tnpeft[demo]'",
        "nicegui": "'tnpeft[edit]'",
        "optuna": "'tnpeft[search]'",
        "pygls": "'tnpeft[lsp]'",
        "transformers": "transformers",
    }
)


def need(package: str, what: str, error: type[TnpeftError] = TnpeftError) -> None:
    """Raises `error`, with the pip command, if a package that `what` needs is not installed."""
    if find_spec(package) is None:
        raise _missing(package, what, error)


@contextmanager
def needing(package: str, what: str) -> Iterator[None]:
    """For imports of a package that `what` needs: raises TnpeftError, with the pip command, if it is not installed."""
    try:
        yield
    except ImportError as error:
        if error.name not in (package, None):  # one that the package itself misses
            raise
        raise _missing(package, what, TnpeftError) from error


def _missing(package: str, what: str, error: type[TnpeftError]) -> TnpeftError:
    fix = f"Run `pip install {INSTALLED_BY[package]}`."
    return error(Problem(what, f"the package {package}", "none installed", fix))


class Problems:
    """Mistakes found so far; checks add to it and go on, `raise_if_any` ends a stage."""

    def __init__(self) -> None:
        self.found: list[Problem] = []

    def add(
        self,
        where: Position | str | None,
        what: str,
        expected: str,
        found: str,
        fix: str,
        *,
        core: str | None = None,
        index: str | None = None,
    ) -> None:
        self.put(Problem(what, expected, found, fix, where, core, index))

    def put(self, problem: Problem) -> None:
        """Keep a mistake, unless it is known already. Raises SpecError once there are enough of them."""
        if problem not in self.found:
            self.found.append(problem)
        if len(self.found) >= MAX_PROBLEMS:
            self.raise_if_any()

    def __len__(self) -> int:
        return len(self.found)

    def raise_if_any(self) -> None:
        if self.found:
            files = {problem.where.file: 0 for problem in self.found if isinstance(problem.where, Position)}
            order = {file: number for number, file in enumerate(files)}
            raise SpecError(*sorted(self.found, key=lambda problem: _by_place(problem, order)))


def _by_place(problem: Problem, files: Mapping[str, int]) -> tuple[int, int, int]:
    where = problem.where
    return (files[where.file], where.line, where.column) if isinstance(where, Position) else (0, 0, 0)


# Letters that two names have in common, as a share of both, from which one may be meant for the other.
_CLOSE = 0.6
# How many names are looked at, of how many letters, and how many of them are compared in full, which takes time.
_LOOKED_AT, _LETTERS, _COMPARED = 20_000, 200, 50


def near_miss(word: str, known: Iterable[str]) -> str:
    """The sentence "Did you mean `known`?" for the closest known word, or an empty string."""
    close = closest(word, known)
    return f"Did you mean `{close}`?" if close else ""


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most like `word`, whatever their case; None if none is near."""
    word = word[:_LETTERS].casefold()
    pairs = _pairs(word)
    shortest, longest = len(word) * _CLOSE / (2 - _CLOSE), len(word) * (2 - _CLOSE) / _CLOSE
    # A name of another length cannot be near; of the rest those with most pairs of letters in common are compared.
    names = (name for name in itertools.islice(known, _LOOKED_AT) if shortest <= len(name) <= longest)
    alike = heapq.nlargest(_COMPARED, names, key=lambda name: (pairs & _pairs(name.casefold())).total())
    matcher = difflib.SequenceMatcher(b=word, autojunk=False)
    best: tuple[float, str] = (_CLOSE, "")
    for name in alike:
        matcher.set_seq1(name.casefold())
        if min(matcher.real_quick_ratio(), matcher.quick_ratio()) >= best[0]:
            best = max(best, (matcher.ratio(), name))
    return best[1] or None


def _pairs(word: str) -> Counter[tuple[str, str]]:
    """How often each pair of letters occurs side by side; both ends of the word count as letters."""
    return Counter(itertools.pairwise(f" {word} "))
