"""Near misses among many names, and equal problems of many layers told once."""

from __future__ import annotations

import copy
import pickle
import time

import pytest
from torch import nn

import tnpeft
from tnpeft.errors import Problem, TnpeftError, listed, near_miss

BLOCK = "down_blocks.{}.attentions.{}.transformer_blocks.{}.{}"
NAMES = [
    BLOCK.format(block, attention, inner, layer)
    for block in range(10)
    for attention in range(10)
    for inner in range(10)
    for layer in ("attn1.to_q", "attn1.to_k", "attn2.to_out.0", "ff.net.0.proj", "norm1")
]


@pytest.mark.parametrize("name", [NAMES[0], NAMES[250], NAMES[-2]])
def test_a_near_miss_is_found_among_thousands_of_names(name):
    assert near_miss(name.replace("transformer", "tranformer"), NAMES) == f"Did you mean `{name}`?"


def test_near_misses_take_bounded_time():
    words = [f"{'layer.' * 20}{number}" for number in range(20_000)]
    names = [*NAMES, *words, *("x" * 60_000 for _ in range(200))]
    began = time.perf_counter()
    assert near_miss(words[7] + "x", names) == f"Did you mean `{words[7]}`?"
    assert near_miss("y" * 60_000, names) == ""
    assert time.perf_counter() - began < 10  # 1.5 s on one core


@pytest.mark.parametrize(
    ("word", "known", "meant"),
    [
        ("LoRA", ["loha", "lora"], "lora"),
        ("alhpa", ["r", "alpha"], "alpha"),
        ("R", ["r"], "r"),
        ("rank", ["r", "alpha"], None),
        ("", ["r"], None),
        ("x", [], None),
    ],
)
def test_small_and_capital_letters_are_alike(word, known, meant):
    assert near_miss(word, known) == (f"Did you mean `{meant}`?" if meant else "")


def problem(layer: str | None = None, on: str | None = None, found: str = "f") -> Problem:
    return Problem("w", "e", found, "Mend it.", layers=(layer,) if layer else (), on=on)


def test_equal_problems_are_folded():
    layers = [f"blocks.{number}" for number in range(317)]
    error = TnpeftError(*(problem(layer) for layer in layers), problem(), problem(), problem("odd", found="g"))
    first, odd = error.problems
    assert first.layers == tuple(layers)
    assert odd.layers == ("odd",)
    assert str(error) == (
        "layers 'blocks.0', 'blocks.1', 'blocks.2', 'blocks.3', 'blocks.4' and 312 more: w: expected e, found f. "
        "Mend it.\nlayer 'odd': w: expected e, found g. Mend it."
    )
    assert pickle.loads(pickle.dumps(error)).problems == error.problems


def test_the_kind_of_layer_is_told_where_it_is_one():
    assert str(TnpeftError(problem("a", "Linear(1, 2)"), problem("b", "Linear(1, 2)"))) == (
        "layers 'a', 'b': w, on Linear(1, 2): expected e, found f. Mend it."
    )
    assert str(TnpeftError(problem("a", "Linear(1, 2)"), problem("b", "Linear(1, 3)"))) == (
        "layers 'a', 'b': w: expected e, found f. Mend it."
    )
    assert str(TnpeftError(problem(on="Linear(1, 2)"))) == "w, on Linear(1, 2): expected e, found f. Mend it."


def test_names_are_listed_up_to_a_bound():
    assert listed(["a"]) == "'a'"
    assert listed(list("abcde")) == "'a', 'b', 'c', 'd', 'e'"
    assert listed(["x"] * 5_006) == "'x', 'x', 'x', 'x', 'x' and 5,001 more"


KINDS = "Linear, Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d"


def stack() -> nn.Module:
    layers = [
        layer for size in range(4, 11) for layer in (nn.Conv1d(size, size + 1, 3), nn.GroupNorm(1, size), nn.SiLU())
    ]
    return nn.Sequential(*layers)


def test_a_pattern_that_catches_norms_names_the_kinds_of_the_spec():
    def refused(model: nn.Module, match: str) -> str:
        with pytest.raises(tnpeft.AttachError) as caught:
            tnpeft.attach(model, "tenvoo_l", match=match, r=2)
        return str(caught.value)

    plain = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    start = "layer '1': layer type: expected one of Conv3d, found LayerNorm. "
    assert refused(plain, ".*") == f"{start}Choose another spec: the model has no layer of its kinds."
    volumes = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv3d(4, 4, 3))
    assert refused(volumes, "[01]") == f"{start}Match other layers."
    assert refused(volumes, ".*") == f"{start}Narrow the pattern, or match `all`: every layer of the spec's kinds."
    assert [row.name for row in tnpeft.attach(volumes, "tenvoo_l", match="all", r=2).report().layers] == ["2"]


def test_a_pattern_that_catches_norms_is_told_once():
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(stack(), "lora", match=".*")
    assert str(caught.value) == (
        f"layers '1', '4', '7', '10', '13' and 2 more: layer type: expected one of {KINDS}, found GroupNorm. "
        "Narrow the pattern, or match `all`: every layer of the spec's kinds."
    )


@pytest.mark.parametrize(
    ("spec", "params", "message"),
    [
        ("quanta", {}, "layers '0', '3', '6', '9', '12' and 2 more: spec 'quanta': expected one of Linear, found "
                       "Conv1d. Choose another spec, or add the kind to its `layers`."),
        ("lora", {"r": 0}, "lora.yaml:13:3: layers '0', '3', '6', '9', '12' and 2 more: core 'down', index 'r': "
                           "expected a size from 1 to 16777216, found 0. Change its size.\n"
                           "lora.yaml:16:8: layers '0', '3', '6', '9', '12' and 2 more: `scale`: expected a divisor "
                           "other than zero, found zero. Guard it with `max(..., 1)`."),
        ("lora", {"r": "4"}, "spec 'lora', param 'r': expected a finite number, found '4'. Write `r=4`."),
        ("lora", {"r": 10**400}, "spec 'lora', param 'r': expected a number of at most 1e+12, found a larger one. "
                                 "Write `r=4`."),
    ],
)  # fmt: skip
def test_what_no_layer_takes_is_told_once(spec, params, message):
    model = stack()
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(model, spec, match=r"^(0|3|6|9|12|15|18)$", **params)
    assert str(caught.value) == message
    assert not any("adapters" in name for name, _ in model.named_modules())


def test_a_file_that_fits_no_layer_of_a_changed_model_says_so_once(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    plain = copy.deepcopy(model)
    tnpeft.save(tnpeft.attach(model, "lora", match=r"\d").model, tmp_path / "a.safetensors")
    for layer in plain:
        layer.forward = nn.ReLU().forward
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.load(plain, tmp_path / "a.safetensors")
    assert str(caught.value) == (
        f"{tmp_path / 'a.safetensors'}: layers '0', '1': layer: expected the forward of Linear, found Linear, with the "
        "`forward` of ReLU. An adapter would bypass it: take it off first, or match other layers."
    )


def test_two_entries_that_claim_many_layers_are_told_once():
    text = "tnpeft: 1\nname: x\nadapters: [{spec: lora, match: all}, {spec: loha, match: '^(0|3|6)$'}]\n"
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(stack(), tnpeft.Recipe.from_yaml(text))
    assert str(caught.value) == (
        "<recipe>:3:38: layers '0', '3', '6': expected one adapter, found two, lora ('all') and loha ('^(0|3|6)$'). "
        "Narrow one of the patterns."
    )
