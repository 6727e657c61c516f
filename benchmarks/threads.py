"""Threads that call one adapted model: exceptions, and the differences of outputs and gradients from one thread's.

There is a run for each mode, with gradients and without (half of the threads under `no_grad`, half under
`inference_mode`), and with `tnpeft.accumulating` in none or one of the threads. Threads switch more often than usual.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from common import environment, parser, show, write
from torch import Tensor, nn

import tnpeft

MODES = ("dense", "factored", "hybrid", "auto")
INTERVAL = 1e-5  # seconds after which a thread is asked to give way; Python's own is 5e-3
STEPS = 4  # calls within one `accumulating`


def made(mode: str, spec: str) -> nn.Module:
    """Two layers that contract their cores together, as after training."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    tnpeft.attach(model, spec, match=r"\d", mode=mode, r=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def called(model: nn.Module, x: Tensor, kind: str) -> list[Tensor]:
    """The output and, with gradients, those of the input and of everything that trains."""
    if kind == "gradients":
        x = x.clone().requires_grad_()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        out = model(x)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *trained])]
    with torch.no_grad() if kind == "no_grad" else torch.inference_mode():
        return [model(x)]


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest, relative to the largest entry of the same tensor; infinite where one is missing or no number."""
    if len(found) != len(expected):
        return float("inf")
    each = [float((one - other).abs().max() / other.abs().max()) for one, other in zip(found, expected, strict=True)]
    return max(each) if all(one == one for one in each) else float("inf")


class Trial:
    """Threads, each with an input of its own, that call one model."""

    def __init__(self, mode: str, gradients: bool, keeps: bool, options: Any) -> None:
        self.model, self.calls = made(mode, options.spec), options.calls
        self.keeps = keeps
        self.kinds = ["gradients" if gradients else ("no_grad", "inference")[n % 2] for n in range(options.workers)]
        self.inputs = [torch.randn(3, 4) for _ in self.kinds]
        for _ in range(2):  # layers that have run once contract together
            self.expected = [called(self.model, x, kind) for x, kind in zip(self.inputs, self.kinds, strict=True)]
        self.done = [0] * len(self.kinds)
        self.worst = [0.0] * len(self.kinds)
        self.other_bits = [0] * len(self.kinds)
        self.errors: list[str] = []

    def work(self, number: int) -> None:
        while self.done[number] < self.calls:
            with tnpeft.accumulating(self.model) if self.keeps and not number else nullcontext():
                for _ in range(min(STEPS, self.calls - self.done[number])):
                    self.done[number] += 1
                    try:
                        found = called(self.model, self.inputs[number], self.kinds[number])
                    except Exception as error:  # noqa: BLE001 - they are what is counted
                        self.errors.append(f"{type(error).__name__}: {error}")
                        continue
                    if not all(map(torch.equal, found, self.expected[number])):
                        self.other_bits[number] += 1
                        self.worst[number] = max(self.worst[number], difference(found, self.expected[number]))

    def run(self) -> dict[str, Any]:
        threads = [threading.Thread(target=self.work, args=(number,)) for number in range(len(self.kinds))]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {
            "calls": sum(self.done),
            "exceptions": len(self.errors),
            "texts": sorted(set(self.errors))[:5],
            "largest_difference": max(self.worst),
            "calls_with_other_bits": sum(self.other_bits),
            "seconds": round(time.perf_counter() - started, 1),
        }


def main() -> None:
    options = parser(__doc__, "threads.json")
    options.add_argument("--calls", type=int, default=10_000, help="calls of each thread")
    options.add_argument("--workers", type=int, default=8, help="threads that call the model")
    options.add_argument("--spec", default="lora", help="the adapter's spec, for Linear layers")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    sys.setswitchinterval(INTERVAL)
    rows = []
    for mode, gradients, keeps in itertools.product(MODES, (True, False), (False, True)):
        trial = {"mode": mode, "gradients": gradients, "accumulating": keeps}
        rows.append(trial | Trial(mode, gradients, keeps, chosen).run())
        about = {"spec": chosen.spec, "workers": chosen.workers, "calls_of_each": chosen.calls, "interval": INTERVAL}
        write(chosen.out, about | {"trials": rows})
    columns = [name for name in rows[0] if name != "texts"]
    title = f"{chosen.workers} threads on one model ({environment()['cpu']})"
    show(title, [name.replace("_", " ") for name in columns], [[row[name] for name in columns] for row in rows])


if __name__ == "__main__":
    main()
