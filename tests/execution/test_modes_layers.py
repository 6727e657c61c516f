"""Single layers in the factored and hybrid modes: where they start, how exact they stay, and what they keep."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from modes import (
    FAST,
    adapted,
    adapter_of,
    calls_of,
    filled,
    gradients_of,
    oracle,
    relative,
    stepped,
    with_weight,
    worst,
)
from small import chain
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tnpeft.errors import ExecutionError
from tnpeft.execution import AdaptedLayer
from tnpeft.network import load_spec
from tnpeft.verify.oracle import dense_weight

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 8), (5, 7, 12)),
    "conv3d": (lambda: nn.Conv3d(8, 12, 3, padding=1), (2, 8, 5, 6, 7)),
    "strided": (lambda: nn.Conv2d(8, 12, (3, 2), stride=(2, 1), padding=1, padding_mode="circular"), (2, 8, 9, 8)),
    "dilated": (lambda: nn.Conv1d(8, 12, 3, dilation=2, padding="same", bias=False), (3, 8, 11)),
    "even": (lambda: nn.Conv2d(8, 12, (2, 4), padding="same"), (2, 8, 5, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 12, 3, stride=2, padding=1, output_padding=1), (2, 8, 5, 4)),
}
# torch's own remark on an even kernel.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
EVERY_MODE = ("dense", *FAST, "auto")


def example(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    make, shape = LAYERS[name]
    torch.manual_seed(3)
    return make().to(dtype), torch.randn(shape).to(dtype)


def upstream_of(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        output = layer(x)
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(4)).to(output.dtype)


def ran(wrapper: AdaptedLayer) -> str:
    last = calls_of(wrapper).last
    assert last is not None
    return last.mode


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast fp16": lambda: torch.autocast("cpu", dtype=torch.float16),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", EVERY_MODE)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_start_as_the_base_layer_to_the_bit(name: str, mode: str, dtype: torch.dtype):
    layer, x = example(name, dtype)
    upstream = upstream_of(layer, x)
    for spec in (chain(), chain("zero")):
        wrapper = adapted(layer, spec, mode)
        for context, training in CONTEXTS.items():
            if "autocast" in context and dtype != torch.float32:
                continue
            for flag in (True, False):
                with training():
                    assert torch.equal(wrapper.train(flag)(x), layer.train(flag)(x)), (context, flag)
        assert mode in ("dense", "auto") or ran(wrapper) == mode
        found = gradients_of(wrapper, x, upstream)
        plain = x.detach().clone().requires_grad_()
        layer.requires_grad_(False)
        assert torch.equal(found["input"], torch.autograd.grad(layer(plain), plain, upstream)[0])
        if wrapper.base.bias is not None:
            wrapper.base.bias.requires_grad_()
            (one,) = torch.autograd.grad(wrapper(x), wrapper.base.bias, upstream)
            layer.bias.requires_grad_()
            assert torch.equal(one, torch.autograd.grad(layer(x), layer.bias, upstream)[0])


@pytest.mark.parametrize("mode", FAST)
def test_inputs_of_any_strides_start_exactly_and_are_close_afterwards(mode: str):
    layer, x = example("conv3d")
    for seen in (
        x.transpose(3, 4).contiguous().transpose(3, 4),
        x.to(memory_format=torch.channels_last_3d),
        x[:, :, ::2],
    ):
        _start_and_after(layer, seen, mode)
    _start_and_after(layer.to(memory_format=torch.channels_last_3d), x, mode)
    layer, x = example("linear")
    for seen in (x.transpose(0, 1), x[..., :1].expand(x.shape), x[0, 0], x[:1], x[:, None].transpose(1, 2)):
        _start_and_after(layer, seen, mode)
    layer, x = example("transposed")
    _start_and_after(layer, x[0], mode)
    _start_and_after(layer, x.to(memory_format=torch.channels_last), mode)


def _start_and_after(layer: nn.Module, x: Tensor, mode: str) -> None:
    wrapper = adapted(layer, chain(), mode)
    assert torch.equal(wrapper(x), layer(x))
    upstream = upstream_of(layer, x)
    filled(wrapper)
    assert worst(gradients_of(wrapper, x, upstream), oracle(wrapper, x, upstream)) < 1e-5
    assert ran(wrapper) == mode


SPECS = {"conv3d": "tenvoo_l", "linear": "quanta", "transposed": chain(), "strided": chain()}


@pytest.mark.parametrize("step", [1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("name", SPECS)
def test_the_update_is_accurate_after_the_smallest_steps(name: str, step: float):
    """Six digits in fp32 and two in bf16, where the plain difference of two outputs has lost them."""
    layer, x = example(name)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    wrapper = stepped(adapted(layer, SPECS[name], "factored"), step)
    upstream = upstream_of(layer, x)
    exact = oracle(wrapper, x, upstream)
    assert worst(gradients_of(wrapper, x, upstream), exact) < 3e-6
    assert ran(wrapper) == "factored"
    narrow = copy.deepcopy(wrapper).to(torch.bfloat16)
    rounded = oracle(wrapper, x.bfloat16(), upstream.bfloat16())
    assert worst(gradients_of(narrow, x.bfloat16(), upstream.bfloat16()), rounded) < 2e-2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert worst(gradients_of(wrapper, x, upstream), exact) < 2e-2
    assert _plain_difference(wrapper, x, exact["output"]) > 3e-9 / step
    assert _plain_difference(wrapper, x.bfloat16(), exact["output"]) > 5e-5 / step


@pytest.mark.parametrize("step", [1e-5, 1e-3])
def test_chains_of_three_and_more_links_are_accurate(step: float):
    """Each link on the way carries a value and its change."""
    torch.manual_seed(0)
    cases = [(nn.Conv3d(64, 64, 3, padding=1, bias=False), "tenvoo_l", torch.randn(1, 64, 8, 8, 8))]
    cases += [(nn.Linear(256, 256, bias=False), "quanta", torch.randn(256, 256))]
    for layer, spec, x in cases:
        nn.init.zeros_(layer.weight)
        wrapper = stepped(adapted(layer, spec, "factored"), step)
        upstream = upstream_of(layer, x)
        assert worst(gradients_of(wrapper, x, upstream), oracle(wrapper, x, upstream)) < 3e-6
        assert len(calls_of(wrapper).last.plan.links) >= 3


def _plain_difference(wrapper: AdaptedLayer, x: Tensor, exact: Tensor) -> float:
    """The error of what the networks of the cores and of their frozen copies make of the input, subtracted."""
    adapter = adapter_of(wrapper)
    outputs = []
    for cores in (adapter.cores, {**adapter.cores, **adapter.start}):
        weight = adapter.network.scale * dense_weight(adapter.network, cores).detach()
        outputs.append(with_weight(copy.deepcopy(wrapper.base).to(x.dtype), x, weight.to(x.dtype), None))
    return relative(outputs[0] - outputs[1], exact)


@pytest.mark.parametrize("mode", FAST)
@pytest.mark.parametrize("name", LAYERS)
def test_half_precision_stays_close(name: str, mode: str):
    """Against float64: whole models in bf16 and fp16, and fp32 ones under autocast."""
    layer, x = example(name)
    for dtype, allowed in ((torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        narrow = copy.deepcopy(layer).to(dtype)
        wrapper = filled(adapted(narrow, chain(), mode))
        upstream = upstream_of(narrow, x.to(dtype))
        assert worst(gradients_of(wrapper, x.to(dtype), upstream), oracle(wrapper, x.to(dtype), upstream)) < allowed
        assert all(core.dtype == torch.float32 for core in adapter_of(wrapper).parameters())
        wrapper = filled(adapted(layer, chain(), mode))
        with torch.autocast("cpu", dtype=dtype):
            found = gradients_of(wrapper, x, upstream)
            assert ran(wrapper) == mode
        assert found["output"].dtype == dtype
        assert worst(found, oracle(wrapper, x, upstream)) < 2 * allowed


@pytest.mark.parametrize("mode", FAST)
def test_values_beyond_fp16_start_exactly_too(mode: str):
    """An infinite value times a change of zero would be no number."""
    layer, x = example("conv3d", torch.float16)
    wrapper = adapted(layer, chain(), mode)
    with torch.no_grad():
        for tensor in adapter_of(wrapper).state_dict().values():
            tensor.mul_(1e4)
    assert torch.equal(wrapper(x), layer(x))
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(wrapper(x), layer(x))
    found = gradients_of(wrapper, x, torch.ones_like(layer(x)))
    assert found["input"].isfinite().all()


@contextmanager
def saved() -> Iterator[list[Tensor]]:
    """What autograd keeps, as it is kept."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


@pytest.mark.parametrize("spec", ["tenvoo_l", "lora", "cp", "tucker5"])
def test_factored_keeps_its_input_and_hybrid_the_summed_weight_too(spec: str):
    torch.manual_seed(0)
    layer, x = nn.Conv3d(24, 32, 3, padding=1), torch.randn(2, 24, 6, 6, 6).requires_grad_()
    wrappers = {mode: filled(adapted(layer, spec, mode)) for mode in ("dense", *FAST)}
    weight = layer.weight
    kept: dict[str, list[Tensor]] = {}
    for mode, wrapper in wrappers.items():
        with saved() as kept[mode]:
            output = wrapper(x)
        own = {wrapper.base.weight.data_ptr(), x.data_ptr(), *(one.data_ptr() for one in wrapper.parameters())}
        kept[mode] = [one for one in kept[mode] if one.data_ptr() not in own]
        assert not any(one.data_ptr() == output.data_ptr() for one in kept[mode])
    plan = calls_of(wrappers["factored"]).last.plan
    clusters = {_numel(plan, link.kept) for part in plan.terms or (plan,) for link in part.links}
    # The clusters, and their dual forms of two to four times their size.
    allowed = {times * size for size in clusters for times in (1, 2, 4)}
    assert {one.numel() for one in kept["factored"]} <= allowed
    assert sum(one.numel() for one in kept["factored"]) < weight.numel()
    assert [one.numel() for one in kept["hybrid"] if one.numel() == weight.numel()] == [weight.numel()]
    assert {one.numel() for one in kept["hybrid"]} <= clusters | {weight.numel()}


def _numel(plan: Any, legs: tuple[str, ...]) -> int:
    number = 1
    for leg in legs:
        number *= plan.network.sizes[leg]
    return number


@pytest.mark.parametrize("mode", FAST)
def test_no_gradient_of_the_weights_size_is_made(mode: str):
    """Nothing as large as the weight is made in a backward pass, but for the one that hybrid uses."""
    torch.manual_seed(0)
    layer, x = nn.Conv3d(48, 40, 3, padding=1), torch.randn(1, 48, 3, 3, 3).requires_grad_()
    wrapper = filled(adapted(layer, "lora", mode))
    numel = layer.weight.numel()
    output = wrapper(x).sum()
    made = _Sizes()
    with made:
        output.backward()
    # The frozen weight's place in the base layer's backward pass is empty.
    assert made.largest < numel


class _Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """The size of the largest tensor that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for one in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(one, Tensor):
                self.largest = max(self.largest, one.numel())
        return found


@pytest.mark.parametrize("mode", FAST)
@pytest.mark.parametrize("name", ["linear", "conv3d"])
def test_double_backward_is_refused(name: str, mode: str):
    layer, x = example(name)
    wrapper = filled(adapted(layer, chain(), mode))
    x.requires_grad_()
    for wanted in (x, adapter_of(wrapper).cores["left"]):
        with pytest.raises(ExecutionError) as excinfo:
            torch.autograd.grad(wrapper(x).square().sum(), wanted, create_graph=True)
        assert str(excinfo.value) == (
            f"double backward through a layer in {mode} mode: expected gradients that are not differentiated, found "
            '`create_graph=True`. Attach the adapter with `mode="dense"` for second derivatives.'
        )
    dense = filled(adapted(layer, chain(), "dense"))
    (first,) = torch.autograd.grad(dense(x).square().sum(), x, create_graph=True)
    assert all(one.abs().sum() > 0 for one in torch.autograd.grad(first.square().sum(), adapter_of(dense).parameters()))


@pytest.mark.parametrize("mode", FAST)
def test_a_graph_is_walked_twice_and_written_cores_are_noticed(mode: str):
    layer, x = example("conv3d")
    wrapper = filled(adapted(layer, chain(), mode))
    loss = wrapper(x).square().mean()
    loss.backward(retain_graph=True)
    once = {name: core.grad.clone() for name, core in adapter_of(wrapper).cores.items()}
    loss.backward()
    for name, core in adapter_of(wrapper).cores.items():
        assert torch.equal(core.grad, 2 * once[name])
    loss = wrapper(x).square().mean()
    with torch.no_grad():
        adapter_of(wrapper).cores["left"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", EVERY_MODE)
@pytest.mark.parametrize("name", ["linear", "conv3d", "transposed"])
def test_activation_checkpointing_changes_nothing(name: str, mode: str, reentrant: bool):
    layer, x = example(name)
    upstream = upstream_of(layer, x)
    for spec in (chain(), chain("zero")):
        wrapper = filled(adapted(layer, spec, mode))
        expected = gradients_of(wrapper, x, upstream)

        def called(x: Tensor, wrapper: AdaptedLayer = wrapper) -> Tensor:
            return checkpoint(wrapper, x, use_reentrant=reentrant)

        again = x.clone().requires_grad_()
        output = called(again)
        output.backward(upstream)
        assert torch.equal(output, expected["output"])
        assert torch.equal(again.grad, expected["input"])
        for core, parameter in adapter_of(wrapper).trained.items():
            assert torch.equal(parameter.grad, expected[core])


TRIPS: dict[str, Callable[[AdaptedLayer], AdaptedLayer]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda wrapper: pickle.loads(pickle.dumps(wrapper)),
}


@pytest.mark.parametrize("mode", FAST)
@pytest.mark.parametrize("trip", TRIPS)
def test_copies_after_a_call_stand_on_their_own(trip: str, mode: str):
    layer, x = example("conv3d")
    upstream = upstream_of(layer, x)
    wrapper = filled(adapted(layer, chain(), mode))
    expected = gradients_of(wrapper, x, upstream)
    other = TRIPS[trip](wrapper)
    assert adapter_of(other).mode == mode
    found = gradients_of(other, x, upstream)
    assert ran(other) == mode
    assert all(torch.equal(found[name], one) for name, one in expected.items())
    stepped(other, 0.1)
    assert not torch.equal(other(x), expected["output"])
    assert torch.equal(wrapper(x), expected["output"])


@pytest.mark.parametrize("mode", FAST)
def test_what_is_loaded_moved_or_passed_is_seen(mode: str):
    """Also the frozen copy, of which constants are kept from call to call."""
    layer, x = example("conv3d")
    wrapper, other = (filled(adapted(layer, chain(), mode), seed) for seed in (0, 1))
    with torch.no_grad():
        for start in adapter_of(other).start.values():
            start.add_(0.5)
    first, second = wrapper(x), other(x)
    values = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    assert torch.equal(torch.func.functional_call(wrapper, values, (x,)), second)
    assert torch.equal(wrapper(x), first)
    wrapper.load_state_dict(other.state_dict())
    assert torch.equal(wrapper(x), second)
    wide = copy.deepcopy(wrapper).double()
    wrapper.double()
    assert torch.equal(wrapper(x.double()), wide(x.double()))
    assert relative(wrapper(x.double()), oracle(wrapper, x, second)["output"]) < 1e-12
    wrapper.to(torch.bfloat16)
    assert relative(wrapper(x.bfloat16()), second) < 2e-2


@pytest.mark.parametrize("mode", FAST)
def test_compiled_layers_make_one_graph(mode: str):
    torch.compiler.reset()
    layer, x = example("conv3d")
    wrapper = adapted(layer, chain(), mode)
    compiled = torch.compile(wrapper, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    filled(wrapper)
    expected = wrapper(x)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
    assert ran(wrapper) == mode


@pytest.mark.parametrize("mode", FAST)
def test_another_size_of_the_input_is_another_plan(mode: str):
    layer, x = example("conv3d")
    wrapper = filled(adapted(layer, chain(), mode))
    calls = set()
    for seen in (x, x[:1], x[:, :, :4], x[0], x[:, :, :1], x):
        upstream = upstream_of(layer, seen)
        assert worst(gradients_of(wrapper, seen, upstream), oracle(wrapper, seen, upstream)) < 1e-5
        calls.add(calls_of(wrapper).last.call)
    assert len(calls) == 4  # unbatched is a batch of one
    empty = x[:0]
    assert wrapper(empty).shape == layer(empty).shape
    assert ran(wrapper) == "dense"


@pytest.mark.parametrize("mode", FAST)
def test_output_sizes_of_transposed_convolutions_are_seen(mode: str):
    layer, x = example("transposed")
    wrapper = adapted(layer, chain(), mode)
    for size in ([10, 8], [9, 7], [9, 8], torch.Size([10, 7])):
        assert torch.equal(wrapper(x, size), layer(x, size))
    filled(wrapper)
    dense = filled(adapted(layer, chain(), "dense"))
    for size in ([10, 8], [9, 7], [9, 8]):
        assert relative(wrapper(x, output_size=size), dense(x, size)) < 1e-5
        assert ran(wrapper) == mode


@pytest.mark.parametrize("mode", FAST)
def test_mistakes_in_the_input_are_torchs_own(mode: str):
    layer, x = example("conv3d")
    wrapper = adapted(layer, chain(), mode)
    for wrong in (x[:, :3], x[0, 0], x[:, :, :0]):
        with pytest.raises(RuntimeError) as expected:
            layer(wrong)
        with pytest.raises(RuntimeError) as excinfo:
            wrapper(wrong)
        assert str(excinfo.value) == str(expected.value)


def test_shipped_specs_agree_in_every_mode():
    """Each once, on a small layer that it takes."""
    for name, kind in (("glora", "Linear"), ("loha", "Conv2d"), ("lokr", "Conv2d"), ("fourierft", "Linear"),
                       ("tensor_ring", "Conv3d"), ("hierarchical_tucker", "Conv3d"), ("vera", "Linear"),
                       ("nola", "Linear"), ("metatt", "Linear"), ("dora", "Conv2d")):  # fmt: skip
        spec = load_spec(name)
        torch.manual_seed(0)
        layer = nn.Linear(16, 24) if kind == "Linear" else getattr(nn, kind)(16, 24, 3, padding=1)
        x = torch.randn(2, 16) if kind == "Linear" else torch.randn(2, 16, *[5] * int(kind[-2]))
        upstream = upstream_of(layer, x)
        dense = gradients_of(filled(adapted(layer, spec, "dense")), x, upstream)
        for mode in (*FAST, "auto"):
            assert worst(gradients_of(filled(adapted(layer, spec, mode)), x, upstream), dense) < 2e-5, (name, mode)


@pytest.mark.parametrize("mode", FAST)
def test_autocast_saves_the_input_once_as_it_calls_the_layer(mode: str):
    layer, x = example("conv3d")
    wrapper = filled(adapted(layer, chain(), mode))
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autocast("cpu", torch.bfloat16):
        wrapper(x)  # what is folded once is there
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            wrapper(x.requires_grad_())
    inputs = [one for one in kept if one.shape == x.shape]
    assert {one.dtype for one in inputs} == {torch.bfloat16}
    assert len({one.untyped_storage().data_ptr() for one in inputs}) == 1
