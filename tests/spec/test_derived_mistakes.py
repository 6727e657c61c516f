"""Mistakes in derived cores, references and index cores: each says where, what was expected, and how to mend it."""

from __future__ import annotations

import pytest
import torch

import tnpeft

GOOD = """tnpeft: 2
name: demo
layers: [Linear]
params: {b: 4}
sizes: {o: out_features, n: in_features // b, x y: b, e: b * (b - 1) // 2}
cores:
  W: {legs: o (n y), from: weight}
  R: {legs: n e, init: zeros}
  turn: {of: R, legs: n x y, map: [skew(e -> x y), cayley(x y)]}
weight: o (n x)
start: frozen_copy
"""
MISTAKES = [
    (
        "init on a derived core",
        "turn: {of: R,",
        "turn: {of: R, init: zeros,",
        [
            (
                "demo.yaml:9:23: core 'turn': expected no `init` beside `of`, found `init` on a core "
                "with `of`. Write it on a core that is stored, one that `of` names."
            ),
        ],
    ),
    (
        "map without of",
        "R: {legs: n e, init: zeros}",
        "R: {legs: n e, init: zeros, map: tanh}",
        [
            (
                "demo.yaml:8:36: core 'R': expected `of` beside `map`, found `map` without `of`. "
                "Write `of` with the core that it acts on, or remove it."
            ),
        ],
    ),
    (
        "version",
        "tnpeft: 2",
        "tnpeft: 1",
        [
            (
                "demo.yaml:1:9: `tnpeft`: expected the language version 2 for derived cores, "
                "references with legs, grouped legs, index cores, inits by position or value and `start_std`, "
                "found 1. Write `tnpeft: 2`: versions of tnpeft before 0.2 then say that they are too old for it."
            ),
        ],
    ),
    (
        "size of an arrow",
        "e: b * (b - 1) // 2",
        "e: b * b",
        [
            (
                "demo.yaml:9:36: core 'turn', map 1: expected e = x (x - 1) / 2 = 6, found 16. Write "
                "`e: x * (x - 1) // 2` under `sizes`."
            ),
        ],
    ),
    (
        "unknown core in of",
        "of: R",
        "of: Q",
        [
            ("demo.yaml:9:14: core 'turn', `of`: expected names of `cores`, found 'Q'. Add it to `cores`."),
        ],
    ),
    (
        "circle",
        "of: R, legs: n x y",
        "of: [turn(n y x), R(n e)], legs: n x y",
        [
            (
                "demo.yaml:9:43: core 'turn': expected no circle, found 'turn', 'turn' derived from "
                "one another. Derive one of them from a stored core."
            ),
        ],
    ),
    (
        "a leg that no map makes",
        "map: [skew(e -> x y), cayley(x y)]",
        "map: [cayley(x y)]",
        [
            (
                "demo.yaml:9:14: core 'turn', `of`, index 'e' dangles: expected a second core or a "
                "place in the legs of 'turn', found 'R' alone. Name 'e' in another core, or in "
                "`legs`."
            ),
            (
                "demo.yaml:9:25: core 'turn', `of`, leg 'x': expected a core of `of`, or a map, that "
                "it comes from, found neither. Name a core that has 'x', or remove it."
            ),
            (
                "demo.yaml:9:27: core 'turn', `of`, leg 'y': expected a core of `of`, or a map, that "
                "it comes from, found neither. Name a core that has 'y', or remove it."
            ),
        ],
    ),
    (
        "an unused map leg",
        "map: [skew(e -> x y), cayley(x y)]",
        "map: [skew(e -> x y), norm(o)]",
        [
            (
                "demo.yaml:9:23: core 'turn', `of`, leg 'o': expected a core of `of`, or a map, that "
                "it comes from, found neither. Name a core that has 'o', or remove it."
            ),
        ],
    ),
    (
        "axes of a reference",
        "of: R",
        "of: R(e)",
        [
            (
                "demo.yaml:9:14: core 'turn', `of`, `R(e)`: expected 'R' has 2 axes (n e), found 1. "
                "Name each of them; parentheses split one."
            ),
            (
                "demo.yaml:9:26: core 'turn', `of`, leg 'n': expected a core of `of`, or a map, that "
                "it comes from, found neither. Name a core that has 'n', or remove it."
            ),
        ],
    ),
    (
        "at is no index core",
        "skew(e -> x y), cayley(x y)]",
        '"scatter(e -> x y, at=R)"]',
        [
            (
                "demo.yaml:9:36: core 'turn', map 1, `at=R`: expected an index core, found 'R' of "
                "init `zeros`. Give 'R' one of the inits choice, random, largest, smallest and places, and "
                "`frozen: true`."
            ),
        ],
    ),
    (
        "start zero behind cayley",
        "start: frozen_copy",
        "start: zero",
        [
            (
                "demo.yaml:11:8: `start: zero`: expected the zeros of 'R' to pass, found `cayley` in "
                "'turn', which is not zero with a slope where its input is zero. Put them after it, "
                "or write `start: frozen_copy`."
            ),
        ],
    ),
    (
        "an index core in a term",
        "  turn:",
        "  p: {legs: n, frozen: true, init: random(n)}\n  turn:",
        [
            (
                "demo.yaml:9:13: `weight`: expected cores of numbers: an index core stands in `at=`, "
                "found 'p', an index core. Name it in a map, `scatter(n -> o i, at=p)` say."
            ),
        ],
    ),
    (
        "an index core that trains",
        "skew(e -> x y), cayley(x y)]}",
        '"gather(n -> n, at=p)"]}\n  p: {legs: n, init: random(n)}',
        [
            (
                "demo.yaml:9:14: core 'turn', `of`, index 'e' dangles: expected a second core or a "
                "place in the legs of 'turn', found 'R' alone. Name 'e' in another core, or in "
                "`legs`."
            ),
            (
                "demo.yaml:9:25: core 'turn', `of`, leg 'x': expected a core of `of`, or a map, that "
                "it comes from, found neither. Name a core that has 'x', or remove it."
            ),
            (
                "demo.yaml:9:27: core 'turn', `of`, leg 'y': expected a core of `of`, or a map, that "
                "it comes from, found neither. Name a core that has 'y', or remove it."
            ),
            (
                "demo.yaml:10:22: index core 'p': expected a frozen core, found one that trains. Add "
                "`frozen: true`: whole numbers have no gradient."
            ),
        ],
    ),
    (
        "places of unknown legs",
        "R: {legs: n e, init: zeros}",
        "R: {legs: n e, init: zeros}\n  p: {legs: n, frozen: true, init: choice(o z)}",
        [
            (
                "demo.yaml:9:13: `weight`: expected cores of numbers: an index core stands in `at=`, "
                "found 'p', an index core. Name it in a map, `scatter(n -> o i, at=p)` say."
            ),
            (
                "demo.yaml:9:36: index core 'p', `choice`: expected legs of the network, found 'z'. "
                "Name indices that a core has."
            ),
        ],
    ),
    (
        "value of a stored core",
        "R: {legs: n e, init: zeros}",
        "R: {legs: n e, init: value(W)}",
        [
            (
                "demo.yaml:8:24: core 'R', `value(W)`: expected a derived core, found a stored one. "
                "Name a core with `of`."
            ),
            (
                "demo.yaml:9:27: core 'turn', index 'y' dangles: expected a second core or a place in "
                "`weight`, found core 'turn' alone. Add 'y' to another core, or to `weight`."
            ),
            (
                "demo.yaml:10:9: `weight`, index 'o': expected a core that has it, found none. Add "
                "'o' to a core, or remove it from `weight`."
            ),
        ],
    ),
]


@pytest.mark.parametrize(
    ("old", "new", "messages"), [case[1:] for case in MISTAKES], ids=[case[0] for case in MISTAKES]
)
def test_a_mistake_says_where_what_and_how_to_mend_it(old: str, new: str, messages: list[str]):
    assert old in GOOD
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.Spec.from_yaml(GOOD.replace(old, new), "demo.yaml")
    assert str(caught.value).splitlines() == messages


def test_without_a_mistake_it_is_read():
    assert [*tnpeft.Spec.from_yaml(GOOD, "demo.yaml").derivations] == ["turn"]


GATED = """tnpeft: 2
name: gated
layers: [Linear]
params: {r: 2}
sizes: {o: out_features, i: in_features}
cores:
  A: r i
  B: {legs: o r, init: zeros}
  g: {legs: r, init: zeros}
  G: {of: g, legs: r, map: MAP}
terms:
  - {cores: [A, B, G], weight: o i}
start: zero
"""


@pytest.mark.parametrize("call", ["cos", "exp", "sigmoid", '"topk_softmax(r, k=2)"', "[tanh, cos]"])
def test_zeros_that_a_map_turns_into_other_numbers_do_not_count(call: str):
    adapter = tnpeft.compile(tnpeft.Spec.from_yaml(GATED.replace("MAP", call)), torch.nn.Linear(3, 4))
    assert not adapter.delta_weight().any()
    adapter.delta_weight().sum().backward()
    assert dict(adapter.named_parameters())["core_B"].grad.any()


@pytest.mark.parametrize("call", ["tanh", "relu", "unit(r)", "[tanh, relu]"])
def test_two_cores_of_zeros_are_one_too_many(call: str):
    text = GATED.replace("MAP", call)
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.Spec.from_yaml(text, "gated.yaml")
    assert str(caught.value) == (
        "gated.yaml:13:8: `start: zero`: expected exactly one trainable core with `init: zeros`, found 2, 'B', 'g'. "
        "Two never receive a gradient: give all but one another init."
    )


def test_zeros_beside_another_summand_do_not_count():
    text = GATED.replace("of: g, legs: r, map: MAP", "of: [{cores: [g]}, {cores: [h]}], legs: r, map: tanh")
    spec = tnpeft.Spec.from_yaml(text.replace("cores:\n", "cores:\n  h: {legs: r, init: ones}\n", 1))
    assert not tnpeft.compile(spec, torch.nn.Linear(3, 4)).delta_weight().any()


def test_zeros_behind_a_map_may_be_given_other_values():
    """Those that make the start zero may not."""
    spec, model = tnpeft.Spec.from_yaml(GATED.replace("MAP", "sigmoid")), torch.nn.Sequential(torch.nn.Linear(3, 4))
    tnpeft.attach(model, spec, match="all", init={"0.g": torch.ones(2)}).detach()
    with pytest.raises(tnpeft.TnpeftError, match="this core makes `start: zero` hold"):
        tnpeft.attach(model, spec, match="all", init={"0.B": torch.ones(4, 2)})
