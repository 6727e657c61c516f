"""Every execution mode on random networks, layers and inputs, against one dense sum in float64."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from modes import agree, filled, gradients_of, oracle, relative
from networks import make_network, networks
from torch import Tensor, nn

from tnpeft.adapters import Adapter
from tnpeft.errors import TnpeftError
from tnpeft.execution import AdaptedLayer, wrap
from tnpeft.network import Network
from tnpeft.planning import Axis
from tnpeft.schedule import MODES
from tnpeft.testing import inputs_for, params_of, run_check, specs
from tnpeft.verify.strategies import cases, signatures

HEALTHY = [HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.data_too_large]


@st.composite
def calls(draw: st.DrawFn, dtypes: tuple[str, ...] = ("float32", "float64")) -> tuple[Network, nn.Module, Tensor]:
    """A network, a layer with options for it, and an input of it, unbatched ones too."""
    network = draw(networks(max_cores=5, groups=False))
    layer = draw(cases(st.just(network.layer), dtypes=dtypes)).build().requires_grad_(False)
    x = draw(inputs_for(layer))
    if draw(st.integers(0, 3)) == 0:
        x = x[0]
    elif draw(st.integers(0, 3)) == 0:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    return network, layer, x


def on(network: Network, layer: nn.Module, mode: str) -> AdaptedLayer:
    wrapper = wrap(layer)
    wrapper.add_adapter("a", Adapter(network, layer, seed=0, mode=mode))
    wrapper.act({"a": 1.0})
    return wrapper


def output_of(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's own; options that torch itself refuses are no case."""
    try:
        with torch.no_grad():
            found: Tensor = layer(x)
    except (RuntimeError, NotImplementedError, ValueError):
        assume(False)
        raise
    return found


RAN: Counter[str] = Counter()


@settings(max_examples=120, suppress_health_check=HEALTHY)
@given(drawn=calls(), seed=st.integers(0, 9))
def test_all_modes_are_the_layer_with_the_summed_weight(drawn: tuple[Network, nn.Module, Tensor], seed: int):
    """Output, input gradient and core gradients, far from the start."""
    network, layer, x = drawn
    base = output_of(layer, x)
    upstream = torch.randn(base.shape, generator=torch.Generator().manual_seed(seed)).to(base.dtype)
    exact: dict[str, Tensor] | None = None
    for mode in MODES:
        wrapper = on(network, layer, mode)
        if network.start == "frozen_copy":
            assert torch.equal(wrapper(x), base)
        filled(wrapper, seed)
        if exact is None:
            exact, bound = oracle(wrapper, x, upstream), oracle(wrapper, x, upstream, magnitude=True)
        agree(gradients_of(wrapper, x, upstream), exact, bound, 1e-5 if x.dtype == torch.float32 else 1e-13)
        RAN[_ran(wrapper)] += 1


def _ran(wrapper: AdaptedLayer) -> str:
    last = wrapper.calls("a").last
    return "dense" if last is None else last.mode


def test_random_networks_do_run_in_every_mode():
    """The test above, which stands before this one, has compared something."""
    if RAN:
        assert min(RAN["factored"], RAN["hybrid"]) > 25


@settings(max_examples=40, suppress_health_check=HEALTHY)
@given(drawn=calls(("bfloat16", "float16")), autocast=st.booleans(), mode=st.sampled_from(("factored", "hybrid")))
def test_narrow_types_start_exactly_and_stay_close(drawn: tuple[Network, nn.Module, Tensor], autocast: bool, mode: str):
    network, layer, x = drawn
    narrow = x.dtype
    if autocast:
        layer, x = layer.float(), x.float()
    with torch.autocast("cpu", dtype=narrow, enabled=autocast):
        base = output_of(layer, x)
        upstream = torch.randn(base.shape, generator=torch.Generator().manual_seed(0)).to(base.dtype)
        wrapper = on(network, layer, mode)
        if network.start == "frozen_copy":
            assert torch.equal(wrapper(x), base)
        filled(wrapper)
        found = gradients_of(wrapper, x, upstream)
    exact, bound = oracle(wrapper, x, upstream), oracle(wrapper, x, upstream, magnitude=True)
    agree(found, exact, bound, 2 * torch.finfo(narrow).eps)


@settings(max_examples=20, suppress_health_check=HEALTHY)
@given(data=st.data())
def test_random_specs_start_exactly_and_agree_in_every_mode(data: st.DataObject):
    """Sums of terms, shared and frozen cores, as a model of equal layers runs them."""
    spec = data.draw(specs(max_cores=4))
    case = data.draw(cases(signatures(spec.layers, max_channels=8, groups=False), params_of(spec), ("float32",)))
    try:
        run_check("start", spec, case)
        run_check("modes", spec, case)
    except TnpeftError:
        assume(False)


@given(
    inputs=st.integers(1, 9),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
    before=st.integers(0, 4),
    transposed=st.booleans(),
    more=st.integers(0, 3),
)
def test_an_axis_joins_what_a_convolution_joins(
    inputs: int, kernel: int, stride: int, dilation: int, before: int, transposed: bool, more: int
):
    """Entry by entry of the kernel, against torch with a kernel of zeros and a one."""
    before = min(before, dilation * (kernel - 1))
    span = dilation * (kernel - 1) + 1
    if transposed:
        outputs = (inputs - 1) * stride - 2 * before + span + min(more, max(stride, dilation) - 1)
    else:
        outputs = (inputs + 2 * before - span) // stride + 1
    assume(outputs > 0 and inputs + 2 * before >= span)
    axis = Axis(inputs, outputs, kernel, stride, dilation, before)
    x = torch.arange(1.0, inputs + 1).reshape(1, 1, -1)
    for entry in range(kernel):
        weight = torch.zeros(1, 1, kernel)
        weight[..., entry] = 1
        if transposed:
            extra = outputs - ((inputs - 1) * stride - 2 * before + span)
            options = {"stride": stride, "padding": before, "output_padding": extra, "dilation": dilation}
            expected = nn.functional.conv_transpose1d(x, weight, **options)
        else:
            expected = nn.functional.conv1d(x, weight, stride=stride, padding=before, dilation=dilation)
        found = torch.zeros(outputs)
        if (pair := axis.slices(entry, transposed)) is not None:
            found[pair[1]] = x[0, 0, pair[0]]
        assert torch.equal(found, expected[0, 0])


TREE = make_network({"left": "o a", "middle": "a b", "right": "b i"}, "o i", {"o": 12, "i": 10, "a": 2, "b": 3})


@pytest.mark.parametrize("mode", ["factored", "hybrid"])
def test_cores_of_one_layer_may_train_in_part(mode: str):
    """Only the gradients that are wanted are made, whichever they are."""
    torch.manual_seed(0)
    layer = nn.Linear(10, 12).requires_grad_(False)
    x, upstream = torch.randn(5, 10), torch.randn(5, 12)
    whole = gradients_of(filled(on(TREE, layer, mode)), x, upstream)
    for name in ("left", "middle", "right"):
        wrapper = filled(on(TREE, layer, mode))
        cores = wrapper.adapter("a").cores
        for other, core in cores.items():
            core.requires_grad_(other == name)
        wrapper(x).backward(upstream)
        assert relative(cores[name].grad, whole[name]) < 1e-6
        assert all(core.grad is None for other, core in cores.items() if other != name)
