"""Whoever looks on at an adapted model sees what it computes: tracers, exporters, compilers and `torch.func`."""

from __future__ import annotations

import pytest
import torch
from observers import per_sample, pushed_forward, subject, traced
from torch import nn

import tnpeft

# torch itself would rather be compiled or exported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

MODES = ("auto", "dense", "factored", "hybrid")
SAMPLE = [
    ("Linear", "lora"),
    ("Linear", "dora"),
    ("Linear", "tt_lora"),
    ("Linear", "quanta"),
    ("Conv1d", "loha"),
    ("Conv2d", "lokr"),
    ("Conv2d", "dora"),
    ("Conv3d", "tenvoo_l"),
    ("ConvTranspose2d", "lora"),
    ("ConvTranspose3d", "glora"),
]


@pytest.mark.parametrize("started", [False, True], ids=["start", "later"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kind", "spec"), SAMPLE)
def test_a_trace_computes_what_the_model_computes(kind, spec, mode, started):
    model, x = subject(kind, spec, mode, started)
    assert traced(model, x) < 1e-5
    with torch.no_grad():
        assert (torch.jit.trace(model, x, check_trace=False)(x) - model(x)).abs().max() < 1e-5


def test_a_trace_of_an_untouched_adapter_is_the_base():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8)).eval(), torch.randn(4, 8)
    base = model(x)
    tnpeft.attach(model, "lora", match="0", r=2)
    assert torch.equal(torch.jit.trace(model, x, check_trace=False)(x), base)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kind", "spec"), SAMPLE)
def test_per_sample_gradients_and_jacobians_are_those_of_backward(kind, spec, mode):
    model, x = subject(kind, spec, mode)
    assert per_sample(model, x) < 1e-5
    assert max(pushed_forward(model, x)) < 1e-5
