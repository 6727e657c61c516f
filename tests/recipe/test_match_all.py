"""`match="all"`: every layer of the spec's kinds that can carry an adapter, and a report of those that cannot."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from terminal import data, mistakes, text
from torch import nn

import tnpeft


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.small = nn.Linear(8, 4)
        self.again = self.small
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        x = self.norm(x + self.attn(x, x, x)[0] + self.conv(x.mT).mT)
        return self.head(x) + self.small(x).sum()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        ("lora", ["attn.out_proj", "conv", "small", "head"]),
        ("quanta", ["attn.out_proj", "small", "head"]),
        ("lokr_tucker", ["conv"]),
    ],
)
def test_all_are_the_layers_of_the_specs_kinds(model, spec, layers):
    tokens = torch.tensor([[0, 3, 1]])
    expected = model(tokens)
    handle = tnpeft.attach(model, spec, match="all")
    assert [row.name for row in handle.report().layers] == layers
    assert torch.equal(model(tokens), expected)
    assert handle.report().skipped == {}
    assert "skipped" not in handle.report().as_dict()
    handle = tnpeft.attach(model, spec, match="all", name="second")  # adapted layers count as what they were
    assert [row.name for row in handle.report().layers] == layers


def test_training_a_tied_layer_leaves_the_embedding(model):
    handle = tnpeft.attach(model, "lora", match="all")
    before = model.embed.weight.clone()
    optimiser = torch.optim.SGD(handle.parameters(), lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        model(torch.tensor([[0, 3, 1]])).square().sum().backward()
        optimiser.step()
    assert torch.equal(model.embed.weight, before)
    assert not torch.equal(model.head.weight, before)


def odd(model: nn.Module) -> nn.Module:
    """Layers that cannot be adapted: weights that are laid out with gaps, or are none of floats."""
    model.small.weight = nn.Parameter(torch.randn(4, 16)[:, ::2])
    for layer in (model.conv, model.attn.out_proj):
        layer.weight = nn.Parameter(torch.zeros(layer.weight.shape, dtype=torch.complex64))
    return model


GAPS = "strides (16, 2) for the shape (4, 8)"


def test_what_cannot_be_adapted_is_skipped_and_reported(model, tmp_path):
    base = copy.deepcopy(model)
    handle = tnpeft.attach(odd(model), "lora", match="all", r=2)
    report = handle.report()
    assert [row.name for row in report.layers] == ["head"]
    assert report.skipped == {
        "attn.out_proj": "complex64",
        "conv": "complex64",
        "small": GAPS,
        "again": GAPS,
    }
    assert str(report).splitlines()[-4:] == [
        "cores 26",
        "skipped: 'attn.out_proj', 'conv' (complex64)",
        f"skipped: 'small', 'again' ({GAPS})",
        "passed over, of kinds that `all` does not take: 1 Embedding",
    ]
    assert json.loads(json.dumps(report.as_dict()))["skipped"] == report.skipped
    tnpeft.save(model, tmp_path / "a.safetensors")
    assert tnpeft.load(odd(base), tmp_path / "a.safetensors").report().skipped == report.skipped


def test_kinds_that_are_passed_over_and_fused_attention_are_told(model, tmp_path):
    model.lstm = nn.LSTM(3, 3)
    report = tnpeft.attach(model, "quanta", match="all").report()
    assert report.passed == {"Embedding": 1, "Conv1d": 1, "LSTM": 1}
    assert report.notes[-2:] == [
        "passed over, of kinds that `all` does not take: 1 Embedding, 1 Conv1d, 1 LSTM",
        "left out: q, k and v of 'attn' (MultiheadAttention: out_proj alone is adapted)",
    ]
    assert json.loads(json.dumps(report.as_dict()))["passed"] == report.passed
    tnpeft.save(model, tmp_path / "a.safetensors")
    torch.manual_seed(0)
    again = Model()
    again.lstm = nn.LSTM(3, 3)
    assert tnpeft.load(again, tmp_path / "a.safetensors").report().notes == report.notes
    second = tnpeft.attach(model, "lora", match="out_proj", name="second").report()
    assert second.notes == ["left out: q, k and v of 'attn' (MultiheadAttention: out_proj alone is adapted)"]
    whole = tnpeft.attach(model, "lora", match="out_proj", name="whole", train={"also": ["attn.in_proj_weight"]})
    assert whole.report().notes == []
    assert tnpeft.attach(model, "lora", match="small", name="last").report().notes == []


def test_layers_of_other_libraries_are_told_once():
    def model_of(module: str) -> nn.Module:
        class Conv1D(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(2, 2))

        Conv1D.__module__, Conv1D.__qualname__ = module, "Conv1D"
        return nn.Sequential(nn.Linear(2, 2), Conv1D(), Conv1D(), nn.LayerNorm(2), nn.Bilinear(2, 2, 2))

    report = tnpeft.attach(model_of(__name__), "lora", match="all").report()
    assert report.notes == [f"passed over, of kinds that `all` does not take: 2 Conv1D of {__name__}, 1 Bilinear"]
    report = tnpeft.attach(model_of("transformers.pytorch_utils"), "lora", match="all").report()
    assert report.notes == [
        "passed over, of kinds that `all` does not take: 1 Bilinear",
    ]
    assert [row.layer for row in report.layers] == ["Linear(2, 2)", *["Linear(2, 2, turned, opaque)"] * 2]


def test_a_spec_that_refuses_a_layer_says_which(model):
    text = tnpeft.load_spec("lora").text.replace("i: in_channels", "i: 'in_channels - 8 * (out_channels == 4)'")
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(model, tnpeft.Spec.from_yaml(text), match="all")
    assert str(caught.value) == (
        "<spec>:11:29: layer 'small': core 'down', index 'i', on Linear(8, 4): expected a size from 1 to 16777216, "
        "found 0. Change its size."
    )


def test_nothing_to_adapt():
    plain = nn.Sequential(nn.ReLU(), nn.Embedding(3, 3))
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(plain, "quanta", match="all")
    assert str(caught.value) == (
        "spec 'quanta', match 'all': expected at least one of Linear, found none. Match embeddings by their names: '1'."
    )
    odd = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    for layer in odd:
        layer.weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(odd, "quanta", match="all")
    assert str(caught.value) == (
        "layers '0', '1': spec 'quanta', match 'all': expected at least one of Linear that can be adapted, "
        "found complex64. Match other layers."
    )


def test_the_word_alone_means_all(model):
    handle = tnpeft.attach(model, "lora", match="(all)")  # a regular expression, as before
    assert [row.name for row in handle.report().layers] == ["small"]
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(Model(), "lora", match=["all"])  # a name
    assert str(caught.value) == (
        "layer 'all': expected the name of a layer, found no such layer. Did you mean `small`?"
    )


@pytest.mark.parametrize("pattern", ["all-linear", "All", "all_layers"])
def test_what_is_written_for_all_elsewhere(model, pattern):
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(model, "lora", match=pattern)
    assert str(caught.value) == (
        f"spec 'lora', match '{pattern}': expected at least one layer, found none. Did you mean `all`? "
        "The model has 'attn.out_proj', 'conv', 'small', 'again' and more."
    )
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.attach(model, "lora", match="*")
    assert str(caught.value) == (
        "pattern '*': expected a regular expression, found nothing to repeat at position 0. Write `all` for all layers."
    )


def test_a_pattern_that_catches_what_has_no_weight():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(model, "lora", match="1")
    assert str(caught.value) == (
        "spec 'lora', match '1': expected at least one layer, found only what has no weight, such as '1', ReLU. "
        "The model has '0'."
    )


def test_many_unknown_names_are_told_in_bounded_time():
    model = nn.ModuleDict({f"layer{number}": nn.Linear(2, 2) for number in range(1_000)})
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(model, "lora", match=[f"layer{number}x" for number in range(1_000)])
    lines = str(caught.value).splitlines()
    assert lines[0] == ("layer 'layer0x': expected the name of a layer, found no such layer. Did you mean `layer0`?")
    assert lines[-1] == (
        "layers 'layer10x', 'layer11x', 'layer12x', 'layer13x', 'layer14x' and 985 more: expected the name of a layer, "
        "found no such layer. List the names with `model.named_modules()`."
    )


RECIPE = "tnpeft: 1\nname: x\nadapters:\n  - {spec: lora, match: all, params: {r: 2}}\n"


def test_recipes_and_commands_take_all(model, tmp_path, monkeypatch):
    handle = tnpeft.attach(model, tnpeft.Recipe.from_yaml(RECIPE))
    assert len(handle.report().layers) == 4
    monkeypatch.chdir(tmp_path)
    source = (
        "import torch\nfrom torch import nn\n\ndef plain():\n    return nn.Sequential(nn.Linear(4, 4), nn.ReLU())\n"
    )
    source += "\ndef odd():\n    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))\n"
    Path("all_nets.py").write_text(
        source + "    model[0].weight = nn.Parameter(torch.zeros(4, 4).cfloat())\n    return model\n"
    )
    Path("recipe.yaml").write_text(RECIPE)
    assert data("count", "recipe.yaml", "--model", "all_nets:plain")["cores"] == 16
    assert data("count", "lora", "--match", "all", "--model", "all_nets:odd", "--set", "r=2")["skipped"] == {
        "0": "complex64"
    }
    shown = text("count", "lora", "--match", "all", "--model", "all_nets:odd")
    assert "\nskipped: '0' (complex64)\n" in shown
    budget = ("budget", "lora", "--match", "all", "--model", "all_nets:plain", "--params", "20")
    assert data(*budget)["value"] == 2
    assert mistakes("count", "lora", "--model", "all_nets:plain", status=2) == [
        "spec 'lora': expected --match, which layers it goes on, found none. "
        r"Add --match, e.g. --match 'attn\.to_[qv]$', or --match all."
    ]
