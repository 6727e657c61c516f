"""How long do attaching a second adapter, switching, saving, loading, removing and merging by name take?

    python benchmarks/switch.py

Two adapters of one recipe are on the paper's model, with biases and norms. A switch is `tnpeft.activate`: to either of
them, to a sum of both at scales other than 1, and to the base. `first` passes are the first ones after a switch,
`later` ones follow with the same adapter; the difference is what a switch makes anew. `switch_mib` is the largest size
of the tensors that a switch makes, while it runs or after it. All are medians.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from allocation import Allocations
from common import parser, show, write
from methods import RECIPES
from models import unet
from torch import nn

import tnpeft

NAMES = ("adni", "ppmi")
SUM = {"adni": 1.0, "ppmi": 0.5}


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(recipe: str, model_name: str, size: int, rounds: int) -> dict[str, Any]:
    """One recipe."""
    model = unet(model_name)
    times: dict[str, list[float]] = {"attach, plans made": [seconds(lambda: tnpeft.attach(model, recipe, name="adni"))]}
    times |= _files(model, recipe, rounds)
    times |= _switches(model, rounds)
    times |= _passes(model, size, rounds)
    with Allocations() as counted:  # it slows down what it counts
        tnpeft.activate(model, "adni")
        alone = counted.peak
        tnpeft.activate(model, SUM)
    return {
        "seconds": {name: statistics.median(own) for name, own in times.items()},
        "switch_mib": {"to one": alone * 2.0**-20, "to a sum": counted.peak * 2.0**-20},
    }


def _files(model: nn.Module, recipe: str, rounds: int) -> dict[str, list[float]]:
    """A second adapter comes and goes; the last one stays."""
    times: dict[str, list[float]] = {name: [] for name in ("attach", "save", "remove", "load")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ppmi.safetensors"
        for _ in range(rounds):
            times["attach"].append(seconds(lambda: tnpeft.attach(model, recipe, name="ppmi")))
            times["save"].append(seconds(lambda: tnpeft.save(model, path, "ppmi")))
            times["remove"].append(seconds(lambda: tnpeft.detach(model, name="ppmi")))
            times["load"].append(seconds(lambda: tnpeft.load(model, path)))
            tnpeft.detach(model, name="ppmi")
        tnpeft.load(model, path)
    return times


def _switches(model: nn.Module, rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in ("to one", "to a sum", "to the base", "merge", "unmerge")}
    for _ in range(rounds):
        for name in NAMES:
            times["to one"].append(seconds(lambda name=name: tnpeft.activate(model, name)))  # type: ignore[misc]
        times["to a sum"].append(seconds(lambda: tnpeft.activate(model, SUM)))
        times["to one"].append(seconds(lambda: tnpeft.activate(model, "adni")))
        times["to the base"].append(seconds(lambda: tnpeft.activate(model, {})))
        times["merge"].append(seconds(lambda: tnpeft.merge(model, "ppmi")))
        times["unmerge"].append(seconds(lambda: tnpeft.unmerge(model)))
    return times


def _passes(model: nn.Module, size: int, rounds: int) -> dict[str, list[float]]:
    """Forward passes without gradients, and steps without the optimiser, right after a switch and later."""
    x, moment = torch.randn(1, 1, size, size, size), torch.tensor([5])

    def forward() -> None:
        with torch.no_grad():
            model(x, moment)

    def step() -> None:
        model(x, moment).square().mean().backward()

    times: dict[str, list[float]] = {}
    for name, run in (("forward", forward), ("step", step)):
        first, later = times.setdefault(f"{name}, first", []), times.setdefault(f"{name}, later", [])
        for number in range(-1, rounds):  # the round before the first warms up, and plans
            for adapter in NAMES:
                tnpeft.activate(model, adapter)
                found = [seconds(run) for _ in range(2)]
                first += found[:1] if number >= 0 else []
                later += found[1:] if number >= 0 else []
    return times


def main() -> None:
    options = parser(__doc__, "switch.json")
    options.add_argument("--recipes", nargs="+", default=RECIPES)
    options.add_argument("--model", choices=("tiny", "small", "paper"), default="paper")
    options.add_argument("--size", type=int, default=32, help="edge of the volume of forward passes and steps")
    options.add_argument("--rounds", type=int, default=5)
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    results = {
        recipe: measure(recipe, arguments.model, arguments.size, arguments.rounds) for recipe in arguments.recipes
    }
    rows = [
        [what, *(f"{1e3 * found['seconds'][what]:.1f}" for found in results.values())]
        for what in next(iter(results.values()))["seconds"]
    ]
    show(f"Two adapters on the {arguments.model} model, milliseconds", ("", *results), rows)
    about = {"model": arguments.model, "size": arguments.size, "rounds": arguments.rounds}
    write(arguments.out, {**about, "recipes": results})


if __name__ == "__main__":
    main()
