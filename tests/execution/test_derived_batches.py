"""Maps are applied once a forward pass, for all layers alike."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnpeft
from tnpeft.program import counting, derived
from tnpeft.program.maps import map_change, map_function


def tower(count: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(16, 16) for _ in range(count)])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each map is called, and for how many layers in all."""
    counted: Counter[str] = Counter()

    def counting(find: Any) -> Any:
        def found(name: str) -> Any:
            function = find(name)

            def call(x: Tensor, *rest: Any, **arguments: Any) -> Tensor:
                counted[name] += 1
                counted[f"{name}, layers"] += len(x)
                return function(x, *rest, **arguments)

            return None if function is None else call

        return found

    monkeypatch.setattr(derived, "map_function", counting(map_function))
    monkeypatch.setattr(derived, "map_change", counting(map_change))
    return counted


@pytest.mark.parametrize(
    ("spec", "params", "name", "times"),
    [
        ("oft", {"b": 4}, "neumann", 3),  # of the cores, of their copies, and once more for the gradients
        ("hra", {"rank": 2}, "reflections", 3),
        ("ether", {}, "unit", 2),  # its change has a formula
    ],
)
def test_a_map_is_called_once_a_pass(
    spec: str, params: dict[str, int], name: str, times: int, calls: Counter[str]
) -> None:
    model = tower()
    tnpeft.attach(model, spec, match="all", **params)
    x = torch.randn(3, 16)
    for _ in range(2):  # the first pass plans, the second makes what is kept of the start
        model(x)
    calls.clear()
    model(x).sum().backward()
    assert (calls[name], calls[f"{name}, layers"]) == (times, 4 * times)


ELEMENTWISE = """
tnpeft: 2
name: elementwise
layers: [Linear]
sizes: {{o: out_channels, i: in_channels}}
cores:
  a: {{legs: o, init: normal(1)}}
  h: {{of: a, legs: o, map: {map}}}
  b: {{legs: i, init: normal(1)}}
weight: o i
start: frozen_copy
"""


@pytest.mark.parametrize("name", ["tanh", "sin", "gelu", "silu", "cos", "sigmoid"])
def test_a_map_starts_exactly_wherever_a_number_stands(name: str):
    """Torch rounds what fills a vector of the processor otherwise than the rest of a tensor."""
    spec = tnpeft.Spec.from_yaml(ELEMENTWISE.format(map=name))
    for size in (1, 7, 13, 22, 37):
        for dtype in (torch.float32, torch.float64):
            adapter = tnpeft.compile(spec, nn.Linear(2, size, dtype=dtype))
            assert not adapter.delta_weight().any(), (size, dtype)


def test_layers_of_a_pass_may_be_walked_back_one_by_one():
    model = tower()
    tnpeft.attach(model, "oft", match="all", b=4)
    x = torch.randn(3, 16)
    seen: list[Tensor] = []
    for layer in model:
        layer.register_forward_hook(lambda _layer, _inputs, output: seen.append(output))
    model(x)
    for place in (3, 1, 1, 0):
        seen[place].sum().backward(retain_graph=True)
    model.zero_grad()
    seen.clear()
    first = model(x)
    second = model(x + 1)  # another pass
    first.sum().backward()
    second.sum().backward()
    grads = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    (model(x).sum() + model(x + 1).sum()).backward()
    again = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for grad, other in zip(grads, again, strict=True):
        torch.testing.assert_close(grad, other)


def test_a_step_between_passes_is_seen():
    model, alone = tower(), tower()
    for each in (model, alone):
        tnpeft.attach(each, "oft", match="all", b=4)
    x = torch.randn(3, 16)
    for _ in range(2):
        optimisers = [
            torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=1.0) for each in (model, alone)
        ]
        for each, optimiser in zip((model, alone), optimisers, strict=True):
            optimiser.zero_grad()
            output = x
            if each is model:
                output = model(x)
            else:
                for layer in alone:  # outside of a pass
                    output = layer(output)
            output.square().sum().backward()
            optimiser.step()
    torch.testing.assert_close(model(x), alone(x))


def test_what_a_pass_knows_without_gradients_is_not_what_it_knows_with_them():
    """One layer is called without gradients before the others are called with them."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = tower()

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.layers[0](x)
            for layer in self.layers:
                x = layer(x)
            return x

    model = Model()
    tnpeft.attach(model, "hra", match="all", rank=2, mode="factored")
    x = torch.randn(3, 16)
    for _ in range(3):
        model.zero_grad()
        model(x).square().sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 4
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in trained)


def test_delta_weights_are_contracted_together_where_derived_cores_have_the_weight() -> None:
    """Not where a term names the weight itself: those are as large as it."""
    x = torch.randn(3, 16)
    for spec, together in (("hra", [4]), ("hira", [1] * 4)):
        model = tower()
        tnpeft.attach(model, spec, match="all", mode="dense")
        expected = x
        with torch.no_grad():
            for layer in model:
                for core in layer.adapter("default").trained.values():
                    core.add_(0.1 * torch.randn_like(core))
                weight = layer.base.weight + layer.adapter("default").delta_weight()
                expected = nn.functional.linear(expected, weight, layer.base.bias)
        model(x)
        with counting() as found:
            output = model(x)
        assert found["deltas"] == together
        torch.testing.assert_close(output, expected)
        first = model[0].base.weight
        with torch.no_grad():  # between two passes
            first.mul_(2)
        assert not torch.allclose(model(x), expected)


def test_a_weight_written_unseen_after_accumulating_is_read_anew() -> None:
    """Passes that use what is kept ask for changes alone, and the start of these must not wait for later ones."""
    model, x = tower(2), torch.randn(3, 16)
    tnpeft.attach(model, "bora", match="all")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    with tnpeft.accumulating(model):
        for _ in range(3):
            model(x).sum().backward()
    for layer in model:
        layer.base.weight.data.mul_(1.5)  # no version counts it
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(model(x), expected)
