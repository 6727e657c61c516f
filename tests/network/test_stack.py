"""A stack of Linear layers is what its slices are one by one, with cores, inits and counts of each."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tnpeft
from tnpeft.adapters import Adapter
from tnpeft.adapters.parked import ParameterLayer
from tnpeft.errors import BindError
from tnpeft.network.orientation import orientation_of, oriented

SLICES, OUT, IN = 3, 12, 8
SHARED_ALONE = ("lorta", "metatt")
SPECS = [name for name in tnpeft.list_specs() if "Linear" in tnpeft.load_spec(name).layers]


def adapter_on(spec: tnpeft.Spec, weight: nn.Parameter, orientation: str, name: str) -> Adapter:
    owner = nn.Module()
    owner.weight = weight
    layer = oriented(weight.shape, orientation)
    return Adapter(spec.bind(layer), ParameterLayer(owner, "weight", layer), name=name)


@pytest.mark.parametrize(
    ("name", "orientation"),
    [(name, "e o i") for name in SPECS if name not in SHARED_ALONE]
    + [
        (name, "e i o")
        for name in ("lora", "dora", "tenvoo_linear", "quanta", "hira", "vera", "pissa")
        if name in SPECS
    ],
)
def test_each_slice_is_a_layer_with_cores_of_its_own(name: str, orientation: str) -> None:
    spec = tnpeft.load_spec(name)
    torch.manual_seed(0)
    sides = (OUT, IN) if orientation == "e o i" else (IN, OUT)
    weight = nn.Parameter(torch.randn(SLICES, *sides))
    stack = adapter_on(spec, weight, orientation, "x")
    assert not stack.delta_weight().any()
    assert stack.network.num_parameters == sum(parameter.numel() for parameter in stack.parameters())
    first = {key: tensor.clone() for key, tensor in stack.state_dict().items()}
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    delta = stack.delta_weight()
    assert delta.stride() == weight.stride()
    shared = {core.name for core in stack.network.cores if core.shared}
    for number in range(SLICES):
        one = adapter_on(spec, nn.Parameter(weight[number].detach().clone()), orientation[2:], f"x.{number}")
        own = {key for key in first if key.partition("_")[2] not in shared}
        for key, tensor in one.state_dict().items():
            if key in own:
                assert torch.equal(first[key][number], tensor), key
        one.load_state_dict({key: value[number] if key in own else value for key, value in stack.state_dict().items()})
        torch.testing.assert_close(delta[number], one.delta_weight(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SHARED_ALONE)
def test_slices_that_would_be_all_the_same_are_refused(name: str) -> None:
    with pytest.raises(BindError) as caught:
        tnpeft.load_spec(name).bind(oriented((3, 12, 8), "e o i"))
    assert str(caught.value) == (
        f"spec '{name}' on Linear(8, 12) x 3: expected a core of its own for each slice, found cores that layers share "
        "alone. Choose a spec of which each layer has a core of its own."
    )


def test_a_slice_may_have_an_index_of_the_stacks_name() -> None:
    text = (
        "tnpeft: 1\nname: mine\nlayers: [Linear]\nsizes: {o: out_features, i: in_features, slice: 2}\n"
        "cores:\n  a: {legs: o slice, init: zeros}\n  b: slice i\nweight: o i\nstart: zero\n"
    )
    network = tnpeft.Spec.from_yaml(text).bind(oriented((3, 4, 5), "e o i"))
    assert network.sizes["slice_"] == 3
    assert network.num_parameters == 3 * 2 * (4 + 5)
    assert network.formula == "3 (2 o + 2 i)"


@pytest.mark.parametrize("orientation", ["o i", "i o", "e o i", "e i o"])
def test_orientations_are_there_and_back(orientation: str) -> None:
    shape = (3, 5, 7)[-len(orientation.split()) :]
    layer = oriented(shape, orientation)
    assert orientation_of(layer) == orientation
    assert layer.stored_shape == shape
    assert layer.numel == torch.Size(shape).numel()
    assert tnpeft.plan(tnpeft.load_spec("lora").bind(layer), "factored").mode in ("factored", "dense")


def test_a_stack_runs_dense() -> None:
    plan = tnpeft.plan(tnpeft.load_spec("lora").bind(oriented((3, 5, 7), "e o i")), "factored")
    assert plan.mode == "dense"
    assert plan.reason == "a stack of layers: each slice has its own input"
