"""Time to attach each recipe to the paper's model, and the memory that an attached model holds over its base.

    python benchmarks/attach.py

`first` is the first attach in a fresh process (after the imports), `again` a later one, for which plans and programs
exist. Memory is that of tensors: cores, frozen copies, copies of what else trains, and what the first calls keep for
later ones, mostly what they fold from the frozen copies.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from typing import Any

import torch
from allocation import Allocations
from common import parser, show, write
from methods import RECIPES
from models import unet
from torch import nn

import tnpeft


def held(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def measure(recipe: str, name: str, side: int) -> dict[str, Any]:
    """One recipe, in this process; the first calls are of volumes of `side` voxels cubed."""
    seconds = []
    for _ in range(2):
        model = unet(name)
        before = held(model)
        start = time.perf_counter()
        tnpeft.attach(model, recipe)
        seconds.append(time.perf_counter() - start)
    with Allocations() as counted:  # it slows down what it counts
        model = unet(name)
        tnpeft.attach(model, recipe)
        gc.collect()
        attached = counted.alive
        with torch.no_grad():
            for _ in range(2):  # the second pass groups layers
                model(torch.randn(1, 1, side, side, side), torch.tensor([5]))
        gc.collect()
        folded = counted.alive - attached
    mib = 2.0**-20
    return {
        "first_s": seconds[0],
        "again_s": seconds[1],
        "base_mib": before * mib,
        "tensors_mib": (held(model) - before) * mib,
        "folded_mib": folded * mib,
    }


def main() -> None:
    options = parser(__doc__, "attach.json")
    options.add_argument("--recipe", help="measure this recipe only, in this process")
    options.add_argument("--recipes", nargs="+", default=RECIPES)
    options.add_argument("--model", choices=("tiny", "small", "paper"), default="paper")
    options.add_argument("--size", type=int, default=32, help="voxels of a volume along each axis")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.recipe:
        sys.stdout.write(json.dumps(measure(arguments.recipe, arguments.model, arguments.size)))
        return
    results: dict[str, dict[str, Any]] = {}
    for recipe in arguments.recipes:
        command = [sys.executable, __file__, "--recipe", recipe, "--model", arguments.model]
        command += ["--threads", str(arguments.threads), "--size", str(arguments.size)]
        results[recipe] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    rows = [
        [name, f"{r['first_s']:.2f}", f"{r['again_s']:.2f}", f"{r['tensors_mib']:.1f}", f"{r['folded_mib']:.1f}"]
        for name, r in results.items()
    ]
    base = next(iter(results.values()))["base_mib"]
    title = f"Attaching to the {arguments.model} model ({base:.0f} MiB)"
    show(title, ("recipe", "first, s", "again, s", "tensors, MiB", "folded, MiB"), rows)
    write(arguments.out, results)


if __name__ == "__main__":
    main()
