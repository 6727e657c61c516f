"""This working tree against an earlier commit, alternating, as ratios (above 1: slower, or more memory).

    python benchmarks/before_after.py 7a8f007 --out benchmarks/results/before_after.json

Each tree has one process throughout. Both do the same work in turn, with this tree's scripts. They measure training
steps of a U-Net, warm passes of a stack of small layers, attaching, the first attach of a new process, plans that are
not cached, and the peak memory of a step.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from allocation import Allocations
from common import parser, show, write
from models import matched, unet
from torch import nn

import tnpeft

ROOT = Path(__file__).parents[1]
ROUNDS = 9
# A new process each time: seconds of what nothing has cached.
_CONV, _LINEAR = "nn.Conv3d(64, 128, 3)", "nn.Linear(768, 768)"
COLD = {
    "first attach of tenvoo_l": f"m = nn.Sequential({_CONV}); f = t.attach; run = lambda: f(m, 'tenvoo_l', match='0')",
    "plans of tenvoo_l": f"n = t.load_spec('tenvoo_l').bind({_CONV}); f = t.plan; run = lambda: f(n, 'auto')",
    "plans of quanta": f"n = t.load_spec('quanta').bind({_LINEAR}); f = t.plan; run = lambda: f(n, 'auto')",
}


def unet_step(spec: str, size: int) -> Callable[[], float]:
    """Seconds of a step of Adam on volumes of noise."""
    model = unet("small")
    layers = [name for name in matched(model) if "conv" in name] if spec == "tenvoo_l" else matched(model)
    tnpeft.attach(model, spec, match=layers)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    x, when = torch.randn(1, 1, size, size, size), torch.tensor([7])

    def run() -> float:
        started = time.perf_counter()
        nn.functional.mse_loss(model(x, when), x).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    return run


def unet_memory(spec: str) -> Callable[[], float]:
    """Bytes at the peak of a step."""
    step = unet_step(spec, 16)

    def run() -> float:
        with Allocations() as counted:
            step()
        return float(counted.peak)

    return run


def stack(spec: str, backward: bool) -> Callable[[], float]:
    """Seconds of 20 passes through twelve small linear layers."""
    model, x = nn.Sequential(*(nn.Linear(64, 64) for _ in range(12))), torch.randn(4, 64)
    tnpeft.attach(model, spec, match=r"\d")

    def run() -> float:
        started = time.perf_counter()
        for _ in range(20):
            y = model(x)
            if backward:
                y.sum().backward()
        return time.perf_counter() - started

    return run


def attaching(spec: str) -> Callable[[], float]:
    """Seconds of attaching to all layers of a U-Net, and of taking it off."""
    model = unet("small")
    layers = [name for name in matched(model) if "conv" in name]

    def run() -> float:
        started = time.perf_counter()
        tnpeft.attach(model, spec, match=layers)
        tnpeft.detach(model)
        return time.perf_counter() - started

    return run


WORK: dict[str, Callable[[], Callable[[], float]]] = {
    "step, tenvoo_l, 16 voxels a side": lambda: unet_step("tenvoo_l", 16),
    "step, tenvoo_l, 32 voxels a side": lambda: unet_step("tenvoo_l", 32),
    "step, lora, 16 voxels a side": lambda: unet_step("lora", 16),
    "step, lora, 32 voxels a side": lambda: unet_step("lora", 32),
    "passes, 12 linear layers, lora": lambda: stack("lora", False),
    "passes and back, 12 linear layers, lora": lambda: stack("lora", True),
    "passes and back, 12 linear layers, quanta": lambda: stack("quanta", True),
    "attach and detach, tenvoo_l": lambda: attaching("tenvoo_l"),
    "memory of a step, tenvoo_l": lambda: unet_memory("tenvoo_l"),
    "memory of a step, lora": lambda: unet_memory("lora"),
}


def serve() -> None:
    """Read the name of a piece of work, prepare it, and run it once for each line until an empty one."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    for line in sys.stdin:
        torch.manual_seed(0)
        run = WORK[line.strip()]()
        for _ in range(2):
            run()
        while next(sys.stdin).strip():
            sys.stdout.write(f"{run()!r}\n")
            sys.stdout.flush()


@contextmanager
def earlier_tree(commit: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--detach", tree, commit], cwd=ROOT, check=True, capture_output=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)


def environment(tree: Path, threads: int) -> dict[str, str]:
    path = os.pathsep.join([str(tree), str(ROOT / "benchmarks")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}


def seconds_in_new_process(code: str, environments: dict[str, dict[str, str]], side: str) -> float:
    setup = "import time, torch, tnpeft as t; from torch import nn; "
    timed = "; s = time.perf_counter(); run(); print(time.perf_counter() - s)"
    command = [sys.executable, "-c", setup + code + timed]
    return float(subprocess.check_output(command, env=environments[side], text=True))


def main() -> None:
    options = parser(__doc__, "before_after.json")
    options.add_argument("commit", help="the earlier commit")
    options.add_argument("--rounds", type=int, default=ROUNDS)
    found = options.parse_args()
    rows = {}
    with earlier_tree(found.commit) as tree:
        environments = {name: environment(place, found.threads) for name, place in (("old", tree), ("new", ROOT))}
        sides = {
            name: subprocess.Popen(
                [sys.executable, __file__, "--serve"], env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            for name, env in environments.items()
        }
        for what in WORK:
            told(sides, what)
            rows[what] = compared(lambda side: asked(sides[side]), found.rounds)
            told(sides, "")
        for side in sides.values():
            side.communicate()
        for what, code in COLD.items():
            rows[what] = compared(partial(seconds_in_new_process, code, environments), found.rounds)
    columns = ("work", "old", "new", "ratio of the medians", "of the least")
    table = [[what, *(f"{value:.4g}" for value in row.values())] for what, row in rows.items()]
    show(f"{found.commit} against this tree", columns, table)
    write(found.out, {"commit": found.commit, "rounds": found.rounds, "threads": found.threads, "rows": rows})


def told(sides: dict[str, subprocess.Popen[str]], line: str) -> None:
    for side in sides.values():
        assert side.stdin is not None
        side.stdin.write(f"{line}\n")
        side.stdin.flush()


def asked(side: subprocess.Popen[str]) -> float:
    assert side.stdin is not None
    assert side.stdout is not None
    side.stdin.write("again\n")
    side.stdin.flush()
    return float(side.stdout.readline())


def compared(measure: Callable[[str], float], rounds: int) -> dict[str, float]:
    """Medians of rounds in which both sides take turns; the first round is left out."""
    values: dict[str, list[float]] = {"old": [], "new": []}
    for number in range(rounds + 1):
        for side in ("old", "new") if number % 2 else ("new", "old"):
            values[side].append(measure(side))
    old, new = (statistics.median(values[side][1:]) for side in ("old", "new"))
    return {"old": old, "new": new, "ratio": new / old, "least": min(values["new"][1:]) / min(values["old"][1:])}


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        main()
