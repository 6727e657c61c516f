"""Peak memory of a training step (forward, backward, Adam) of every method, for tnpeft's methods in every mode.

    python benchmarks/memory.py --size 16
    python benchmarks/memory.py --model paper --shape 160,224,160 --device cuda --autocast bf16

On a CPU the allocations of every operation are counted, from the making of the model on; workspace inside a kernel is
not seen. On a GPU it is what torch's allocator has given out. `held` is there between steps: the model, the adapter and
Adam's state. `saved` is what the forward pass saves for the backward pass, mostly activations. No times are measured.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from allocation import Allocations
from common import parser, show, write
from methods import PEERS, RECIPES, adapt
from models import unet
from torch import nn
from training import Setting, add_options, optimiser_of, setting_of

MODES = ("dense", "hybrid", "factored", "auto")
MIB = 2**20

Make = Callable[..., nn.Module]


class Counted:
    """Bytes that are alive on a device, and the most since `restart`."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device.startswith("cuda")
        self._counts = None if self.on_gpu else Allocations()

    def context(self) -> AbstractContextManager[Any]:
        return self._counts or nullcontext()

    @property
    def alive(self) -> int:
        return self._counts.alive if self._counts else torch.cuda.memory_allocated()

    @property
    def peak(self) -> int:
        return self._counts.peak if self._counts else torch.cuda.max_memory_allocated()

    def restart(self) -> None:
        if self._counts:
            self._counts.restart()
        else:
            torch.cuda.reset_peak_memory_stats()


def methods(model: str, modes: Sequence[str], peers: bool) -> Iterator[tuple[str, Make]]:
    """Every method by name, each to be made when its turn comes; ranks are those of the recipes."""
    base = unet(model)
    for name in ("full", "floor"):
        yield name, partial(adapted, base, name, "auto")
    for recipe in RECIPES:
        for mode in modes:
            yield f"{recipe} {mode}", partial(adapted, base, recipe, mode)
    if peers:
        for name in PEERS:
            if "Tucker" not in name:
                yield name, partial(adapted, base, name, "auto")


def adapted(base: nn.Module, name: str, mode: str, setting: Setting) -> nn.Module:
    return adapt(setting.placed(copy.deepcopy(base)), name, mode)


def measure(make: Make, setting: Setting) -> dict[str, int]:
    """Bytes held, saved and at the peak of the third step."""
    gc.collect()
    counted = Counted(setting.device)
    with counted.context():
        model = make(setting=setting)
        optimiser = optimiser_of(model, setting)
        for _ in range(3):
            gc.collect()
            held = counted.alive
            counted.restart()
            saved = step(model, optimiser, counted, setting) - held
        peak = counted.peak
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"trained": trained, "held": held, "saved": saved, "peak": peak}


def step(model: nn.Module, optimiser: torch.optim.Optimizer, counted: Counted, setting: Setting) -> int:
    """One training step on noise; bytes alive after its forward pass."""
    x, timesteps = setting.inputs()
    with setting.precision():
        loss = nn.functional.mse_loss(model(x, timesteps), torch.randn_like(x))
    alive = counted.alive
    loss.backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return alive


def main() -> None:
    options = parser(__doc__, "memory.json")
    add_options(options)
    options.add_argument("--modes", nargs="+", default=list(MODES), help="execution modes of tnpeft's methods")
    options.add_argument("--no-peers", action="store_true", help="leave the other libraries out")
    options.add_argument("--only", nargs="*", help="only methods (and full) whose names begin so")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    setting = setting_of(arguments)
    found = {}
    for name, make in methods(setting.model, arguments.modes, not arguments.no_peers):
        if not arguments.only or name.startswith(("full", *arguments.only)):
            found[name] = measure(make, setting)
            print(name, found[name], flush=True)
    full = found["full"]["peak"]
    rows = [
        [name, f"{one['trained']:,}", *(f"{one[key] / MIB:.1f}" for key in ("held", "saved", "peak")),
         f"{one['peak'] / full:.3f}"]
        for name, one in found.items()
    ]  # fmt: skip
    title = f"Memory of a training step, MiB, {setting}"
    show(title, ("method", "trained", "held", "saved", "peak", "ratio to full"), rows)
    write(arguments.out, {**setting.as_json(), "methods": found})


if __name__ == "__main__":
    main()
