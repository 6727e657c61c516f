"""Maps on tensors: values beside numpy's, slopes, what is promised of zeros and sums, and wherever tensors go."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tnpeft
from tnpeft.program.maps import map_change, map_function
from tnpeft.spec import map_kinds
from tnpeft.spec.maps import MapCall, map_kind, map_names, passes_zero, register_map, size_problem
from tnpeft.spec.wavelets import FAMILIES, wavelet_filters
from tnpeft.verify.oracle_maps import oracle_map

BUILT_IN = map_names()
ELEMENTWISE = tuple(name for name in BUILT_IN if map_kind(name).takes == (0, 0))  # type: ignore[union-attr]


@dataclass(frozen=True)
class Case:
    """A map with sizes and arguments; `at` is of two layers."""

    name: str
    taken: tuple[int, ...] = ()
    made: tuple[int, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)
    layers: int = 2
    rest: int = 3

    def __str__(self) -> str:
        return self.name

    def run(self, x: Tensor, **other: Any) -> Tensor:
        return map_function(self.name)(x, self.made, **{**self.arguments, **other})

    def input(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        """Random values at which the map is well-conditioned."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.layers, self.rest, *self.taken, dtype=torch.float64, generator=generator)
        if self.name in ("cayley", "neumann", "reflections"):
            x = x / (2 * x.flatten(2).norm(dim=-1)[..., None, None])
        if self.name == "reflections":
            x = x + torch.eye(*self.taken)  # columns have lengths
        if self.name == "qr":
            columns = self.taken[-1]
            x = (x.flatten(2, -2) + 4 * torch.eye(math.prod(self.taken[:-1]), columns)).reshape(x.shape)
        return x.to(dtype)


def places(seed: int, shape: tuple[int, ...], below: int, repeat: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if repeat:
        return torch.randint(below, (2, *shape), generator=generator)
    drawn = [torch.randperm(below, generator=generator)[: math.prod(shape)].reshape(shape) for _ in range(2)]
    return torch.stack(drawn)


CASES = [
    *(Case(name) for name in ELEMENTWISE),
    Case("topk_softmax", (5,), (5,), {"k": 2.0}),
    Case("unit", (2, 3), (2, 3), {"floor": 1e-4}),
    Case("unit", (2, 3), (2, 3)),
    Case("norm", (2, 3)),
    Case("qr", (2, 2, 3), (2, 2, 3)),
    Case("antisymmetric", (3, 3), (3, 3)),
    Case("skew", (6,), (4, 4)),
    Case("cayley", (3, 3), (3, 3)),
    Case("expm", (3, 3), (3, 3)),
    Case("neumann", (3, 3), (3, 3), {"terms": 5.0}),
    Case("reflections", (3, 3), (3, 3)),
    Case("scatter", (4,), (3, 4), {"at": places(0, (4,), 12, repeat=False)}),
    Case("gather", (3,), (2, 4), {"at": places(0, (2, 4), 3, repeat=True)}),
    Case("roll", (4,), (3, 4)),
    Case("roll", (3, 4), (3, 4)),
    Case("pad", (5,), (2, 4)),
    Case("wavelet", (2, 5), (7,), {"family": "db2"}),
]


@st.composite
def cases(draw: st.DrawFn, names: tuple[str, ...] = BUILT_IN) -> Case:
    """Any map with any small sizes that fit it."""
    name = draw(st.sampled_from(names))
    small = st.integers(1, 4)
    a, b, c, n = draw(small), draw(small), draw(small), draw(st.integers(2, 5))
    several = draw(st.sampled_from([(a,), (a, b), (a, b, c)]))
    seed = draw(st.integers(0, 99))
    sizes: dict[str, Any] = {
        "topk_softmax": lambda: (several, several, {"k": float(draw(st.integers(1, math.prod(several))))}),
        "unit": lambda: (several, several, {"floor": draw(st.sampled_from([1e-4, 1.0, 100.0]))}),
        "norm": lambda: (several, (), {}),
        "qr": lambda: ((*several, min(n, math.prod(several))),) * 2 + ({},),
        "skew": lambda: ((n * (n - 1) // 2,), (n, n), {}),
        "neumann": lambda: ((n, n), (n, n), {"terms": float(draw(st.integers(2, 8)))}),
        "scatter": lambda: ((a,), (b, a, c), {"at": places(seed, (a,), a * b * c, repeat=False)}),
        "gather": lambda: (several, (n, a), {"at": places(seed, (n, a), math.prod(several), repeat=True)}),
        "roll": lambda: (draw(st.sampled_from([(a,), (n, a)])), (n, a), {}),
        "pad": lambda: ((a,), (b, a + c), {}),
    }
    if name == "wavelet":
        family = draw(st.sampled_from(FAMILIES))
        band = a + len(wavelet_filters(family)[0]) // 2
        entries = 2 * band - len(wavelet_filters(family)[0]) + 2
        return Case(name, (2, band), (draw(st.integers(1, entries)),), {"family": family}, rest=b)
    taken, made, arguments = sizes[name]() if name in sizes else (() if name in ELEMENTWISE else (n, n),) * 2 + ({},)
    return Case(name, taken, made, arguments, rest=b)


def expected(case: Case, x: Tensor) -> np.ndarray[Any, Any]:
    """The oracle's values, layer by layer."""
    layers = []
    for number, layer in enumerate(x.double().numpy()):
        at = {"at": case.arguments["at"][number].numpy()} if "at" in case.arguments else {}
        layers.append(oracle_map(case.name)(layer, case.made, **{**case.arguments, **at}))
    return np.stack(layers)


def assert_close(found: Any, wanted: Any, bound: float) -> None:
    found, wanted = np.asarray(found, dtype=np.float64), np.asarray(wanted, dtype=np.float64)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= bound * (1 + np.abs(wanted).max())


def test_every_map_has_a_function_and_an_oracle():
    assert {case.name for case in CASES} == {*BUILT_IN}
    for name in BUILT_IN:
        assert callable(map_function(name))
        assert callable(oracle_map(name))


@given(case=cases(), seed=st.integers(0, 999))
def test_values_are_the_oracles(case, seed):
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        x = case.input(seed, dtype)
        value = case.run(x)
        assert value.dtype == dtype
        assert_close(value, expected(case, x), bound)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_slopes(case):
    x = case.input().requires_grad_()
    assert torch.autograd.gradcheck(case.run, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(case.run, (x,))


ZERO = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
STARTS = [
    *((name, ZERO[..., 0, 0], (), {}) for name in ELEMENTWISE),
    ("unit", ZERO, (3, 3), {"floor": 1e-4}),
    ("unit", ZERO, (3, 3), {}),
    ("norm", ZERO, (), {}),
    ("qr", ZERO + torch.eye(3), (3, 3), {}),
    ("cayley", ZERO, (3, 3), {}),
    ("expm", ZERO, (3, 3), {}),
    ("neumann", ZERO, (3, 3), {"terms": 5.0}),
    ("neumann", ZERO, (3, 3), {"terms": 2.0}),
    ("reflections", ZERO, (3, 3), {}),
    ("reflections", ZERO + 1, (3, 3), {}),  # equal columns
    ("topk_softmax", ZERO, (3, 3), {"k": 2.0}),
    ("topk_softmax", torch.full_like(ZERO, -math.inf).index_fill(-1, torch.tensor([1]), 0.0), (3, 3), {"k": 2.0}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "x", "made", "arguments"), STARTS)
def test_slopes_are_finite_where_training_starts(name, x, made, arguments, dtype):
    """Once and twice: a penalty on gradients trains there too."""
    x = x.to(dtype, copy=True).requires_grad_()
    value = map_function(name)(x, made, **arguments)
    weights = torch.linspace(-1, 2, value.numel(), dtype=dtype).reshape(value.shape)
    (slope,) = torch.autograd.grad((value * weights).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((slope * slope).sum() + 0 * x.sum(), x)  # the last term: slopes may be constant
    for result in (value, slope, second):
        assert result.isfinite().all()


def test_equal_logits_are_chosen_in_order():
    x = torch.zeros(1, 1, 300)
    chosen = map_function("topk_softmax")(x, (300,), k=2.0)
    assert chosen.flatten().tolist() == [0.5, 0.5, *[0.0] * 298]


def test_unit_and_its_floor():
    x = torch.tensor([[[3e-5, 4e-5], [3.0, 4.0], [0.0, 0.0]]], dtype=torch.float64)
    unit = map_function("unit")
    assert_close(unit(x, (2,), floor=1e-4), [[[0.3, 0.4], [0.6, 0.8], [0, 0]]], 1e-14)
    assert_close(unit(x, (2,)), [[[0.6, 0.8], [0.6, 0.8], [0, 0]]], 1e-14)
    slope = torch.autograd.functional.jacobian(lambda x: unit(x, (2,), floor=1e-4)[0, 2], x)[:, 0, 2]
    assert_close(slope, 1e4 * np.eye(2), 1e-14)


@given(case=cases(tuple(name for name in BUILT_IN if map_kind(name).linear)), seed=st.integers(0, 999))  # type: ignore[union-attr]
def test_linear_maps_are_their_dense_tensor_and_add_up(case, seed):
    x, y = case.input(seed), case.input(seed + 1)
    flat = x.reshape(case.layers, case.rest, -1)
    for layer in range(case.layers):
        at = {"at": case.arguments["at"][layer : layer + 1]} if "at" in case.arguments else {}
        units = torch.eye(flat.shape[-1], dtype=x.dtype).reshape(1, flat.shape[-1], *case.taken)
        dense = case.run(units, **at)[0]  # (entries taken, *made)
        assert_close(case.run(x)[layer], torch.tensordot(flat[layer], dense, dims=1), 1e-12)
    assert_close(case.run(2 * x - y), 2 * case.run(x) - case.run(y), 1e-12)
    assert not case.run(torch.zeros_like(x)).any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_the_table_promises_of_sums_and_zeros(case):
    kind = map_kind(case.name)
    assert kind is not None
    x, y = case.input(), case.input(1)
    adds_up = torch.allclose(case.run(x + y), case.run(x) + case.run(y))
    assert kind.linear is adds_up
    zero = torch.zeros_like(x).requires_grad_()
    value = case.run(zero)
    slope = torch.autograd.functional.jacobian(case.run, zero)
    trains = not value.any() and slope.isfinite().all() and bool(slope.any())
    call = MapCall(case.name, tuple("abc"[: x.ndim - 2]), tuple("xyz"[: len(case.made)]), case.arguments, case.name)
    assert size_problem(call, case.taken, case.made, case.arguments) is None
    if case.name != "qr":  # of zeros it has no value
        assert passes_zero(call) is trains


@given(
    floor=st.sampled_from([None, 1e-4, 1.0, 100.0]),
    size=st.sampled_from([0.0, 1e-9, 1e-5, 1.0, 1e3]),
    zeros=st.sampled_from(["none", "start", "end"]),
    seed=st.integers(0, 999),
)
def test_the_change_of_unit_is_the_difference_of_its_values(floor, size, zeros, seed):
    """A formula in place of two values in float64; in float32 it has as many digits, however small the step."""
    generator = torch.Generator().manual_seed(seed)
    first, step = torch.randn(2, 2, 3, 5, dtype=torch.float32, generator=generator)
    step = step * size
    if zeros == "start":
        first[0, 1] = 0
    if zeros == "end":
        step[0, 1] = -first[0, 1]
    unit, change = map_function("unit"), map_change("unit")
    assert change is not None
    leaf, wide = step.clone().requires_grad_(), step.double().requires_grad_()
    found = change(first, leaf, (5,), floor=floor)
    wanted = unit(first.double() + wide, (5,), floor=floor) - unit(first.double(), (5,), floor=floor)
    upstream = torch.randn(found.shape, generator=generator)
    (gradient,) = torch.autograd.grad(found, leaf, upstream)
    (slope,) = torch.autograd.grad(wanted, wide, upstream.double())
    assert found.dtype == torch.float32
    assert (found - wanted).norm() <= 3e-6 * wanted.norm() + 1e-30
    assert (gradient - slope).norm() <= 3e-6 * slope.norm() + 1e-30
    assert not change(first, torch.zeros_like(step), (5,), floor=floor).any()


def matrices(count: int, size: int) -> Tensor:
    return torch.randn(2, count, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("size", [2, 5, 16])
def test_turns_are_orthogonal(size):
    entries = torch.randn(2, 3, size * (size - 1) // 2, dtype=torch.float64)
    skew = map_function("skew")(entries, (size, size))
    assert torch.equal(skew, -skew.mT)
    rows, columns = np.triu_indices(size, 1)
    assert torch.equal(skew[..., rows, columns], entries)
    eye = torch.eye(size, dtype=torch.float64).expand(2, 3, size, size)
    turn = map_function("cayley")(skew, (size, size))
    assert_close(turn @ turn.mT, eye, 1e-12)
    assert_close(turn @ (eye - skew), eye + skew, 1e-12)
    columns = map_function("qr")(matrices(3, size), (size, size))
    assert_close(columns.mT @ columns, eye, 1e-12)


def test_a_tall_matrix_has_orthonormal_columns_over_all_rows():
    x = torch.randn(2, 3, 4, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    flat = map_function("qr")(x, (4, 2, 5)).flatten(2, -2)
    assert_close(flat.mT @ flat, torch.eye(5).expand(2, 3, 5, 5), 1e-12)


def test_neumann_tends_to_cayley():
    skew = map_function("antisymmetric")(matrices(3, 5), (5, 5)) / 40
    exact = map_function("cayley")(skew, (5, 5))
    errors = [
        (map_function("neumann")(skew, (5, 5), terms=float(terms)) - exact).abs().max().item() for terms in (3, 6, 12)
    ]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[2] < 1e-9


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_reflections_are_householders(rank):
    """Of columns of any length; one of zeros reflects nothing."""
    u = torch.randn(2, 1, 7, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    u *= 10.0 ** torch.arange(-3, 2 * rank - 3, 2)
    u[1, ..., rank // 2] = 0
    product = map_function("reflections")(u.mT @ u, (rank, rank))
    turn = torch.eye(7, dtype=torch.float64) - u @ product @ u.mT
    wanted = torch.eye(7, dtype=torch.float64).expand(2, 1, 7, 7)
    for column in range(rank):
        one = u[..., column : column + 1]
        squares = (one.mT @ one).where(one.mT @ one > 0, torch.ones(()))
        wanted = wanted @ (torch.eye(7) - 2 * one @ one.mT / squares)
    assert_close(turn, wanted, 1e-12)


@pytest.mark.parametrize("square", [0.0, 1e-45, 1e-39, 2e-38, 1e-20, 1.0])
def test_reflections_at_columns_of_hardly_any_length_are_numbers(square):
    """A float32 that has no inverse is the square of a column of zeros."""
    x = torch.tensor([[[[square]]]], requires_grad=True)
    product = map_function("reflections")(x, (1, 1))
    has_length = square > 1e-38
    assert product.item() == pytest.approx(2 / square if has_length else 2)
    (slope,) = torch.autograd.grad(product, x, torch.full_like(x, square))  # as large as it is where u^T u meets it
    assert slope.item() == (pytest.approx(-2 / square) if has_length else 0)


@given(case=cases(), seed=st.integers(0, 99))
def test_layers_together_are_layers_one_by_one(case, seed):
    x = case.input(seed)
    alone = []
    for layer in range(case.layers):
        at = {"at": case.arguments["at"][layer : layer + 1]} if "at" in case.arguments else {}
        alone.append(case.run(x[layer : layer + 1], **at))
    assert_close(case.run(x), torch.cat(alone), 1e-14)


@pytest.mark.parametrize("case", [case for case in CASES if "at" in case.arguments], ids=str)
def test_one_layer_stands_for_all(case):
    """A core that the model shares beside places of each layer, and the other way round."""
    x, at = case.input(), case.arguments["at"]
    assert torch.equal(case.run(x[:1]), case.run(x[:1].expand(x.shape)))
    assert torch.equal(case.run(x, at=at[:1]), case.run(x, at=at[:1].expand(at.shape)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_meta_tensors_have_the_shape(case):
    at = {"at": case.arguments["at"].to("meta")} if "at" in case.arguments else {}
    value = case.run(case.input(dtype=torch.float32).to("meta"), **at)
    assert (value.device.type, value.dtype) == ("meta", torch.float32)
    assert value.shape == (case.layers, case.rest, *case.made)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_functorch(case):
    x = torch.stack([case.input(seed) for seed in range(4)])
    assert_close(torch.func.vmap(case.run)(x), torch.stack([case.run(one) for one in x]), 1e-13)
    step = case.input(9)
    value, change = torch.func.jvp(case.run, (x[0],), (step,))
    assert_close(value, case.run(x[0]), 1e-14)
    assert_close(change, (case.run(x[0] + 1e-6 * step) - case.run(x[0] - 1e-6 * step)) / 2e-6, 1e-7)
    per_sample = torch.func.vmap(torch.func.grad(lambda x: case.run(x).square().sum()))(x)
    one = x[1].clone().requires_grad_()
    (slope,) = torch.autograd.grad(case.run(one).square().sum(), one)
    assert_close(per_sample[1], slope, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compilers_take_them_whole(case):
    torch.compiler.reset()
    x = case.input(dtype=torch.float32).requires_grad_()
    plain = case.run(x)
    compiled = torch.compile(case.run, backend="aot_eager", fullgraph=True)(x)
    assert_close(compiled.detach(), plain.detach(), 1e-6)
    slopes = [torch.autograd.grad(value.square().sum(), x)[0] for value in (plain, compiled)]
    assert_close(*slopes, 1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_autocast_changes_nothing(case):
    x = case.input(dtype=torch.float32)
    plain = case.run(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(case.run(x), plain)


@pytest.mark.parametrize(
    ("name", "value", "arguments"),
    [("unit", 1.0, {}), ("norm", 3.0, {}), ("topk_softmax", 1.0, {"k": 1.0})],
)
def test_a_kernel_without_axes_is_one_entry(name, value, arguments):
    """`k...` alone stands for no leg of a Linear."""
    x = torch.tensor([[3.0, 3.0]])
    assert torch.equal(map_function(name)(x, (), **arguments), torch.full((1, 2), value))
    assert map_function("qr")(x[..., None], (1,)).shape == (1, 2, 1)


def test_cayley_of_what_has_none():
    with pytest.raises(tnpeft.ExecutionError) as caught:
        map_function("cayley")(torch.eye(3)[None, None], (3, 3))
    assert str(caught.value) == (
        "map `cayley`: expected I - Q that can be inverted, found a singular one. "
        "Put `antisymmetric` or `skew` before it: I - Q can be inverted for every skew Q of finite numbers."
    )


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_kinds, "_registered", {})


def raising(error: Exception) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        raise error

    return function


FIX = "Mend the function that `tnpeft.register_map` was given."
WANTED = "map `mine`: expected a float32 tensor of 2 x 3 x 4, found"


@pytest.mark.usefixtures("registry")
def test_registered_functions_see_trailing_axes():
    register_map("mine", lambda x, power: (x**power).sum(-1), lambda sizes, power: sizes[:-1], zero=True)
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(map_function("mine")(x, (4,), power=2.0), (x**2).sum(-1))


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda x: 5, "5"),
        (lambda x: x.sum(), "a float32 one of no axes"),
        (lambda x: x[..., :2], "a float32 one of 2 x 3 x 2"),
        (lambda x: x.double(), "a float64 one of 2 x 3 x 4"),
        (raising(ValueError("no")), "ValueError: no"),
    ],
)
def test_mistakes_of_registered_functions_are_told(function, found):
    register_map("mine", function, lambda sizes: sizes)
    with pytest.raises(tnpeft.ExecutionError) as caught:
        map_function("mine")(torch.zeros(2, 3, 4), (4,))
    assert str(caught.value) == f"{WANTED} {found}. {FIX}"


@pytest.mark.usefixtures("registry")
def test_memory_that_runs_out_is_told_as_torch_tells_it():
    register_map("mine", raising(torch.OutOfMemoryError("full")), lambda sizes: sizes)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        map_function("mine")(torch.zeros(2, 3, 4), (4,))


@pytest.mark.usefixtures("registry")
def test_a_function_that_nobody_registered():
    with pytest.raises(tnpeft.ExecutionError) as caught:
        map_function("theirs")
    assert str(caught.value) == (
        "map `theirs`: expected a registered function, found none of that name. "
        'Call `tnpeft.register_map("theirs", function, shape)` first.'
    )
