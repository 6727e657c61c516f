"""Progress bars and lines for people; silent in all processes but the first.

Where there is no terminal, a line now and then says how far a phase is.
"""

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

__all__ = ["Bar", "Screen", "clock"]

QUIET = 20.0  # seconds without a line where there is no terminal


def clock(seconds: float) -> str:
    """A time for people: 45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Bar:
    """One progress bar: call it with the number of things done and a short text."""

    def __init__(self, move: Callable[[int, str], None]) -> None:
        self._move = move

    def __call__(self, done: int, note: str = "") -> None:
        self._move(done, note)


class _Reporter:
    """Says every `QUIET` seconds how far a phase is."""

    def __init__(self, title: str, total: int, start: int, say: Callable[[str], None]) -> None:
        self.title, self.total, self.start, self.say = title, total, start, say
        self.started = self.said = time.perf_counter()

    def __call__(self, done: int, note: str) -> None:
        now = time.perf_counter()
        if now - self.said < QUIET or done >= self.total:
            return
        self.said = now
        rest = ""
        if done > self.start:
            left = (now - self.started) / (done - self.start) * (self.total - done)
            rest = f", about {clock(left)} left"
        self.say(f"{self.title}: {done} of {self.total} ({done / self.total:.0%}){rest}{note and f', {note}'}")


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

        A transient bar leaves no trace when it is full. Without a terminal the bar comes when it is full, and lines
        before it.
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
        terminal = self.console.is_terminal
        report = _Reporter(title, total, start, self.line)
        # A file would keep what vanishes.
        progress = Progress(*columns, console=self.console, transient=transient, disable=transient and not terminal)
        with self.phase(title), progress:
            task = progress.add_task(title, total=total, completed=start, note="")

            def move(done: int, note: str) -> None:
                progress.update(task, completed=done)
                if note:
                    progress.update(task, note=note)
                if not terminal:
                    report(done, note)

            yield Bar(move)

    @contextmanager
    def phase(self, title: str) -> Iterator[None]:
        """Time a phase that has no bar."""
        started = time.perf_counter()
        yield
        self.seconds[title] = self.seconds.get(title, 0.0) + time.perf_counter() - started
