"""`dropout` as files and `attach` say it: what is read, refused, reported and kept in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tnpeft

HEAD = "tnpeft: 1\nname: mine\nadapters:\n  - spec: lora\n    match: '0'\n    dropout: "
EXAMPLE = "For example `dropout: {input: 0.05, bond: 0.1, module: 0.0}`."


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))


@pytest.mark.parametrize(
    ("dropout", "text"),
    [
        (0.1, "`dropout`: expected what is dropped, with probabilities, found 0.1. "
              "Say of what: `{'input': 0.1}` is PEFT's `lora_dropout`, `bond` LyCORIS's `rank_dropout`."),
        ("input", f"`dropout`: expected what is dropped, with probabilities, found 'input'. {EXAMPLE}"),
        ({"inputs": 0.1}, "`dropout`: expected some of input, bond, module, found `inputs`. Did you mean `input`?"),
        ({"rank_dropout": 0.1},
         "`dropout`: expected some of input, bond, module, found `rank_dropout`. Did you mean `bond`?"),
        ({"input": 1}, "`dropout`, `input`: expected a probability below 1, found 1. "
                       "Where everything is dropped nothing trains: leave the layers out, or write less than 1."),
        ({"bond": float("nan"), "module": True},
         "`dropout`, `bond`: expected a probability below 1, found nan. "
         "Write how likely an entry is to be dropped, such as 0.1.\n"
         "`dropout`, `module`: expected a probability below 1, found True. "
         "Write how likely an entry is to be dropped, such as 0.1."),
    ],
)  # fmt: skip
def test_arguments_that_are_refused(dropout: Any, text: str):
    given = model()
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(given, "lora", match="0", dropout=dropout)
    assert str(caught.value) == text
    assert type(given[0]) is nn.Linear


@pytest.mark.parametrize(
    ("dropout", "text"),
    [
        ("0.1", "6:14: `adapters`, entry 1, `dropout`: expected what training drops at random, with probabilities, "
                "found 0.1. For example `dropout: {input: 0.05, bond: 0.1}`."),
        ("{input: 2}", "6:22: `dropout`, `input`: expected a probability below 1, found 2. "
                       "Write how likely an entry is to be dropped, such as 0.1."),
        ("{lora_dropout: 0.1}", "6:15: unknown key 'lora_dropout' in `adapters`, entry 1: expected one of bond, "
                                "input, module, found 'lora_dropout'. Did you mean `input`?"),
        ("{bond: x}", "6:21: `adapters`, entry 1, `bond`: expected a probability below 1: of an entry of a bond, "
                      "found 'x'. For example `bond: 0.1`."),
    ],
)  # fmt: skip
def test_files_that_are_refused(dropout: str, text: str):
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.Recipe.from_yaml(HEAD + dropout + "\n")
    assert str(caught.value) == f"<recipe>:{text}"


def test_names_of_other_libraries_in_an_entry():
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.Recipe.from_yaml(HEAD.replace("    dropout: ", "    rank_dropout: 0.1\n"))
    assert str(caught.value).endswith("found 'rank_dropout'. Write `dropout: {bond: 0.1}`.")


@pytest.mark.parametrize(
    ("spec", "given", "where", "text"),
    [
        ("ia3", nn.Linear(6, 6), "0", "expected a bond of two entries or more in 'ia3', found none. "
            "Drop its `input` or `module`, or take another spec or a larger rank."),
        ("lora", nn.MultiheadAttention(4, 2), "0.out_proj", "expected a layer whose input is seen, "
            "found the output projection of an attention. Exclude it, or adapt it by another entry of a recipe, "
            "or under another name, without `dropout`."),
        ("lora", nn.Embedding(5, 4), "0", "expected a layer whose input is seen, found an embedding. "
            "Exclude it, or adapt it by another entry of a recipe, or under another name, without `dropout`."),
    ],
)  # fmt: skip
def test_layers_that_cannot_drop_are_refused(spec: str, given: nn.Module, where: str, text: str):
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(nn.Sequential(given), spec, match=[where], dropout={"bond": 0.1})
    what = "`dropout`, `bond`" if spec == "ia3" else "`dropout`"
    assert str(caught.value) == f"layer '{where}': {what}: {text}"


def sums(cores: str, *terms: str) -> tnpeft.Spec:
    head = "tnpeft: 1\nname: sums\nlayers: [Linear]\nparams: {r: 3}\nbond: r\nstart: frozen_copy\n"
    sizes = "sizes: {x: out_channels, y: in_channels, z: in_channels}\n"
    return tnpeft.Spec.from_yaml(f"{head}{sizes}cores: {{{cores}}}\nterms: [{', '.join(terms)}]\n")


def test_a_bond_of_several_terms_is_masked_once_in_each():
    terms = ("{cores: [A, B], weight: x y}", "{cores: [A, C], weight: x z}")
    spec = sums("A: x a, B: a y, C: a z", *terms)
    handle = tnpeft.attach(model().double(), spec, match="0", dropout={"bond": 0.4})
    adapter = handle.adapters["0"]
    assert [mask.places for mask in adapter.masks] == [((0, (1, 3)),)]
    with torch.no_grad():
        for core in handle.parameters():
            core.add_(torch.randn_like(core))
    (a, b, c), (a0, b0, c0) = adapter.cores.values(), adapter.start.values()
    x = torch.randn(2, 6).double()
    layer = handle.model.get_submodule("0")
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    mask = (torch.rand(3) >= 0.4) / 0.6
    with tnpeft.disabled(handle.model):
        torch.testing.assert_close(y, layer(x) + x @ ((a * mask) @ (b + c) - (a0 * mask) @ (b0 + c0)).T)


def test_a_bond_that_no_core_has_once_in_each_term_is_refused():
    terms = ("{cores: [A, B], weight: x y}", "{cores: [B, C], weight: y z}", "{cores: [A, C], weight: x z}")
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(model(), sums("A: x a, B: a y, C: a z", *terms), match="0", dropout={"bond": 0.4})
    assert str(caught.value) == (
        "layer '0': `dropout`, `bond`: expected a bond 'a' of 'sums' that can be dropped, found terms that have its "
        "cores in common in such a way that none has it once in each. Drop `input` or `module`."
    )


def test_files_keep_it_and_reports_say_it(tmp_path: Path):
    first = model()
    recipe = tnpeft.Recipe.from_yaml(HEAD + "{input: 0.3, bond: 0.2}\n  - {spec: lora, match: '1'}\n")
    handle = tnpeft.attach(first, recipe)
    assert "\ndropout in training: input 0.3, bond 0.2, of 1 layer" in str(handle.report())
    assert handle.report().as_dict()["dropout"] == {"input 0.3, bond 0.2": 1}
    with torch.no_grad():
        for core in handle.parameters():
            core.add_(torch.randn_like(core))
    tnpeft.save(first, tmp_path / "a.safetensors")
    second = model()
    second.load_state_dict(tnpeft.plain_state_dict(first))
    loaded = tnpeft.load(second, tmp_path / "a.safetensors")
    assert loaded.report().dropout == handle.report().dropout
    x = torch.randn(3, 6)
    torch.manual_seed(0)
    y = first(x)
    torch.manual_seed(0)
    assert torch.equal(second(x), y)
    assert torch.equal(second.eval()(x), first.eval()(x))
    smaller = tnpeft.truncate(second, r=2)
    assert smaller is not None
    assert loaded.report().dropout == handle.report().dropout


def test_attach_has_the_last_word_on_a_recipe():
    recipe = tnpeft.Recipe.from_yaml(HEAD + "{input: 0.3}\n")
    assert tnpeft.attach(model(), recipe, dropout={"module": 0.5}).report().dropout == {"module 0.5": 1}
    report = tnpeft.attach(model(), recipe, dropout={}).report()
    assert report.dropout == {}
    assert "dropout" not in report.as_dict()
