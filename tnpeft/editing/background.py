"""The process behind a page, which computes what takes longer than a keystroke (`computing`)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from tnpeft.editing.trial import Trial

__all__ = ["STAGES", "Background", "Refused"]

STAGES = ("placements", "costs", "spread", "directions")  # in the order in which they are asked for
_LIMIT = 60.0  # seconds that one stage may take
_PATIENCE = 2.0  # seconds that a stage which nobody waits for any more may go on, before its process is ended
_LARGEST_LINE = 2**24  # bytes of an answer


class Refused(Exception):  # noqa: N818 - an answer too, shown in the place of numbers
    """A stage that has no answer for this network, in a sentence."""


class Background:
    """The process, which starts with the first question and ends with `close`."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._readers: set[asyncio.Task[None]] = set()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = itertools.count()
        self._busy: dict[int, float] = {}  # questions without an answer, and when they were sent
        self._turn = asyncio.Lock()

    async def ask(self, stage: str, text: str, trial: Trial) -> dict[str, Any]:
        """The answer of a stage. Raises Refused, also if the stage takes too long."""
        async with self._turn:
            await self._wait_or_end()
            number = next(self._numbers)
            answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
            self._waiting[number], self._busy[number] = answer, time.monotonic()
            question = {"number": number, "stage": stage, "text": text, "trial": trial.data()}
            try:
                await self._send(question)
                found = await asyncio.wait_for(answer, _LIMIT)
            except asyncio.TimeoutError:
                self.stop()
                raise Refused(f"No answer in {_LIMIT:.0f} s: try a smaller layer.") from None
            finally:
                self._waiting.pop(number, None)
            if "refused" in found:
                raise Refused(found["refused"])
            return dict(found["answer"])

    async def _wait_or_end(self) -> None:
        """Let a stage that was given up finish if it does so soon; else end the process."""
        while self._busy:
            if time.monotonic() - min(self._busy.values()) > _PATIENCE:
                self.stop()
                return
            await asyncio.sleep(0.01)

    async def _send(self, question: Mapping[str, Any]) -> None:
        if self._process is None or self._process.returncode is not None:
            code = "import sys; from tnpeft.editing.computing import serve; serve(sys.stdin, sys.stdout)"
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                code,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                limit=_LARGEST_LINE,
                env={**os.environ, "OMP_NUM_THREADS": "1"},  # the page has the other cores
            )
            reader = asyncio.create_task(self._read(self._process))
            self._readers.add(reader)
            reader.add_done_callback(self._readers.discard)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        with contextlib.suppress(ConnectionError):
            await self._process.stdin.drain()

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        try:
            while line := await process.stdout.readline():
                found = _answer(line)
                number = found.get("number", -1)
                self._busy.pop(number, None)
                if (answer := self._waiting.get(number)) is not None and not answer.done():
                    answer.set_result(found)
        except ValueError:  # a line without an end
            process.kill()
        if process is self._process:
            self._give_up("The process that computes it ended.")
        if process.stdin is not None:
            process.stdin.close()
        await process.wait()

    def _give_up(self, reason: str) -> None:
        self._busy.clear()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_result({"refused": reason})

    def stop(self) -> None:
        """End the process; the next question starts another."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        self._process = None
        self._give_up("It was ended.")

    async def close(self) -> None:
        """End the process, and wait until it has."""
        self.stop()
        await asyncio.gather(*self._readers)


def _answer(line: bytes) -> dict[str, Any]:
    """What a line of the process answers; empty for one that a library of its printed there."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and not found.keys().isdisjoint(("answer", "refused")) else {}
