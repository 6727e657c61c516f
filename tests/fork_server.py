"""A process that has imported the driver and forks a copy of itself for each run: test_examples_crash.py kills those.

Reads a job as a line of JSON from its input and answers with one. Nothing has computed before the fork, so that a
copy starts as a cold process does. A job of several processes gets them as torchrun would start them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ddpm
import ddpm_lab.driver
import torch
from ddpm_lab.checkpoint import Checkpoints
from ddpm_lab.durable import write_tensors


def main() -> None:
    answer(ready=os.getpid())
    for line in sys.stdin:
        job = json.loads(line)
        port = free_port()
        children = [started(job, rank, port) for rank in range(job.get("processes", 1))]
        answer(status=watched(children, job.get("seconds")))


def started(job: dict[str, Any], rank: int, port: int) -> int:
    """A copy of this process that runs the job."""
    child = os.fork()
    if child == 0:
        count = job.get("processes", 1)
        if count > 1:
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            os.environ.update({name: str(value) for name, value in ranks.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
        run(job)
    return child


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def answer(**values: int) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def watched(children: Sequence[int], seconds: float | None) -> int:
    """Kill them after so many seconds, and wait for their end: 0, the first one's status, or minus a signal."""
    if seconds is not None:
        time.sleep(seconds)
        for child in children:
            os.kill(child, signal.SIGKILL)  # no error if it has ended: nobody has waited for it yet
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return next((end for end in ends if end != 0), 0)


def run(job: dict[str, Any]) -> None:
    """The command in this process, which ends with it; `stop_at` ends it hard at one of its writes."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job.get("stop_at") is not None:
        stop_at(job["stop_at"], Path(job["counted"]))
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
    assert ddpm_lab.driver
    main()
