"""`tnpeft.budget`: the largest rank within a budget, against counting every rank."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import net
from terminal import data, mistakes, text
from torch import nn

import tnpeft
from tnpeft.errors import AttachError
from tnpeft.network import Spec

PAPER = "monai:ddpm-paper"
LAYERS = "first|wide|up|head"


def counted(model: nn.Module, what: object, rank: int, **keywords: object) -> int:
    """What really trains at a rank."""
    tnpeft.attach(model, what, r=rank, **keywords)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.fixture(scope="module")
def paper() -> nn.Module:
    from tnpeft.cli.models import build_model

    return build_model(PAPER)


@pytest.mark.parametrize(("recipe", "rank", "trained"), [("lora_ddpm", 2, 824_192), ("tenvoo_l_ddpm", 4, 601_024)])
def test_the_papers_recipes_meet_their_own_counts(paper: nn.Module, recipe: str, rank: int, trained: int):
    found = tnpeft.budget(tnpeft.load_recipe(recipe), paper, trained)
    assert (found.value, found.total) == (rank, trained)
    assert tnpeft.budget(tnpeft.load_recipe(recipe), paper, trained - 1).value == rank - 1
    assert found.layers == 111
    assert found.cores + found.bias + found.norm + found.also == found.total


def test_a_budget_agrees_with_count():
    """`--set r=` of the answer counts what the budget says, and one more is too much."""
    recipe, params = "lora_ddpm", 1_300_000
    found = data("budget", recipe, "--model", PAPER, "--params", str(params))
    assert found["total"] <= params
    for row in found["rows"]:
        if abs(row["value"] - found["value"]) > 1:
            continue
        report = data("count", recipe, "--model", PAPER, "--set", f"r={row['value']}")
        assert (report["trained"], report["cores"]) == (row["total"], row["cores"])
        assert (row["value"] > found["value"]) == (row["total"] > params)
    assert found["settings"] == {"r": found["value"]}


def test_fixed_specs_keep_the_recipes_rank(paper: nn.Module):
    recipe = tnpeft.load_recipe("tenvoo_l_ddpm")
    found = tnpeft.budget(recipe, paper, 1_000_000, fixed=["quanta"])
    assert found.specs == {"tenvoo_l": found.value, "quanta": 4}
    assert found.value > 4
    both = tnpeft.budget(recipe, paper, 1_000_000)
    assert both.specs == {"tenvoo_l": both.value, "quanta": both.value}
    assert found.value >= both.value


MANY = """
tnpeft: 1
name: ragged
layers: any
params: {r: 2}
sizes: {o: out_channels, i: in_channels, a: "r if r % 3 else 1"}
cores: {up: {legs: o a, init: zeros}, down: a i k...}
weight: o i k...
start: zero
"""
ODD = MANY.replace("ragged", "odd").replace("r: 2", "r: 1").replace("if r % 3 else 1", "if r % 2 else 0 - r")
SPECS = {
    "ragged": Spec.from_yaml(MANY),
    **{name: tnpeft.load_spec(name) for name in ("lora", "dora", "lotr", "vera", "lokr", "tucker5", "loha")},
}


@cache
def counts(name: str, match: str, bias: str) -> dict[int, int]:
    return {rank: counted(net(), SPECS[name], rank, match=match, train={"bias": bias}) for rank in range(1, 8)}


@settings(max_examples=40)
@given(name=st.sampled_from(sorted(SPECS)), params=st.integers(1, 3000), data=st.data())
def test_against_every_rank(name: str, params: int, data: st.DataObject):
    """Also where counts fall with the rank, cores are shared, and the channels bound the rank."""
    model, match = net(), "first|wide" if name == "tucker5" else LAYERS
    bias = data.draw(st.sampled_from(["none", "adapted"]), "bias")
    train, ranks = {"bias": bias}, counts(name, match, bias)
    within = [rank for rank, count in ranks.items() if count <= params]
    if ranks[1] > params:
        with pytest.raises(AttachError, match="expected room for the smallest adapter"):
            tnpeft.budget(SPECS[name], model, params, match=match, train=train)
        return
    found = tnpeft.budget(SPECS[name], model, params, match=match, train=train)
    assert found.total <= params
    assert found.total == counted(model, SPECS[name], found.value, match=match, train=train)
    if found.value < 7:
        most = max(ranks[rank] for rank in within)
        assert found.total == most
        assert found.value == min(rank for rank in within if ranks[rank] == most)


def test_counts_that_fall_with_the_rank():
    """Rank 3 trains what rank 1 does: just beyond too much lies more that fits."""
    layer = nn.Sequential(nn.Linear(8, 8, bias=False))
    found = tnpeft.budget(SPECS["ragged"], layer, 64, match="0")
    assert (found.value, found.total) == (4, 64)
    assert [(row.value, row.total) for row in found.rows] == [
        (1, 16), (2, 32), (3, 16), (4, 64), (5, 80), (6, 16), (7, 112)
    ]  # fmt: skip
    assert tnpeft.budget(SPECS["ragged"], layer, 70, match="0").value == 4
    # Halving passes by rank 5, which trains all that is allowed.
    found = tnpeft.budget(SPECS["ragged"], net(), 1045, match=LAYERS)
    assert (found.value, found.total) == (5, 1045)
    # Not every rank need be one.
    odd = tnpeft.budget(Spec.from_yaml(ODD), layer, 100, match="0")
    assert (odd.value, [row.value for row in odd.rows]) == (5, [3, 5, 7])


def test_its_data_and_text():
    found = tnpeft.budget("lora", net(), 1000, match="wide|head", train={"bias": "adapted", "norm": True})
    assert (found.value, found.cores, found.bias, found.norm, found.also, found.total) == (7, 917, 9, 16, 0, 942)
    assert found.as_dict()["rows"][3] == {"value": 7, "cores": 917, "total": 942, "share": 0.942}
    assert str(found).splitlines()[0] == "lora: r=7 trains 942 of 1,000"


def refused(*arguments: object, **keywords: object) -> str:
    with pytest.raises(AttachError) as excinfo:
        tnpeft.budget(*arguments, **keywords)
    return str(excinfo.value)


def test_budgets_that_cannot_be_met():
    model = net()
    assert refused("lora", model, 10, match="wide|head") == (
        "budget of 10: expected room for the smallest adapter, found 131 at r=1, the least it takes. "
        "Allow 131, adapt fewer layers, or train fewer biases and norms."
    )
    for wrong in (0, -1, True, 2.5, "many"):
        assert refused("lora", model, wrong, match="wide") == (
            f"budget: expected a positive whole number of parameters, found {wrong!r}. For example `params=600_000`."
        )
    assert refused("lora", model, 1000, match="wide", param="alpha") == (
        "param 'alpha': expected one that changes the count, found 448 at every alpha. Name another param."
    )
    assert refused("lora", model, 1000, match="wide", param="q") == (
        "recipe 'lora', param 'q': expected one of alpha, r, found `q`. Name the param that sets the adapter's size."
    )
    assert refused("lora", model, 1000, match="wide", r=2) == (
        "budget: expected `r` to be solved for, found a value for it. Leave `r=` out."
    )
    assert refused("lora", model, 1000, match="wide", fixed=["lor"]) == (
        "fixed spec 'lor': expected one of lora, found `lor`. Did you mean `lora`?"
    )
    assert refused("lora", model, 1000, match="wide", fixed=["lora"]) == (
        "recipe 'lora', param 'r': expected a spec with params that is not fixed, found none. "
        "Name the param that sets the adapter's size."
    )
    assert refused("lora", 3, 1000, match="wide") == (
        "model: expected a torch.nn.Module, found 3. Pass the model itself."
    )


def test_a_model_without_data_and_one_that_stays_as_it_is():
    expected = tnpeft.budget("lora", net(), 1000, match=LAYERS)
    with torch.device("meta"):
        assert tnpeft.budget("lora", type(net())(), 1000, match=LAYERS) == expected
    model = net()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    tnpeft.budget("lora", model, 1000, match=LAYERS)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert type(model.wide) is nn.Conv3d


RECIPE = """
tnpeft: 1
name: mine
adapters:
  - {spec: lora, match: 'wide', params: {r: 3}}
  - {spec: lokr, match: 'head', params: {r: 2}}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1]), *sys.path])
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(RECIPE)


@pytest.mark.usefixtures("here")
def test_on_the_command_line():
    printed = text("budget", "lora", "-m", "small:net", "-p", "1000", "--match", "wide|head").splitlines()
    assert [line.split() for line in printed] == [
        ["lora", "on", "small:net"],
        ["r", "cores", "trained", "of", "the", "budget"],
        ["4", "524", "524", "52.4%"],
        ["5", "655", "655", "65.5%"],
        ["6", "786", "786", "78.6%"],
        [">", "7", "917", "917", "91.7%"],
        ["8", "1,048", "1,048", "104.8%"],
        ["9", "1,179", "1,179", "117.9%"],
        ["10", "1,310", "1,310", "131.0%"],
        [],
        ["lora", "r=7"],
        ["layers", "3"],
        ["cores", "917"],
        ["biases", "0"],
        ["norms", "0"],
        ["others", "0"],
        ["trained", "917", "of", "1,000", "(91.7%)"],
        ["use", "--set", "r=7"],
    ]
    kept = text("budget", "mine.yaml", "-m", "small:net", "-p", "600", "--fixed", "lokr").splitlines()
    assert "lokr          r=2 (kept)" in kept
    assert kept[-1].split(maxsplit=1)[1].startswith("params: {r: ")
    found = data("budget", "mine.yaml", "-m", "small:net", "-p", "600")
    assert set(found["specs"]) == {"lora", "lokr"}
    report = data("count", "mine.yaml", "-m", "small:net", "--set", f"r={found['value']}")
    assert report["trained"] == found["total"] <= 600


@pytest.mark.usefixtures("here")
def test_mistakes_on_the_command_line():
    where = ("-m", "small:net", "-p", "1000")
    assert mistakes("budget", "lora", "-m", "small:net", "-p", "0", "--match", "wide", status=2) == [
        "--params: expected a positive whole number, found 0. For example --params 600000, or 5k, or 1.2M."
    ]
    assert mistakes("budget", "lora", *where, "--match", "wide", "--set", "r=2", status=2) == [
        "--set r: expected r to be solved for, found a value for it. Leave --set r out."
    ]
    assert mistakes("budget", "lora", *where, status=2)[0].startswith("spec 'lora': expected --match, which layers")
    assert mistakes("budget", "lora", "-m", "small:net", "-p", "10", "--match", "wide") == [
        "budget of 10: expected room for the smallest adapter, found 112 at r=1, the least it takes. "
        "Allow 112, adapt fewer layers, or train fewer biases and norms."
    ]
    assert mistakes("budget", "mine.yaml", *where, "--fixed", "lorra") == [
        "fixed spec 'lorra': expected one of lora, lokr, found `lorra`. Did you mean `lora`?"
    ]


BONDS = """\
tnpeft: 1
name: bonds
layers: any
params: {r_a: 2, r_b: 2, r_c: 2}
sizes: {o: out_channels, i: in_channels, a: r_a, b: r_b, c: r_c}
cores:
  first:  {legs: o a, init: zeros}
  second: a b
  third:  b c
  fourth: c i k...
weight: o i k...
start: zero
"""


@given(st.integers(40, 3_000))
@settings(max_examples=8)
def test_a_rank_for_each_bond(params: int):
    spec, names = Spec.from_yaml(BONDS), ["r_b", "r_a", "r_c"]
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 5))

    def total(**ranks: int) -> int:
        return sum(spec.bind(layer, **ranks).num_parameters for layer in model)

    found = tnpeft.budget(spec, model, params, match="all", param=names)
    value = max(rank for rank in range(1, 60) if total(r_a=rank, r_b=rank, r_c=rank) <= params)
    ranks = dict.fromkeys(names, value)
    for name in names[:2]:
        if total(**{**ranks, name: value + 1}) > params:
            break
        ranks[name] += 1
    assert found.values == found.settings == ranks
    assert found.total == total(**ranks) <= params
    assert (found.param, found.value) == ("r_b", value)
    assert str(found).startswith(f"bonds: r_b={ranks['r_b']}, r_a={ranks['r_a']}, r_c={ranks['r_c']} trains")


@pytest.mark.parametrize("param", [[], ["r_a", "r_a"], [3], 7])
def test_params_that_are_no_names(param: object):
    with pytest.raises(AttachError) as caught:
        tnpeft.budget(Spec.from_yaml(BONDS), nn.Sequential(nn.Linear(6, 9)), 900, match="all", param=param)
    assert str(caught.value) == (
        f"budget, `param`: expected a param, or a list of different ones, found {param!r}. "
        'For example `param="r"`, or `param=["r_a", "r_b"]`.'
    )
