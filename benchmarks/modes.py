"""Which mode is the quickest on a layer, what did the cost model predict, and what does its choice lose?

    python benchmarks/modes.py --rounds 9

Forward and backward of single adapted layers of the models of `models.py`, each in every mode, in turn. `frozen` is
the plain layer with the gradient of its input alone. `loss` is the time of the mode that `auto` chose over the best.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from common import alternating, parser, show, timings, write
from torch import Tensor, nn

import tnpeft
from tnpeft.plan import predict

MODES = ("dense", "hybrid", "factored")
# Channels in, channels out, voxels a side: what the 41.7 M model sees at 16^3 and 32^3, and one of the paper's model.
CONVOLUTIONS = (
    (32, 32, 16), (96, 32, 16), (64, 64, 8), (192, 64, 8), (128, 128, 4), (384, 128, 4), (256, 256, 2), (512, 256, 2),
    (32, 32, 32), (64, 32, 32), (96, 32, 32), (64, 64, 16), (128, 64, 16), (128, 128, 8), (256, 256, 4), (512, 512, 4),
)  # fmt: skip
# Features in and out, rows.
LINEARS = ((128, 32, 1), (128, 256, 1), (128, 128, 64), (256, 256, 8), (256, 256, 512), (512, 512, 64))
SPECS = {
    "tenvoo_l": {"r": 4}, "tenvoo_q": {"r": 4}, "lora": {"r": 2}, "loha": {"r": 1}, "lokr_both": {"r": 24},
    "quanta": {"r": 4},
}  # fmt: skip


def main() -> None:
    options = parser(__doc__, "modes.json")
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--specs", nargs="+", default=list(SPECS))
    options.add_argument("--batch", type=int, default=1)
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for name in arguments.specs:
        for layer, x in layers(arguments.batch):
            if type(layer).__name__ in tnpeft.load_spec(name).layers:
                rows.append(measure(name, layer, x, arguments.rounds))
                print(line(rows[-1]), flush=True)
    columns = ["spec", "layer", "input", "frozen", *(f"{mode} (predicted)" for mode in MODES), "auto", "loss"]
    cells = [cell(row) for row in rows]
    show("One layer, forward and backward, ms", columns, cells)
    losses = sorted(row["loss"] for row in rows)
    print(f"auto against the best mode: worst {losses[-1]:.3f}, median {losses[len(losses) // 2]:.3f}")
    write(arguments.out, rows)


def layers(batch: int) -> list[tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    found: list[tuple[nn.Module, Tensor]] = []
    for inputs, outputs, side in CONVOLUTIONS:
        found.append((nn.Conv3d(inputs, outputs, 3, padding=1), torch.randn(batch, inputs, side, side, side)))
    for inputs, outputs, rows in LINEARS:
        found.append((nn.Linear(inputs, outputs), torch.randn(batch * rows, inputs)))
    return found


def measure(name: str, layer: nn.Module, x: Tensor, rounds: int) -> dict[str, Any]:
    x.requires_grad_()
    frozen = copy.deepcopy(layer).requires_grad_(False)
    with torch.no_grad():
        gradient = torch.randn_like(layer(x))
    calls: dict[str, Callable[[], None]] = {"frozen": step(frozen, x, gradient)}
    plans = {}
    for mode in (*MODES, "auto"):
        model = nn.Sequential(copy.deepcopy(layer))
        tnpeft.attach(model, name, match=["0"], mode=mode, **SPECS.get(name, {}))
        adapter = model[0].adapter("default")
        plans[mode] = adapter.calling.running(model[0], x, ()).plan
        if mode != "auto":
            calls[mode] = step(model, x, gradient)
    call = adapter.calling.last.call
    predicted = {mode: predict(plans[mode], call).step for mode in MODES}
    planned = {mode: found.mode for mode, found in plans.items()}
    found = timings(alternating(calls, rounds), "frozen")
    times = {mode: found[mode].seconds for mode in calls}
    possible = [mode for mode in MODES if planned[mode] == mode]
    best = min(possible, key=lambda mode: times[mode])
    return {
        "spec": name,
        "layer": str(adapter.network.layer),
        "input": list(x.shape),
        "seconds": times,
        "predicted": predicted,
        "auto": planned["auto"],
        "best": best,
        "loss": times[planned["auto"]] / times[best],
    }


def step(model: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], None]:
    def run() -> None:
        model(x).backward(gradient)

    return run


def cell(row: dict[str, Any]) -> list[str]:
    seconds, predicted = row["seconds"], row["predicted"]
    pairs = [f"{1e3 * seconds[mode]:.2f} ({1e3 * predicted[mode]:.2f})" for mode in MODES]
    size = "x".join(map(str, row["input"]))
    return [
        row["spec"],
        row["layer"],
        size,
        f"{1e3 * seconds['frozen']:.2f}",
        *pairs,
        row["auto"],
        f"{row['loss']:.2f}",
    ]


def line(row: dict[str, Any]) -> str:
    return "  ".join(cell(row))


if __name__ == "__main__":
    main()
