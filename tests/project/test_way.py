"""How long the way is: calls of functions of tnpeft, counted with `sys.setprofile`.

The bounds are what is reached today; a change may lower them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import tnpeft
from tnpeft.planning import plan
from tnpeft.program import build_program

# Aims: 50, 250 and 400. A few more once torch.distributed is imported.
LORA, TENVOO, ATTACH = 135, 430, 1100
# Within `program`, and how deep the first matrix product lies there.
DELTA, DEPTH = 12, 4
# The first `attach` of a process, most of it the search of a path and of the layouts; 76,000 at first.
COLD = 12_000
PACKAGE = str(Path(tnpeft.__file__).parent)
PROGRAM = str(Path(PACKAGE) / "program")


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


def test_a_warm_delta_weight_of_lora():
    network = tnpeft.load_spec("lora").bind("Linear", in_features=8, out_features=6)
    program = build_program(plan(network), (0, 1))
    cores = [torch.randn(core.shape, requires_grad=True) for core in network.cores]
    program.deltas(cores, None)
    calls = depth = 0
    depths = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls, depth
        if event in ("call", "return") and frame.f_code.co_filename.startswith(PROGRAM):
            calls += event == "call"
            depth += 1 if event == "call" else -1
        if event == "c_call" and argument is torch.mm:
            depths.append(depth)

    sys.setprofile(note)
    try:
        program.deltas(cores, None)
    finally:
        sys.setprofile(None)
    assert calls <= DELTA
    assert depths == [DEPTH]


def test_attaching_in_a_new_process():
    code = (
        "from test_way import calls_in, nn, tnpeft\n"
        "model = nn.Sequential(nn.Conv3d(8, 8, 3))\n"
        "print(len(calls_in(lambda: tnpeft.attach(model, 'tenvoo_l', match='0'))))"
    )
    calls = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=Path(__file__).parent)
    assert int(calls) <= COLD
