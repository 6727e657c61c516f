"""Peak memory of a training step (forward, backward, Adam) of every method, and of every mode of tnpeft's.

    python benchmarks/memory.py --size 16

On a CPU every operation's allocations are counted, from the model's making on; workspace within a kernel is unseen.
On a GPU it is what torch's allocator has given out. `held` is there between steps: the model, the adapter and Adam's
state. `saved` is what the forward pass leaves for the backward pass, activations above all. Nothing here is a timing.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from allocation import Allocations
from common import parser, show, write
from models import lycoris_model, matched, peft_model, train_biases_and_norms, unet
from torch import nn

import tnpeft

RECIPES = ("lora_ddpm", "loha_ddpm", "lokr_ddpm", "tenvoo_l_ddpm", "tenvoo_q_ddpm")
MODES = ("dense", "hybrid", "factored", "auto")
MIB = 2**20

Make = Callable[[], nn.Module]


class Counted:
    """Bytes that are alive on a device, and the most since `restart`."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
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


def methods(model: str, peers: bool) -> Iterator[tuple[str, Make]]:
    """Every method by name, each to be made when its turn comes; ranks are those of the recipes."""
    yield "full", lambda: unet(model)
    yield "floor", lambda: floor(model)
    for recipe in RECIPES:
        for mode in MODES:
            yield f"{recipe} {mode}", lambda recipe=recipe, mode=mode: adapted(model, recipe, mode)
    if peers:
        yield "peft LoRA r=2", lambda: peft_model(unet(model), 2)
        yield "lycoris LoCon r=2", lambda: lycoris_model(unet(model), "lora", 2)
        yield "lycoris LoHa r=1", lambda: lycoris_model(unet(model), "loha", 1)
        yield "lycoris LoKr r=24", lambda: lycoris_model(unet(model), "lokr", 24, decompose_both=True, factor=-1)


def floor(model: str) -> nn.Module:
    """The frozen model that trains only the biases and norms of the recipes."""
    frozen = unet(model).requires_grad_(False)
    train_biases_and_norms(frozen, matched(frozen))
    return frozen


def adapted(model: str, recipe: str, mode: str) -> nn.Module:
    found = unet(model)
    tnpeft.attach(found, recipe, mode=mode)
    return found


def measure(make: Make, device: str, size: int, batch: int) -> dict[str, int]:
    """Bytes held, saved and at the peak of the third step."""
    gc.collect()
    counted = Counted(device)
    with counted.context():
        model = make().to(device)
        optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        for _ in range(3):
            gc.collect()
            held = counted.alive
            counted.restart()
            saved = step(model, optimiser, counted, size, batch, device) - held
        peak = counted.peak
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"trained": trained, "held": held, "saved": saved, "peak": peak}


def step(
    model: nn.Module, optimiser: torch.optim.Optimizer, counted: Counted, size: int, batch: int, device: str
) -> int:
    """One training step on noise; bytes alive after its forward pass."""
    x = torch.randn(batch, 1, size, size, size, device=device)
    loss = nn.functional.mse_loss(model(x, torch.full((batch,), 17, device=device)), torch.randn_like(x))
    alive = counted.alive
    loss.backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return alive


def main() -> None:
    options = parser(__doc__, "memory.json")
    options.add_argument("--model", choices=("small", "paper"), default="small")
    options.add_argument("--size", type=int, default=16, help="side of the volume, voxels")
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--no-peers", action="store_true", help="leave the other libraries out")
    options.add_argument("--only", nargs="*", help="these methods (and full) alone, by the beginning of their names")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    found = {}
    for name, make in methods(arguments.model, not arguments.no_peers):
        if not arguments.only or name.startswith(("full", *arguments.only)):
            found[name] = measure(make, arguments.device, arguments.size, arguments.batch)
    full = found["full"]["peak"]
    rows = [
        [name, f"{one['trained']:,}", *(f"{one[key] / MIB:.1f}" for key in ("held", "saved", "peak")),
         f"{one['peak'] / full:.3f}"]
        for name, one in found.items()
    ]  # fmt: skip
    title = f"Memory of a training step, MiB, {arguments.model} model, {arguments.size}^3, batch {arguments.batch}"
    show(title, ("method", "trained", "held", "saved", "peak", "ratio to full"), rows)
    asked = {key: getattr(arguments, key) for key in ("model", "size", "batch", "device")}
    write(arguments.out, {**asked, "methods": found})


if __name__ == "__main__":
    main()
