"""Turn a full fine-tune into an adapter: how much of the change does each adapter capture?

    python examples/fit_a_checkpoint.py

A few seconds on a CPU. A tiny network is fine-tuned with all its weights, from blurring images to finding edges; then
`tnpeft.extract` fits adapters to the difference of the two checkpoints, without data and without training. On the
command line, `tnpeft fit base.safetensors tuned.safetensors ...` does the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tnpeft

FILE = Path("runs/fit_a_checkpoint/adapter.safetensors")
IMAGES = torch.randn(16, 1, 12, 12, generator=torch.Generator().manual_seed(0))
ADAPTERS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"r": 1}),
    ("lora", {"r": 4}),
    ("locon_tucker", {"r": 6}),
    ("full", {}),
]


def blurred(images: Tensor) -> Tensor:
    return F.avg_pool2d(images, 3, stride=1, padding=1)


def edges(images: Tensor) -> Tensor:
    return images - blurred(images)


def train(model: nn.Module, task: Callable[[Tensor], Tensor]) -> None:
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimiser.zero_grad()
        F.mse_loss(model(IMAGES), task(IMAGES)).backward()
        optimiser.step()


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    output: Tensor = model(IMAGES)
    return output


def error(model: nn.Module) -> float:
    return float(F.mse_loss(run(model), edges(IMAGES)))


def same(actual: Tensor, expected: Tensor) -> str:
    """Bit for bit, without a tolerance."""
    return "exact: yes" if torch.equal(actual, expected) else "exact: no"


def main() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 1)
    )
    train(base, blurred)
    tuned = copy.deepcopy(base)
    train(tuned, edges)
    print(f"Mean squared error at finding edges: {error(base):.4f} base, {error(tuned):.4f} fully fine-tuned.\n")

    # 1. One layer: the nearest update of a given rank is known, so that the fit can be held against it.
    delta = (tuned.get_parameter("2.weight") - base.get_parameter("2.weight")).detach()
    fitted = tnpeft.fit("lora", delta, base[2], r=4)
    print(f"One layer: {fitted}")
    singular = torch.linalg.svdvals(delta.double().flatten(1))
    nearest = float(singular[4:].norm() / singular.norm())
    print(f"The truncated SVD has relative error {nearest:.3e}, and no update of rank 4 is nearer.")
    print(f"As near as can be: {'yes' if fitted.error <= nearest * 1.0001 else 'no'}\n")

    # 2. The whole checkpoint. Biases are taken as they are, so that only the weights' change is cut at the rank.
    print("adapter           trained  captured    error   (captured: of the change's energy, its squared norm)")
    before = run(base)
    for spec, params in ADAPTERS:
        extraction = tnpeft.extract(base, tuned.state_dict(), spec, match="all", train={"bias": "adapted"}, **params)
        trained = extraction.handle.report().trained
        print(f"{spec:<13}{params.get('r', ''):<3}{trained:>9,}{extraction.captured:>10.1%}{error(base):>9.4f}")
        tnpeft.detach(base)
    print(f"Taken off, the base gives what it gave: {same(run(base), before)}")

    # 3. What `extract` leaves on the model is an adapter like any other: save it, load it, go on training it.
    extraction = tnpeft.extract(base, tuned.state_dict(), "lora", match="all", train={"bias": "adapted"}, r=4)
    print(f"\nLayer by layer:\n{extraction}")
    fitted_output = run(base)
    FILE.parent.mkdir(parents=True, exist_ok=True)
    tnpeft.save(base, FILE)
    tnpeft.detach(base)
    tnpeft.load(base, FILE)
    print(f"Loaded from {FILE}, it gives what it gave: {same(run(base), fitted_output)}")


if __name__ == "__main__":
    main()
