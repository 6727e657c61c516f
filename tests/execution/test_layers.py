"""Adapters and adapted layers against plain layers with the summed weight."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import chain, layers, move, runs, sample_input, spec_cases_in
from torch import Tensor, nn

from tnpeft.adapters import Adapter
from tnpeft.adapters.inits import canonical_weight
from tnpeft.errors import BindError, ExecutionError, TnpeftWarning
from tnpeft.execution import AdaptedLayer, compile, wrap
from tnpeft.network import Network, load_spec

# torch's own remark on an option that the strategies draw.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

LORA = load_spec("lora")


def adapted(layer: nn.Module, adapter: Adapter, scale: float = 1.0) -> AdaptedLayer:
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    wrapper = wrap(layer)
    wrapper.add_adapter("a", adapter)
    wrapper.act({"a": scale})
    return wrapper


def summed(layer: nn.Module, delta: Tensor) -> nn.Module:
    """The same plain layer with the summed weight."""
    plain = copy.deepcopy(layer)
    plain.weight = nn.Parameter(torch.empty_like(layer.weight).copy_(layer.weight + delta))
    return plain


def dense_weight(network: Network, cores: dict[str, Tensor]) -> Tensor:
    """The definition: one einsum in float64, cropped, and laid out as torch stores it, element by element."""
    layer = network.layer
    full = torch.einsum(network.einsum, *[core.detach().double() for core in cores.values()])
    full = full.reshape(network.padded_shape)[tuple(slice(0, size) for size in layer.weight_shape)]
    if not layer.transposed:
        return full
    stored = torch.empty(layer.stored_shape, dtype=torch.float64)
    a, b = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    for group in range(layer.groups):
        for i in range(a):
            for o in range(b):
                stored[group * a + i, o] = full[group * b + o, i]
    return stored


@pytest.mark.parametrize(
    ("seed", "found"),
    [
        (True, "True"),
        (1.0, "1.0"),
        (float("nan"), "nan"),
        ("1", "'1'"),
        ([1], "[1]"),
        (torch.tensor(1), "a Tensor"),
        (np.array(1.5), "array(1.5)"),
    ],
)
def test_a_seed_is_a_whole_number(seed, found):
    with pytest.raises(BindError) as excinfo:
        compile(chain(), nn.Linear(3, 3), seed=seed)
    assert str(excinfo.value) == f"seed: expected a whole number, found {found}. For example `seed=0`."


def test_seeds_of_other_types_and_sizes():
    layer = nn.Linear(3, 3)
    adapter = compile(chain(), layer, seed=np.int64(5))
    assert type(adapter.seed) is int
    assert torch.equal(adapter.cores["left"], compile(chain(), layer, seed=5).cores["left"])
    for seed in (-(2**63), 2**63 - 1):
        assert compile(chain(), layer, seed=seed).seed == seed
    for seed in (2**63, -(10**5000)):
        with pytest.raises(BindError) as excinfo:
            compile(chain(), layer, seed=seed)
        assert str(excinfo.value) == (
            "seed: expected a whole number of at most 64 bits, found a larger one. For example `seed=0`."
        )


@settings(max_examples=150, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(layer=layers(), spec=st.sampled_from([LORA, chain(), chain(frozen=True), chain("zero")]), r=st.integers(1, 3))
def test_an_adapted_layer_is_the_plain_layer_with_the_summed_weight(layer, spec, r):
    x = sample_input(layer)
    base = runs(layer, x)
    adapter = compile(spec, layer, r=r)
    wrapper = adapted(layer, adapter)
    assert torch.equal(wrapper(x), base)
    move(adapter)
    assert torch.equal(wrapper(x), summed(layer, adapter.delta_weight())(x))
    start = {**adapter.cores, **adapter.start}
    first = dense_weight(adapter.network, start) if spec.start == "frozen_copy" else 0
    scale = adapter.network.scale
    expected = scale * (dense_weight(adapter.network, adapter.cores) - first)
    torch.testing.assert_close(adapter.delta_weight().double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        adapter.network_weight().double(), dense_weight(adapter.network, adapter.cores), rtol=1e-4, atol=1e-5
    )
    assert adapter.delta_weight().shape == layer.weight.shape


@settings(max_examples=40, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(layer=layers(), size=st.integers(0, 1))
def test_output_size_of_a_transposed_convolution_is_the_layers_own(layer, size):
    x = sample_input(layer)
    base = runs(layer, x)
    adapter = compile(chain(), layer)
    wrapper = adapted(layer, adapter)
    move(adapter)
    if not type(layer).__name__.startswith("ConvTranspose"):
        assert wrapper(input=x).shape == base.shape
        return
    wanted = [length + size for length in base.shape[2:]]
    plain = summed(layer, adapter.delta_weight())
    try:
        expected = plain(x, output_size=wanted)
    except (RuntimeError, ValueError) as error:
        with pytest.raises(type(error)):
            wrapper(x, output_size=wanted)
        return
    assert torch.equal(wrapper(x, output_size=wanted), expected)
    assert torch.equal(wrapper(input=x, output_size=wanted), expected)


def _layer_for(kind: str, dtype: torch.dtype, groups: int = 1) -> nn.Module:
    torch.manual_seed(1)
    if kind == "Linear":
        return nn.Linear(12, 16).to(dtype)
    return getattr(nn, kind)(12, 16, 3, padding=1, groups=groups).to(dtype)


@pytest.mark.parametrize(
    ("name", "mode", "kinds"), spec_cases_in(("fp32", "autocast bf16", "bf16", "fp64", "fp16", "autocast fp16"))
)
def test_every_shipped_spec_starts_exactly_at_the_base(name, mode, kinds):
    spec = load_spec(name)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}.get(mode, torch.float32)
    cast = torch.float16 if mode.endswith("fp16") else torch.bfloat16
    for kind in kinds:
        layer = _layer_for(kind, dtype, groups=1 if name.startswith(("quanta", "tenvoo")) else 2)
        x = sample_input(layer, dtype=dtype)
        with torch.autocast("cpu", dtype=cast, enabled=mode.startswith("autocast")):
            try:
                base = layer(x)
            except RuntimeError as error:
                if "not implemented" in str(error):  # fp16 kernels that this processor's torch does not have
                    continue
                raise
            wrapper = adapted(layer, compile(spec, layer))
            output = wrapper(x)
            assert output.dtype == base.dtype
            assert torch.equal(output, base)
            wrapper.merge()
            assert torch.equal(wrapper(x), base)


def test_gradients_reach_the_cores_alone_and_equal_those_of_the_plain_network():
    layer = nn.Conv2d(4, 6, 3).double()
    adapter = compile(chain(), layer)
    wrapper = adapted(layer, adapter)
    layer.weight.requires_grad_(True)  # even then: the base weight belongs to the model
    move(adapter)
    x = sample_input(layer, dtype=torch.float64)
    wrapper(x).square().sum().backward()
    assert layer.weight.grad is None
    cores = [core.detach().requires_grad_() for core in adapter.cores.values()]
    start = list(adapter.start.values())
    einsum = adapter.network.einsum
    weight = layer.weight.detach() + 0.5 * (torch.einsum(einsum, *cores) - torch.einsum(einsum, *start))
    nn.functional.conv2d(x, weight, layer.bias).square().sum().backward()
    for core, parameter in zip(cores, adapter.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, core.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", [LORA, chain()], ids=["zero", "frozen copy"])
def test_gradients_of_gradients_are_right(spec):
    layer = nn.ConvTranspose1d(4, 4, 2, groups=2).double()
    adapter = compile(spec, layer, r=2)
    wrapper = adapted(layer, adapter)
    move(adapter)
    x = sample_input(layer, side=3, dtype=torch.float64)
    cores = [parameter.detach().requires_grad_() for parameter in adapter.parameters()]
    names = [f"adapters.a.{name}" for name, _ in adapter.named_parameters()]

    def output(*values: Tensor) -> Tensor:
        return torch.func.functional_call(wrapper, dict(zip(names, values, strict=True)), (x,)).square().sum()

    assert torch.autograd.gradcheck(output, cores)
    assert torch.autograd.gradgradcheck(output, cores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("formats", [(torch.contiguous_format,), (torch.channels_last_3d,)])
def test_the_summed_weight_has_exactly_the_base_strides(formats, kernel, dtype):
    layer = nn.Conv3d(4, 6, kernel).to(dtype).to(memory_format=formats[0])
    for spec in (LORA, chain()):
        wrapper = adapted(layer, compile(spec, layer))
        for scales in ({"a": 1.0}, {"a": 0.5}):
            wrapper.act(scales)
            assert wrapper.weight.stride() == layer.weight.stride()
            assert wrapper.weight.dtype == dtype
            assert not wrapper.weight.is_leaf


def test_a_small_update_is_added_in_fp32_and_rounded_once():
    layer = nn.Linear(64, 64).bfloat16()
    adapter = compile(chain(), layer)
    wrapper = adapted(layer, adapter)
    move(adapter, 1e-2)
    exact = layer.weight.double() + adapter.delta_weight().double()
    assert torch.equal(wrapper.weight, (layer.weight.float() + adapter.delta_weight()).bfloat16())
    assert (wrapper.weight.double() - exact).abs().max() <= exact.abs().max() * 2**-8


def test_cores_are_at_least_fp32_and_contiguous_whatever_the_model_is_cast_to():
    layer = nn.Conv2d(4, 6, 3).bfloat16()
    model = nn.Sequential(adapted(layer, compile(chain(), layer)))
    adapter = model[0].adapter("a")
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    model.to(torch.float16).to(memory_format=torch.channels_last).half().float().bfloat16()
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in adapter.state_dict().values())
    assert all(torch.equal(before[name], tensor) for name, tensor in adapter.state_dict().items())
    model.double()
    assert all(tensor.dtype == torch.float64 for tensor in adapter.state_dict().values())
    assert model[0].weight.dtype == torch.float64
    model.float()
    assert all(tensor.dtype == torch.float64 for tensor in adapter.state_dict().values())
    assert model[0].weight.dtype == torch.float32


def test_cores_of_an_fp64_layer_are_fp64_with_the_same_values():
    layer = nn.Linear(8, 8)
    single, double = compile(chain(), layer, name="x"), compile(chain(), layer.double(), name="x")
    for one, two in zip(single.parameters(), double.parameters(), strict=True):
        assert two.dtype == torch.float64
        assert torch.equal(one.double(), two)


def test_state_dict_keys_are_prefixed_in_file_order():
    adapter = compile(chain(frozen=True), nn.Linear(4, 4))
    assert list(adapter.state_dict()) == ["core_left", "core_right", "start_left", "core_middle", "start_right"]
    assert list(adapter.cores) == ["left", "middle", "right"]
    assert list(adapter.start) == ["left", "right"]
    assert [name for name, _ in adapter.named_parameters()] == ["core_left", "core_right"]
    assert list(compile(LORA, nn.Linear(4, 4)).state_dict()) == ["core_down", "core_up"]


def test_loading_other_values_drops_what_was_cached():
    layer = nn.Conv1d(4, 6, 3)
    adapter, other = compile(chain(), layer, seed=0), compile(chain(), layer, seed=1)
    move(other)
    assert torch.equal(adapter.delta_weight(), torch.zeros_like(layer.weight))
    adapter.load_state_dict(other.state_dict())
    assert torch.equal(adapter.delta_weight(), other.delta_weight())


def test_copies_and_pickles_carry_no_cache_and_share_the_plan():
    layer = nn.Conv1d(4, 6, 3)
    adapter = compile(chain(), layer)
    move(adapter)
    delta = adapter.delta_weight()
    copied = copy.deepcopy(adapter)
    assert copied.plan is adapter.plan
    loaded = pickle.loads(pickle.dumps(adapter))
    for other in (copied, loaded):
        assert torch.equal(other.delta_weight(), delta)
        assert other.network.signature == adapter.network.signature
        move(other)
        assert not torch.equal(other.delta_weight(), delta)
    assert torch.equal(adapter.delta_weight(), delta)


def test_a_pickle_holds_no_more_than_the_tensors_and_the_spec():
    layer = nn.Linear(64, 64)
    wrapper = adapted(layer, compile(chain(), layer))
    wrapper(torch.randn(2, 64))
    tensors = sum(t.numel() * t.element_size() for t in wrapper.state_dict().values())
    assert len(pickle.dumps(wrapper)) < tensors + 30_000


def test_attributes_of_the_base_layer_are_reached_and_mistakes_are_not_hidden(monkeypatch):
    layer = nn.Conv2d(4, 6, 3, stride=2, padding_mode="reflect")
    wrapper = adapted(layer, compile(chain(), layer))
    assert (wrapper.in_channels, wrapper.stride, wrapper.padding_mode) == (4, (2, 2), "reflect")
    assert wrapper.bias is layer.bias
    with pytest.raises(AttributeError, match=r"^'Conv2d' object has no attribute 'strides'$"):
        _ = wrapper.strides
    with pytest.warns(TnpeftWarning, match="an assignment to `weight`"):
        wrapper.weight = nn.Parameter(torch.zeros_like(layer.weight))  # as code that ties weights does
    assert wrapper.base.weight.count_nonzero() == 0

    def broken(self, weight):
        raise AttributeError("inside")

    monkeypatch.setattr(Adapter, "delta_inputs", broken)
    with pytest.raises(AttributeError):
        _ = wrapper.weight
    assert AdaptedLayer.__new__(type(wrapper)).__dict__ == {}
    with pytest.raises(AttributeError):
        _ = AdaptedLayer.__new__(type(wrapper)).stride


def test_adapters_may_be_called_like_methods_of_a_module_dict():
    layer = nn.Linear(4, 4)
    wrapper = wrap(layer)
    names = ("keys", "type", "half", "default", "pop", "training", "1")
    for name in names:
        wrapper.add_adapter(name, compile(chain(), layer, seed=len(name)))
    assert wrapper.names == names
    assert wrapper.adapter("keys").seed == 4
    assert sorted(wrapper.state_dict())[0] == "adapters.1.core_left"
    wrapper.remove_adapter("keys")
    assert wrapper.names == names[1:]


def test_hooks_of_the_base_layer_keep_working_and_can_be_removed():
    layer = nn.Linear(4, 4)
    calls: list[str] = []
    first = layer.register_forward_hook(lambda module, args, output: calls.append("forward"))
    layer.register_forward_pre_hook(lambda module, args: calls.append("before"))
    wrapper = adapted(layer, compile(chain(), layer))
    wrapper(torch.randn(1, 4))
    assert calls == ["before", "forward"]
    first.remove()
    wrapper.register_full_backward_hook(lambda module, before, after: calls.append("backward"))
    wrapper(torch.randn(1, 4, requires_grad=True)).sum().backward()
    assert calls == ["before", "forward", "before", "backward"]
    plain = pickle.loads(pickle.dumps(wrap(nn.Linear(4, 4)))).unwrap()
    assert type(plain) is nn.Linear
    layer = wrapper.unwrap()
    layer(torch.randn(1, 4, requires_grad=True)).sum().backward()
    assert calls == ["before", "forward", "before", "backward", "before", "backward"]


def test_cores_made_on_meta_need_values_before_the_first_forward():
    with torch.device("meta"):
        layer = nn.Linear(4, 6)
    adapter = compile(chain(), layer, name="mid.fc")
    wrapper = adapted(layer, adapter)
    assert wrapper(torch.empty(2, 4, device="meta")).shape == (2, 6)
    assert not adapter.has_values
    wrapper.to_empty(device="cpu")
    expected = (
        "layer 'mid.fc': cores: expected initial or loaded values, found memory without values (they were made on "
        "the meta device). Call `reset_parameters` of the adapted layer, or load the adapter, before the first forward."
    )
    for act in (lambda: wrapper(torch.zeros(2, 4)), adapter.delta_weight, adapter.network_weight):
        with pytest.raises(ExecutionError) as excinfo:
            act()
        assert str(excinfo.value) == expected
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    wrapper.reset_parameters()
    like = compile(chain(), nn.Linear(4, 6), name="mid.fc")
    assert all(torch.equal(one, two) for one, two in zip(adapter.parameters(), like.parameters(), strict=True))
    x = torch.randn(2, 4)
    assert torch.equal(wrapper(x), layer(x))
    wrapper.to("meta")
    assert not adapter.has_values
    wrapper.to_empty(device="cpu").load_state_dict(
        {**wrapper.state_dict(), **{f"adapters.a.{k}": v for k, v in like.state_dict().items()}}
    )
    assert adapter.has_values
    assert torch.equal(adapter.delta_weight(), torch.zeros(6, 4))


def test_attaching_inside_other_contexts_makes_ordinary_cores():
    layer = nn.Linear(4, 4)
    expected = compile(chain(), layer, name="x")
    with torch.inference_mode():
        inference = compile(chain(), layer, name="x")
    with torch.device("meta"):
        meta = compile(chain(), layer, name="x")
    torch.set_default_dtype(torch.float64)
    try:
        double = compile(chain(), layer, name="x")
    finally:
        torch.set_default_dtype(torch.float32)
    for adapter in (inference, meta, double):
        for one, two in zip(adapter.parameters(), expected.parameters(), strict=True):
            assert torch.equal(one, two)
            assert one.dtype == torch.float32
        adapter.delta_weight().sum().backward()


def test_a_forward_in_inference_mode_leaves_nothing_that_training_cannot_use():
    layer = nn.Linear(4, 4)
    wrapper = adapted(layer, compile(chain(), layer))
    with torch.inference_mode():
        wrapper(torch.randn(2, 4))
    wrapper(torch.randn(2, 4)).sum().backward()


def test_compile_takes_names_paths_and_adapted_layers(tmp_path):
    layer = nn.Linear(4, 4)
    path = tmp_path / "mine.yaml"
    path.write_text(load_spec("lora").text)
    assert compile(str(path), layer, r=2).network.num_parameters == 16
    assert compile("lora", adapted(layer, compile("lora", layer)), r=2).network.num_parameters == 16
    with pytest.raises(BindError):
        compile("lora", nn.Embedding(3, 3))


def test_canonical_weight_undoes_torchs_layout_of_grouped_transposed_convolutions():
    layer = nn.ConvTranspose1d(4, 6, 3, groups=2)
    network = chain().bind(layer)
    cores = {core.name: torch.randn(core.shape) for core in network.cores}
    stored = dense_weight(network, cores)
    canonical = canonical_weight(network.layer, stored)
    expected = torch.einsum(network.einsum, *[core.double() for core in cores.values()])
    assert torch.equal(canonical, expected.reshape(canonical.shape))
