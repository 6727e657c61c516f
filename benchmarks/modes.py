"""Which mode is the fastest on a layer, what did the cost model predict, and how much does its choice lose?

    python benchmarks/modes.py --rounds 9
    python benchmarks/modes.py --layers-of paper --shape 160,224,160 --device cuda --autocast bf16
    python benchmarks/modes.py --pool one.json two.json three.json

Forward and backward of single adapted layers, each in every mode, in turn: of the layers below or, with `--layers-of`,
of all that the recipes adapt in a model, as it calls them. `--alike` layers of one signature are called in a row and
contract their cores together, as in a model; times are of one. `frozen` is the plain layer with the gradient of its
input alone. `loss` is the time of the mode that `auto` chose, and of the one that `autotune=True` did, over the best.
Of so many comparisons some look lost by chance: a row where `auto` loses more than 5 % is measured once more, in four
times as many rounds, and that measurement counts, whatever it says. A process has its own luck too (where its memory
lies): `--pool` puts several runs together, with geometric means of their times and the choices of the last.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import alternating, parser, show, timings, write
from models import matched, unet
from torch import Tensor, nn
from training import AUTOCAST, Setting, add_options, setting_of

import tnpeft
from tnpeft.execution.dispatch import running_of
from tnpeft.schedule import predict

MODES = ("dense", "hybrid", "factored")
LOST = 1.05  # what `auto` may lose
AGAIN = 4  # times as many rounds, where it seems to have lost more
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
    arguments = options().parse_args()
    torch.set_num_threads(arguments.threads)
    rows = pooled(arguments.pool) if arguments.pool else measured(arguments)
    columns = ["spec", "layer", "input", "frozen", *(f"{mode} (predicted)" for mode in MODES)]
    columns += ["auto", "loss", "autotune", "loss"]
    cells = [cell(row) for row in rows]
    show("One layer, forward and backward, ms", columns, cells)
    for way, key in (("auto", "loss"), ("autotune", "loss_autotune")):
        losses = [row[key] for row in rows]
        kept, mean = sum(loss <= LOST for loss in losses), sum(losses) / len(losses)
        print(f"{way}: within 5 % of the best mode on {kept} of {len(rows)}, mean {mean:.3f}, worst {max(losses):.3f}")
    write(arguments.out, rows)


def measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    setting = setting_of(arguments)
    rows = []
    for name in arguments.specs:
        for layer, shape in layers(arguments.layers_of, setting):
            if type(layer).__name__ in tnpeft.load_spec(name).layers:
                row = measure(name, layer, shape, setting, arguments.alike, arguments.rounds)
                if row["loss"] > LOST:
                    row = measure(name, layer, shape, setting, arguments.alike, AGAIN * arguments.rounds)
                rows.append(row)
                print(line(rows[-1]), flush=True)
    return rows


def pooled(files: list[Path]) -> list[dict[str, Any]]:
    """The rows of several runs as one, whose times are geometric means."""
    runs = [json.loads(file.read_text(encoding="utf-8"))["results"] for file in files]
    rows = []
    for parts in zip(*runs, strict=True):
        assert len({(row["spec"], row["layer"], *row["input"]) for row in parts}) == 1, "runs of other layers"
        last = parts[-1]
        times = {mode: math.prod(row["seconds"][mode] for row in parts) ** (1 / len(parts)) for mode in last["seconds"]}
        best = min((mode for mode in MODES if mode in times), key=lambda mode: times[mode])
        losses = {"loss": times[last["auto"]] / times[best], "loss_autotune": times[last["autotune"]] / times[best]}
        rows.append({**last, "rounds": [row["rounds"] for row in parts], "seconds": times, "best": best, **losses})
    return rows


def options() -> argparse.ArgumentParser:
    found = parser(__doc__, "modes.json")
    add_options(found)
    found.add_argument("--rounds", type=int, default=9)
    found.add_argument("--specs", nargs="+", default=list(SPECS))
    found.add_argument("--alike", type=int, default=3, help="number of equal layers that are called in a row")
    found.add_argument("--pool", nargs="+", type=Path, help="merge the files of earlier runs")
    found.add_argument(
        "--layers-of", choices=("tiny", "small", "paper"), help="measure this model's layers at `--size` instead"
    )
    return found


def layers(model: str | None, setting: Setting) -> Iterator[tuple[nn.Module, tuple[int, ...]]]:
    """Layers and the shapes of their inputs."""
    torch.manual_seed(0)
    if model is not None:
        yield from layers_of(setting.placed(unet(model)), setting)
        return
    for inputs, outputs, side in CONVOLUTIONS:
        layer = nn.Conv3d(inputs, outputs, 3, padding=1)
        yield setting.placed(layer), (setting.batch, inputs, side, side, side)
    for inputs, outputs, rows in LINEARS:
        yield setting.placed(nn.Linear(inputs, outputs)), (setting.batch * rows, inputs)


def layers_of(model: nn.Module, setting: Setting) -> list[tuple[nn.Module, tuple[int, ...]]]:
    """Of the layers that the recipes adapt one for each kind and input, as one call of the model has them."""
    found: dict[tuple[str, tuple[int, ...]], nn.Module] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.setdefault((str(layer), tuple(inputs[0].shape)), layer)

    for name in matched(model):
        model.get_submodule(name).register_forward_pre_hook(note)
    with torch.no_grad(), setting.precision():
        model(*setting.inputs())
    return [(_plain(layer), shape) for (_, shape), layer in found.items()]


def _plain(layer: nn.Module) -> nn.Module:
    """A copy of a layer without what hangs on it."""
    found = copy.deepcopy(layer)
    found._forward_pre_hooks.clear()
    return found


class Alike(nn.Module):
    """Layers of one signature, called on one input."""

    def __init__(self, layer: nn.Module, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(count))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def measure(
    name: str, layer: nn.Module, shape: tuple[int, ...], setting: Setting, alike: int, rounds: int
) -> dict[str, Any]:
    x = torch.randn(*shape, device=setting.device)
    if setting.autocast:
        x = x.to(AUTOCAST[setting.autocast])
    if setting.channels_last and x.dim() == 5:
        x = x.to(memory_format=torch.channels_last_3d)
    x.requires_grad_()
    timed = partial(step, x=x, setting=setting)
    calls: dict[str, Callable[[], None]] = {"frozen": timed(Alike(layer, alike).requires_grad_(False))}
    plans = {}
    for mode in (*MODES, "auto", "autotune"):
        model = Alike(layer, alike)
        tuned = mode == "autotune"
        tnpeft.attach(
            model, name, match=r"layers\.\d+", mode="auto" if tuned else mode, autotune=tuned, **SPECS.get(name, {})
        )
        adapter = model.layers[0].adapter("default")
        site = model.layers[0].site
        plans[mode] = running_of(site, site.acting[0], x, ()).plan
        if mode in MODES:
            calls[mode] = timed(model)
    call = model.layers[0].calls("default").last.call
    predicted = {mode: predict(plans[mode], call).step for mode in MODES}
    planned = {mode: found.mode for mode, found in plans.items()}
    found = timings(alternating(calls, rounds, synchronise=setting.on_gpu), "frozen")
    times = {mode: found[mode].seconds / alike for mode in calls}
    possible = [mode for mode in MODES if planned[mode] == mode]
    best = min(possible, key=lambda mode: times[mode])
    return {
        "spec": name,
        "layer": str(adapter.network.layer),
        "input": list(x.shape),
        "alike": alike,
        "rounds": rounds,
        "seconds": times,
        "predicted": predicted,
        "auto": planned["auto"],
        "autotune": planned["autotune"],
        "best": best,
        "loss": times[planned["auto"]] / times[best],
        "loss_autotune": times[planned["autotune"]] / times[best],
    }


def step(model: nn.Module, x: Tensor, setting: Setting) -> Callable[[], None]:
    with torch.no_grad(), setting.precision():
        gradients = [torch.randn_like(output) for output in model(x)]

    def run() -> None:
        with setting.precision():
            outputs = model(x)
        torch.autograd.backward(outputs, gradients)

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
        row["autotune"],
        f"{row['loss_autotune']:.2f}",
    ]


def line(row: dict[str, Any]) -> str:
    return "  ".join(cell(row))


if __name__ == "__main__":
    main()
