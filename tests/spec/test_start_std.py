"""`start_std`: the size of T at the start, in standard deviations of the weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import tnpeft

SPEC = """\
tnpeft: 2
name: sized
layers: any
params: {r: 3, x: 0.02}
sizes: {o: out_channels, i: in_channels}
cores:
  up:   {legs: o r, init: orthogonal}
  mid:  {legs: r, init: normal(0.1)}
  down: {legs: r i k..., init: kaiming_uniform}
weight: o i k...
scale: 4
start: frozen_copy
start_std: x
"""


def std(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().double().std(correction=0)


@pytest.mark.parametrize("layer", [nn.Linear(12, 10), nn.Conv2d(4, 6, 3), nn.ConvTranspose1d(4, 6, 3, groups=2)])
def test_t_of_the_start_has_the_size_that_the_spec_says(layer: nn.Module):
    weight = layer.get_parameter("weight").detach().clone()
    model = nn.Sequential(layer)
    plain = tnpeft.Spec.from_yaml(SPEC.replace("start_std: x\n", "").replace(", x: 0.02", ""))
    before = tnpeft.attach(model, plain, match="0", name="plain").adapters["0"]
    tnpeft.activate(model, {})
    adapter = tnpeft.attach(model, tnpeft.Spec.from_yaml(SPEC), match="0").adapters["0"]
    torch.testing.assert_close(std(adapter.network_weight()), 0.02 * std(weight), rtol=1e-5, atol=0)
    assert torch.equal(adapter.delta_weight(), torch.zeros_like(weight))
    factor = (0.02 * std(weight) / std(before.network_weight())) ** (1 / 3)
    for name, core in adapter.cores.items():
        torch.testing.assert_close(core.double(), before.cores[name].double() * factor, rtol=1e-5, atol=1e-8)


def test_each_slice_of_a_stack_has_its_own_factor():
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(3, 8, 6) * torch.tensor([1.0, 10.0, 0.1]).reshape(3, 1, 1))
    weight = model.w.detach().clone()
    adapter = tnpeft.attach(model, tnpeft.Spec.from_yaml(SPEC), parameters={"w": "e o i"}).adapters["w"]
    for value, base in zip(adapter.network_weight(), weight, strict=True):
        torch.testing.assert_close(std(value), 0.02 * std(base), rtol=1e-5, atol=0)


def test_derived_cores_count_what_they_are_made_of():
    text = """\
tnpeft: 2
name: rolled
layers: [Linear]
params: {r: 2}
sizes: {o: out_features, i: in_features, y: in_features}
cores:
  A: {legs: o r, init: normal(1)}
  B: {legs: r y, init: normal(1)}
  C: {of: B, legs: r y i, map: "roll(y -> i y)"}
  s: {legs: y, init: ones, frozen: true}
terms:
  - {cores: [A, C, s], weight: o i}
  - {cores: [A, C(r i y), s], weight: o i}
start: frozen_copy
start_std: 0.5
"""
    model = nn.Sequential(nn.Linear(6, 8))
    base = std(model[0].weight)
    adapter = tnpeft.attach(model, tnpeft.Spec.from_yaml(text), match="0").adapters["0"]
    torch.testing.assert_close(std(adapter.network_weight()), 0.5 * base, rtol=1e-5, atol=0)
    assert bool((adapter.cores["s"] == 1).all())


def test_files_hold_the_scaled_cores(tmp_path: Path):
    model = nn.Sequential(nn.Linear(6, 8))
    fresh = nn.Sequential(nn.Linear(6, 8))
    fresh.load_state_dict(model.state_dict())
    adapter = tnpeft.attach(model, tnpeft.Spec.from_yaml(SPEC), match="0", x=0.3).adapters["0"]
    tnpeft.save(model, tmp_path / "a.safetensors")
    loaded = tnpeft.load(fresh, tmp_path / "a.safetensors").adapters["0"]
    for name, core in adapter.cores.items():
        assert torch.equal(loaded.cores[name], core)
        assert torch.equal(loaded.start[name], adapter.start[name])


REFUSED = {
    "version": (
        ("tnpeft: 2", "tnpeft: 1"),
        "<spec>:1:9: `tnpeft`: expected the language version 2 for derived cores, references with legs, grouped legs, "
        "index cores, inits by position or value and `start_std`, found 1. Write `tnpeft: 2`: versions of tnpeft "
        "before 0.2 then say that they are too old for it.",
    ),
    "zero": (
        ("orthogonal}", "zeros}", "frozen_copy", "zero"),
        "<spec>:13:12: `start_std`: expected `start: frozen_copy` beside it, found `start: zero`, where T is "
        "zero. Write "
        "`start: frozen_copy`, or remove `start_std`.",
    ),
    "shared": (
        ("legs: r, ", "legs: r, shared: model, "),
        "<spec>:13:12: `start_std`: expected cores with values of their own, found 'mid', which layers "
        "share: it has one "
        "size for all of them. Remove `start_std`, or give the cores inits of that size.",
    ),
    "terms": (
        (
            "weight: o i k...\n",
            "terms: [{cores: [up, mid, down], weight: o i k...}, {cores: [up, down], weight: o i k...}]\n",
        ),
        "<spec>:13:12: `start_std`: expected as many trained cores in every term, found 3 in `terms`, entry 1 and 2 in "
        "`terms`, entry 2. Remove `start_std`: one factor would change the terms' shares.",
    ),
    "map": (
        ("  mid:  {legs: r, ", "  m: {of: mid, legs: r, map: tanh}\n  mid:  {legs: r, "),
        "<spec>:14:12: `start_std`: expected linear maps alone on trained cores, found `tanh` in core 'm'. Remove "
        "`start_std`, or give the cores inits of that size.",
    ),
    "summands": (
        (
            "  mid:  {legs: r, ",
            "  m: {of: [{cores: [mid]}, {cores: [mid, other]}], legs: r}\n"
            "  other: {legs: r, init: ones}\n  mid:  {legs: r, ",
        ),
        "<spec>:15:12: `start_std`: expected as many trained cores in every term, found 1 in core 'm', `of`, "
        "entry 1 and 2 "
        "in core 'm', `of`, entry 2. Remove `start_std`: one factor would change the terms' shares.",
    ),
    "value": (
        (
            "init: normal(0.1)}",
            "init: value(v)}\n  v: {of: w, legs: r, map: tanh}\n  w: {legs: r, frozen: true, init: ones}",
        ),
        "<spec>:15:12: `start_std`: expected cores with values of their own, found 'mid', whose `init: value(v)` is a "
        "value of before. Remove `start_std`, or give the cores inits of that size.",
    ),
    "name": (
        ("start_std: x", "start_std: y"),
        "<spec>:13:12: `start_std`: expected params, layer names and indices in `sizes`, found 'y'. Add it "
        "to `params`, or "
        "give it a line in `sizes`.",
    ),
}


@pytest.mark.parametrize(("changes", "text"), REFUSED.values(), ids=REFUSED)
def test_where_one_factor_says_nothing(changes: tuple[str, ...], text: str):
    spec = SPEC
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert old in spec
        spec = spec.replace(old, new)
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.Spec.from_yaml(spec)
    assert text in str(caught.value).splitlines() or str(caught.value) == text


def test_numbers_that_are_known_with_the_layer():
    spec = tnpeft.Spec.from_yaml(SPEC)
    with pytest.raises(tnpeft.BindError) as caught:
        spec.bind(nn.Linear(6, 8), x=0)
    assert str(caught.value) == (
        "<spec>:13:12: `start_std`, on Linear(6, 8): expected a positive number, found 0. For example "
        "`start_std: 0.01`."
    )
    model = nn.Sequential(nn.Linear(6, 8))
    nn.init.ones_(model[0].weight)
    with pytest.raises(tnpeft.AttachError) as caught_too:
        tnpeft.attach(model, spec, match="0")
    assert str(caught_too.value) == (
        "layer '0': `start_std`: expected the base weight with a standard deviation, found 0: all of its "
        "entries are equal. "
        "Remove `start_std`, or match other layers."
    )
