"""How results and mistakes reach the terminal."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TextIO

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from tnpeft.errors import Problem, TnpeftError, TnpeftWarning

__all__ = ["Output", "Rows", "UsageError", "columns_of", "number", "problem_data", "reported", "table"]

PIPE_WIDTH = 160  # where there is no terminal whose width could be asked for
LEAST_WIDTH = 20  # of a terminal: no text can be read in fewer columns

_INSTALL = "Install the build of torch that fits this machine: `pip install torch`."
_LABEL = re.compile(r"\s*\S.*?\s{2,}(?=\S)")  # `parameters    `: what stands before a line's text
_AFTER_SIGN = re.compile(r"(?<=[,;=/+>._-])(?=[^,;=/+>._\s-])")  # where a word longer than a line may break

P = ParamSpec("P")


class UsageError(TnpeftError):
    """A command that cannot be understood; exit status 2, as for any wrong option."""


@dataclass(frozen=True)
class Rows:
    """A table; `columns` maps each heading to "left" or "right"."""

    title: str
    columns: Mapping[str, str]
    rows: tuple[tuple[str, ...], ...]

    def as_table(self) -> Table:
        """The table as a grid without lines."""
        looks: dict[str, Any] = {"title": self.title or None, "title_justify": "left", "title_style": "bold"}
        result = Table(**looks, box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for heading, side in self.columns.items():
            justify: Any = "right" if side == "right" else "left"
            result.add_column(heading, justify=justify, header_style="dim", overflow="fold")
        for row in self.rows:
            result.add_row(*(Text(cell) for cell in row))
        return result

    def as_list(self, width: int) -> list[str]:
        """The table as a list: each row's first cell, and below it a line for each other cell that is not empty."""
        first, *headings = self.columns
        margin = max(map(len, headings), default=0) + 4
        lines = [*_wrapped(self.title, width)] if self.title else []
        for head, *cells in self.rows:
            lines += _wrapped(head or first, width)
            for heading, cell in zip(headings, cells, strict=True):
                if cell:
                    lines += _wrapped(f"  {heading}".ljust(margin) + cell if heading else f"  {cell}", width)
        return lines


class Output:
    """Results to stdout, mistakes to stderr; texts of users' files are never read as markup.

    On a terminal, lines break between words and tables that do not fit become lists. Elsewhere lines stay whole.
    """

    def __init__(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a title in any language, on any terminal
        self._columns, self._columns_of_mistakes = columns_of(sys.stdout), columns_of(sys.stderr)
        self._results = Console(width=self._columns or PIPE_WIDTH, highlight=False, markup=False)
        self._mistakes = Console(stderr=True, highlight=False, markup=False)

    @property
    def width(self) -> int:
        """How many characters fit on a line."""
        return self._results.width

    @property
    def encoding(self) -> str:
        """The encoding of the results."""
        return sys.stdout.encoding or "utf-8"

    def say(self, text: str = "") -> None:
        self._results.print(_fitted(text, self._columns), soft_wrap=True)

    def show(self, result: Rows) -> None:
        grid = result.as_table()
        with self._results.capture() as drawn:
            self._results.print(grid)
        lines = [line.rstrip() for line in drawn.get().splitlines()]  # without the blanks that fill the last column
        if self._columns is not None:
            listed = result.as_list(self._columns)
            least = Measurement.get(self._results, self._results.options, grid).minimum
            if _least_width(result) > self._columns or least > self._columns or len(listed) < len(lines):
                lines = listed
        for line in lines:
            sys.stdout.write(line + "\n")

    def data(self, document: Mapping[str, Any]) -> None:
        """One JSON document, its keys in a fixed order."""
        sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")

    def progress(self, text: str) -> None:
        """Print a line on stderr at once, so that commands which take minutes show their progress."""
        sys.stderr.write(_fitted(text, self._columns_of_mistakes) + "\n")
        sys.stderr.flush()

    def mistake(self, problem: Problem) -> None:
        self._tell("error", "bold red", str(problem))

    def doubt(self, problem: Problem) -> None:
        self._tell("warning", "bold yellow", str(problem))

    def _tell(self, kind: str, style: str, text: str) -> None:
        told = Text(_fitted(f"{kind} {text}", self._columns_of_mistakes))
        told.stylize(style, 0, len(kind))
        self._mistakes.print(told, soft_wrap=True)


def columns_of(stream: TextIO) -> int | None:
    """The width of the terminal that a stream is written to; None if it is no terminal."""
    return max(LEAST_WIDTH, shutil.get_terminal_size().columns) if stream.isatty() else None


def _fitted(text: str, width: int | None) -> str:
    """A text whose lines are no longer than a terminal's."""
    if width is None:
        return text
    return "\n".join(part for line in text.split("\n") for part in _wrapped(line, width))


def _wrapped(line: str, width: int) -> list[str]:
    """A line broken between words; further lines are indented to the text of the first, as in a list of facts."""
    if len(line) <= width:
        return [line.rstrip()]
    label = _LABEL.match(line)
    head = label.group() if label and label.end() <= width // 2 else line[: len(line) - len(line.lstrip())]
    hang = len(head) + 2 * (not head.strip())
    pieces = [piece for word in line[len(head) :].split() for piece in _pieces(word, width - hang)]
    wrapper = textwrap.TextWrapper(width, head, " " * hang, break_on_hyphens=False)
    return wrapper.wrap(" ".join(pieces))  # two parts of one word never meet on a line


def _pieces(word: str, width: int) -> list[str]:
    """A word, or its parts if it is longer than a line: it breaks after signs, as paths and formulas do."""
    if len(word) <= width:
        return [word]
    parts = [""]
    for piece in _AFTER_SIGN.split(word):
        if len(parts[-1]) + len(piece) > width and parts[-1]:
            parts.append("")
        parts[-1] += piece
    return parts


def _least_width(rows: Rows) -> int:
    """The least width of the grid at which no word is broken."""
    columns = zip(rows.columns, *rows.rows, strict=True)
    return sum(max((len(word) for cell in column for word in cell.split()), default=0) + 2 for column in columns) - 2


def reported(command: Callable[P, None]) -> Callable[P, None]:
    """Run a command; its TnpeftErrors become messages and exit status 1 (2 for usage), never a traceback."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with _warnings_told():
                command(*args, **kwargs)
        except TnpeftError as error:
            output = Output()
            for problem in error.problems:
                output.mistake(problem)
            raise typer.Exit(2 if isinstance(error, UsageError) else 1) from None
        except ModuleNotFoundError as error:
            if error.name != "torch":  # specs and recipes are read, checked, shown and drawn without it
                raise
            Output().mistake(Problem("this command", "torch, installed here", "none", _INSTALL))
            raise typer.Exit(1) from None

    return run


@contextmanager
def _warnings_told() -> Iterator[None]:
    """Inside, the library's warnings are printed as its errors are; others are shown as usual."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", TnpeftWarning)
        show = warnings.showwarning

        def tell(message: Warning | str, *rest: Any, **more: Any) -> None:
            if isinstance(message, TnpeftWarning):
                for problem in message.problems:
                    Output().doubt(problem)
            else:
                show(message, *rest, **more)

        warnings.showwarning = tell
        yield


def problem_data(problem: Problem) -> dict[str, Any]:
    """A mistake as JSON: its place is text, `file:line:column` where there is one."""
    where = None if problem.where is None else str(problem.where)
    parts = ("what", "expected", "found", "fix", "core", "index")
    return {"where": where, **{part: getattr(problem, part) for part in parts}}


def number(value: float) -> str:
    """12345 → "12,345"; 0.5 → "0.5"."""
    return f"{value:,}" if float(value).is_integer() and isinstance(value, int) else f"{value:g}"


def table(title: str, columns: Mapping[str, str], rows: Iterable[Iterable[str]]) -> Rows:
    """A table of cells, row by row."""
    return Rows(title, columns, tuple(map(tuple, rows)))
