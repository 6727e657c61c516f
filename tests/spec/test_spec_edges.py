"""Mistakes that are reported once, wrong types, and what only looks like a mistake."""

from __future__ import annotations

import pytest
from test_spec_mistakes import GOOD

import tnpeft


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "params: {r: 4}",
            "params: {r: 4, q: max(r, 2)}",
            "4:26: `params`, key '2)': expected a quoted value, found the rest of one that a comma split. "
            'A comma ends a value inside `{...}`: quote this, `init: "kaiming_uniform(fan=8, gain=relu)"`.',
        ),
        (
            "params: {r: 4}",
            "params: {r: 4}\nfactors: {4: [2.0, 2]}",
            "5:15: `factors`: expected a table's name, or numbers with their factors, found 2.0. "
            "For example `factors: {32: [4, 4, 2]}`.",
        ),
        (
            "tnpeft: 1",
            "tnpeft: true",
            "1:9: `tnpeft`: expected the language version 1 or 2, found True. "
            "Write `tnpeft: 1`, or `tnpeft: 2` where a core is derived.",
        ),
        (
            "bond: r",
            "bnd: r",
            "5:1: unknown key 'bnd' in the file: expected one of bond, compose, cores, factors, init, layers, name, "
            "params, scale, seed, sizes, source, start, start_std, terms, title, tnpeft, weight, found 'bnd'. "
            "Did you mean `bond`?",
        ),
    ],
)
def test_one_mistake_is_reported_once(old, new, message):
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.Spec.from_yaml(GOOD.replace(old, new, 1), "demo.yaml")
    assert str(caught.value) == f"demo.yaml:{message}"


def test_one_index_takes_a_kernel_of_one_axis():
    text = GOOD.replace("Conv3d", "Conv1d").replace("kd kh kw: kernel_size", "k: kernel_size").replace("kd kh kw", "k")
    network = tnpeft.Spec.from_yaml(text).bind("Conv1d", in_channels=2, out_channels=3, kernel_size=5)
    assert network.sizes["k"] == 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tnpeft.Spec.from_yaml(5), "spec: expected YAML text, found 5. "
                                           "Pass the YAML itself, or use `load_spec` for a file."),
        (lambda: tnpeft.load_spec(None), "spec: expected a name or a path, found None. "
                                         "Give the name of a shipped spec, or the path of a file."),
        (lambda: tnpeft.register_init("mine", 5), "register_init 'mine': expected a function, found 5. "
                                                  "Pass `function(shape, generator, **arguments) -> Tensor`."),
    ],
)  # fmt: skip
def test_wrong_types_are_mistakes_too(call, message):
    with pytest.raises(tnpeft.SpecError) as caught:
        call()
    assert str(caught.value) == message


def test_a_spec_must_train_something():
    text = "tnpeft: 1\nname: f\nlayers: any\nsizes: {o: out_channels, i: in_channels}\n"
    text += "cores: {a: {legs: o i k..., frozen: true}}\nweight: o i k...\nstart: frozen_copy\n"
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.Spec.from_yaml(text, "f.yaml")
    assert str(caught.value) == (
        "f.yaml:5:8: `cores`: expected at least one that is trained, found all of them frozen. "
        "Remove one `frozen: true`: nothing would train."
    )
