"""Dense layers that contract their delta weights together compute as each does alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from modes import relative
from small import chain, move
from torch import Tensor, nn
from towers import SHARED, Tower, X, adapters, results, same, tower

import tnpeft
from tnpeft import ExecutionError
from tnpeft.execution import batches
from tnpeft.network import Spec
from tnpeft.program import counting

# Two terms with a core in common; a core that stands in a term by itself; a scale of each.
SUM = """
tnpeft: 1
name: sum
layers: any
params: {r: 3}
sizes: {o: out_channels, i: in_channels}
cores:
  up:    o r
  down:  r i k...
  other: {legs: r i k..., frozen: true}
  full:  o i k...
terms:
  - {cores: [up, down], weight: o i k..., scale: 2}
  - {cores: [up, other], weight: o i k..., scale: -1}
  - {cores: [full], weight: o i k..., scale: 0.5}
scale: 0.5
start: frozen_copy
"""
SPECS = [chain(), chain("zero"), chain(frozen=True), Spec.from_yaml(SUM), SHARED, "loha", "lora", "lokr"]


@pytest.fixture
def contracted() -> Iterator[list[int]]:
    """For how many layers at once delta weights were contracted, call by call."""
    with counting() as found:
        yield found["deltas"]


def together(contracted: list[int]) -> list[int]:
    """Those of several layers."""
    return [layers for layers in contracted if layers > 1]


def exact(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal but for the rounding of float64."""
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        assert relative(found[name], one) < 1e-12, name


def pair(spec: Spec | str | None = None, dtype: torch.dtype = torch.float64) -> tuple[Tower, Tower]:
    """A model that groups its layers, and one that does not."""
    model, alone = (tower("dense", spec, alone=alone).to(dtype) for alone in (False, True))
    return model, alone


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_groups_compute_what_layers_do_alone(spec: Spec | str, contracted: list[int]):
    model, alone = pair(spec)
    expected = results(alone, X.double())
    assert not together(contracted)
    for _ in range(2):
        exact(results(model, X.double()), expected)
    assert sorted(together(contracted)) == [2, 2, 4, 4]
    with torch.no_grad():
        assert relative(model(X.double()), expected["output"]) < 1e-12


@pytest.mark.parametrize("spec", [chain(), chain("zero"), "loha"], ids=str)
def test_the_start_is_the_base_model(spec: Spec | str, contracted: list[int]):
    start = tower("dense", spec, moved=False)
    torch.manual_seed(0)
    assert torch.equal(start(X), Tower()(X))
    assert together(contracted)


@pytest.mark.parametrize("spec", ["dora", "glora", "hira"])
def test_what_cannot_be_grouped_is_not(spec: str, contracted: list[int]):
    model, alone = pair(spec)
    exact(results(model, X.double()), results(alone, X.double()))
    assert not together(contracted)


def test_large_weights_are_contracted_alone(monkeypatch: pytest.MonkeyPatch, contracted: list[int]):
    monkeypatch.setattr(batches, "SMALL", 64)
    model, alone = pair()
    exact(results(model, X.double()), results(alone, X.double()))
    assert together(contracted) == [2]


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.ConvTranspose2d(8, 8, 3, padding=1, groups=2),
        lambda: nn.Conv2d(8, 8, 3, padding=1, groups=4),
        lambda: nn.ConvTranspose2d(8, 8, 3, padding=1),
        lambda: nn.Conv2d(8, 8, (3, 1), padding=(1, 0)).to(memory_format=torch.channels_last),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_every_layout(make: Callable[[], nn.Module], dtype: torch.dtype, contracted: list[int]):
    torch.manual_seed(0)
    model = nn.Sequential(*(make() for _ in range(3))).to(dtype)
    tnpeft.attach(model, chain(), match=r"\d", mode="dense")
    move(model)
    x = X.to(dtype)
    expected, found = x, {}
    for layer in model:
        expected = layer(expected)
    for name, output in (("alone", expected), ("together", model(x))):
        model.zero_grad()
        output.square().sum().backward()
        found[name] = [one.grad for one in model.parameters() if one.grad is not None]
    assert together(contracted) == [3]
    bound = 1e-12 if dtype == torch.float64 else 1e-2
    assert relative(model(x), expected) < bound
    for one, other in zip(found["together"], found["alone"], strict=True):
        assert relative(one, other) < 3 * bound


def test_weights_that_changed_their_memory_format(contracted: list[int]):
    model, alone = pair()
    expected = results(alone, X.double())
    exact(results(model, X.double()), expected)
    model.to(memory_format=torch.channels_last)
    exact(results(model, X.double()), expected)
    assert together(contracted) == [4, 2, 4, 2]


def test_a_layer_may_be_called_twice_or_not_at_all(contracted: list[int]):
    """Whatever a pass does not call gets no gradient: a zero would be a step of weight decay and of momentum."""
    both = pair()
    for one in both:
        one.twice = 1
    exact(*(results(one, X.double()) for one in both))
    for one in both:
        one.skips = {0, 3}
    found, expected = (results(one, X.double()) for one in both)
    exact(found, expected)
    assert not any(name.startswith(("convs.0", "convs.3")) for name in found)
    assert together(contracted) == [4, 2] * 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_a_part_of_the_model_changes_nothing(reentrant: bool):
    both = pair()
    for one in both:
        one.checkpointed = {1: reentrant, 2: reentrant}
    for _ in range(2):
        exact(*(results(one, X.double()) for one in both))


def second_order(model: Tower) -> list[Tensor]:
    """The gradient of the squared norm of a gradient."""
    cores = [core for core in model.parameters() if core.requires_grad and core.dim() > 1]
    x = X.double().requires_grad_()
    found = torch.autograd.grad(model(x).pow(3).sum(), [x, *cores], create_graph=True)
    return list(torch.autograd.grad(sum(one.square().sum() for one in found), [x, *cores]))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_second_derivatives(spec: Spec | str, contracted: list[int]):
    model, alone = pair(spec)
    for found, expected in zip(second_order(model), second_order(alone), strict=True):
        assert relative(found, expected) < 1e-11
    assert together(contracted) == [4, 2]


def test_second_derivatives_with_cores_that_were_written_to_are_refused():
    model, _ = pair()
    loss = model(X.double()).square().sum()
    move(adapters(model)[0], 0.1)
    with pytest.raises(ExecutionError) as caught:
        torch.autograd.grad(loss, list(adapters(model)[0].parameters()), create_graph=True)
    assert str(caught.value) == (
        "double backward through delta weights: expected the cores of the forward pass, found values that were written "
        "since. Step the optimiser after the last backward pass."
    )


def test_each_pass_has_its_own_gradients():
    """Two passes before their backward passes, with other cores, and a loss for each output."""
    gradients = []
    for model in pair():
        first = model(X.double())
        graph = torch.autograd.grad(first.square().sum(), list(adapters(model)[1].parameters()), retain_graph=True)
        for number, adapter in enumerate(adapters(model)):
            adapter.cores["left"].data.add_(0.1 * number)
        second = model(X.double())
        assert relative(first, second) > 1e-3
        second.square().sum().backward()
        gradients.append([*graph, *(one.grad for one in model.parameters() if one.grad is not None)])
    for found, expected in zip(*gradients, strict=True):
        assert relative(found, expected) < 1e-12


def test_each_of_several_losses_has_its_own_backward_pass():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.left(x), self.right(x)

    torch.manual_seed(0)
    model = Branches()
    tnpeft.attach(model, chain(), match="left|right", mode="dense")
    move(model)
    x = X[0, :, :, 0].T
    found = []
    for outputs in (model(x), (model.left(x), model.right(x))):
        model.zero_grad()
        for output in outputs:
            output.square().sum().backward()
        found.append([one.grad for one in model.parameters() if one.grad is not None])
    assert len(found[0]) == 6
    for one, other in zip(*found, strict=True):
        assert relative(one, other) < 1e-5


@pytest.mark.parametrize(
    "trip",
    [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one)), lambda one: one.float().double()],
    ids=["copy", "pickle", "to"],
)
def test_copies_and_casts(trip: Callable[[Tower], Tower], contracted: list[int]):
    model, alone = pair()
    results(model, X.double())
    other = trip(model)
    exact(results(other, X.double()), results(alone, X.double()))
    assert together(contracted) == [4, 2] * 2
    move(adapters(other)[0], 0.5)
    move(adapters(alone)[0], 0.5)
    exact(results(other, X.double()), results(alone, X.double()))
    same(results(other.float()), results(alone.float()))


def test_other_tensors_in_a_layers_place_are_seen():
    model, other = pair()
    model.float(), other.float()
    for number, adapter in enumerate(adapters(other)):
        move(adapter, 0.5, 30 + number)
        for start in adapter.start.values():
            start.add_(0.1)
    for conv in other.convs:
        conv.base.weight.data.add_(0.1)
    values = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    first = model(X)
    assert relative(torch.func.functional_call(model, values, (X,)), other(X)) < 1e-6
    assert torch.equal(model(X), first)
    model.load_state_dict(other.state_dict())
    assert relative(model(X), other(X)) < 1e-6


@pytest.mark.parametrize("what", ["cores", "base weight", "effective weight"])
def test_what_changes_within_a_pass_is_seen(what: str):
    model, alone = pair()

    def change(layer: nn.Module, _inputs: object) -> None:
        with torch.no_grad():
            if what == "cores":
                layer.adapter("default").cores["left"].add_(0.1)
            elif what == "base weight":
                layer.base.weight.mul_(1.5)
            else:
                layer.weight.mul_(2)

    for one in (model, alone):
        one.convs[2].register_forward_pre_hook(change)
    with torch.no_grad():
        assert relative(model(X.double()), alone(X.double())) < 1e-12


def test_passes_with_and_without_gradients_follow_each_other():
    model, alone = pair()
    expected = alone(X.double()).detach()
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad, torch.inference_mode, torch.no_grad):
        with context():
            assert relative(model(X.double()).detach().clone(), expected) < 1e-12
    for one in (model, alone):
        adapters(one)[0].cores["middle"].requires_grad_(False)
    exact(results(model, X.double()), results(alone, X.double()))


def test_accumulating_keeps_the_sums_of_a_group(contracted: list[int]):
    model, alone = pair()
    xs = [X.double(), 2 * X.double(), X.double().flip(0)]
    found = []
    for one in (model, alone):
        with tnpeft.accumulating(one):
            one.skips = {1}
            one(xs[0]).square().sum().backward()
            one.skips = set()
            for x in xs:
                one(x).square().sum().backward()
        found.append({name: core.grad for name, core in one.named_parameters() if core.grad is not None})
    assert together(contracted) == [4, 2]
    exact(*found)


def test_layers_without_values_do_not_hinder_the_others(contracted: list[int]):
    model, alone = pair()
    for one in (model, alone):
        one.skips = {3}
        adapters(one)[3]._initialised = False
    exact(results(model, X.double()), results(alone, X.double()))
    assert together(contracted) == [3, 2]


def test_compiled_parts_of_a_model():
    torch.compiler.reset()
    model, alone = pair()
    for one in (model, alone):
        one.convs[0] = torch.compile(one.convs[0], backend="eager")  # type: ignore[assignment]
    exact(results(model, X.double()), results(alone, X.double()))
