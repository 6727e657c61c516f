"""One page's text: read and drawn after each keystroke, while slower stages are computed in the background."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from tnpeft.editing.background import STAGES, Background, Refused
from tnpeft.editing.facts import Facts, facts_of
from tnpeft.editing.live_picture import Drawing, LivePicture
from tnpeft.editing.reading import Mistake, bound, located, read_spec
from tnpeft.editing.trial import Trial, typical_trial
from tnpeft.errors import TnpeftError
from tnpeft.network import Network, Spec

__all__ = ["Session", "Slow", "View"]

_DEBOUNCE = 0.02  # seconds in which another keystroke replaces this one


class Superseded(Exception):  # noqa: N818 - no error: a newer text is there
    """There is a newer text."""


@dataclass(frozen=True)
class Slow:
    """The answer of one stage; `current` is false while the answer for the current text is computed."""

    answer: dict[str, Any] | None = None
    refused: str = ""
    current: bool = False


@dataclass(frozen=True)
class View:
    """What a page shows. While there is a mistake, `facts`, `svg` and the rest are those of the last valid text."""

    text: str
    trial: Trial
    mistakes: tuple[Mistake, ...] = ()
    spec: Spec | None = None
    network: Network | None = None
    facts: Facts | None = None
    svg: bytes | None = None
    is_current: bool = False  # whether facts and picture are those of this text
    slow: dict[str, Slow] = field(default_factory=lambda: {stage: Slow() for stage in STAGES[1:]})


class Session:
    """Call `edit` with each change; `show` is called with every new view, in the event loop's thread."""

    def __init__(self, text: str, file: str, background: Background, show: Callable[[View], None]) -> None:
        self.file = file
        self.view = View(text, Trial())
        self.picture = LivePicture()
        self._show = show
        self._background = background
        self._task: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "tnpeft-editing")
        self._version = 0
        self._chosen = False  # whether a layer was chosen for this text

    def edit(self, text: str | None = None, trial: Trial | None = None, new: bool = False) -> None:
        """Take a new text or trial; with `new` another spec, which is put on a layer that it takes."""
        self._version += 1
        self._chosen = self._chosen and not new
        if trial is not None:
            self._chosen = True
        view = self.view
        self.view = replace(view, text=view.text if text is None else text, trial=trial or view.trial)
        if self._task is not None:
            self._task.cancel()
        self._task = asyncio.get_running_loop().create_task(self._update(self._version))
        self._task.add_done_callback(_told)

    async def settled(self) -> None:
        """Wait until nothing is being computed."""
        while self._task is not None and not self._task.done():
            await asyncio.wait([self._task])

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def export(self, suffix: str) -> bytes:
        """The picture of the last valid text, as `tnpeft draw` makes it."""
        network = self.view.network
        assert network is not None
        data: bytes = await self._in_thread(lambda: self.picture.finish(network, suffix))
        return data

    async def _update(self, version: int) -> None:
        await asyncio.sleep(_DEBOUNCE)

        def check() -> None:
            if version != self._version:
                raise Superseded

        try:
            final = await self._at_once(check)
            if final is not None and self.view.is_current:
                await self._later(final)
        except Superseded:
            return

    async def _at_once(self, check: Callable[[], None]) -> bool | None:
        """Mistakes, facts and picture; returns whether the picture is final, or None if there is a mistake."""
        read = await self._in_thread(lambda: self._read(self.view))
        check()
        self._tell(read)
        network = read.network
        if not read.is_current or network is None:
            return None
        try:
            drawing: Drawing = await self._in_thread(lambda: self.picture.draw(network, check))
        except TnpeftError as error:
            self._tell(replace(self.view, mistakes=located(error.problems, read.text, self.file)))
            return None
        check()
        self._tell(replace(self.view, svg=drawing.svg))
        return drawing.final

    def _read(self, view: View) -> View:
        """The view with mistakes and facts of its text."""
        reading = read_spec(view.text, self.file)
        stale = {stage: replace(slow, current=False) for stage, slow in view.slow.items()}
        if reading.spec is None:
            return replace(view, mistakes=reading.mistakes, is_current=False, slow=stale)
        spec = reading.spec
        if not self._chosen:
            view = replace(view, trial=typical_trial(spec, None))
            self._chosen = True
        known = {name: value for name, value in view.trial.params.items() if name in spec.params}
        trial = replace(view.trial, params=known)
        if trial.kind not in spec.layers:
            trial = replace(typical_trial(spec), params=known)
        view = replace(view, trial=trial)
        try:
            layer = trial.layer()
            trial.call(layer)
        except TnpeftError as error:
            mistakes = located(error.problems, view.text, self.file)
            return replace(view, mistakes=mistakes, spec=spec, is_current=False, slow=stale)
        network, mistakes = bound(spec, layer, trial.params, self.file)
        if network is None:
            return replace(view, mistakes=mistakes, spec=spec, is_current=False, slow=stale)
        facts = facts_of(network, trial)
        return replace(
            view, mistakes=(), spec=spec, network=network, facts=facts, is_current=True, slow=stale, trial=trial
        )

    async def _later(self, final: bool) -> None:
        """The stages in turn; each is shown as soon as it is done."""
        view = self.view
        network = view.network
        assert network is not None
        for stage in STAGES[final:]:
            try:
                answer = await self._background.ask(stage, view.text, view.trial)
            except Refused as refusal:
                if stage != "placements":
                    self._tell_slow(stage, Slow(None, str(refusal), True))
                continue
            if stage == "placements":
                self.picture.keep(answer)
                drawing = await self._in_thread(lambda: self.picture.draw(network))
                self._tell(replace(self.view, svg=drawing.svg))
            else:
                self._tell_slow(stage, Slow(answer, "", True))

    def _tell_slow(self, stage: str, slow: Slow) -> None:
        self._tell(replace(self.view, slow={**self.view.slow, stage: slow}))

    def _tell(self, view: View) -> None:
        self.view = view
        self._show(view)

    async def _in_thread(self, function: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)


def _told(task: asyncio.Task[None]) -> None:
    """Report an unexpected error on the terminal at once, not when the task is collected."""
    if not task.cancelled() and (error := task.exception()) is not None:
        task.get_loop().call_exception_handler({"message": "the page was not brought up to date", "exception": error})
