"""Progress bars and lines for people; silent in all processes but the first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

__all__ = ["Bar", "Screen"]


class Bar:
    """One progress bar: call it with the number of things done and a short text."""

    def __init__(self, move: Callable[[int, str], None]) -> None:
        self._move = move

    def __call__(self, done: int, note: str = "") -> None:
        self._move(done, note)


class RateColumn(ProgressColumn):
    """Things done in a second, or seconds for each."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")


class Screen:
    """Where a run shows what it does, and how long each phase took (`seconds`, by title)."""

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Console(quiet=quiet)
        self.seconds: dict[str, float] = {}

    def line(self, text: str) -> None:
        """Print a line as it is: brackets in a file's name are no markup."""
        self.console.print(text, highlight=False, markup=False, emoji=False)

    @contextmanager
    def bar(self, title: str, total: int, start: int = 0, transient: bool = False) -> Iterator[Bar]:
        """A bar for one phase, of which an earlier process did `start` things; its time is added to `seconds`.

        A transient bar leaves no trace when it is full.
        """
        columns = (
            TextColumn("{task.description:<36}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            RateColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with self.phase(title), Progress(*columns, console=self.console, transient=transient) as progress:
            task = progress.add_task(title, total=total, completed=start, note="")

            def move(done: int, note: str) -> None:
                progress.update(task, completed=done)
                if note:
                    progress.update(task, note=note)

            yield Bar(move)

    @contextmanager
    def phase(self, title: str) -> Iterator[None]:
        """Time a phase that has no bar."""
        started = time.perf_counter()
        yield
        self.seconds[title] = self.seconds.get(title, 0.0) + time.perf_counter() - started
