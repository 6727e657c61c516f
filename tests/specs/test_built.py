"""The families of docs/specs_from_python.md against their formulas, and `compile` of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pages import PAGES, run
from torch import Tensor, nn

import tnpeft

Family = Callable[[int], tnpeft.Spec]


@pytest.fixture(scope="module")
def families() -> dict[str, Any]:
    return run(next(page for page in PAGES if page.stem == "specs_from_python"))


def perturbed(adapter: Any) -> dict[str, Tensor]:
    """The cores in float64, after a step away from the start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for core in adapter.trained.values():
            core.add_(0.3 * torch.randn_like(core))
    return {name: core.detach().double() for name, core in adapter.cores.items()}


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_boft(families: dict[str, Any], m: int):
    torch.manual_seed(0)
    layer, b = nn.Linear(64, 6), 4
    adapter = tnpeft.attach(nn.Sequential(layer), families["boft"](m), match="0").adapters["0"]
    cores, weight = perturbed(adapter), layer.weight.detach().double()
    whole = torch.eye(64, dtype=torch.float64)
    for j in range(m):
        skew = (cores[f"X{j}"] - cores[f"X{j}"].mT) / 2
        eye = torch.eye(b, dtype=torch.float64)
        turns = (eye - skew) @ torch.linalg.inv(eye + skew)
        factor = torch.zeros(64, 64, dtype=torch.float64)
        blocks: dict[int, list[tuple[int, int]]] = {}
        for place in range(64):
            group, t = divmod(place, b // 2)
            bit = group >> j & 1
            block = (group >> j + 1 << j) + (group & (1 << j) - 1)  # the other bits in their order
            blocks.setdefault(block, []).append((bit * (b // 2) + t, place))
        for block, places in blocks.items():
            for row, out in places:
                for column, at in places:
                    factor[out, at] = turns[block, row, column]
        whole = factor @ whole
    expected = cores["s"].reshape(-1, 1) * (weight @ whole.T)
    torch.testing.assert_close(adapter.network_weight().double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapter.delta_weight().double(), expected - weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 5])
def test_peanut(families: dict[str, Any], depth: int):
    torch.manual_seed(0)
    layer = nn.Linear(10, 8)
    model = nn.Sequential(layer)
    adapter = tnpeft.attach(model, families["peanut"](depth), match="0", r=3, alpha=0.5).adapters["0"]
    cores, weight = perturbed(adapter), layer.weight.detach().double()
    inner = [(cores["A"] @ weight).relu()]
    for j in range(1, depth + 1):
        inner.append((cores[f"E{j}"] @ inner[-1]).relu())
    now = inner[-1]
    for j in range(1, depth + 1):
        now = (cores[f"D{j}"] @ now).relu() + inner[depth - j]
    torch.testing.assert_close(adapter.delta_weight().double(), 0.5 * cores["B"] @ now, rtol=1e-5, atol=1e-6)


def test_a_network_compiles_with_its_layer_and_alone():
    layer = nn.Linear(6, 8)
    network = tnpeft.load_spec("lora").bind(layer, r=2)
    alone, beside = tnpeft.compile(network, name="x"), tnpeft.compile(network, layer, name="x")
    named = tnpeft.compile("lora", layer, name="x", r=2)
    for name, core in named.cores.items():
        assert torch.equal(alone.cores[name], core)
        assert torch.equal(beside.cores[name], core)
    with torch.no_grad():
        alone.cores["up"].add_(1)
    assert torch.equal(alone.delta_weight(), alone.cores["up"] @ alone.cores["down"])


@pytest.mark.parametrize(
    ("arguments", "params", "text"),
    [
        (
            ("deft",),
            {},
            "network of spec 'deft': expected a layer, whose weight it reads, found none. Pass the layer too.",
        ),
        (
            ("pissa",),
            {},
            "network of spec 'pissa': expected a layer, whose weight it reads, found none. Pass the layer too.",
        ),
        (
            ("lora", nn.Linear(6, 7)),
            {},
            "network of spec 'lora': expected the layer it is bound to, Linear(6, 8), found Linear(6, 7). Bind "
            "the spec to "
            "this layer.",
        ),
        (
            ("lora",),
            {"r": 2},
            "network of spec 'lora': expected no params, found r. Give params to `spec.bind`, where sizes are "
            "worked out.",
        ),
    ],
)
def test_networks_that_do_not_compile(arguments: tuple[Any, ...], params: dict[str, Any], text: str):
    name, *layer = arguments
    network = tnpeft.load_spec(name).bind("Linear", in_features=6, out_features=8)
    with pytest.raises(tnpeft.BindError) as caught:
        tnpeft.compile(network, *layer, **params)
    assert str(caught.value) == text


def test_a_spec_needs_a_layer():
    with pytest.raises(tnpeft.BindError) as caught:
        tnpeft.compile("lora")
    assert str(caught.value) == (
        "compile: expected a layer, found none. For example `tnpeft.compile(spec, layer)`, or bind it first: "
        "`spec.bind(...)` gives a network."
    )
