"""Specs from Python: `Spec.build`, `to_yaml`, `canonical`."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import tnpeft
from tnpeft.documents.nodes import read_document
from tnpeft.documents.writing import as_yaml
from tnpeft.spec.canonical_form import canonical_form
from tnpeft.spec.map_kinds import map_names

LORA: dict[str, Any] = {
    "name": "mine",
    "layers": "any",
    "params": {"r": 4, "alpha": "r"},
    "sizes": {"o": "out_channels", "i": "in_channels"},
    "cores": {"up": {"legs": "o r", "init": "zeros"}, "down": "r i k..."},
    "weight": "o i k...",
    "scale": "alpha / r",
    "start": "zero",
}
SPECS = tnpeft.list_specs()


@pytest.mark.parametrize("name", SPECS)
def test_every_shipped_spec_can_be_built_and_written(name: str):
    spec = tnpeft.load_spec(name)
    parts = spec.root.plain()
    version = parts.pop("tnpeft")
    built = tnpeft.Spec.build(**parts)
    assert built == spec
    assert hash(built) == hash(spec)
    assert built.root.get("tnpeft").value == version
    for each in (spec, built):
        assert tnpeft.Spec.from_yaml(each.to_yaml()) == each
    assert built.canonical() == spec.canonical()


def test_a_built_spec_does_what_the_file_does():
    spec = tnpeft.Spec.build(**LORA)
    assert spec != tnpeft.load_spec("lora")
    assert spec.canonical() == tnpeft.load_spec("lora").canonical()
    adapter = tnpeft.attach(nn.Sequential(nn.Linear(6, 8)), spec, match="0", r=2).adapters["0"]
    assert {name: tuple(core.shape) for name, core in adapter.cores.items()} == {"up": (8, 2), "down": (2, 6)}


def test_the_order_of_keys_and_comments_make_no_other_spec_but_that_of_cores_does():
    spec = tnpeft.Spec.build(**LORA)
    turned = dict(reversed(LORA.items()))
    assert tnpeft.Spec.build(**turned) == spec
    assert tnpeft.Spec.from_yaml("# a comment\n" + spec.to_yaml()) == spec
    assert tnpeft.Spec.build(**{**LORA, "cores": dict(reversed(LORA["cores"].items()))}) != spec
    assert tnpeft.Spec.build(**{**LORA, "seed": 1}) != spec


def test_a_table_that_does_not_ship_is_written_out():
    parts = {**LORA, "factors": "mine", "sizes": {**LORA["sizes"], "o": "out_channels"}}
    parts["sizes"] = {"o a": "factorize(out_channels, 2)", "i": "in_channels"}
    parts |= {"cores": {"up": {"legs": "o a r", "init": "zeros"}, "down": "r i k..."}, "weight": "(o a) i k..."}
    spec = tnpeft.Spec.build(tables={"mine": {8: (8, 1)}}, **parts)
    again = tnpeft.Spec.from_yaml(spec.to_yaml())
    assert again == spec
    assert again.bind(nn.Linear(6, 8)).sizes["o"] == 8


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"cores": {"up": {"legs": "o r", "init": "zeros"}, "down": "q i k..."}},
            "<spec>:8:9: core 'down', index 'q' has no size: expected `bond`, or a line in `sizes`, found neither. Add "
            "`q: ...` to `sizes`.",
        ),
        (
            {"cores": {"up": {"legs": "o r", "init": "zeroes"}, "down": "r i k..."}},
            "<spec>:7:25: unknown init 'zeroes': expected one of",
        ),
        (
            {"cores": {"up": {"legs": torch.ones(2)}}},
            "Spec.build, `cores`: expected texts, numbers, lists and mappings, found tensor([1., 1.]). Give it "
            "as a text, "
            "as a file would have it.",
        ),
        ({"strat": "zero"}, "unknown key 'strat' in the file"),
    ],
)
def test_mistakes_are_those_of_a_file(change: dict[str, Any], text: str):
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.Spec.build(**{**LORA, **change})
    assert text in str(caught.value)


def test_texts_and_numbers_survive_as_yaml():
    tricky = ["no", "null", "True", "1e-3", "a: b", "x #y", " lead", "trail ", "(i k...) r", "~", "", "- x", '"']
    tricky += ["\u00e9\u2028\n\U0001f600"]
    numbers = [1, -2, 1e-05, 2.5, float("inf")]
    data = {"texts": tricky, "numbers": numbers, "flags": [True, None], "empty": {}, "1": {2: [3]}}
    assert read_document(as_yaml(data)).plain() == data
    ring: list[Any] = []
    ring.append(ring)
    with pytest.raises(tnpeft.SpecError, match="at most 16 levels"):
        as_yaml({"ring": ring})


def renamed(value: Any, names: dict[str, str]) -> Any:
    """All words of some data under other names."""
    if isinstance(value, dict):
        return {renamed(key, names) if key not in KEYS else key: renamed(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [renamed(item, names) for item in value]
    if not isinstance(value, str):
        return value
    return re.sub(r"\b[A-Za-z_]\w*\b(?!\s*=[^=])", lambda word: names.get(word[0], word[0]), value)


KEYS = {"legs", "init", "frozen", "shared", "from", "of", "map", "scale", "cores", "weight"}


@pytest.mark.parametrize("name", SPECS)
def test_names_and_order_do_not_matter(name: str):
    spec = tnpeft.load_spec(name)
    data = spec.root.plain()
    words = {*spec.params, *(core.name for core in spec.cores)}
    words |= {*re.findall(r"\b[a-z]\w*\b", " ".join(map(str, data["sizes"])))}
    words |= {leg for core in spec.cores for leg in core.legs if leg != "k..."}
    words -= {*map_names(), *KEYS, "min", "max", "prod", "sqrt", "log", "floor", "draw", "value"}
    names = {word: f"other_{number}" for number, word in enumerate(sorted(words))}
    keep = ("tnpeft", "layers", "start", "factors", "compose")
    other = {key: value if key in keep else renamed(value, names) for key, value in data.items()}
    other["cores"] = dict(reversed(other["cores"].items()))
    other["sizes"] = dict(reversed(other["sizes"].items()))
    if "terms" in other:
        other["terms"] = [{**term, "cores": term["cores"][::-1]} for term in other["terms"][::-1]]
    other |= {"name": "other", "title": "another"}
    built = tnpeft.Spec.from_yaml(as_yaml(other))
    assert built.canonical() == spec.canonical()
    assert built != spec


@pytest.mark.slow
def test_no_two_shipped_specs_are_the_same_network():
    hashes = [tnpeft.load_spec(name).canonical().hash for name in SPECS]
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize(
    "change",
    [
        {"cores": {"up": {"legs": "o r", "init": "zeros"}, "down": {"legs": "r i k...", "init": "normal(0.1)"}}},
        {"cores": {"up": {"legs": "o r", "init": "zeros"}, "down": {"legs": "r i k...", "frozen": True}}},
        {"cores": {"up": {"legs": "o r", "init": "zeros"}, "down": {"legs": "r i k...", "shared": "model"}}},
        {"cores": {"up": {"legs": "o r", "init": "zeros"}, "down": "i r k..."}},  # its fan is another
        {"scale": "alpha"},
        {"layers": ["Linear"]},
        {"params": {"r": 8, "alpha": "r"}},
    ],
)
def test_what_matters_makes_another_form(change: dict[str, Any]):
    assert tnpeft.Spec.build(**{**LORA, **change}).canonical() != tnpeft.Spec.build(**LORA).canonical()


def test_legs_of_a_core_in_another_order_are_the_same_where_the_init_does_not_care():
    cores = {"up": {"legs": "o r", "init": "zeros"}, "down": {"legs": "r i k...", "init": "normal(0.1)"}}
    turned = {"down": {"legs": "k... i r", "init": "normal(0.1)"}, "up": {"legs": "r o", "init": "zeros"}}
    assert tnpeft.Spec.build(**{**LORA, "cores": cores}).canonical() == (
        tnpeft.Spec.build(**{**LORA, "cores": turned}).canonical()
    )


def test_forms_tell_apart_what_refinement_alone_does_not():
    two_triangles = [(0, 1), (1, 2), (2, 0), (3, 4), (4, 5), (5, 3)]
    hexagon = [(n, (n + 1) % 6) for n in range(6)]
    both = [[*edges, *((b, a) for a, b in edges)] for edges in (two_triangles, hexagon)]
    first, second = (canonical_form(["x"] * 6, [(a, b, "") for a, b in edges]) for edges in both)
    assert first != second
    order = [3, 0, 5, 1, 4, 2]
    again = canonical_form(["x"] * 6, [(order[a], order[b], "") for a, b in both[1]])
    assert again == second


def test_many_cores_alike_are_no_obstacle():
    names = [f"c{number}" for number in range(12)]
    cores: dict[str, Any] = {"up": {"legs": "o r", "init": "zeros"}, "down": "r i"}
    cores |= {name: {"legs": "r", "init": "ones"} for name in names}
    parts = {**LORA, "layers": ["Linear"], "weight": "o i"}
    spec = tnpeft.Spec.build(**{**parts, "cores": cores})
    assert spec.canonical() == tnpeft.Spec.build(**{**parts, "cores": dict(reversed(cores.items()))}).canonical()
