"""Which network captures most of full fine-tunes within a number of parameters?

    python examples/search_for_a_network.py

One to two minutes on a CPU; `pip install 'tnpeft[search,draw]'` brings what it needs. A small 3D network learns to
copy volumes; three full fine-tunes teach it to find edges, to blur along one axis and to sharpen. `tnpeft.search` is
given the first two, and what it found is tested on the third, which it never saw. On the command line,
`tnpeft search base.safetensors tuned.safetensors ...` does the same.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tnpeft

FOLDER = Path("runs/search_for_a_network")
VOLUMES = torch.randn(8, 1, 10, 10, 10, generator=torch.Generator().manual_seed(0))


def blurred(volumes: Tensor) -> Tensor:
    return F.avg_pool3d(volumes, 3, stride=1, padding=1)


def edges(volumes: Tensor) -> Tensor:
    return volumes - blurred(volumes)


def blurred_in_depth(volumes: Tensor) -> Tensor:
    return F.avg_pool3d(volumes, (3, 1, 1), stride=1, padding=(1, 0, 0))


def sharpened(volumes: Tensor) -> Tensor:
    return 2 * volumes - blurred(volumes)


def train(model: nn.Module, task: Callable[[Tensor], Tensor], steps: int = 60) -> None:
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        F.mse_loss(model(VOLUMES), task(VOLUMES)).backward()
        optimiser.step()


def tuned_on(base: nn.Module, task: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The weights of a full fine-tune."""
    model = copy.deepcopy(base)
    train(model, task)
    return model.state_dict()


def told(candidate: Any, count: int) -> None:
    if candidate is not None and candidate.score is not None:
        print(f"[{count:>3}] {candidate.origin:<10} {candidate.parameters:>5,} {candidate.score:>7.2%}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Search for the network that captures most of two fine-tunes.")
    parser.add_argument("--evaluations", type=int, default=40)
    evaluations = parser.parse_args().evaluations
    torch.manual_seed(0)
    base = nn.Sequential(
        nn.Conv3d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, 1, 1)
    )
    train(base, lambda volumes: volumes, steps=120)
    before = base.state_dict()
    pairs = [(before, tuned_on(base, task)) for task in (edges, blurred_in_depth)]
    held_out = [(before, tuned_on(base, sharpened))]

    # 1. The search: 800 of the layer's 6,912 parameters.
    found = tnpeft.search(base, pairs, 800, match=["2"], test_pairs=held_out, evaluations=evaluations, progress=told)
    print(f"\n{found}\n")

    # 2. Beside random search and shipped specs at as many parameters.
    print("                   parameters  selection   test")
    for row in tnpeft.search_report(found, FOLDER):
        scores = [f"{score:.2%}" if score is not None else "" for score in (row.selection_score, row.test_score)]
        print(f"{row.name:<18} {row.parameters or '':>10} {scores[0]:>10} {scores[1]:>7}")

    # 3. What was found is a spec like any other.
    found.save(FOLDER / "found.yaml")
    handle = tnpeft.attach(base, tnpeft.load_spec(FOLDER / "found.yaml"), match=["2"])
    print(f"\nAttached from {FOLDER / 'found.yaml'}: {handle.report().trained:,} parameters train.")


if __name__ == "__main__":
    main()
