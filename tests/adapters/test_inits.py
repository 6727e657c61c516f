"""Initial values: their distributions, their streams, and the mistakes of registered functions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tnpeft.adapters.inits import stream
from tnpeft.errors import BindError, SpecError
from tnpeft.execution import compile
from tnpeft.network import Spec
from tnpeft.spec import register_init

SINGLE = """
tnpeft: 1
name: single
layers: any
sizes: {o: out_channels, i: in_channels}
cores:
  w: {legs: o i k..., init: "INIT"}
weight: o i k...
start: frozen_copy
"""

PISSA = """
tnpeft: 1
name: pissa
layers: any
params: {r: 3}
sizes: {o1 o2: "factorize(out_channels, 2, pad=true)", i: in_channels}
bond: r
cores:
  u: {legs: o1 r o2, init: svd_us}
  v: {legs: r i k..., init: svd_vs}
weight: (o1 o2) i k...
start: frozen_copy
"""


@pytest.fixture
def empty_registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr("tnpeft.spec.inits._registered", {})


def draw(init: str, layer: nn.Module | None = None) -> torch.Tensor:
    adapter = compile(Spec.from_yaml(SINGLE.replace("INIT", init)), layer or nn.Linear(200, 300), name="layer")
    return adapter.cores["w"].detach()


@pytest.mark.parametrize(
    ("init", "std", "bound"),
    [
        ("zeros", 0.0, 0.0),
        ("normal(0.3)", 0.3, math.inf),
        ("uniform(0.6)", 0.6 / math.sqrt(3), 0.6),
        ("kaiming_uniform(fan=[i], gain=relu)", math.sqrt(2 / 200), math.sqrt(6 / 200)),
        ("kaiming_uniform(fan=50)", math.sqrt(1 / 50), math.sqrt(3 / 50)),
        ("orthogonal(2)", 2 / math.sqrt(300), math.inf),
    ],
)
def test_the_distributions_are_what_they_are_called(init, std, bound):
    values = draw(init)
    assert values.dtype == torch.float32
    assert values.is_contiguous()
    assert abs(values.mean()) <= 0.01 * (std or 1)
    assert values.std().item() == pytest.approx(std, rel=0.01)
    assert values.abs().max() <= bound
    if 0 < bound < math.inf:
        assert values.abs().max() > 0.99 * bound


def test_constants_and_identities():
    assert torch.equal(draw("ones"), torch.ones(300, 200))
    assert torch.equal(draw("constant(-0.25)"), torch.full((300, 200), -0.25))
    assert torch.equal(draw("eye"), torch.eye(300, 200))


@pytest.mark.parametrize("layer", [nn.Linear(20, 30), nn.Linear(30, 20), nn.Conv2d(4, 30, 3), nn.Conv1d(40, 8, 1)])
def test_orthogonal_has_orthonormal_columns_or_rows(layer):
    values = draw("orthogonal(gain=3)", layer).flatten(1).double() / 3
    gram = values.T @ values if values.shape[0] >= values.shape[1] else values @ values.T
    torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("init", "first"),
    [
        ("normal(1)", [0.60364, -0.67337, -1.15571]),
        ("uniform(1)", [0.96658, -0.48467, -0.16609]),
        ("orthogonal", [0.33790, -0.64694, -0.68359]),
    ],
)
def test_the_numbers_themselves_never_change(init, first):
    assert draw(init, nn.Linear(3, 2)).flatten()[:3].tolist() == pytest.approx(first, abs=1e-5)


def test_a_stream_depends_on_seed_layer_core_and_shape_alone():
    def first(*key: object) -> float:
        return torch.rand(1, generator=stream(*key)).item()

    keys = [
        (0, "a", "b", (2, 3)),
        (1, "a", "b", (2, 3)),
        (0, "c", "b", (2, 3)),
        (0, "a", "c", (2, 3)),
        (0, "a", "b", (3, 2)),
        (0, "ab", "", (2, 3)),
    ]
    torch.manual_seed(5)
    values = [first(*key) for key in keys]
    torch.manual_seed(6)
    torch.rand(3)
    assert values == [first(*key) for key in keys]
    assert len(set(values)) == len(keys)


def test_cores_and_layers_draw_apart_and_the_global_generator_is_not_used():
    before = torch.get_rng_state()
    layer = nn.Linear(8, 8)
    torch.set_rng_state(before)
    one, two = (compile("quanta", layer, name=name) for name in ("a", "b"))
    again = compile("quanta", layer, name="a")
    other = compile("quanta", layer, name="a", seed=1)
    assert torch.equal(before, torch.get_rng_state())
    for core in one.cores:
        assert torch.equal(one.cores[core], again.cores[core])
        assert not torch.equal(one.cores[core], two.cores[core])
        assert not torch.equal(one.cores[core], other.cores[core])
    assert len({tuple(core.flatten()[:4].tolist()) for core in one.cores.values()}) == len(one.cores)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 7),
        nn.Conv2d(4, 7, 3),
        nn.Conv1d(4, 7, 3, groups=1),
        nn.ConvTranspose1d(6, 4, 3, groups=2),
        nn.Conv2d(4, 6, 3, groups=2),
    ],
)
def test_svd_inits_give_the_best_approximation_of_the_weight(layer):
    adapter = compile(Spec.from_yaml(PISSA), layer)
    network = adapter.network.layer
    weight = layer.weight.detach().double()
    if network.transposed:
        g, a, b = network.groups, network.in_channels // network.groups, network.out_channels // network.groups
        weight = weight.reshape(g, a, b, -1).transpose(1, 2).reshape(network.out_channels, -1)
        found = adapter.network_weight().detach().double().reshape(g, a, b, -1).transpose(1, 2)
    else:
        weight = weight.flatten(1)
        found = adapter.network_weight().detach().double()
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    best = u[:, :3] * s[:3] @ v[:3]
    torch.testing.assert_close(found.reshape(best.shape), best, atol=1e-6, rtol=1e-5)
    product = adapter.cores["u"].detach().permute(0, 2, 1).reshape(-1, 3)
    torch.testing.assert_close((product.T @ product).double(), torch.diag(s[:3]), atol=1e-6, rtol=1e-5)
    assert adapter.cores["u"].shape[1] == 3


def test_svd_inits_need_the_weight_and_a_small_enough_bond():
    with pytest.raises(BindError) as excinfo:
        compile(Spec.from_yaml(PISSA), nn.Linear(8, 2))
    assert str(excinfo.value) == (
        "".join(
            f"<spec>:{line}:13: core '{core}', `svd_{core}s`, on Linear(8, 2): expected a bond of at most 2, "
            "the rank of the weight, found 3. Lower the size of `r`.\n"
            for line, core in ((9, "u"), (10, "v"))
        ).strip()
    )
    adapter = compile(Spec.from_yaml(PISSA), nn.Linear(8, 8))
    with pytest.raises(BindError) as excinfo:
        adapter.reset_parameters()
    assert str(excinfo.value) == (
        "core `u`, init `svd_us`: expected the base weight's values, found none. "
        "Give the model its weights first, then call `reset_parameters` with the layer's weight."
    )


@pytest.mark.usefixtures("empty_registry")
def test_registered_inits_are_called_with_shape_stream_and_arguments():
    seen = []

    def twice(shape, generator, factor=2):
        seen.append((shape, factor))
        return factor * torch.rand(shape, generator=generator, dtype=torch.float64)

    register_init("twice", twice)
    values = draw("twice(factor=4)", nn.Linear(2, 3))
    assert seen == [((3, 2), 4)]
    drawn = torch.rand(3, 2, generator=stream(0, "layer", "w", (3, 2)), dtype=torch.float64)
    assert torch.equal(values, (4 * drawn).float())


@pytest.mark.usefixtures("empty_registry")
@pytest.mark.parametrize(
    ("result", "expected", "found"),
    [
        ([1.0], "a tensor", "list"),
        (torch.zeros(2, 3), "the shape (3, 2)", "(2, 3)"),
        (torch.zeros(3, 2, dtype=torch.long), "floating-point numbers", "torch.int64"),
        (torch.full((3, 2), math.nan), "finite numbers", "nan or inf"),
        (torch.full((3, 2), 1e300, dtype=torch.float64), "finite numbers", "nan or inf"),
        (torch.zeros(3, 2).to_sparse(), "a dense tensor with values", "torch.sparse_coo"),
        (torch.zeros(3, 2, device="meta"), "a dense tensor with values", "one on meta"),
    ],
)
def test_what_a_registered_init_returns_is_checked(result, expected, found):
    register_init("odd", lambda shape, generator: result)
    with pytest.raises(BindError) as excinfo:
        draw("odd", nn.Linear(2, 3))
    assert str(excinfo.value) == (
        f"core `w`, init `odd`: expected {expected}, found {found}. Mend the function registered as `odd`."
    )


@pytest.mark.usefixtures("empty_registry")
def test_a_registered_init_that_fails_is_a_mistake_of_its_layer():
    def broken(shape, generator):
        raise KeyError("no such file")

    register_init("odd", broken)
    with pytest.raises(BindError) as excinfo:
        draw("odd", nn.Linear(2, 3))
    assert str(excinfo.value) == (
        "core `w`, init `odd`: expected a tensor, found KeyError: 'no such file'. "
        "Mend the function registered as `odd`."
    )
    assert isinstance(excinfo.value.__cause__, KeyError)


@pytest.mark.usefixtures("empty_registry")
@pytest.mark.parametrize("function", [lambda: 0, lambda shape: 0, lambda shape, *, generator: 0, max])
def test_what_takes_no_shape_and_generator_is_not_registered(function):
    with pytest.raises(SpecError) as excinfo:
        register_init("odd", function)
    assert str(excinfo.value) == (
        "register_init 'odd': expected a function of a shape and a generator, found one that cannot be called so. "
        "Pass `function(shape, generator, **arguments) -> Tensor`."
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_singular_vectors_need_finite_weights(value):
    layer = nn.Linear(8, 4)
    with torch.no_grad():
        layer.weight[0, 0] = value
    with pytest.raises(BindError) as excinfo:
        compile(Spec.from_yaml(PISSA), layer)
    assert str(excinfo.value) == (
        "core `u`, init `svd_us`: expected a base weight of finite numbers, found nan or inf. "
        "Mend the layer's weight, or match other layers."
    )


PART = """
tnpeft: 2
name: part
layers: any
params: {r: 2, skip: 0}
sizes: {o: out_channels, i: in_channels, p: r}
cores:
  u: {legs: o p, init: svd_u(skip=skip)}
  s: {legs: p, init: svd_s(skip=skip)}
  v: {legs: p i k..., init: svd_v(skip=skip)}
weight: o i k...
start: frozen_copy
"""


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(2, 5, (2, 3)), nn.ConvTranspose1d(4, 5, 3)], ids=str)
@pytest.mark.parametrize("skip", [0, 1, 3])
def test_singular_parts_from_one_number_on(layer: nn.Module, skip: int):
    adapter = compile(Spec.from_yaml(PART), layer, skip=skip)
    weight = layer.weight.detach().double()
    matrix = (weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose1d) else weight).flatten(1)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    part = slice(skip, skip + 2)
    wanted = u[:, part] @ torch.diag(s[part]) @ vh[part]
    cores = {name: core.detach().double() for name, core in adapter.cores.items()}
    torch.testing.assert_close(
        cores["u"] @ torch.diag(cores["s"]) @ cores["v"].flatten(1), wanted, rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(cores["s"], s[part], rtol=1e-6, atol=1e-7)
    assert all(core.requires_grad for core in adapter.cores.values())


@pytest.mark.parametrize(
    ("skip", "found"),
    [
        (4, "expected a bond of at most 5, the rank of the weight, found 2 after 4. Lower the size of `p`."),
        (-1, "expected a whole number as `skip`, not below 0, found -1. Use `//`, `floor` or `max`."),
        (0.5, "expected a whole number as `skip`, not below 0, found 0.5. Use `//`, `floor` or `max`."),
    ],
)
def test_singular_parts_that_are_not_there(skip: float, found: str):
    with pytest.raises(BindError) as caught:
        compile(Spec.from_yaml(PART, "part.yaml"), nn.Linear(6, 5), skip=skip)
    assert str(caught.value).splitlines()[0] == f"part.yaml:8:13: core 'u', `svd_u`, on Linear(6, 5): {found}"


@pytest.mark.parametrize("init", ["svd_u", "svd_us(skip=1)"])
def test_new_singular_inits_need_the_second_version(init: str):
    text = PISSA.replace("init: svd_us", f"init: {init}")
    with pytest.raises(SpecError, match="the language version 2 for"):
        Spec.from_yaml(text)
    assert Spec.from_yaml(text.replace("tnpeft: 1", "tnpeft: 2"))


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(2, 5, 3)], ids=str)
def test_a_weight_is_decomposed_once(layer: nn.Module, monkeypatch):
    calls, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **kwargs: calls.append(1) or svd(*args, **kwargs))
    compile(Spec.from_yaml(PART), layer)
    assert len(calls) == 1
