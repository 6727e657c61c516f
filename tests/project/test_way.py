"""How long the way is: calls of functions of tnpeft, counted with `sys.setprofile`.

The bounds are what is reached today; a change may lower them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import tnpeft
from tnpeft.planning import plan

# Aims: 50, 250 and 400. A few more once torch.distributed is imported.
LORA, TENVOO, ATTACH = 135, 430, 1100
PACKAGE = str(Path(tnpeft.__file__).parent)


def calls_in(action: Callable[[], object]) -> list[FrameType]:
    """The frames of tnpeft's functions that an action enters, comprehensions included."""
    frames: list[FrameType] = []

    def note(frame: FrameType, event: str, _argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            frames.append(frame)

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return frames


def layer(spec: str, module: nn.Module, mode: str, x: torch.Tensor, **params: Any) -> Callable[[], object]:
    """A warm forward pass of one adapted layer."""
    model = nn.Sequential(module)
    tnpeft.attach(model, spec, match="0", mode=mode, **params)
    for _ in range(3):
        model(x)
    return lambda: model(x)


def test_a_warm_forward_of_lora():
    run = layer("lora", nn.Linear(8, 8), "dense", torch.randn(3, 8))
    assert len(calls_in(run)) <= LORA


def test_a_warm_forward_of_tenvoo():
    run = layer("tenvoo_l", nn.Conv3d(8, 8, 3, padding=1), "factored", torch.randn(1, 8, 4, 4, 4), r=2)
    assert len(calls_in(run)) <= TENVOO


def test_attaching_a_parsed_spec():
    spec = tnpeft.load_spec("lora")
    plan(spec.bind("Linear", in_features=8, out_features=8))

    def attach() -> None:
        tnpeft.attach(nn.Sequential(nn.Linear(8, 8)), spec, match="0")

    attach()
    assert len(calls_in(attach)) <= ATTACH
