"""How results and mistakes reach the terminal."""

from __future__ import annotations

import io
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tnpeft.errors import Problem, TnpeftError, TnpeftWarning

__all__ = ["Output", "UsageError", "number", "problem_data", "reported", "table"]

PIPE_WIDTH = 160  # where there is no terminal whose width could be asked for

_INSTALL = "Install the build of torch that fits this machine: `pip install torch`."

P = ParamSpec("P")


class UsageError(TnpeftError):
    """A command that cannot be understood; exit status 2, as for any wrong option."""


class Output:
    """Results to stdout, mistakes to stderr; texts of users' files are never read as markup."""

    def __init__(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a title in any language, on any terminal
        width = None if sys.stdout.isatty() else PIPE_WIDTH
        self._results = Console(width=width, highlight=False, markup=False)
        self._mistakes = Console(stderr=True, highlight=False, markup=False)

    @property
    def width(self) -> int:
        """Columns that fit on a line."""
        return self._results.width

    @property
    def encoding(self) -> str:
        """What the results are written in."""
        return sys.stdout.encoding or "utf-8"

    def say(self, text: str | Text = "") -> None:
        self._results.print(text, soft_wrap=True)

    def show(self, result: Table) -> None:
        with self._results.capture() as drawn:
            self._results.print(result)
        for line in drawn.get().splitlines():  # without the blanks that fill up the last column
            sys.stdout.write(line.rstrip() + "\n")

    def data(self, document: Mapping[str, Any]) -> None:
        """One JSON document, its keys in a fixed order."""
        sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")

    def mistake(self, problem: Problem) -> None:
        self._mistakes.print(Text.assemble(("error ", "bold red"), str(problem)), soft_wrap=True)

    def doubt(self, problem: Problem) -> None:
        self._mistakes.print(Text.assemble(("warning ", "bold yellow"), str(problem)), soft_wrap=True)


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
    """Inside, the library's warnings are printed as its errors are; others are shown as ever."""
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


def table(title: str, columns: Mapping[str, str], rows: Iterable[Iterable[str]]) -> Table:
    """A plain table; `columns` maps each heading to "left" or "right"."""
    result = Table(
        title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for heading, side in columns.items():
        result.add_column(heading, justify="right" if side == "right" else "left", header_style="dim", overflow="fold")
    for row in rows:
        result.add_row(*(Text(cell) for cell in row))
    return result
