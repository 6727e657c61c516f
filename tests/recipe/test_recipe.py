"""`attach` with specs and recipes: what it matches, what trains, what it reports, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import tnpeft

SPEC = """\
tnpeft: 1
name: mine
layers: any
params: {r: 2, alpha: r}
sizes: {o: out_channels, i: in_channels}
cores: {up: {legs: o r, init: zeros}, down: r i k...}
weight: o i k...
scale: alpha / r
start: zero
"""

RECIPE = """\
tnpeft: 1
name: both
adapters:
  - {spec: mine.yaml, match: 'conv$', params: {r: 3}}
  - {spec: lora, match: ['attn.to_q', 'attn.to_v'], params: {r: 1}}
train: {bias: adapted, norm: true, also: ['^head\\.']}
"""


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.to_q(x) + self.to_k(x) * self.to_v(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.attn = Attention()
        self.drop = nn.Dropout(0.0)
        self.head = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))

    def forward(self, x):
        # Contiguous: for other inputs torch lets a frozen weight choose another kernel than a trained one.
        return self.head(self.attn(self.norm(self.conv(x)).mT.contiguous()))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.yaml").write_text(SPEC)
    (tmp_path / "both.yaml").write_text(RECIPE)
    return tmp_path


def trained(model: nn.Module) -> set[str]:
    """By the names of the plain model: an adapter's own copies stand beside them, under names of their own."""
    return {name.replace("_tnpeft_of_default:", "") for name, value in model.named_parameters() if value.requires_grad}


def test_a_pattern_searches_full_names_and_skips_containers(model):
    handle = tnpeft.attach(model, "lora", match="attn", r=1)
    assert [row.name for row in handle.report().layers] == ["attn.to_q", "attn.to_k", "attn.to_v"]
    assert all("core_" in name for name in trained(model))


def test_a_list_names_layers_exactly(model):
    handle = tnpeft.attach(model, tnpeft.load_spec("lora"), match=["attn.to_v", "conv"], r=1)
    assert [row.name for row in handle.report().layers] == ["conv", "attn.to_v"]


def test_a_recipe_from_files(model, folder):
    x = torch.randn(2, 3, 5)
    expected = model(x)
    handle = tnpeft.attach(model, folder / "both.yaml")
    assert torch.equal(model(x), expected)
    report = handle.report()
    assert [(row.name, row.spec, dict(row.params)) for row in report.layers] == [
        ("conv", "mine", {"r": 3, "alpha": 3}),
        ("attn.to_q", "lora", {"r": 1, "alpha": 1}),
        ("attn.to_v", "lora", {"r": 1, "alpha": 1}),
    ]
    cores = 3 * (4 + 3 * 3) + 8 + 8
    assert (report.cores, report.bias, report.norm, report.also) == (cores, 4 + 4, 8, 8 + 10)
    assert report.trained == sum(parameter.numel() for parameter in handle.parameters())
    assert report.trained == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert report.base == sum(parameter.numel() for parameter in Model().parameters())
    assert report.share == report.trained / report.base


def test_the_report_is_data_and_text(model, folder):
    report = tnpeft.attach(model, folder / "both.yaml").report()
    data = json.loads(json.dumps(report.as_dict()))
    assert data["layers"][0] == {
        "name": "conv",
        "layer": "Conv1d(3, 4, 3)",
        "spec": "mine",
        "params": {"r": 3, "alpha": 3},
        "mode": "auto",
        "chosen": None,
        "cores": 39,
        "bias": 4,
        "weight": 36,
    }
    lines = str(report).splitlines()
    assert lines[0] == f"Adapter 'default': {report.trained} of {report.base} parameters train ({report.share:.3%})"
    assert lines[-1] == "cores 55, biases 8, norms 8, also 18"


@pytest.mark.parametrize(
    ("train", "names"),
    [
        ({}, set()),
        ({"bias": "adapted"}, {"conv.bias"}),
        (
            {"bias": "all"},
            {"conv.bias", "norm.bias", "attn.to_q.bias", "attn.to_k.bias", "head.0.bias", "head.1.bias"},
        ),
        ({"norm": True}, {"norm.weight", "norm.bias"}),
        ({"norm": "all"}, {"norm.weight", "norm.bias", "head.0.weight", "head.0.bias"}),
        ({"also": ["to_k"]}, {"attn.to_k.weight", "attn.to_k.bias"}),
        ({"also": ["conv"]}, {"conv.bias"}),
    ],
)
def test_what_trains_beside_the_cores(model, train, names):
    tnpeft.attach(model, "lora", match="conv", train=train)
    assert {name for name in trained(model) if "core_" not in name} == names


def test_params_of_attach_override_those_of_a_recipe(model, folder):
    handle = tnpeft.attach(model, tnpeft.load_recipe(folder / "both.yaml"), r=2, train={})
    assert [row.params["r"] for row in handle.report().layers] == [2, 2, 2]
    assert handle.report().also == 0


def test_shipped_recipes_are_found_by_name():
    assert tnpeft.list_recipes() == (
        "loha_ddpm",
        "lokr_ddpm",
        "lora_bert",
        "lora_ddpm",
        "lora_flux",
        "lora_gpt2",
        "lora_llama",
        "lora_maisi",
        "lora_maisi_controlnet",
        "lora_mixtral",
        "lora_nnunet",
        "lora_unet",
        "lora_vit",
        "tenvoo_l_ddpm",
        "tenvoo_l_maisi",
        "tenvoo_l_maisi_controlnet",
        "tenvoo_l_nnunet",
        "tenvoo_l_swin_unetr",
        "tenvoo_q_ddpm",
    )
    recipe = tnpeft.load_recipe("tenvoo_l_ddpm")
    assert [entry.spec.name for entry in recipe.entries] == ["tenvoo_l", "quanta"]
    assert recipe.train == tnpeft.recipe.Train(bias="adapted", norm=True)


def test_a_layer_under_two_names_is_adapted_once(model):
    model.again = model.attn.to_q
    handle = tnpeft.attach(model, "lora", match="to_q|again", r=1)
    assert handle.report().cores == 8
    assert model.again is model.attn.to_q


NOTHING = (
    "spec 'lora', match 'attn.too_q': expected at least one layer, found none. Did you mean `attn.to_q`? "
    "The model has 'conv', 'attn.to_q', 'attn.to_k', 'attn.to_v' and more."
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "spec 'lora': expected `match`, found none. "
             r"For example `match=r'attn\.to_[qv]$'`, a list of names from `model.named_modules()`, or `match='all'`."),
        ({"match": "attn.too_q"}, NOTHING),
        ({"match": "attn$"}, "spec 'lora', match 'attn$': expected at least one layer, found only containers such as "
                             "'attn'. Match the layers inside, such as 'attn.to_q'."),
        ({"match": ["attn.too_q"]}, "layer 'attn.too_q': expected the name of a layer, found no such layer. "
                                    "Did you mean `attn.to_q`?"),
        ({"match": []}, "`match`: expected a regular expression or layer names, found []. "
                        "Give full module names, as `model.named_modules()` has them."),
        ({"match": "("}, "pattern '(': expected a regular expression, found missing ), unterminated subpattern at "
                         r"position 0. A dot of a module's name is written `\.`."),
        ({"match": "norm"}, "layer 'norm': layer type: expected one of Linear, Conv1d, Conv2d, Conv3d, "
                            "ConvTranspose1d, ConvTranspose2d, ConvTranspose3d, found GroupNorm. Match other layers."),
        ({"match": "conv", "train": {"bias": "some"}},
         "train:1:1: `train`, `bias`: expected `none`, `adapted` or `all`, found 'some'. Write `bias: adapted`, say."),
        ({"match": "conv", "train": {"nrom": True}},
         "train:1:1: unknown key 'nrom' in `train`: expected one of also, bias, norm, found 'nrom'. "
         "Did you mean `norm`?"),
        ({"match": "conv", "train": {"also": ["haed"]}},
         "`also` 'haed': expected at least one parameter, found none. The model has 'conv.weight', ..."),
    ],
)  # fmt: skip
def test_refusals_leave_the_model_alone(model, arguments, message):
    before = {name: (id(value), value.requires_grad) for name, value in model.named_parameters()}
    with pytest.raises(tnpeft.TnpeftError) as caught:
        tnpeft.attach(model, "lora", **arguments)
    assert str(caught.value) == message
    assert {name: (id(value), value.requires_grad) for name, value in model.named_parameters()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"match": 5}, "`match`: expected a regular expression or layer names, found 5. "
                       "Give full module names, as `model.named_modules()` has them."),
        ({"match": "conv", "train": "all"}, "`train`: expected a mapping, found 'all'. "
                                            "For example `train={'bias': 'adapted', 'norm': True}`."),
        ({"match": "conv", "mode": None}, "the execution mode: expected one of `dense`, `factored`, `hybrid`, `auto`, "
                                              "found `None`. "
                                          "Leave `mode` out for the default."),
    ],
)  # fmt: skip
def test_wrong_types_are_mistakes_too(model, arguments, message):
    with pytest.raises(tnpeft.TnpeftError) as caught:
        tnpeft.attach(model, "lora", **arguments)
    assert str(caught.value) == message
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach("model", "lora", match="conv")
    assert str(caught.value) == "model: expected a torch.nn.Module, found 'model'. Pass the model itself."


def test_every_layer_that_does_not_fit_is_reported(model):
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(model, "quanta", match="conv|to_q", r=0)
    assert str(caught.value) == (
        "layer 'conv': spec 'quanta': expected one of Linear, found Conv1d. "
        "Choose another spec, or add the kind to its `layers`."
    )


def test_two_entries_may_not_claim_one_layer(model, folder):
    (folder / "both.yaml").write_text(RECIPE.replace("'conv$'", "'conv$|to_q'"))
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(model, folder / "both.yaml")
    assert str(caught.value) == (
        f"{folder / 'both.yaml'}:5:5: layer 'attn.to_q': expected one adapter, found two, mine ('conv$|to_q') and "
        "lora (('attn.to_q', 'attn.to_v')). Narrow one of the patterns."
    )


def test_two_entries_may_not_claim_one_layer_by_two_names(model):
    model.again = model.attn.to_q
    text = "tnpeft: 1\nname: x\nadapters: [{spec: lora, match: to_q}, {spec: loha, match: again}]\n"
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(model, tnpeft.Recipe.from_yaml(text))
    assert str(caught.value) == (
        "<recipe>:3:39: layer 'again' (which is 'attn.to_q' too): expected one adapter, found two, lora ('to_q') and "
        "loha ('again'). Narrow one of the patterns."
    )


def test_a_recipe_takes_no_match_and_known_params(model):
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(model, "lora_ddpm", match="conv")
    assert str(caught.value) == (
        "recipe 'lora_ddpm': expected its own patterns, found match='conv'. Remove `match`, or attach a spec."
    )
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(model, "lora_ddpm", alhpa=2)
    assert str(caught.value) == (
        "params of recipe 'lora_ddpm': expected one of r, alpha, found `alhpa`. Did you mean `alpha`?"
    )


def test_names_that_are_neither_spec_nor_recipe(model):
    for name, meant in (("tenvo_l", "tenvoo_l"), ("tenvoo_l_ddmp", "tenvoo_l_ddpm"), ("lora_dpm", "lora_ddpm")):
        with pytest.raises(tnpeft.SpecError) as caught:
            tnpeft.attach(model, name, match="conv")
        assert str(caught.value) == (
            f"recipe or spec '{name}': expected a YAML file, or the name of a shipped recipe or spec, found neither. "
            f"Did you mean `{meant}`?"
        )


def test_what_is_neither_a_name_nor_a_recipe(model):
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(model, 3)
    assert str(caught.value) == (
        "attach: expected a spec or a recipe, found int. "
        "Pass the name or path of one, `load_spec(...)` or `load_recipe(...)`."
    )


def test_mistakes_in_a_recipe_are_collected_with_those_in_its_specs(folder):
    (folder / "mine.yaml").write_text(SPEC.replace("init: zeros", "init: zeroes"))
    text = RECIPE.replace("r: 1", "rank: 1").replace("'^head", "'(^head").replace("name: both", "nmae: both")
    (folder / "both.yaml").write_text(text)
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.load_recipe(folder / "both.yaml")
    recipe, spec = folder / "both.yaml", folder / "mine.yaml"
    assert str(caught.value).splitlines() == [
        f"{recipe}:2:1: unknown key 'nmae' in the file: expected one of adapters, name, scopes, source, title, tnpeft, "
        "train, found 'nmae'. Did you mean `name`?",
        f"{recipe}:5:61: params of spec 'lora': expected one of r, alpha, found `rank`. Did you mean `r`?",
        f"{recipe}:6:43: pattern '(^head\\\\.': expected a regular expression, found missing ), "
        r"unterminated subpattern at position 0. A dot of a module's name is written `\.`.",
        f"{spec}:6:31: unknown init 'zeroes': expected one of zeros, ones, eye, constant, normal, uniform, "
        "kaiming_uniform, orthogonal, cosine, sine, svd_u, svd_s, svd_v, svd_us, svd_vs, value, choice, random, "
        "largest, smallest, entries, places, found `zeroes`. Did you mean `zeros`?",
    ]


ENTRIES = (
    ", which an entry of a recipe has. It looks like a recipe, whose entries stand under `adapters`: write "
    "`tnpeft: 1`, `name: my_recipe` and `adapters: [{spec: lora, match: all, params: {r: 4}}]`, say."
)


@pytest.mark.parametrize(
    ("text", "place", "found"),
    [
        ("spec: lora\nmatch: all\nrank: 4\n", "1:1", "`spec` and `match`"),
        ("tnpeft: 1\nname: mine\nspec: lora\n", "3:1", "`spec`"),
        ("- {spec: lora, match: conv, params: {r: 2}}\n- {spec: loha, match: to_q}\n", "1:4",
         "`spec` and `match` and `params`"),
    ],
)  # fmt: skip
def test_entries_without_a_recipe_are_said_to_be(model, text, place, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rec.yaml").write_text(text)
    start = f"rec.yaml:{place}: the file: expected a"
    spec = f"{start} spec, with `layers`, `cores`, `weight` and `start`, found {found}{ENTRIES}"
    recipe = f"{start} recipe, with `tnpeft`, `name` and `adapters`, found {found}{ENTRIES}"
    for use, message in (
        (lambda: tnpeft.attach(model, "rec.yaml"), spec),
        (lambda: tnpeft.load_spec("rec.yaml"), spec),
        (lambda: tnpeft.load_recipe("rec.yaml"), recipe),
    ):
        with pytest.raises(tnpeft.SpecError) as caught:
            use()
        assert str(caught.value) == message
    Path("rec.yaml").write_text(f"tnpeft: 1\nname: my_recipe\n{ENTRIES.split('`')[-2]}\n")  # the advice, followed
    assert len(tnpeft.attach(model, "rec.yaml").report().layers) > 1
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.load_spec("rec.yaml")
    assert str(caught.value) == (
        "rec.yaml:3:1: the file: expected a spec, found a recipe, by its `adapters`. Name a spec here, such as one of "
        "its entries'; `tnpeft.attach`, `tnpeft count` and `tnpeft fit` take recipes."
    )
