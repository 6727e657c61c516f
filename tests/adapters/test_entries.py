"""Cores by their positions: entries and places that an expression says, beside Python's own arithmetic."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

import tnpeft
from tnpeft.adapters.entries import entries
from tnpeft.errors import BindError, SpecError
from tnpeft.spec.expression import ExpressionError, parse_expression

ONE = """
tnpeft: 2
name: one
layers: any
params: {r: 3}
sizes: {o: out_channels, i: in_channels}
cores:
  E: {legs: o r, frozen: true, init: "entries(ENTRY)"}
  A: {legs: r i k..., init: zeros}
weight: o i k...
start: zero
"""

TOEPLITZ = """
tnpeft: 2
name: toeplitz
layers: [Linear]
sizes: {o: out_features, i: in_features, d: o + i - 1}
cores:
  diagonals: {legs: d, init: zeros}
  at:        {legs: o i, frozen: true, init: "places(PLACES)"}
  T:         {of: diagonals, legs: o i, map: "gather(d -> o i, at=at)"}
weight: o i
start: zero
"""


def python(text: str, **names: float) -> float:
    """The expression as Python has it."""
    ways = {"sqrt": math.sqrt, "floor": math.floor, "ceil": math.ceil, "gcd": math.gcd, "cos": math.cos}
    ways |= {"sin": math.sin, "pi": math.pi, "prod": lambda *values: math.prod(values), "min": min, "max": max}
    ways["walsh"] = lambda a, b: (-1) ** bin(a & b).count("1")
    return float(eval(text, {"__builtins__": {}}, {**ways, **names}))


@pytest.mark.parametrize(
    "text",
    [
        "x - y",
        "(x - y) % n",
        "x // 2 + y % 3 - x / 4",
        "-x if x > y else +y",
        "1 if 0 < x <= y < n else 0",
        "x and y",
        "x or y + 1",
        "not x",
        "x == y != 3",
        "min(x, y, 2) * max(x, n)",
        "gcd(x, y)",
        "prod(x, y, 2)",
        "floor(x / 2) + ceil(y / 3) - sqrt(x)",
        "cos(pi * (2 * x + 1) * y / (2 * n)) * sqrt((1 if y == 0 else 2) / n)",
        "sin(2 * pi * x * y / n)",
        "walsh(x, y)",
        "n",
    ],
)
def test_entries_are_those_of_python(text: str):
    table = entries(parse_expression(text, positions=True), ("x", "y"), (5, 4), {"n": 7})
    assert table.shape == (5, 4)
    assert table.dtype == torch.float64
    for x, y in itertools.product(range(5), range(4)):
        assert float(table[x, y]) == pytest.approx(python(text, x=x, y=y, n=7), rel=1e-14, abs=1e-14)


@given(sizes=st.tuples(*[st.integers(1, 5)] * 3), factors=st.tuples(*[st.integers(-3, 3)] * 3))
def test_positions_stand_on_their_own_axis(sizes: tuple[int, int, int], factors: tuple[int, int, int]):
    text = " + ".join(f"{factor} * {leg}" for factor, leg in zip(factors, "xyz", strict=True))
    table = entries(parse_expression(text, positions=True), ("x", "y", "z"), sizes, {})
    for place in itertools.product(*map(range, sizes)):
        assert table[place] == sum(map(math.prod, zip(factors, place, strict=True)))


@pytest.mark.parametrize("size", [1, 2, 4, 8, 32])
def test_walsh_is_the_hadamard_matrix(size: int):
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    assert torch.equal(entries(parse_expression("walsh(x, y)", positions=True), ("x", "y"), (size, size), {}), matrix)


def test_legs_are_positions_and_other_names_numbers():
    spec = tnpeft.Spec.from_yaml(ONE.replace("ENTRY", "o * out_channels + r + i / 2"))
    adapter = tnpeft.compile(spec, nn.Conv1d(5, 4, 2))
    rows = torch.arange(4.0)[:, None] * 4
    assert torch.equal(adapter.cores["E"], rows + torch.arange(3.0) + 2.5)
    assert adapter.network.num_parameters == 3 * 5 * 2


def test_a_toeplitz_update_is_saved_without_its_places(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    spec = tnpeft.Spec.from_yaml(TOEPLITZ.replace("PLACES", "o - i + in_features - 1"))
    handle = tnpeft.attach(model, spec, match="all")
    with torch.no_grad():
        handle.adapters["0"].cores["diagonals"].copy_(torch.arange(9.0))
    update = handle.adapters["0"].delta_weight()
    assert torch.equal(update, torch.tensor([[float(o - i + 3) for i in range(4)] for o in range(6)]))
    x = torch.randn(2, 4)
    wanted = model[0](x)
    tnpeft.save(model, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        names = [*file.keys()]
    assert names
    assert not any("at" in name.split(".") or name.endswith("core_at") for name in names)
    handle.detach()
    tnpeft.load(model, tmp_path / "a.safetensors")
    assert torch.equal(model[0](x), wanted)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (
            "o - i",
            "core `at`, init `places`: expected whole numbers of 0 to 8 (`gather` in 'T'), found -3. "
            "Change the expression, or the sizes.",
        ),
        (
            "o + i + 1",
            "core `at`, init `places`: expected whole numbers of 0 to 8 (`gather` in 'T'), found 9. "
            "Change the expression, or the sizes.",
        ),
        (
            "o / 2 + i",
            "core `at`, init `places`: expected whole numbers, found 0.5. Use `//` or `floor`.",
        ),
        (
            "o / i",
            "core `at`, init `places`: expected a finite number at every position, found nan or inf. "
            "Guard divisors with `max(..., 1)`.",
        ),
        (
            "(o, 1)[i]",
            "core `at`, init `places`: expected one number at each position, found a tuple. "
            "Write `a if x == 0 else b`.",
        ),
        (
            "factorize(o, 2)",
            "core `at`, init `places`: expected some numbers in `factorize`, found positions. "
            "Give factors a line in `sizes`.",
        ),
        (
            "cos(o, i)",
            "core `at`, init `places`: expected 1 number in `cos`, found 2. Write `cos(x)`, or `cos(x, y)`.",
        ),
    ],
)
def test_what_is_no_place(places: str, message: str):
    spec = tnpeft.Spec.from_yaml(TOEPLITZ.replace("PLACES", places))
    with pytest.raises(BindError) as caught:
        tnpeft.compile(spec, nn.Linear(4, 6))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "ENTRY",
            "o + t",
            "one.yaml:8:38: core 'E', `entries`: expected the core's legs, params, layer names and indices in `sizes`, "
            "found 't'. Add it to `params`.",
        ),
        (
            "ENTRY",
            "log(o)",
            "one.yaml:8:38: `entry` of init: expected one of ceil, factorize, floor, gcd, max, min, prod, sqrt, cos, "
            "sin, walsh, found 'log'(...). Use one of these functions.",
        ),
        (
            "(ENTRY)",
            "",
            "one.yaml:8:38: init `entries`: expected `entry`, found it missing. Write `entries(entry=...)`.",
        ),
        (
            "entries(ENTRY)",
            "normal(cos(r))",
            "one.yaml:8:38: `std` of init: expected one of ceil, factorize, floor, gcd, max, min, prod, sqrt, found "
            "'cos'(...). Use one of these functions.",
        ),
        (
            "tnpeft: 2",
            "tnpeft: 1",
            "one.yaml:2:9: `tnpeft`: expected the language version 2 for derived cores, references with legs, grouped "
            "legs, index cores, inits by position or value and `start_std`, found 1. Write `tnpeft: 2`: versions of "
            "tnpeft before 0.2 then say that they are too old for it.",
        ),
    ],
)
def test_mistakes_are_found_at_load(old: str, new: str, message: str):
    with pytest.raises(SpecError) as caught:
        tnpeft.Spec.from_yaml(ONE.replace(old, new).replace("ENTRY", "o"), "one.yaml")
    assert str(caught.value) == message


def test_an_expression_that_is_none_of_numbers():
    with pytest.raises(ExpressionError) as caught:
        entries(parse_expression("kernel_size", positions=True), ("x",), (2,), {"kernel_size": (3, 3)})
    assert caught.value.found == "2 numbers"


def test_equal_entries_under_other_names_are_one_canonical_form():
    renamed = (
        ONE.replace("sizes: {o:", "sizes: {row:")
        .replace("legs: o r", "legs: row r")
        .replace("weight: o", "weight: row")
    )
    one = tnpeft.Spec.from_yaml(ONE.replace("ENTRY", "o - 2 * r"))
    same = tnpeft.Spec.from_yaml(renamed.replace("ENTRY", "row - 2 * r"))
    other = tnpeft.Spec.from_yaml(ONE.replace("ENTRY", "r - 2 * o"))
    assert one.canonical() == same.canonical()
    assert one.canonical() != other.canonical()


def test_places_given_by_hand_are_checked_against_the_map():
    spec = tnpeft.Spec.from_yaml(TOEPLITZ.replace("PLACES", "o - i + in_features - 1"))
    model = nn.Sequential(nn.Linear(2, 2))
    tnpeft.attach(model, spec, match="all", init={"0.at": torch.tensor([[2, 1], [0, 0]])}).detach()
    with pytest.raises(tnpeft.TnpeftError, match="from 0") as caught:
        tnpeft.attach(model, spec, match="all", init={"0.at": torch.tensor([[3, 1], [0, 0]])})
    assert "expected whole numbers of 0 to 2 (`gather` in 'T'), found 3" in str(caught.value)


@pytest.mark.parametrize("size", [1, 2, 6, 12])
def test_loca_has_the_orthonormal_cosine_transform(size: int):
    basis = tnpeft.compile(tnpeft.load_spec("loca"), nn.Linear(size, 4).double()).cores["C_in"].double()
    rows = [[math.cos(math.pi * (place + 0.5) * wave / size) for place in range(size)] for wave in range(size)]
    lengths = torch.tensor(rows, dtype=torch.float64).norm(dim=1, keepdim=True)
    torch.testing.assert_close(basis, torch.tensor(rows, dtype=torch.float64) / lengths, rtol=0, atol=1e-7)
    torch.testing.assert_close(basis @ basis.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("inputs", "size"), [(12, 4), (8, 8), (7, 1)])
def test_qwha_has_the_hadamard_matrix_of_the_largest_power_of_two(inputs: int, size: int):
    matrix = tnpeft.compile(tnpeft.load_spec("qwha"), nn.Linear(inputs, 4)).cores["H"]
    assert matrix.shape == (size, size)
    assert set(matrix.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size))


@pytest.mark.parametrize(("outputs", "inputs", "band"), [(5, 9, 2), (6, 4, 1), (3, 3, 7), (1, 4, 2)])
def test_svft_banded_has_as_many_numbers_as_its_band(outputs: int, inputs: int, band: int):
    adapter = tnpeft.compile(tnpeft.load_spec("svft_banded"), nn.Linear(inputs, outputs), band=band)
    rank = min(outputs, inputs)
    within = [(p, q) for p in range(rank) for q in range(rank) if abs(p - q) <= band]
    assert torch.equal(adapter.cores["mask"].nonzero(), torch.tensor(within))
    assert adapter.cores["at"][adapter.cores["mask"] > 0].tolist() == [*range(len(within))]
    assert len(adapter.cores["s"]) == len(within)
