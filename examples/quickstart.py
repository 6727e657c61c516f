"""Fine-tune a small convolution network with an adapter that ships with tnpeft, then save, load and merge it.

    python examples/quickstart.py

A few seconds on a CPU. The base model has learned to blur images; the adapter teaches it to find edges, while the base
stays as it is. The adapter's file is left in runs/quickstart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tnpeft

SPEC = "lora"  # or another that takes a Conv2d: `tnpeft list` prints all names
FILE = Path("runs/quickstart/adapter.safetensors")
IMAGES = torch.randn(16, 1, 12, 12, generator=torch.Generator().manual_seed(0))


def blurred(images: Tensor) -> Tensor:
    return F.avg_pool2d(images, 3, stride=1, padding=1)


def edges(images: Tensor) -> Tensor:
    return images - blurred(images)


def train(model: nn.Module, parameters: Iterable[nn.Parameter], task: Callable[[Tensor], Tensor]) -> None:
    """The loop is yours: tnpeft only says which parameters to give the optimiser."""
    optimiser = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(80):
        optimiser.zero_grad()
        F.mse_loss(model(IMAGES), task(IMAGES)).backward()
        optimiser.step()


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    output: Tensor = model(IMAGES)
    return output


def error(output: Tensor) -> str:
    return f"{F.mse_loss(output, edges(IMAGES)):.4f}"


def same(actual: Tensor, expected: Tensor) -> str:
    """Bit for bit, without a tolerance."""
    return "exact: yes" if torch.equal(actual, expected) else "exact: no"


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 1)
    )
    train(model, model.parameters(), blurred)
    base = copy.deepcopy(model)  # kept for the comparisons below
    print(f"The base model finds edges with a mean squared error of {error(run(base))}.")

    # 1. Attach. `match` is a list of module names, a regular expression on them, or "all".
    handle = tnpeft.attach(model, SPEC, match=["2"], r=4)
    print(f"\nWhat trains:\n{handle.report()}")
    print(f"Before training, the adapted model gives what the base gives   {same(run(model), run(base))}")

    # 2. Train the adapter; the base is frozen.
    train(model, handle.parameters(), edges)
    tuned = run(model)
    print(f"\nAfter 80 steps the error is {error(tuned)}.")
    with tnpeft.disabled(model):
        print(f"With the adapter disabled, the model is the base again         {same(run(model), run(base))}")

    # 3. Save the adapter, and load it on a fresh copy of the base. The file holds the spec too.
    FILE.parent.mkdir(parents=True, exist_ok=True)
    tnpeft.save(model, FILE)
    fresh = copy.deepcopy(base)
    loaded = tnpeft.load(fresh, FILE)
    kept = all(torch.equal(*pair) for pair in zip(handle.parameters(), loaded.parameters(), strict=True))
    print(f"\nThe adapter is {FILE.stat().st_size:,} bytes in {FILE}.")
    print(f"All its trained tensors are read back from there               exact: {'yes' if kept else 'no'}")
    print(f"On a fresh base it gives what the trained model gives          {same(run(fresh), tuned)}")

    # 4. Merge: one weight per layer, no cost at inference. `unmerge` takes it back.
    tnpeft.merge(model)
    print(f"\nMerged, the output differs by rounding alone: at most {(run(model) - tuned).abs().max():.0e}.")
    tnpeft.unmerge(model)
    print(f"Unmerged, it is what it was before                             {same(run(model), tuned)}")
    tnpeft.detach(model, merge=True)
    plain = "yes" if list(model.state_dict()) == list(base.state_dict()) else "no"
    print(f"Detached with the update merged, the model has torch's layers and the base's keys: {plain}")
    print(f"It finds edges with an error of {error(run(model))}.")


if __name__ == "__main__":
    main()
