"""Does any input raise something other than a TnpeftError, hang, or exhaust the memory?

    python benchmarks/fuzz.py --count 200000 --processes 2 --out benchmarks/results/fuzz.json

Input number n is the same in every run. The state is kept beside the results, and a stopped run goes on from it.
Processes work on blocks of inputs under a memory limit. One that makes no step for ten minutes is ended, and its input
is reported. Every finding has its input's number: `--only N` runs that input alone, in this process.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from common import environment
from fuzz_inputs import KINDS, SHARES

BLOCK = 1000
SECONDS = 10.0  # of one input, of the process's own time
STUCK = 600.0  # of the clock, without a step: something does not listen to signals
MEMORY = 6 << 30


class TooLong(BaseException):
    """Raised by the alarm; nothing catches it by accident."""


def input_of(number: int) -> tuple[str, str]:
    """The kind and the text of an input."""
    choose = random.Random(number)
    (kind,) = choose.choices(list(SHARES), weights=list(SHARES.values()))
    return kind, KINDS[kind](choose)


def attempt(kind: str, text: str) -> None:
    """What a user would do with it; TnpeftErrors are answers."""
    import tnpeft

    try:
        {"recipes": _recipe, "names": _name, "commands": _command, "metadata": _metadata}.get(kind, _spec)(text)
    except tnpeft.TnpeftError as error:
        str(error).encode("utf-8", "surrogatepass")


def _spec(text: str) -> None:
    import tnpeft
    from tnpeft.recipe import Recipe
    from tnpeft.schedule import plan

    if "adapters" in text:
        Recipe.from_yaml(text)
        return
    spec = tnpeft.Spec.from_yaml(text)
    for layer in (tnpeft.Layer("Conv3d", 6, 4, (1, 3, 2)), tnpeft.Layer("Linear", 7, 5)):
        try:
            network = spec.bind(layer)
            str(plan(network, "auto"))
            if len(text) % 16 == 0:  # the longest of it
                tnpeft.draw_network(network).data("svg")
            if len(text) % 4 == 0:
                with tnpeft.memory_limit(1 << 28):
                    tnpeft.compile(spec, _module(layer), mode="dense")
        except tnpeft.BindError as error:
            str(error).encode()


def _module(layer: Any) -> Any:
    import torch

    if layer.kind == "Linear":
        return torch.nn.Linear(layer.in_channels, layer.out_channels)
    return torch.nn.Conv3d(layer.in_channels, layer.out_channels, layer.kernel_size)


def _recipe(text: str) -> None:
    from tnpeft.recipe import Recipe

    Recipe.from_yaml(text)


def _name(text: str) -> None:
    import torch

    import tnpeft

    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    uses = (
        lambda: tnpeft.load_spec(text),
        lambda: tnpeft.load_recipe(text),
        lambda: tnpeft.attach(model, text, match="^nothing$"),
        lambda: tnpeft.load(model, text),
        lambda: tnpeft.load_foreign(model, text),
        lambda: tnpeft.draw_network("lora", "/dev/null/" + text),
        lambda: tnpeft.compile("lora", model[0], mode=text),
    )
    for use in uses:
        with contextlib.suppress(tnpeft.TnpeftError):
            use()


def _command(text: str) -> None:
    from typer.testing import CliRunner

    from tnpeft.cli.app import app

    result = CliRunner().invoke(app, json.loads(text))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception


def _metadata(text: str) -> None:
    import torch
    from safetensors.torch import save_file

    import tnpeft
    from tnpeft.io.manifest import KEY, digest

    tensors = {"layers.0.core_up": torch.zeros(4, 2), "layers.0.core_down": torch.zeros(2, 4)}
    try:
        fields = json.loads(text)
        number = fields.pop("format")
        text = json.dumps(fields | {"sha256": digest(fields, tensors), "format": number})
    except (ValueError, KeyError, TypeError, AttributeError):
        pass  # it goes into the file as it is
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.safetensors"
        save_file(tensors, path, {KEY: text.encode("ascii", "replace").decode()})
        tnpeft.load(torch.nn.Sequential(torch.nn.Linear(4, 4)), path)


def run_one(number: int) -> dict[str, Any] | None:
    """Try one input; what is wrong with it, or None."""
    kind, text = input_of(number)

    def ring(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    started = time.process_time()
    found = None
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            attempt(kind, text)
    except TooLong:
        found = {"what": f"more than {SECONDS:g} s", "where": traceback.format_exc(limit=-4)[-600:]}
    except Exception as error:  # noqa: BLE001 - whatever comes out is what is looked for
        found = {"what": f"{type(error).__name__}: {error}"[:300], "where": traceback.format_exc(limit=-3)[-600:]}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    seconds = time.process_time() - started
    return None if found is None else {"number": number, "kind": kind, "seconds": round(seconds, 2), **found}


def work(block: int, count: int, step: Any, out: str) -> None:
    """One block, in a process of its own; its results are a file of one JSON line for each finding and a last one."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.chdir(tempfile.mkdtemp())
    lines, slowest = [], 0.0
    first = step.value if step.value > block * BLOCK else block * BLOCK
    for number in range(first, min((block + 1) * BLOCK, count)):
        step.value = number
        started = time.process_time()
        if (found := run_one(number)) is not None:
            lines.append(found)
        slowest = max(slowest, time.process_time() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    Path(out).write_text(json.dumps({"found": lines, "slowest": round(slowest, 2), "peak_mib": peak}))


def watched(block: int, count: int, folder: Path) -> dict[str, Any]:
    """A block's results; an input at which the process stands still is a finding, and the block goes on after it."""
    context = multiprocessing.get_context("spawn")
    step, stuck = context.Value("q", -1), []
    while True:
        out = folder / f"{block}.part"
        process = context.Process(target=work, args=(block, count, step, str(out)))
        process.start()
        last, since = step.value, time.monotonic()
        while process.is_alive():
            process.join(1.0)
            if step.value != last:
                last, since = step.value, time.monotonic()
            if time.monotonic() - since > STUCK:
                process.kill()
                process.join()
        if out.exists():
            result: dict[str, Any] = json.loads(out.read_text())
            out.unlink()
            result["found"] += stuck
            return result
        kind, _ = input_of(step.value)
        stuck.append(
            {"number": step.value, "kind": kind, "what": f"the process ended ({process.exitcode})", "where": ""}
        )
        step.value += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--share", type=int, default=0, help="the number of this process, if others run too")
    parser.add_argument("--only", type=int, help="run only this input, and show it")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/fuzz.json"))
    arguments = parser.parse_args()
    if arguments.only is not None:
        kind, text = input_of(arguments.only)
        sys.stdout.write(f"{kind}: {text[:2000]!r}\n")
        attempt(kind, text)
        return
    state = arguments.out.with_suffix(".state")
    state.mkdir(parents=True, exist_ok=True)
    blocks = -(-arguments.count // BLOCK)
    for block in range(arguments.share, blocks, arguments.processes):
        file = state / f"{block}.json"
        if not file.exists():
            file.write_text(json.dumps(watched(block, arguments.count, state)))
    done = [
        json.loads((state / f"{block}.json").read_text())
        for block in range(blocks)
        if (state / f"{block}.json").exists()
    ]
    found = [item for part in done for item in part["found"]]
    results = {
        "inputs": min(len(done) * BLOCK, arguments.count),
        "findings": len(found),
        "slowest_seconds": max((part["slowest"] for part in done), default=0.0),
        "peak_mib": max((part["peak_mib"] for part in done), default=0),
        "found": found[:50],
    }
    arguments.out.write_text(json.dumps({"environment": environment(), "results": results}, indent=2) + "\n")
    sys.stdout.write(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
