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

PACKAGE = str(Path(tnpeft.__file__).parent)
# At most so many calls: of warm forward passes, of attaching a parsed spec, of the first attach of a process, most of
# which is the search of a path and of the layouts.
CALLS = {"lora": 50, "tenvoo_l": 250, "attach": 400, "cold": 13_000}
# How deep the first matrix product lies: `forward` is 1.
FRAMES = 8


def calls_in(action: Callable[[], object]) -> int:
    """The calls of tnpeft's functions, comprehensions included."""
    calls = 0

    def note(frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return calls


def frames_to_product(action: Callable[[], object]) -> int:
    """How many of tnpeft's functions, `forward` the first, are on the way to the first matrix product."""
    depth, depths = 0, list[int]()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal depth
        if event in ("call", "return") and frame.f_code.co_filename.startswith(PACKAGE):
            depth += 1 if event == "call" else -1
        if event == "c_call" and argument is torch.mm:
            depths.append(depth)

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return depths[0]


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
    cold = calls_in(lambda: tnpeft.attach(cold_model, "tenvoo_l", match="0"))
    spec = tnpeft.load_spec("lora")

    def attach() -> None:
        tnpeft.attach(nn.Sequential(nn.Linear(8, 8)), spec, match="0")

    attach()
    conv = nn.Conv3d(8, 8, 3, padding=1)
    lora = warm_forward("lora", nn.Linear(8, 8), "dense", torch.randn(3, 8))
    tenvoo = warm_forward("tenvoo_l", conv, "factored", torch.randn(1, 8, 4, 4, 4), r=2)
    return {
        "cold": cold,
        "attach": calls_in(attach),
        "lora": calls_in(lora),
        "tenvoo_l": calls_in(tenvoo),
        "frames": frames_to_product(lora),
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


if __name__ == "__main__":
    sys.stdout.write(json.dumps(count()))
