"""Binding: sizes, counts, formulas and graphs of networks, and what does not bind."""

from __future__ import annotations

import copy
import importlib
import math
import pickle
import re
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tnpeft
from tnpeft.network.spec import _from_parts
from tnpeft.spec import Declaration
from tnpeft.verify.strategies import params_of, signatures

TENVOO_L = "(i1 i2 + o1 o2) r^2 + (i3 + o3 + kd + kh + kw + 1) r^3 + 2r^4"
TENVOO_Q = "(i1 i2 + o1 o2 + kh) r^2 + (i3 + o3 + kd + kw) r^3 + 3r^4"


@pytest.mark.parametrize(
    ("name", "kind", "formula"),
    [
        ("tenvoo_l", "Conv3d", TENVOO_L),
        ("tenvoo_q", "Conv3d", TENVOO_Q),
        ("lora", "Linear", "(o + i) r"),
        ("lora", "Conv2d", "(o + i k...) r"),
        ("loha", "Conv2d", "2(o + i k...) r"),
        ("locon_tucker", "Conv1d", "(o + i) r + k... r^2"),
    ],
)
def test_the_count_as_the_papers_write_it(name, kind, formula):
    """TenVOO-L and -Q print the paper's Eq. (6)."""
    kernel = {} if kind == "Linear" else {"kernel_size": 3}
    network = (
        tnpeft.load_spec(name).bind(kind, in_channels=64, out_channels=96, **kernel)
        if kernel
        else (tnpeft.load_spec(name).bind(kind, in_features=64, out_features=96))
    )
    assert network.formula == formula


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(tnpeft.list_specs()),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(1, 3),
    st.data(),
)
def test_count_formula_shapes_and_tensors_agree(name, in_channels, out_channels, rank, groups, data):
    spec = tnpeft.load_spec(name)
    kind = data.draw(st.sampled_from(spec.layers))
    spatial = int(kind[-2]) if kind != "Linear" else 0
    groups = groups if spatial else 1
    kernel = tuple(data.draw(st.integers(1, 4)) for _ in range(spatial))
    layer = tnpeft.Layer(kind, in_channels * groups, out_channels * groups, kernel, groups)
    params = {"r": rank} if "r" in spec.params else {}
    try:
        network = spec.bind(layer, **params)
    except tnpeft.BindError:  # sides that no block divides
        return
    trained = sum(math.prod(core.shape) for core in network.cores if not core.frozen)
    assert network.num_parameters == trained + (layer.out_channels if network.compose else 0)
    assert network.num_parameters == value_of(network.formula, network)
    for part in network.parts:
        assert all(padded >= size for padded, size in zip(part.padded_shape, layer.weight_shape, strict=True))
        letters = part.einsum.split("->")[0].split(",")
        assert [len(word) for word in letters] == [len(core.shape) for core in part.cores]


WORDS = {"if", "else", "and", "or", "not", "max", "min", "ceil", "floor", "gcd", "prod", "sqrt"}


def value_of(formula: str, network: tnpeft.Network) -> int:
    """The formula's value with every index at its size, by Python: what stands side by side is multiplied."""
    layer = network.layer
    names = {**network.sizes, **network.params, "K": math.prod(layer.kernel_size), "out_channels": layer.out_channels}
    text = formula.replace("k...", "K")
    written: list[str] = []
    for token in re.findall(r"\d+(?:\.\d+)?|\w+|[<>=!]=|//|[^\s\w]", text):
        factor = token[0].isalnum() or token[0] in "(_"
        if (
            written
            and factor
            and token not in WORDS
            and written[-1] not in WORDS
            and written[-1][-1] not in "+-*/%<>=!(,"
        ):
            written.append("*")
        written.append({"^": "**"}.get(token, token))
    functions = {"max": max, "min": min, "ceil": math.ceil, "floor": math.floor, "gcd": math.gcd, "sqrt": math.sqrt}
    return int(eval(" ".join(written), {"__builtins__": {}}, {**functions, **names}))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(tnpeft.list_specs()), st.data())
def test_formulas_hold_for_any_params(name, data):
    spec = tnpeft.load_spec(name)
    layer = data.draw(signatures(spec.layers, max_channels=16))
    try:
        network = spec.bind(layer, **data.draw(params_of(spec)))
    except tnpeft.BindError:
        return
    assert network.num_parameters == value_of(network.formula, network)


def test_a_number_before_a_param_stays_a_number():
    """`2e3` would be two thousand."""
    text = "tnpeft: 1\nname: demo\nlayers: [Linear]\nparams: {e3: 5}\nsizes: {o: out_features, i: in_features}\n"
    text += "cores: {a: {legs: e3, init: ones}, b: {legs: e3, init: ones}, c: o i}\nweight: o i\nstart: frozen_copy\n"
    network = tnpeft.Spec.from_yaml(text).bind("Linear", in_features=3, out_features=2)
    assert network.formula == "o i + 2 e3"
    assert value_of(network.formula, network) == network.num_parameters == 16


def test_the_graph_is_bipartite_and_keeps_hyperedges():
    network = tnpeft.load_spec("loha").bind(torch.nn.Linear(6, 5), r=2)
    graph = network.graph
    assert all({left[0], right[0]} == {"core", "index"} for left, right in graph.edges)
    assert graph.nodes["index", "o"] == {"kind": "index", "size": 5, "open": True}
    plain = {"frozen": False, "shared": None, "origin": None, "terms": (0,)}
    assert graph.nodes["core", "up_1"] == {"kind": "core", "shape": (5, 2), **plain}
    assert graph.degree["index", "o"] == 2


def test_a_layer_and_its_numbers_bind_alike():
    spec = tnpeft.load_spec("lora")
    layer = torch.nn.ConvTranspose2d(8, 6, (2, 3), groups=2)
    from_module = spec.bind(layer, r=3)
    numbers = {"in_channels": 8, "out_channels": 6, "kernel_size": (2, 3), "groups": 2}
    assert from_module.signature == spec.bind("ConvTranspose2d", **numbers, r=3).signature
    assert from_module.layer.weight_shape == (6, 4, 2, 3)
    assert from_module.layer.stored_shape == tuple(layer.weight.shape) == (8, 3, 2, 3)
    assert str(from_module.layer) == "ConvTranspose2d(8, 6, 2x3, groups=2)"


def test_einsum_is_the_definition():
    network = tnpeft.load_spec("locon_tucker").bind("Conv2d", in_channels=4, out_channels=3, kernel_size=2, r=2)
    cores = [np.random.default_rng(0).normal(size=core.shape) for core in network.cores]
    named = {core.name: tensor for core, tensor in zip(network.cores, cores, strict=True)}
    value = np.einsum(network.einsum, *cores)
    assert value.shape == (3, 4, 2, 2)
    assert len(named) == 3


def test_specs_and_networks_copy_and_pickle():
    network = tnpeft.load_spec("tenvoo_l").bind("Conv3d", in_channels=32, out_channels=64, kernel_size=3)
    assert copy.deepcopy(network) is network
    again = pickle.loads(pickle.dumps(network))
    assert again.signature == network.signature
    assert again.spec == network.spec


def test_params_may_be_expressions_of_earlier_ones():
    spec = tnpeft.load_spec("lora")
    assert spec.bind("Linear", in_features=4, out_features=4, r=2).scale == 1.0
    assert spec.bind("Linear", in_features=4, out_features=4, r=2, alpha=4).scale == 2.0


def test_padding_crops_prime_channels():
    text = """\
tnpeft: 1
name: padded
layers: [Linear]
params: {r: 2}
bond: r
sizes: {o1 o2: "factorize(out_features, 2, pad=true)", i: in_features}
cores: {a: o1 x, b: x o2 i}
weight: (o1 o2) i
start: frozen_copy
"""
    network = tnpeft.Spec.from_yaml(text).bind("Linear", in_features=3, out_features=13)
    assert (network.sizes["o1"], network.sizes["o2"]) == (5, 3)
    assert network.padded_shape == (15, 3)


KIND = "expected one of Linear, Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d"


@pytest.mark.parametrize(
    ("spec", "layer", "arguments", "message"),
    [
        ("lora", "Conv4d", {}, f"layer kind: {KIND}, found 'Conv4d'. Did you mean `Conv3d`?"),
        (
            "lora",
            "Linear",
            {"in_features": 4},
            "Linear: expected `out_features` once, found it 0 times. Give `out_features=...`.",
        ),
        (
            "lora",
            "Conv2d",
            {"in_channels": 4, "out_channels": 4},
            "Conv2d: expected 2 kernel sizes, found 0. Give one number, or one per kernel axis.",
        ),
        (
            "lora",
            "Conv2d",
            {"in_channels": 4, "out_channels": 4, "kernel_size": (3,)},
            "Conv2d: expected 2 kernel sizes, found 1. Give one number, or one per kernel axis.",
        ),
        (
            "lora",
            "Conv1d",
            {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "groups": 4},
            "Conv1d: expected channels that `groups` divides, found 4 and 6 with groups=4. Change `groups`.",
        ),
        (
            "lora",
            "Linear",
            {"in_features": 0, "out_features": 4},
            "Linear, `in_features`: expected a positive whole number, found 0. Give `in_features=64`, say.",
        ),
    ],
)
def test_wrong_numbers_of_a_layer(spec, layer, arguments, message):
    with pytest.raises(tnpeft.BindError) as caught:
        tnpeft.load_spec(spec).bind(layer, **arguments)
    assert str(caught.value) == message


def test_wrong_params_name_the_spec():
    spec = tnpeft.load_spec("lora")
    with pytest.raises(tnpeft.BindError) as caught:
        spec.bind("Linear", in_features=4, out_features=4, rr=3, alpha="2")
    assert str(caught.value) == (
        "params of spec 'lora': expected one of r, alpha, found `rr`. Did you mean `r`?\n"
        "spec 'lora', param 'alpha': expected a finite number, found '2'. Write `alpha=4`."
    )


def test_a_kind_that_the_spec_does_not_know():
    spec = tnpeft.load_spec("quanta")
    with pytest.raises(tnpeft.BindError) as caught:
        spec.bind(torch.nn.Conv1d(4, 4, 3))
    assert str(caught.value) == (
        "spec 'quanta': expected one of Linear, found Conv1d. Choose another spec, or add the kind to its `layers`."
    )


def test_sizes_that_do_not_fit_the_layer_have_their_place():
    text = """\
tnpeft: 1
name: halves
layers: [Linear]
params: {r: 2}
sizes: {o: out_features, i: in_features // 2 * 2}
cores: {a: o r, b: r i}
weight: o i
start: frozen_copy
"""
    spec = tnpeft.Spec.from_yaml(text, "halves.yaml")
    assert spec.bind("Linear", in_features=6, out_features=3).num_parameters == 18
    with pytest.raises(tnpeft.BindError) as caught:
        spec.bind("Linear", in_features=7, out_features=3, r=0)
    assert str(caught.value) == (
        "halves.yaml:6:9: core 'a', index 'r', on Linear(7, 3): expected a size from 1 to 16777216, found 0. "
        "Change its size.\n"
        "halves.yaml:7:9: `weight`, axis 2 (i), on Linear(7, 3): expected a product of 7 (in_channels), found 6. "
        "Change `sizes` or `factors`, or group the legs of `weight` otherwise."
    )


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            torch.nn.GroupNorm(1, 2),
            f"unsupported layer: {KIND}, found GroupNorm. "
            "Adapt the layers inside it, or train it as a whole with `also`.",
        ),
    ],
)
def test_modules_that_are_no_layer_of_ours(module, message):
    with pytest.raises(tnpeft.BindError) as caught:
        tnpeft.load_spec("lora").bind(module)
    assert str(caught.value) == message


def test_a_layer_with_a_forward_of_its_own_is_opaque():
    layer = tnpeft.load_spec("lora").bind(Doubled(2, 2)).layer
    assert (layer.opaque, str(layer)) == (True, "Linear(2, 2, opaque)")


def test_a_spec_is_what_was_declared_and_cannot_change():
    spec = tnpeft.Spec.from_yaml(tnpeft.load_spec("lokr").text, "lokr.yaml")
    assert isinstance(spec, Declaration)
    assert spec.bind("Linear", in_features=4, out_features=6).spec is spec
    assert copy.copy(spec) is copy.deepcopy(spec) is spec
    for part in (spec, spec.cores[0], spec.terms[0], spec.sizes[0]):
        with pytest.raises(FrozenInstanceError):
            part.label = "another"
    again = pickle.loads(pickle.dumps(spec))
    assert (type(again), again == spec, hash(again) == hash(spec)) == (tnpeft.Spec, True, True)
    assert spec != tnpeft.load_spec("loha")


def test_what_is_declared_knows_its_places():
    spec = tnpeft.Spec.from_yaml(
        "tnpeft: 1\nname: s\nlayers: [Linear]\nparams: {r: 2}\nsizes:\n  o: out_features\n"
        "  i: in_features\ncores:\n  a: o r\n  b: {legs: r i}\nweight: o i\nstart: frozen_copy\n",
        "s.yaml",
    )
    assert [str(where) for core in spec.cores for where in core.places.values()] == [
        *("s.yaml:9:6", "s.yaml:9:8", "s.yaml:10:13", "s.yaml:10:15")
    ]
    assert [str(core.position) for core in spec.cores] == ["s.yaml:9:3", "s.yaml:10:13"]
    assert {leg: str(where) for leg, where in spec.terms[0].places.items()} == {"o": "s.yaml:11:9", "i": "s.yaml:11:11"}
    assert [str(rule.node.position) for rule in spec.sizes] == ["s.yaml:6:6", "s.yaml:7:6"]
    assert (str(spec.place("start")), str(spec.place("scale"))) == ("s.yaml:12:8", "s.yaml:1:1")


def test_earlier_pickles_find_how_specs_are_made_again():
    assert importlib.import_module("tnpeft.spec.model")._from_parts is _from_parts


def test_registered_inits_are_known_and_checked(monkeypatch):
    monkeypatch.setattr("tnpeft.spec.inits._registered", {})

    def sign(shape, generator, scale, shift=0.0):
        return scale * torch.sign(torch.randn(shape, generator=generator)) + shift

    tnpeft.register_init("sign", sign)
    text = "tnpeft: 1\nname: s\nlayers: any\nsizes: {o: out_channels, i: in_channels}\n"
    text += "cores: {a: {legs: o i k..., init: INIT}}\nweight: o i k...\nstart: frozen_copy\n"
    network = tnpeft.Spec.from_yaml(text.replace("INIT", "sign(0.5)")).bind("Linear", in_features=2, out_features=3)
    assert network.cores[0].init.name == "sign"
    assert network.cores[0].init.arguments == {"scale": 0.5}
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.Spec.from_yaml(text.replace("INIT", "sign"), "s.yaml")
    assert str(caught.value) == "s.yaml:5:35: init `sign`: expected `scale`, found it missing. Write `sign(scale=...)`."
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.register_init("zeros", sign)
    assert str(caught.value) == "register_init: expected a new ASCII word, found 'zeros'. Choose another name."
