"""A hybrid Linear makes W + ΔW again in its backward pass: gradients, what is saved, and when it is kept after all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from allocation import saved_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from modes import adapted, calls_of, filled
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import tnpeft
from tnpeft.program import counting

SPECS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4}, "lokr": {}, "loha": {"r": 2}, "tt_lora": {}, "quanta": {"r": 4}, "pissa": {"r": 4},
}  # fmt: skip
MODES = ("dense", "factored", "hybrid")


@given(
    st.sampled_from(["lora", "tt_lora", "pissa"]), st.booleans(), st.booleans(), st.integers(0, 2**20),
    st.lists(st.integers(1, 12), max_size=2), st.tuples(st.sampled_from([4, 8, 12]), st.sampled_from([4, 8, 12])),
)  # fmt: skip
@settings(deadline=None, max_examples=25)
def test_gradients_are_those_of_a_linear_with_the_summed_weight(
    spec: str, input_needed: bool, bias: bool, seed: int, batch: list[int], widths: tuple[int, int]
) -> None:
    """Oracle: torch's own Linear in float64, whose weight is the sum and whose bias trains."""
    torch.manual_seed(seed)
    layer = nn.Linear(*widths, bias=bias).double()
    wrapper = filled(adapted(layer, spec, "hybrid", **({"r": 2} if spec != "tt_lora" else {})), seed)
    if bias:
        wrapper.base.bias.requires_grad_()
    x = torch.randn(*batch, widths[0], dtype=torch.float64, requires_grad=input_needed)
    output = wrapper(x)
    assert calls_of(wrapper).mode == "hybrid"
    upstream = torch.randn_like(output)
    output.backward(upstream)
    weight = (layer.weight + wrapper.adapter("a").delta_weight()).detach().requires_grad_()
    other, known_bias = x.detach().requires_grad_(), layer.bias.detach().requires_grad_() if bias else None
    expected = functional.linear(other, weight, known_bias)
    expected.backward(upstream)
    torch.testing.assert_close(output, expected)
    assert (x.grad is not None) == input_needed
    if input_needed:
        torch.testing.assert_close(x.grad, other.grad)
    if bias:
        torch.testing.assert_close(wrapper.base.bias.grad, known_bias.grad)
    delta = wrapper.adapter("a").delta_weight()
    cores = [core for core in wrapper.adapter("a").parameters() if core.requires_grad]
    for core, grad in zip(cores, torch.autograd.grad(delta, cores, weight.grad), strict=True):
        torch.testing.assert_close(core.grad, grad)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", SPECS)
def test_what_hooks_see_is_what_the_plan_says(spec: str, mode: str) -> None:
    """Autograd saves cores as well, which are there all the time and count as held."""
    torch.manual_seed(0)
    wrapper = adapted(nn.Linear(192, 256), spec, mode, **SPECS[spec])
    x = torch.randn(320, 192, requires_grad=True)
    wrapper(x).sum().backward()
    assert calls_of(wrapper).mode == mode or mode == "dense"
    running = calls_of(wrapper).last
    memory = (running.plan if running else wrapper.adapter("a").plan).memory
    saved = saved_bytes(lambda: wrapper(x), x, wrapper.base.weight, wrapper.base.bias)
    assert abs(saved - memory.saved) <= memory.held + 0.04 * memory.saved
    if mode == "factored" or (running and running.plan.remade):
        assert memory.saved < 4 * wrapper.base.weight.numel()


def test_lora_saves_its_input_and_its_cores() -> None:
    """Of a model: no byte more, in either mode, and as many as LoRA by hand, which saves r numbers a row beside."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 64))
    x = torch.randn(2, 50, 64)
    for mode in ("factored", "hybrid"):
        adapting = copy.deepcopy(model)
        handle = tnpeft.attach(adapting, "lora", match=r"\d", r=2, mode=mode)
        saved = saved_bytes(lambda: adapting(x), *adapting.parameters())  # noqa: B023 - called at once
        # The inputs of three layers, which are outputs of GELU but for the first, and of two GELU.
        assert saved == 4 * 100 * (64 + 96 + 64 + 96 + 64)
        handle.detach()


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_weight_is_made_once_more_in_the_backward_pass(reentrant: bool) -> None:
    wrapper = filled(adapted(nn.Linear(24, 16), "lora", "hybrid", r=2))
    x = torch.randn(32, 24, requires_grad=True)
    with counting() as counts:
        output = wrapper(x)
        assert len(counts["merges"]) == 1
        output.sum().backward()
        assert len(counts["merges"]) == 2
    grads = [core.grad.clone() for core in wrapper.parameters() if core.grad is not None]
    expected, x.grad = x.grad, None
    wrapper.zero_grad()
    checkpoint(wrapper, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(x.grad, expected)
    assert all(map(torch.equal, grads, [core.grad for core in wrapper.parameters() if core.grad is not None]))
    with counting() as counts:
        wrapper(x.detach()).sum().backward()  # no gradient of the input, which alone needs the weight
        assert len(counts["merges"]) == 1


def test_a_weight_that_takes_long_to_make_is_saved() -> None:
    """Few rows use it, or merging takes many operations."""
    lora, quanta = (adapted(nn.Linear(64, 64), spec, "hybrid", r=4) for spec in ("lora", "quanta"))
    for wrapper, rows, remade in ((lora, 8, False), (lora, 64, True), (quanta, 64, False), (quanta, 4096, True)):
        x = torch.randn(rows, 64, requires_grad=True)
        with counting() as counts:
            wrapper(x).sum().backward()
        assert calls_of(wrapper).last.plan.remade == remade
        assert len(counts["merges"]) == 1 + remade


def test_who_accumulates_keeps_the_weight_and_makes_it_once() -> None:
    model = nn.Sequential(nn.Linear(24, 16))
    tnpeft.attach(model, "lora", match="0", r=2, mode="hybrid")
    x = torch.randn(5, 24, requires_grad=True)
    model(x).sum().backward()
    expected = [core.grad.clone() for core in model.parameters() if core.grad is not None]
    model.zero_grad()
    with counting() as counts, tnpeft.accumulating(model):
        for _ in range(3):
            (model(x).sum() / 3).backward()
    assert len(counts["merges"]) == 1
    for core, grad in zip([core for core in model.parameters() if core.grad is not None], expected, strict=True):
        torch.testing.assert_close(core.grad, grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_the_weight_anew(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 48), torch.randn(32, 64)
    grads = {}
    for mode in ("dense", "hybrid"):
        wrapper = filled(adapted(layer, "lora", mode, r=4))
        own = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype):
            output = wrapper(own)
        assert output.dtype == dtype
        output.float().square().sum().backward()
        grads[mode] = own.grad
    torch.testing.assert_close(grads["hybrid"], grads["dense"], rtol=0.02, atol=0.02)


def test_a_base_weight_that_is_written_to_before_the_backward_pass_is_noticed() -> None:
    wrapper = adapted(nn.Linear(8, 8), "lora", "hybrid", r=2)
    output = wrapper(torch.randn(32, 8, requires_grad=True))
    with torch.no_grad():
        wrapper.base.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_compiled_layers_run_factored_where_the_eager_ones_run_hybrid() -> None:
    """No operation of the graph makes a tensor of the weight's size."""
    model = nn.Sequential(nn.Linear(512, 512))
    tnpeft.attach(model, "lora", match="0", r=4, mode="auto")
    x = torch.randn(768, 512)
    model(x)
    assert model[0].calls("default").mode == "hybrid"
    sizes: list[int] = []

    def note(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        made = [node.meta.get("example_value") for node in graph.graph.nodes if node.op == "call_function"]
        sizes.extend(tensor.numel() for tensor in made if isinstance(tensor, Tensor))
        return graph.forward

    torch.testing.assert_close(torch.compile(model, backend=note, dynamic=False)(x), model(x), rtol=1e-4, atol=1e-5)
    assert sizes
    assert 512 * 512 not in sizes
