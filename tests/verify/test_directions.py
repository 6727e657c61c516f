"""What `verify` says of the start: the share of directions in a sentence, and the rate that goes as far as LoRA's."""

from __future__ import annotations

import math

import pytest
import torch
from terminal import data, text

import tnpeft
from tnpeft.execution import compile
from tnpeft.network import Spec
from tnpeft.verify import Case, Directions
from tnpeft.verify.directions import directions_on

PISSA_LIKE = """
tnpeft: 1
name: mine
layers: [Linear]
params: {r: 8}
sizes: {o: out_channels, i: in_channels}
bond: r
cores:
  up: {legs: o a, init: normal(0.5)}
  down: {legs: a i, init: normal(0.5)}
weight: o i
start: frozen_copy
"""
FAR = "as far in 10 steps as LoRA (r=8) at 0.001"


def way(spec: Spec, case: Case, rate: float, **params: float) -> float:
    """How far ten of Adam's steps go, by its formulas on a plain product of two cores."""
    adapter = compile(spec, case.build(), name="layer", **params)
    upstream = torch.randn(case.layer.stored_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    names = ("up", "down")
    first = [adapter.cores[name].detach().double() for name in names]
    cores, means, squares = [core.clone() for core in first], [0.0, 0.0], [0.0, 0.0]
    for step in range(1, 11):
        up, down = cores
        for place, gradient in enumerate((upstream @ down.T, up.T @ upstream)):
            means[place] = 0.9 * means[place] + 0.1 * gradient
            squares[place] = 0.999 * squares[place] + 0.001 * gradient**2
            mean, square = means[place] / (1 - 0.9**step), squares[place] / (1 - 0.999**step)
            cores[place] = cores[place] - rate * mean / (square.sqrt() + 1e-8)
    return float((cores[0] @ cores[1] - first[0] @ first[1]).norm())


def test_the_rate_goes_as_far_as_lora():
    case, spec = Case("Linear", 24, 20), Spec.from_yaml(PISSA_LIKE)
    found = directions_on(spec, case)
    assert (found.rank, found.entries, found.counted) == (8 * (24 + 20 - 8), 480, True)
    assert way(spec, case, found.rate) == pytest.approx(way(tnpeft.load_spec("lora"), case, 1e-3, r=8), rel=0.05)
    assert str(found) == (
        "Linear(24, 20): at this start the first steps move in 60.0% of the directions (288 of 480); "
        f"rate {found.rate:.1g} moves {FAR}"
    )


def test_lora_itself_has_its_own_rate():
    (found,) = (directions_on(tnpeft.load_spec("lora"), Case("Linear", 24, 20, params={"r": 8})),)
    assert found.rate == pytest.approx(1e-3)
    assert (found.rank, found.share) == (8 * 20, 8 / 24)


@pytest.mark.parametrize(
    ("rank", "counted", "rate", "said"),
    [
        (50, True, 2.34e-4, "first steps move in 5.0% of the directions (50 of 1,000); rate 0.0002 moves "),
        (0, True, None, "first step moves nothing, to first order; no rate up to 1 moves "),
        (1000, True, 2.34e-4, "first steps move in all directions; rate 0.0002 moves "),
        (
            1000,
            False,
            2.34e-4,
            "first steps move in at most 100.0% of the directions (at most 1,000 of 1,000); rate 0.0002 moves ",
        ),
        (
            50,
            False,
            None,
            "first steps move in at most 5.0% of the directions (at most 50 of 1,000); no rate up to 1 moves ",
        ),
    ],
)
def test_sentences(rank: int, counted: bool, rate: float | None, said: str):
    found = Directions("Linear(10, 100)", {}, rank, 1000, counted, rate)
    assert str(found) == f"Linear(10, 100): at this start the {said}{FAR}"


def test_a_small_share_is_not_spelt_out():
    found = Directions("Linear(100, 100)", {}, 4, 10_000, False, 1e-3)
    assert "move in less than 0.1% of the directions (at most 4 of 10,000); " in str(found)


def test_a_start_that_is_large_beside_the_weight_keeps_its_directions():
    """An update is then a small change of large cores, linear in it: the published start of TenVOO."""
    large, small = (Spec.from_yaml(PISSA_LIKE.replace("0.5", size)) for size in ("4", "0.05"))
    case = Case("Linear", 24, 20)
    found = directions_on(large, case)
    assert str(found).startswith(
        "Linear(24, 20): at this start the first steps move in 60.0% of the directions (288 of 480), and so do later "
        "ones; rate "
    )
    adapter, weight = compile(large, case.build(), name="layer"), case.build().weight.detach()
    value = (adapter.cores["up"] @ adapter.cores["down"]).detach()
    assert found.size == pytest.approx(float(value.std() / weight.std()), rel=1e-5)
    assert "(288 of 480); rate " in str(directions_on(small, case))
    assert directions_on(tnpeft.load_spec("lora"), case).size == 0


def test_printed_and_as_data():
    options = ("verify", "lora", "--layer", "Conv2d:4,6,3x1,groups=2", "--set", "r=2", "--examples", "1")
    report = data(*options)
    (row,) = report["directions"]
    assert (row["rank"], row["entries"], row["counted"], row["share"]) == (12, 36, True, 12 / 36)
    assert math.isfinite(row["rate"])
    assert row["text"].startswith("Conv2d(4, 6, 3x1, groups=2): at this start the first steps move in 33.3% of the ")
    assert text(*options).splitlines()[-1] == row["text"]
