"""What every benchmark shares: hardware and versions, alternating timings as ratios, a table, a JSON file."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

PACKAGES = ("tnpeft", "torch", "numpy", "cotengra", "opt_einsum", "networkx", "monai", "peft", "lycoris-lora")
PACKAGES += ("transformers", "matplotlib", "nicegui")
# `cpu` is the time that the process itself took, of all its threads: what else the machine does is not in it.
CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Timing:
    """Seconds per call and the ratio to the reference of the same round: medians, and the middle half of the ratios."""

    seconds: float
    ratio: float
    low: float
    high: float


def environment() -> dict[str, Any]:
    """Hardware and versions, to stand beside every number."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
    }


def alternating(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 3,
    synchronise: bool = False,
    clock: Callable[[], float] = time.perf_counter,
    ends: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of each function, called in turn in every round, so that a slow minute of the machine slows them all.

    No round but the first begins later than at `ends`, by `time.monotonic`.
    """
    for _ in range(warmup):
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds):
        if number and time.monotonic() > ends:
            break
        for name, function in functions.items():
            if synchronise:
                torch.cuda.synchronize()
            start = clock()
            function()
            if synchronise:
                torch.cuda.synchronize()
            times[name].append(clock() - start)
    return times


def timings(times: Mapping[str, Sequence[float]], reference: str) -> dict[str, Timing]:
    """Median seconds and the median of the ratios to `reference`, round by round."""
    found = {}
    for name, own in times.items():
        ratios = sorted(a / b for a, b in zip(own, times[reference], strict=True))
        quarter = len(ratios) // 4
        low, high = ratios[quarter], ratios[-1 - quarter]
        found[name] = Timing(statistics.median(own), statistics.median(ratios), low, high)
    return found


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; the first column is left-aligned, the others are numbers."""
    table = Table(title=title)
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place == 0 else "right")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    # Wide enough for every column where the output is a file.
    Console(width=None if Console().is_terminal else 160).print(table)


def write(path: Path, results: Any) -> None:
    """Write results with the hardware and versions that made them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": environment(), "results": results}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")
    Console().print(f"Written to {path}")


def parser(description: str | None, output: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    options = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    options.add_argument("--out", type=Path, default=Path("runs/benchmarks") / output, help="JSON file to write")
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    return options


def add_clock(options: argparse.ArgumentParser) -> None:
    """The option `--clock`, a name of `CLOCKS`."""
    options.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="`cpu`: this process's own time")


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
