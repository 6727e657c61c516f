"""Two adapters over one base model: switch between them, add them up, merge one by its name.

    python examples/several_adapters.py

A few seconds on a CPU. The base model has learned to blur images. One adapter teaches it to find edges, another to
invert images; each is a file of its own in runs/several_adapters, and the base is there once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tnpeft

FOLDER = Path("runs/several_adapters")
IMAGES = torch.randn(16, 1, 12, 12, generator=torch.Generator().manual_seed(0))


def blurred(images: Tensor) -> Tensor:
    return F.avg_pool2d(images, 3, stride=1, padding=1)


def edges(images: Tensor) -> Tensor:
    return images - blurred(images)


TASKS: dict[str, Callable[[Tensor], Tensor]] = {"edges": edges, "inverted": torch.neg}


def train(model: nn.Module, parameters: Iterable[nn.Parameter], task: Callable[[Tensor], Tensor]) -> None:
    optimiser = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(80):
        optimiser.zero_grad()
        F.mse_loss(model(IMAGES), task(IMAGES)).backward()
        optimiser.step()


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    output: Tensor = model(IMAGES)
    return output


@torch.no_grad()
def weight(model: nn.Module) -> Tensor:
    """What layer 2 multiplies with: an adapted layer's `weight` reads W plus the updates that act."""
    return torch.as_tensor(model.get_submodule("2").weight).clone()


def same(actual: Tensor, expected: Tensor) -> str:
    """Bit for bit, without a tolerance."""
    return "exact: yes" if torch.equal(actual, expected) else "exact: no"


def rounding(actual: Tensor, expected: Tensor) -> str:
    return f"largest difference: {(actual - expected).abs().max():.0e}"


def row(what: str, output: Tensor) -> None:
    print(f"{what:<20}" + "".join(f"{F.mse_loss(output, task(IMAGES)):>12.4f}" for task in TASKS.values()))


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 1)
    )
    train(model, model.parameters(), blurred)
    base = copy.deepcopy(model)  # kept for the comparisons below
    FOLDER.mkdir(parents=True, exist_ok=True)

    # 1. Attach and train one after the other. The newest acts and trains alone.
    outputs: dict[str, Tensor] = {}
    for name, task in TASKS.items():
        handle = tnpeft.attach(model, "lora", match=["2"], r=4, name=name)
        train(model, handle.parameters(), task)
        outputs[name] = run(model)
        tnpeft.save(model, FOLDER / f"{name}.safetensors", name=name)
    print(f"Attached: {', '.join(tnpeft.names_of(model))}. Each is a file in {FOLDER}.")

    # 2. Switch. Nothing of the base is copied, and a switch takes milliseconds.
    print(f"\n{'what acts':<20}" + "".join(f"{name:>12}" for name in TASKS) + "   (mean squared error on each task)")
    row("the base alone", run(base))
    updates: dict[str, Tensor] = {}
    for name in TASKS:
        tnpeft.activate(model, name)
        row(name, run(model))
        updates[name] = weight(model) - weight(base)
        print(f"  gives what it gave when it had been trained: {same(run(model), outputs[name])}")

    # 3. Add up: the weight is W + 0.5 dW(edges) + 0.5 dW(inverted).
    tnpeft.activate(model, dict.fromkeys(TASKS, 0.5))
    both = run(model)
    row("half of each", both)
    by_hand = weight(base) + 0.5 * updates["edges"] + 0.5 * updates["inverted"]
    print(f"Half of each: its weight is the sum made by hand, {rounding(weight(model), by_hand)}")

    # 4. Merge one by its name, at the scale at which it acts; `unmerge` lets the sum act again.
    tnpeft.merge(model, name="edges")
    by_hand = weight(base) + 0.5 * updates["edges"]
    print(f"Half of 'edges' merged: the weight is W + 0.5 dW(edges), {rounding(weight(model), by_hand)}")
    tnpeft.unmerge(model)
    print(f"Unmerged, the sum gives what it gave: {same(run(model), both)}")

    # 5. Take them off: one adapter leaves the other as it is.
    tnpeft.detach(model, name="inverted")
    tnpeft.activate(model, "edges")
    print(f"Without 'inverted', 'edges' gives what it gave: {same(run(model), outputs['edges'])}")
    tnpeft.detach(model)
    print(f"Without any, the model gives what the base gives: {same(run(model), run(base))}")


if __name__ == "__main__":
    main()
