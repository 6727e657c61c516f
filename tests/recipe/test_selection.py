"""`exclude`, `kinds`, `layers` and `ranks`: from files and from Python, beside PEFT on the same names of layers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from torch import nn

import tnpeft

HEAD = "tnpeft: 1\nname: mine\nadapters:\n  - spec: lora\n    match: all\n"


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(4, 4, bias=False) for _ in range(3))


class Block(nn.Module):
    def __init__(self, experts: int = 0) -> None:
        super().__init__()
        self.self_attn, self.norm = Attention(), nn.LayerNorm(4)
        if experts:
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(experts))
        else:
            self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))


class Stack(nn.Module):
    def __init__(self, number: int, experts: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(experts) for _ in range(number))


class Decoder(nn.Module):
    """Named as language models are: `model.layers.3.self_attn.q_proj`, `lm_head`."""

    def __init__(self, experts: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.model = Stack(12, experts)
        self.lm_head = nn.Linear(4, 5, bias=False)


class Pair(nn.Module):
    """Two lists of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Stack(3), Stack(4)
        self.conv = nn.Conv1d(4, 4, 1)


def chosen(model: nn.Module, match: Any = "all", **how: Any) -> dict[str, int]:
    """The layers that are adapted, with their ranks."""
    handle = tnpeft.attach(model, "lora", match=match, **{"r": 2, **how})
    return {layer: int(adapter.network.params["r"]) for layer, adapter in handle.adapters.items()}


def by_peft(model: nn.Module, **how: Any) -> dict[str, int]:
    """The same by PEFT's own rules, on the same model."""
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv1d)}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, **how}))
    ranks = {
        name.removeprefix("base_model.model."): module.r["default"]
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert ranks.keys() <= names
    return ranks


ENDS = r"(^|\.)({})$"


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"kinds": "Linear"}, {"target_modules": "all-linear"}),
        ({"exclude": "lm_head$"}, {"target_modules": "all-linear", "exclude_modules": ["lm_head"]}),
        ({"exclude": ["lm_head", "model.layers.3"]},
         {"target_modules": "all-linear", "exclude_modules": r"lm_head|model\.layers\.3\..*"}),
        ({"match": r"[qv]_proj$", "layers": [1, 2]},
         {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1, 2]}),
        ({"match": r"[qv]_proj$", "layers": "0-3, 10"},
         {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1, 2, 3, 10]}),
        ({"match": r"q_proj$", "layers": {"layers": "9-"}},
         {"target_modules": ["q_proj"], "layers_to_transform": [9, 10, 11], "layers_pattern": "layers"}),
        ({"match": r"q_proj$", "layers": 7}, {"target_modules": ["q_proj"], "layers_to_transform": 7}),
        ({"match": r"[qk]_proj$", "ranks": {ENDS.format("q_proj"): {"r": 5}}},
         {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_proj": 5}}),
        ({"match": r"[qk]_proj$",
          "ranks": {r"^model\.layers\.1\.self_attn\.q_proj$": {"r": 6}, ENDS.format("q_proj"): {"r": 5}}},
         {"target_modules": ["q_proj", "k_proj"],
          "rank_pattern": {r"^model\.layers\.1\.self_attn\.q_proj": 6, "q_proj": 5}}),
    ],
)  # fmt: skip
def test_layers_and_ranks_are_pefts(experts, ours, theirs):
    assert chosen(Decoder(experts), **ours) == by_peft(Decoder(experts), **theirs)


def test_blocks_of_all_lists_of_a_name_are_pefts():
    assert chosen(Pair(), match="q_proj$", layers={"layers": [0, 2]}) == by_peft(
        Pair(), target_modules=["q_proj"], layers_to_transform=[0, 2], layers_pattern="layers"
    )


def test_kinds_are_those_of_the_spec():
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.Conv3d(4, 4, 1), nn.ConvTranspose3d(4, 4, 1))
    for spec, kinds, layers in (
        ("tenvoo_l", "conv", ["2"]),
        ("tenvoo_l", "any", ["2"]),
        ("lora", "conv", ["1", "2"]),
        ("lora", ["Linear", "conv_transpose"], ["0", "3"]),
    ):
        handle = tnpeft.attach(model, spec, match=r"\d", kinds=kinds)
        assert [*handle.adapters] == layers
        tnpeft.detach(model)


def test_the_outermost_number_is_the_blocks():
    found = chosen(Decoder(experts=3), match="experts", layers="0-1")
    assert [*found] == [f"model.layers.{block}.experts.{expert}" for block in range(2) for expert in range(3)]
    assert [*chosen(Decoder(experts=3), match="experts", layers={"experts": 2})] == [
        f"model.layers.{block}.experts.2" for block in range(12)
    ]
    assert [*chosen(nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))), layers="1-2")] == ["1", "2"]


@pytest.mark.parametrize("indices", [[0], [2, 3], [0, 5, 11]])
def test_every_name_is_judged_as_by_peft(indices):
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], layers_to_transform=indices, exclude_modules=["x"])
    model = Decoder()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    verdicts = {name: check_target_module_exists(config, name) for name in names}
    expected = [name for name, said in verdicts.items() if said and not isinstance(said, _ExcludedModule)]
    assert [*chosen(model, match=r"\.[qv]_proj$", layers=indices)] == expected


def test_alpha_patterns_and_rank_patterns_stand_side_by_side(tmp_path: Path):
    torch.manual_seed(0)
    ranks = {r"0\.": {"alpha": 16}, r"q_proj$": {"r": 3, "alpha": 5}}
    model = Decoder()
    handle = tnpeft.attach(model, "lora", match=r"[qv]_proj$", layers="0-1", ranks=ranks, r=2, alpha=4)
    params = {layer: dict(adapter.network.params) for layer, adapter in handle.adapters.items()}
    assert params == {
        "model.layers.0.self_attn.q_proj": {"r": 3, "alpha": 16},
        "model.layers.0.self_attn.v_proj": {"r": 2, "alpha": 16},
        "model.layers.1.self_attn.q_proj": {"r": 3, "alpha": 5},
        "model.layers.1.self_attn.v_proj": {"r": 2, "alpha": 4},
    }
    scales = {layer: adapter.network.scale for layer, adapter in handle.adapters.items()}
    theirs = Decoder()
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 1],
                             rank_pattern={"q_proj": 3}, alpha_pattern={r"layers\.0\..*": 16, "q_proj": 5})  # fmt: skip
    for name, module in peft.get_peft_model(theirs, config).named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            assert module.scaling["default"] == scales.pop(name.removeprefix("base_model.model."))
    assert scales == {}
    tnpeft.save(model, tmp_path / "a.safetensors")
    torch.manual_seed(0)
    fresh = tnpeft.load(Decoder(), tmp_path / "a.safetensors")
    assert {layer: dict(adapter.network.params) for layer, adapter in fresh.adapters.items()} == params
    tnpeft.save_foreign(model, tmp_path / "peft", "peft")
    torch.manual_seed(0)
    back = tnpeft.load_foreign(Decoder(), tmp_path / "peft")
    assert {layer: adapter.network.params["r"] for layer, adapter in back.adapters.items()} == {
        layer: each["r"] for layer, each in params.items()
    }


def test_a_recipe_says_the_same():
    text = (
        "    exclude: [lm_head]\n    kinds: Linear\n    layers: 0-1, 4\n"
        "    ranks: {'q_proj$': {r: 8}, 'k_proj$': {alpha: 3}}\n    params: {r: 2}\n"
    )
    handle = tnpeft.attach(Decoder(), tnpeft.Recipe.from_yaml(HEAD + text))
    found = {layer: adapter.network.params["r"] for layer, adapter in handle.adapters.items()}
    assert found == chosen(
        Decoder(), exclude=["lm_head"], kinds="Linear", layers=[0, 1, 4],
        ranks={"q_proj$": {"r": 8}, "k_proj$": {"alpha": 3}},
    )  # fmt: skip
    assert {number for layer in found for number in layer.split(".") if number.isdigit()} >= {"0", "1", "4"}
    assert tnpeft.attach(Decoder(), tnpeft.Recipe.from_yaml(HEAD + text), r=4).adapters[
        "model.layers.0.self_attn.q_proj"
    ].network.params["r"] == 8  # of one layer: more special than the call's  # fmt: skip
    two = HEAD + "    layers:\n      decoder.layers: 0-1, 3\n      encoder.layers: 2\n"
    blocks = {tuple(name.split(".")[:3]) for name in tnpeft.attach(Pair(), tnpeft.Recipe.from_yaml(two)).adapters}
    assert blocks == {("encoder", "layers", "2"), *(("decoder", "layers", number) for number in "013")}


def test_a_report_does_not_call_left_out_layers_passed_over():
    report = tnpeft.attach(Pair(), "lora", match="all", kinds="Linear", exclude="mlp", layers={"layers": 0}).report()
    assert report.skipped == {}
    assert report.passed == {"Conv1d": 1}


def test_a_budget_and_an_extraction_take_them_too():
    ranks = {"q_proj$": {"r": 1}}
    where: dict[str, Any] = {"match": "proj$", "layers": "0-1", "ranks": ranks, "exclude": "k_proj"}
    answer = tnpeft.budget("lora", Decoder(), 100, **where)
    handle = tnpeft.attach(Decoder(), "lora", **where, r=answer.value)
    assert sum(parameter.numel() for parameter in handle.parameters()) == answer.total <= 100
    assert handle.adapters["model.layers.0.self_attn.q_proj"].network.params["r"] == 1
    assert answer.value > 1
    model = Decoder()
    tuned = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned["model.layers.0.self_attn.q_proj.weight"] += torch.ones(4, 1) @ torch.rand(1, 4)
    extraction = tnpeft.extract(model, tuned, "lora", **where, r=2)
    assert [row.name for row in extraction.layers] == [*handle.adapters]
    assert extraction.captured == pytest.approx(1)


ENTRY = "spec 'lora', match {}"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"exclude": "lm_haed"}, "`exclude` 'lm_haed': expected at least one of the layers matched, found none. "
                                 "Did you mean `lm_head`?"),
        ({"exclude": ["lm_head", "zzz"], "match": "head"},
         "`exclude` 'zzz': expected at least one of the layers matched, found none. `match` finds 'lm_head'."),
        ({"exclude": "proj", "match": "q_proj$"},
         "spec 'lora', match 'q_proj$': expected at least one layer, found none: `exclude` leaves out all 12 that are "
         "matched. Leave out less."),
        ({"exclude": "layers.[1-9]", "layers": "1-3", "match": "q_proj$"},
         "spec 'lora', match 'q_proj$': expected at least one layer, found none: `exclude` and `layers` leave out all "
         "12 that are matched. Leave out less."),
        ({"exclude": 3}, "`exclude`: expected a regular expression or names, found 3. "
                         "For example `exclude: 'lm_head$'`."),
        ({"exclude": "["}, "pattern '[': expected a regular expression, found unterminated character set at position "
                           "0. A dot of a module's name is written `\\.`."),
        ({"kinds": "Linaer"}, "`kinds`: expected one of those that 'lora' takes, Linear, Conv1d, Conv2d, Conv3d, "
                              "ConvTranspose1d, ConvTranspose2d, ConvTranspose3d, found `Linaer`. "
                              "Did you mean `Linear`?"),
        ({"kinds": 3}, "`kinds`: expected kinds of layers, found 3. For example `kinds: Linear`."),
        ({"kinds": "conv"}, "spec 'lora', match 'all': expected at least one of Conv1d, Conv2d, Conv3d, found none. "
                            "Choose another spec."),
        ({"layers": "0-5; 8"}, "`layers`: expected numbers of blocks, found `0-5; 8`. For example `0-5, 8`, or "
                               "`{decoder.layers: 0-5}` of one of several lists."),
        ({"layers": [1, -1]}, "`layers`: expected numbers of blocks, found [1, -1]. For example `0-5, 8`, or "
                              "`{decoder.layers: 0-5}` of one of several lists."),
        ({"layers": "5-2"}, "`layers`: expected numbers of blocks, found `5-2`, which goes backwards. For example "
                            "`0-5, 8`, or `{decoder.layers: 0-5}` of one of several lists."),
        ({"layers": "8-12"}, "`layers`: expected blocks from 0 to 11, found 12. The last one is 11."),
        ({"layers": {"layer": 1}}, "`layers` of `layer`: expected layers that lie in numbered blocks, found none. "
                                   "Did you mean `layers`?"),
        ({"layers": 1, "match": "lm_head"}, "`layers`: expected layers that lie in numbered blocks, found none. "
                                            "Leave `layers` out."),
        ({"ranks": {"q_porj$": {"r": 3}}}, "`ranks` 'q_porj$': expected at least one of its layers, found none. "
                                           "Did you mean `q_proj`?"),
        ({"ranks": {"q_proj": {"rank": 3}}}, "params of spec 'lora': expected one of r, alpha, found `rank`. "
                                             "Did you mean `r`?"),
        ({"ranks": {"q_proj": {"r": "x"}}}, "spec 'lora', param 'r': expected a finite number, found 'x'. "
                                            "Write `r=4`."),
        ({"ranks": {"q_proj": 3}}, "`ranks`: expected params by regular expressions on layers' names, found "
                                   "'q_proj': 3. For example `ranks: {'q_proj$': {r: 8}}`."),
    ],
)  # fmt: skip
def test_what_is_said_in_vain_is_refused(how, said):
    model = Decoder()
    with pytest.raises((tnpeft.AttachError, tnpeft.SpecError)) as caught:
        chosen(model, **how)
    assert str(caught.value) == said
    assert not any("adapters" in name for name, _ in model.named_modules())


def test_blocks_of_several_lists_are_not_guessed():
    with pytest.raises(tnpeft.AttachError) as caught:
        chosen(Pair(), layers="0-1, 3-")
    assert str(caught.value) == (
        "`layers`: expected blocks of one list, found those of 'encoder.layers', 'decoder.layers'. "
        "Say of which, for example `layers: {encoder.layers: 0-1, 3-}`."
    )


def test_a_recipe_has_patterns_of_its_own():
    recipe = tnpeft.Recipe.from_yaml(HEAD)
    for key, value in (("exclude", "x"), ("kinds", "Linear"), ("layers", 3), ("ranks", {"x": {"r": 1}})):
        with pytest.raises(tnpeft.AttachError) as caught:
            tnpeft.attach(Decoder(), recipe, **{key: value})
        assert str(caught.value) == (
            f"recipe 'mine': expected its own patterns, found {key}={value!r}. Remove `{key}`, or attach a spec."
        )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("    exclude: '['\n", "6:14: pattern '[': expected a regular expression, found unterminated character set at "
                               "position 0. A dot of a module's name is written `\\.`."),
        ("    kinds: Conv4d\n", "6:12: `kinds`: expected one of those that 'lora' takes, Linear, Conv1d, Conv2d, "
                                "Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d, found `Conv4d`. "
                                "Did you mean `Conv3d`?"),
        ("    layers: first\n", "6:13: `layers`: expected numbers of blocks, found `first`. For example `0-5, 8`, or "
                                "`{decoder.layers: 0-5}` of one of several lists."),
        ("    layers:\n      a.b: 1-x\n", "7:12: `layers`: expected numbers of blocks, found `1-x`. For example "
                                          "`0-5, 8`, or `{decoder.layers: 0-5}` of one of several lists."),
        ("    ranks:\n      '(': {r: 3}\n", "7:12: pattern '(': expected a regular expression, found missing ), "
                                            "unterminated subpattern at position 0. A dot of a module's name is "
                                            "written `\\.`."),
        ("    ranks:\n      q: {rank: 3}\n", "7:10: params of spec 'lora': expected one of r, alpha, found `rank`. "
                                             "Did you mean `r`?"),
        ("    ranks:\n      q: 3\n", "7:10: `adapters`, entry 1, `ranks`: expected params by regular expressions on "
                                     "layers' names, in place of those in `params`, found 3. For example "
                                     "`ranks: {'q_proj$': {r: 8}}`; of each param the first pattern that finds a "
                                     "layer counts."),
        ("    layers: true\n", "6:13: `adapters`, entry 1, `layers`: expected numbers of blocks: only layers in these "
                               "are adapted, found True. For example `layers: 0-5, 8`; "
                               "`layers: {decoder.layers: 0-5}` where a model has several lists of blocks."),
        ("    exclude: [a, 3]\n", "6:18: `adapters`, entry 1, `exclude`: expected a regular expression or a list of "
                                  "names: what `match` finds and is left out, found 3. "
                                  "For example `exclude: 'lm_head$'`."),
    ],
)  # fmt: skip
def test_mistakes_in_a_recipe_have_places(text, said):
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.Recipe.from_yaml(HEAD + text, "mine.yaml")
    assert str(caught.value) == f"mine.yaml:{said}"


def test_what_a_recipe_says_in_vain_is_told_with_its_place():
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(Decoder(), tnpeft.Recipe.from_yaml(HEAD + "    layers: 40\n", "mine.yaml"))
    assert str(caught.value) == "mine.yaml:4:5: `layers`: expected blocks from 0 to 11, found 40. The last one is 11."


def test_all_of_it_together_on_every_model():
    for model, layers in itertools.product((Decoder, Pair), ("0", "0-2", [1, 2], range(2), {2})):
        blocks = {"model.layers": layers} if model is Decoder else {"decoder.layers": layers}
        found = chosen(model(), match=["lm_head", "q_proj"][1], layers=blocks, ranks={"q_proj": {"r": 3}})
        assert set(found.values()) == {3}
