"""What the cost model says on a CPU and on a GPU: of times, of bytes, and of the mode that `auto` takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tnpeft
from tnpeft.network import Network
from tnpeft.planning import Call, nominal_call
from tnpeft.planning.device_model import DEVICE_MODELS, device_model
from tnpeft.schedule import best_plan, feasible_plans, plan, predict

MODES = ("dense", "factored", "hybrid")
WIDTHS, ROWS = (1024, 2048, 4096, 8192), (512, 2048, 8192)
FACTORED: dict[str, dict[str, Any]] = {
    "lokr": {}, "lokr_both": {"r": 16}, "quanta": {"r": 4}, "tt_lora": {}, "loha": {"r": 4}, "oft": {},
    "vera": {"r": 64}, "pissa": {"r": 16}, "moslora": {"r": 16}, "krona": {},
}  # fmt: skip


def linear(spec: str, inputs: int, outputs: int, **params: Any) -> Network:
    return tnpeft.load_spec(spec).bind(nn.Linear(inputs, outputs, device="meta"), **params)


def on_gpu(rows: int) -> Call:
    return Call(rows, device="cuda")


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("r", [4, 16, 64])
@pytest.mark.parametrize(("inputs", "outputs"), [*((width, width) for width in WIDTHS), (4096, 11008), (8192, 1024)])
def test_lora_on_a_large_linear_is_never_dense_on_a_gpu(inputs: int, outputs: int, r: int, rows: int) -> None:
    bound = linear("lora", inputs, outputs, r=r)
    chosen = plan(bound, "auto", on_gpu(rows))
    assert chosen.mode != "dense"
    assert chosen.saved_bytes == 4 * r * (inputs + outputs)  # and the input, as every adapter that trains
    assert predict(chosen, on_gpu(rows)).step < 1.15 * predict(plan(bound), on_gpu(rows)).step


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [4096, 8192])
@pytest.mark.parametrize("spec", FACTORED)
def test_no_large_linear_is_dense_on_a_gpu_that_can_be_factored(spec: str, width: int, rows: int) -> None:
    bound = linear(spec, width, width, **FACTORED[spec])
    if len(feasible_plans(bound, on_gpu(rows))) == 1:
        pytest.skip(str(plan(bound, "factored", on_gpu(rows)).reason))
    chosen = plan(bound, "auto", on_gpu(rows))
    assert chosen.mode != "dense"
    assert chosen.saved_bytes < 4 * bound.layer.numel / 4


def test_small_layers_are_dense_on_a_gpu() -> None:
    """To start operations is all that they take, and dense starts the fewest."""
    for width, rows in ((64, 16), (256, 512), (512, 175)):
        assert plan(linear("lora", width, width, r=2), "auto", on_gpu(rows)).mode == "dense"
    bound = tnpeft.load_spec("lora").bind(nn.Conv3d(32, 32, 3, padding=1, device="meta"), r=2)
    assert plan(bound, "auto", replace(nominal_call(bound.layer), device="cuda")).mode == "dense"


@pytest.mark.parametrize("device", DEVICE_MODELS)
def test_auto_counts_time_and_what_is_saved(device: str) -> None:
    """By hand, the one rule: the least of seconds and saved bytes at their price."""
    for width, rows in ((64, 8), (512, 512), (1024, 64), (4096, 8192)):
        bound, call = linear("lora", width, width, r=8), Call(rows, device=device)
        plans = feasible_plans(bound, call)
        price = device_model(device).saved * 1e-9
        counted = [predict(found, call).step + price * found.saved_bytes for found in plans]
        assert best_plan(plans, call) is plans[counted.index(min(counted))]
        forward = [predict(found, call).forward for found in plans]
        assert best_plan(plans, call, inference=True) is plans[forward.index(min(forward))]


def test_of_equal_times_the_one_that_saves_less_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    bound, call = linear("lora", 256, 256, r=8), Call(256)
    known = predict(plan(bound), call)
    monkeypatch.setattr("tnpeft.schedule.modes.predict", lambda *_: known)
    dense, hybrid, factored = feasible_plans(bound, call)
    assert best_plan([dense, hybrid, factored], call) is hybrid  # the first of those that save the cores alone
    assert best_plan([dense, factored], call) is factored


def test_a_hybrid_linear_saves_no_weight_and_a_hybrid_convolution_does() -> None:
    bound, call = linear("lora", 512, 256, r=8), Call(512)
    assert plan(bound, "hybrid", call).saved_bytes == plan(bound, "factored", call).saved_bytes == 4 * 8 * (512 + 256)
    assert plan(bound, "dense", call).saved_bytes == 4 * 512 * 256
    conv = tnpeft.load_spec("lora").bind(nn.Conv2d(64, 32, 3, device="meta"), r=8)
    of_conv = nominal_call(conv.layer)
    weight = 4 * conv.layer.numel
    assert plan(conv, "factored", of_conv).saved_bytes < weight <= plan(conv, "hybrid", of_conv).saved_bytes


@given(
    st.sampled_from(["lora", "lokr", "moslora"]), st.sampled_from(MODES), st.sampled_from(["cpu", "cuda"]),
    st.integers(1, 5000), st.integers(0, 5000), st.tuples(st.integers(6, 11), st.integers(6, 11)),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_more_rows_take_no_less_time_and_one_chain_saves_no_more(
    spec: str, mode: str, device: str, rows: int, more: int, widths: tuple[int, int]
) -> None:
    """The rows themselves are the layer's input, which is not counted; another chain may have other clusters.

    For many rows a hybrid layer makes its weight again.
    """
    bound = linear(spec, 1 << widths[0], 1 << widths[1])
    calls = [Call(number, device=device) for number in (rows, rows + more)]
    few, many = (plan(bound, mode, call) for call in calls)
    assert predict(few, calls[0]).step <= predict(many, calls[1]).step
    assert few.saved_bytes >= many.saved_bytes or (few.chain or few).path != (many.chain or many).path


@given(
    st.sampled_from(MODES), st.sampled_from(["cpu", "cuda"]), st.integers(1, 5000),
    st.integers(32, 4096), st.integers(32, 4096), st.integers(0, 2048), st.integers(0, 2048), st.integers(1, 32),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_a_wider_linear_takes_no_less_of_either(
    mode: str, device: str, rows: int, inputs: int, outputs: int, more_in: int, more_out: int, r: int
) -> None:
    call = Call(rows, device=device)
    narrow, wide = (
        plan(linear("lora", *sizes, r=r), mode, call)
        for sizes in ((inputs, outputs), (inputs + more_in, outputs + more_out))
    )
    assert predict(narrow, call).step <= predict(wide, call).step
    assert narrow.saved_bytes <= wide.saved_bytes
