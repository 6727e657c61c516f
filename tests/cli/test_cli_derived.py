"""`tnpeft show` of derived cores, references with legs, grouped legs and index cores."""

from __future__ import annotations

import pytest
from terminal import data, text

HRA = """\
hra: Householder reflections of the inputs
Yuan et al. (HRA), NeurIPS 2024, arXiv:2405.17484; PEFT, HRA
on Linear(64, 128), rank = 8

core  legs     shape     init                                           elements
W     o i      128 x 64  the base weight                                   8,192
u     i (p q)  64 x 8    kaiming_uniform(fan=4, gain=0.5774, same=[q])       512
T     r s      8 x 8     reflections(r s) of u(i r) * u(i s)             derived
Wu    o r      128 x 8   W(o i) * u(i r)                                 derived

term of scale -1
        i  s r o
        64 8 8 128
u       ●──●
T       │  ◆─◆
Wu      │    ◆─◆
weight  in     out
"""
MAPS = """\
  T(r s) = reflections(r s) of u(i r) * u(i s): 1 map, 64 elements
  Wu(o r) = W(o i) * u(i r)
"""


def test_derived_cores_are_shown_with_what_they_are_made_of():
    printed = text("show", "hra", "--layer", "Linear:64,128")
    assert HRA.replace("term of scale -1\n", "") in printed
    assert "\nmaps          1 in a pass\n" in printed
    assert MAPS in printed


def test_a_spec_without_a_layer_is_shown_as_its_file_has_it():
    printed = text("show", "hra")
    assert "u     (i k...) (p q)\n" in printed
    assert "T     r s             reflections(r s) of u((i k...) r) * u((i k...) s)\n" in printed
    printed = text("show", "shira")
    assert "places  n         choice(o i k...), frozen\n" in printed
    assert "update  o i k...  scatter(n -> o i k..., at=places) of values\n" in printed


def test_sums_and_scales_inside_derived_cores_are_shown():
    assert "antisymmetric(x y), cayley(x y) of -0.5 * X_1(n x y)" in text("show", "boft_2", "--layer", "Linear:64,128")
    assert "g1    s i   32 x 64   d1(s i) + h1(s i) " in text("show", "peanut_2", "--layer", "Linear:64,128")


def test_a_core_named_twice_is_drawn_twice():
    printed = text("show", "vblora", "--layer", "Linear:64,128")
    lines = [line for line in printed.splitlines() if "●" in line or "◆" in line]
    assert [line.split()[0] for line in lines[:-1]] == ["bank", "bank", "pick_a", "pick_b"]
    assert [line.split()[0] for line in lines[:-1] if "◆" in line] == ["pick_a", "pick_b"]
    assert lines[-1] == "● a leg of a core, ◆ of a core that is made of others"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("hira", "as dense (a core is the base weight itself)"),
        ("shira", "as dense (every order builds the whole weight first)"),
    ],
)
def test_modes_that_cannot_serve_say_why(name: str, why: str):
    printed = text("show", name, "--layer", "Linear:64,128", "--input", "1,64")
    for mode in ("factored", "hybrid"):
        (row,) = (line for line in printed.splitlines() if line.startswith(mode))
        assert row.endswith(why)


def test_derived_cores_as_json():
    shown = data("show", "hra", "--layer", "Linear:64,128")
    assert [core["name"] for core in shown["cores"]] == ["W", "u"]
    assert shown["derived"][0] == {
        "name": "T",
        "legs": ["r", "s"],
        "shape": [8, 8],
        "of": [{"cores": ["u(i r)", "u(i s)"], "scale": 1.0}],
        "map": ["reflections(r s)"],
    }
    assert shown["plan"]["maps"] == 1
