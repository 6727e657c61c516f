"""How long the way is: calls of functions of tnpeft, counted with `sys.setprofile` in a process of their own.

What other tests import, torch.distributed for one, would add to them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import tnpeft
from tnpeft.program import build_program
from tnpeft.schedule import plan

PACKAGE = str(Path(tnpeft.__file__).parent)
# At most so many calls: of warm forward passes, of attaching a parsed spec, of the first attach of a process, most of
# which is the search of a path and of the layouts.
CALLS = {"lora": 50, "tenvoo_l": 250, "attach": 400, "cold": 12_000}
# How deep the first matrix product lies: `forward` is 1.
FRAMES = 8
# The same of a warm delta weight of LoRA within `program`.
DELTA, DEPTH = 12, 4


def way(action: Callable[[], object], folder: str = PACKAGE) -> tuple[int, list[int]]:
    """The calls of functions in a folder, comprehensions included, and how deep in them each matrix product lies."""
    calls, depth, depths = 0, 0, list[int]()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls, depth
        if event in ("call", "return") and frame.f_code.co_filename.startswith(folder):
            calls += event == "call"
            depth += 1 if event == "call" else -1
        if event == "c_call" and argument is torch.mm:
            depths.append(depth)

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return calls, depths


def warm_forward(spec: str, module: nn.Module, mode: str, x: torch.Tensor, **params: Any) -> Callable[[], object]:
    """The forward pass of a model of one adapted layer, which has run before."""
    model = nn.Sequential(module)
    tnpeft.attach(model, spec, match="0", mode=mode, **params)
    for _ in range(3):
        model(x)
    return lambda: model(x)


def count() -> dict[str, int]:
    """All that the tests ask for."""
    cold_model = nn.Sequential(nn.Conv3d(8, 8, 3))
    cold = way(lambda: tnpeft.attach(cold_model, "tenvoo_l", match="0"))[0]
    spec = tnpeft.load_spec("lora")

    def attach() -> None:
        tnpeft.attach(nn.Sequential(nn.Linear(8, 8)), spec, match="0")

    attach()
    conv = nn.Conv3d(8, 8, 3, padding=1)
    lora = warm_forward("lora", nn.Linear(8, 8), "dense", torch.randn(3, 8))
    tenvoo = warm_forward("tenvoo_l", conv, "factored", torch.randn(1, 8, 4, 4, 4), r=2)
    return {
        "cold": cold,
        "attach": way(attach)[0],
        "lora": way(lora)[0],
        "tenvoo_l": way(tenvoo)[0],
        "frames": way(lora)[1][0],
    }


@pytest.fixture(scope="module")
def counted() -> dict[str, int]:
    told = subprocess.check_output([sys.executable, __file__], text=True)
    return json.loads(told)  # type: ignore[no-any-return]


@pytest.mark.parametrize("what", CALLS)
def test_calls(what: str, counted: dict[str, int]):
    assert counted[what] <= CALLS[what]


def test_frames_to_the_first_product(counted: dict[str, int]):
    assert counted["frames"] <= FRAMES


def test_a_warm_delta_weight_of_lora():
    network = tnpeft.load_spec("lora").bind("Linear", in_features=8, out_features=6)
    program = build_program(plan(network), (0, 1))
    cores = [torch.randn(core.shape, requires_grad=True) for core in network.cores]
    program.deltas(cores, None)
    calls, depths = way(lambda: program.deltas(cores, None), str(Path(PACKAGE) / "program"))
    assert calls <= DELTA
    assert depths == [DEPTH]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(count()))
