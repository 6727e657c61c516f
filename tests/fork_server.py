"""A process that has imported the driver and forks a copy of itself for each run; those are what test_crash.py kills.

Reads a job as a line of JSON from its input and answers with one. Nothing has computed before the fork, so that a
copy starts as a cold process does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import ddpm
import ddpm_lab.training.driver
import torch
from ddpm_lab.model.diffusion import HeldOut
from ddpm_lab.support.durable import write_tensors
from ddpm_lab.support.faults import fault
from ddpm_lab.training.checkpoint import Checkpoints


def main() -> None:
    ddpm_lab.training.driver.plot_curves = lambda path, *_: path.touch()  # tests/driver/test_run.py looks at pictures
    answer(ready=os.getpid())
    for line in sys.stdin:
        job = json.loads(line)
        children = [forked(job, environment) for environment in job.get("environments", [{}])]
        answer(status=watched(children, job))


def forked(job: dict[str, Any], environment: dict[str, str]) -> int:
    """Start the job in a copy of this process, with more in its environment; its process number."""
    child = os.fork()
    if child == 0:
        os.environ.update(environment)
        run(job)
    return child


def answer(**values: int) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def watched(children: list[int], job: dict[str, Any]) -> int:
    """Kill the children after `seconds`, or once the file `until` is there, and wait for their end.

    Returns 0, an exit status, or minus a signal: of several children the first that is not 0.
    """
    if job.get("seconds") is not None:
        time.sleep(job["seconds"])
        kill(children)
    if job.get("until") is not None:
        while not Path(job["until"]).exists() and os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.002)
        kill(children)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return next((status for status in statuses if status), 0)


def kill(children: list[int]) -> None:
    for child in children:
        os.kill(child, signal.SIGKILL)  # no error if it has ended: nobody has waited for it yet


def run(job: dict[str, Any]) -> None:
    """The command in this process, which ends with it; `stop_at` ends it hard at one of its writes."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job.get("stop_at") is not None:
        stop_at(job["stop_at"], Path(job["counted"]))
    if "BROKEN" in os.environ:
        HeldOut._drawn = broken  # type: ignore[method-assign]
    status = 99
    try:
        if "checkpoints" in job:
            write_checkpoint(Path(job["checkpoints"]), job["step"])
        else:
            ddpm.app(job["arguments"], standalone_mode=False)
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    finally:
        if status == 99:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)


def broken(*_: Any) -> Any:
    """In place of what reads a held-out volume."""
    raise fault("a volume", "held out", "one that can be read", "none", "Mend it.")


def write_checkpoint(out: Path, step: int) -> None:
    """A checkpoint of a tensor that says which step it is of."""
    tensor = torch.full((4,), float(step))

    def save(folder: Path) -> None:
        write_tensors(folder / "model.safetensors", {"w": tensor})

    Checkpoints(out, keep=2).write(step, {"note": f"step {step}"}, {"optimizer": {"m": tensor}}, save)


def stop_at(number: int, counted: Path) -> None:
    """End the process before its `number`-th fsync or rename (counting from 0); the count is left in a file."""
    calls = 0

    def counting(inner: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            if calls == number:
                os._exit(77)
            calls += 1
            counted.write_text(str(calls), encoding="utf-8")
            return inner(*arguments, **named)

        return call

    os.fsync, os.replace = counting(os.fsync), counting(os.replace)


if __name__ == "__main__":
    main()
