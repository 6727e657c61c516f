"""Time to attach each recipe to the paper's model, and the memory that an attached model holds over its base.

    python benchmarks/attach.py

`first` is the first attach in a fresh process (after the imports), `again` one with plans and
programs at hand. Memory is that of tensors: cores, frozen copies, own copies of what trains, and
the constants of the frozen copies, which the first forward folds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import torch
from common import parser, show, write
from models import unet
from torch import Tensor, nn

import tnpeft
from tnpeft.surgery import adapters_of


def held(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def constants(model: nn.Module) -> int:
    """Bytes of the folded constants that are not the frozen copies themselves."""
    total = 0
    for adapter in adapters_of(model, "default").values():
        folded = adapter._folded
        own: dict[int, Tensor] = {}
        if folded is not None:
            known = {tensor.data_ptr() for tensor in folded.start}
            own = {tensor.data_ptr(): tensor for tensor in folded.constants if tensor.data_ptr() not in known}
        total += sum(tensor.numel() * tensor.element_size() for tensor in own.values())
    return total


def measure(recipe: str) -> dict[str, Any]:
    """One recipe, in this process."""
    seconds = []
    for _ in range(2):
        model = unet("paper")
        before = held(model)
        start = time.perf_counter()
        tnpeft.attach(model, recipe)
        seconds.append(time.perf_counter() - start)
    with torch.no_grad():
        model(torch.randn(1, 1, 32, 32, 32), torch.tensor([5]))
    mib = 2.0**-20
    return {
        "first_s": seconds[0],
        "again_s": seconds[1],
        "base_mib": before * mib,
        "tensors_mib": (held(model) - before) * mib,
        "constants_mib": constants(model) * mib,
    }


def main() -> None:
    options = parser(__doc__, "attach.json")
    options.add_argument("--recipe", help="measure this one, here")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.recipe:
        sys.stdout.write(json.dumps(measure(arguments.recipe)))
        return
    results: dict[str, dict[str, Any]] = {}
    for recipe in tnpeft.list_recipes():
        command = [sys.executable, __file__, "--recipe", recipe, "--threads", str(arguments.threads)]
        results[recipe] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    rows = [
        [name, f"{r['first_s']:.2f}", f"{r['again_s']:.2f}", f"{r['tensors_mib']:.1f}", f"{r['constants_mib']:.1f}"]
        for name, r in results.items()
    ]
    base = next(iter(results.values()))["base_mib"]
    title = f"Attaching to the paper's model ({base:.0f} MiB)"
    show(title, ("recipe", "first, s", "again, s", "tensors, MiB", "constants, MiB"), rows)
    write(arguments.out, results)


if __name__ == "__main__":
    main()
