"""Verifying derived cores: the oracle of maps, checks of maps that users register, and what a broken library hides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import tnpeft
from tnpeft.network import Network
from tnpeft.program import maps as program_maps
from tnpeft.spec import map_kinds
from tnpeft.testing import networks
from tnpeft.verify import Case, VerifyReport, checks, engine, run_check, verify
from tnpeft.verify.differences import slope_by_differences
from tnpeft.verify.exact import Exact
from tnpeft.verify.gauge import gauge_of
from tnpeft.verify.model_under_test import adapted_layers
from tnpeft.verify.oracle import dense_weight, entry
from tnpeft.verify.oracle_derived import Definition, derive, size_of
from tnpeft.verify.oracle_linear import LINEAR, matrix_of
from tnpeft.verify.oracle_maps import oracle_map, oracle_slope

Shape = tuple[int, ...]
SMOOTH: list[tuple[str, Shape, Shape, dict[str, Any]]] = [
    *((name, (), (), {}) for name in ("tanh", "sin", "gelu", "silu", "relu", "cos", "exp", "sigmoid")),
    ("topk_softmax", (5,), (5,), {"k": 2.0}),
    ("unit", (2, 3), (2, 3), {}),
    ("unit", (2, 3), (2, 3), {"floor": 100.0}),
    ("norm", (2, 3), (), {}),
    ("qr", (2, 2, 3), (2, 2, 3), {}),
    ("cayley", (3, 3), (3, 3), {}),
    ("expm", (3, 3), (3, 3), {}),
    ("neumann", (3, 3), (3, 3), {"terms": 5.0}),
    ("neumann", (3, 3), (3, 3), {"terms": 2.0}),
    ("reflections", (3, 3), (3, 3), {}),
]
MOVING: list[tuple[str, Shape, Shape, dict[str, Any]]] = [
    ("antisymmetric", (3, 3), (3, 3), {}),
    ("skew", (6,), (4, 4), {}),
    ("scatter", (4,), (3, 4), {"at": np.array([7, 0, 11, 2])}),
    ("gather", (3,), (2, 2), {"at": np.array([[2, 0], [2, 1]])}),
    ("roll", (4,), (3, 4), {}),
    ("roll", (3, 4), (3, 4), {}),
    ("pad", (5,), (2, 4), {}),
    ("wavelet", (2, 5), (7,), {"family": "db2"}),
]


def rows(taken: Shape, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, *taken, generator=generator, dtype=torch.float64) / max(1.0, math.sqrt(math.prod(taken)))


@pytest.mark.parametrize(("name", "taken", "made", "arguments"), [*SMOOTH, *MOVING])
def test_slopes_are_those_of_differences(name: str, taken: Shape, made: Shape, arguments: dict[str, Any]):
    x, upstream = rows(taken), rows(made, 1)

    def value(points: Tensor) -> Tensor:
        return torch.from_numpy(oracle_map(name)(points.numpy(), made, **arguments))

    wanted = slope_by_differences(value, x, upstream)
    found = torch.from_numpy(oracle_slope(name)(x.numpy(), upstream.numpy(), made, **arguments))
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)
    assert (name in LINEAR) == bool(map_kinds.map_kind(name).linear)  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "taken", "made", "arguments"), MOVING)
def test_linear_maps_are_their_dense_tensor(name: str, taken: Shape, made: Shape, arguments: dict[str, Any]):
    dense = matrix_of(name, taken, made, **arguments).dense()
    assert dense.shape == (math.prod(made), math.prod(taken))
    function = program_maps.map_function(name)
    given = {key: torch.from_numpy(one)[None] if key == "at" else one for key, one in arguments.items()}
    units = torch.eye(math.prod(taken), dtype=torch.float64).reshape(1, -1, *taken)
    found = function(units, made, **given).reshape(math.prod(taken), -1)
    torch.testing.assert_close(found.T, torch.from_numpy(dense), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "taken", "made", "arguments"), [*SMOOTH, *MOVING])
def test_sizes_bound_what_rounding_does(name: str, taken: Shape, made: Shape, arguments: dict[str, Any]):
    """In fp32 the value is within a few roundings of its size."""
    x = rows(taken)
    definition = Definition(
        lambda points: torch.from_numpy(oracle_map(name)(points.numpy(), made, **arguments)),
        lambda points, up: torch.from_numpy(oracle_slope(name)(points.numpy(), up.numpy(), made, **arguments)),
    )
    bound = size_of(x.abs(), x, definition)
    given = {key: torch.from_numpy(one)[None] if key == "at" else one for key, one in arguments.items()}
    found = program_maps.map_function(name)(x.float()[None], made, **given)[0].double()
    assert bool(((found - definition.value(x)).abs() <= 2e-6 * bound.max()).all())
    assert bool((bound >= definition.value(x).abs()).all())


@settings(max_examples=25)
@given(networks())
def test_the_oracle_agrees_with_itself_entry_by_entry(network: Network):
    generator = torch.Generator().manual_seed(0)
    cores = {
        core.name: torch.zeros(core.shape, dtype=torch.int64)
        if core.is_index
        else torch.randn(core.shape, generator=generator, dtype=torch.float64)
        for core in network.cores
    }
    for core in network.derived:
        assert derive(network, cores).cores[core.name].shape == core.shape
    found = dense_weight(network, cores)
    last = tuple(size - 1 for size in found.shape)
    torch.testing.assert_close(entry(network, cores, last), float(found[last]), rtol=1e-9, atol=1e-9)


LOOKED_AT = ("entries", "start", "maps", "difference", "values", "gradients")

MAPPED = """
tnpeft: 2
name: mapped
layers: [Linear]
params: {{r: 2}}
sizes: {{o: out_channels, i: in_channels}}
cores:
  up:   {{legs: o r, init: {init}}}
  down: {{legs: r i, init: normal(1)}}
  made: {{of: up, legs: o r, map: {map}}}
weight: o i
start: {start}
"""


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    before = dict(map_kinds._registered)

    monkeypatch.setattr(engine, "SHRINKING_SECONDS", 0.5)
    monkeypatch.setattr(engine, "CHECKS", tuple(check for check in checks.CHECKS if check.name in LOOKED_AT))

    def act(function: Callable[..., Any], **flags: bool) -> None:
        map_kinds.register_map("mine", function, lambda sizes: sizes, **flags)

    yield act
    map_kinds._registered.clear()
    map_kinds._registered.update(before)


def report_of(legs: str = "o r", start: str = "frozen_copy", **options: Any) -> VerifyReport:
    init = "zeros" if start == "zero" else "normal(1)"
    text = MAPPED.format(map=f"mine({legs})" if legs else "mine", start=start, init=init)
    return verify(tnpeft.Spec.from_yaml(text), examples=3, advice=False, **options)


def told(report: VerifyReport, check: str = "maps") -> str:
    failure = next(failure for failure in report.failures if failure.check == check)
    return failure.message


def test_a_registered_map_holds(register: Callable[..., None]):
    register(lambda x: x.sinh())
    assert report_of("").ok
    register(lambda x: x / (1 + x.square().sum(-1, keepdim=True)), zero=True)
    assert report_of("r", "zero").ok
    register(lambda x: x.flip(-1) * 2, linear=True)
    assert report_of("r").ok


class Wrong(torch.autograd.Function):
    """x^3 with the gradient of x^2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2 * ctx.saved_tensors[0]


@pytest.mark.parametrize(
    ("function", "flags", "start", "text"),
    [
        (
            lambda x: x.tanh(),
            {"linear": True},
            "frozen_copy",
            "is not linear, but is said to be (`linear=True`): f(a + b)",
        ),
        (
            lambda x: x.cos(),
            {"zero": True},
            "zero",
            "is not zero at zeros, but is said to be (`zero=True`): it is up to 1",
        ),
        (lambda x: x.square(), {"zero": True}, "zero", "has no slope at zeros, but is said to have one (`zero=True`)"),
        (lambda x: x.detach().sin(), {}, "frozen_copy", "has no gradient; expected one made by functions that torch"),
        (
            lambda x: x - x.mean(),
            {},
            "frozen_copy",
            "depends on what other layers and legs hold; expected leading axes",
        ),
        (Wrong.apply, {}, "frozen_copy", "the gradient of map `mine` of core 'made' is "),
    ],
    ids=["linear", "zero", "slope", "gradient", "mixed", "wrong gradient"],
)
def test_what_is_wrong_with_a_map_is_told_by_name(
    function: Callable[..., Any], flags: dict[str, bool], start: str, text: str, register: Callable[..., None]
):
    register(function, **flags)
    message = told(report_of(start=start))
    assert "map `mine` of core 'made'" in message
    assert text in message


def test_sizes_count_what_a_frozen_copy_had_behind_a_kink():
    """Where `relu` has come to 0, a gradient is a difference of what the copy makes."""
    model = nn.Sequential(nn.Linear(3, 2))
    tnpeft.attach(
        model, tnpeft.Spec.from_yaml(MAPPED.format(map="relu", start="frozen_copy", init="ones")), match="all"
    )
    (layer,) = adapted_layers(model)
    cores = layer.adapter("default").cores
    with torch.no_grad():
        cores["up"].fill_(-1)
    gradients = []
    for oracle in (Exact(model), Exact(model, magnitude=True)):
        gradients += torch.autograd.grad(oracle.delta(layer).sum(), oracle.leaves[id(cores["down"])])
    assert not gradients[0].any()
    assert bool((gradients[1] >= 2).all())


def test_a_difference_that_loses_its_digits_is_found(monkeypatch: pytest.MonkeyPatch):
    """f(A) - f(A0) of rounded values, instead of in float64 by one call."""
    spec = tnpeft.Spec.from_yaml(MAPPED.format(map="sin", start="frozen_copy", init="normal(1)"))
    case = Case("Linear", 6, 8)
    tnpeft.testing.run_check("difference", spec, case)

    def rounded(adapter: tnpeft.Adapter, weight: Tensor | None = None) -> Tensor:
        now = {name: core.detach() for name, core in adapter.cores.items()}
        first = {**now, **adapter.start}
        made = [dense_weight(adapter.network, each).float() for each in (now, first)]
        return made[0] - made[1]

    monkeypatch.setattr(tnpeft.Adapter, "delta_weight", rounded)
    with pytest.raises(AssertionError, match="difference: the update after a step of 1e-05 is off by "):
        tnpeft.testing.run_check("difference", spec, case)


def test_a_broken_map_of_the_library_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(program_maps._BUILT_IN, "tanh", lambda x, shape: x.tanh() * 1.001)
    monkeypatch.setattr(engine, "CHECKS", tuple(check for check in checks.CHECKS if check.name in ("maps", "values")))
    report = verify(
        tnpeft.Spec.from_yaml(MAPPED.format(map="tanh", start="frozen_copy", init="normal(1)")),
        examples=3,
        advice=False,
    )
    assert "the value of map `tanh` of core 'made' is " in told(report)
    assert {failure.check for failure in report.failures} == {"maps", "values"}


def test_gauge_through_maps():
    """A bond of a derived product passes a matrix; a direction's length does nothing."""
    spec = tnpeft.load_spec("fedpara_tanh")
    gauge = gauge_of(spec, [Case("Linear", 8, 9, params={"r": 2}, dtype="float64")])
    assert gauge is not None
    assert (gauge.parameters, gauge.gauge, gauge.redundant) == (2 * 2 * 17, 8, 0)
    turned = gauge_of(tnpeft.load_spec("oft"), [Case("Linear", 8, 9, params={"b": 4}, dtype="float64")])
    assert turned is not None
    assert (turned.rank, turned.redundant) == (12, 0)


@pytest.mark.parametrize("name", ["oft", "hra", "gralora", "delora", "lorma_pi", "c3a", "psoft"])
def test_shipped_specs_with_maps_are_sound(name: str):
    report = verify(
        name, examples=1, seconds=5, advice=False, layer=tnpeft.layer_of(nn.Linear(8, 8)), **SMALL.get(name, {})
    )
    assert report.ok, report


SMALL: dict[str, dict[str, float]] = {"oft": {"b": 4}, "c3a": {"b": 4}, "psoft": {"r": 3}, "gralora": {"r": 4}}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("seed", range(4))
def test_sums_over_an_outer_leg_are_equal_where_their_inputs_are(seed: int, dtype: str):
    """`bora` takes norms over outputs and over inputs: rows of one sum must be added in one order."""
    case = Case("ConvTranspose2d", 3, 11, kernel_size=(2, 1), dtype=dtype, seed=seed, options={"bias": False})
    run_check("start", "bora", case)
