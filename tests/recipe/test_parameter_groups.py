"""`handle.parameter_groups`: by core, layer and role, each parameter once; PEFT's LoRA+ takes the same steps."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

import tnpeft


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        return x + self.norm(self.v_proj(torch.tanh(self.q_proj(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def settings(handle: tnpeft.Handle, groups: list[dict[str, Any]]) -> dict[str, tuple[float, Any]]:
    """What each parameter got, by its name; each must be there once."""
    names = {id(parameter): name for name, parameter in handle.named_parameters()}
    pairs = [(names[id(each)], (g["lr"], g.get("weight_decay"))) for g in groups for each in g["params"]]
    assert sorted(name for name, _ in pairs) == sorted(names.values())
    assert len({group["name"] for group in groups}) == len(groups)
    return dict(pairs)


def test_cores_layers_and_roles(model):
    handle = tnpeft.attach(
        model, "lora", match="q_proj", r=2, train={"bias": "adapted", "norm": True, "also": ["^head"]}
    )
    found = settings(
        handle,
        handle.parameter_groups(
            lr=0.1,
            lr_factors={"up": 16, r"^layers\.1\.": 0.5, "norm": 2, "head.weight": 3},
            no_decay=["bias", r"norm\.bias$"],
            weight_decay=0.01,
        ),
    )
    assert found == {
        "layers.0.q_proj.down": (0.1, 0.01),
        "layers.0.q_proj.up": (1.6, 0.01),
        "layers.1.q_proj.down": (0.05, 0.01),
        "layers.1.q_proj.up": (0.8, 0.01),
        "layers.0.q_proj.bias": (0.1, 0.0),
        "layers.1.q_proj.bias": (0.05, 0.0),
        "layers.0.norm.weight": (0.2, 0.01),
        "layers.0.norm.bias": (0.2, 0.0),
        "layers.1.norm.weight": (0.1, 0.01),
        "layers.1.norm.bias": (0.1, 0.0),
        "head.weight": (pytest.approx(0.3), 0.01),
        "head.bias": (0.1, 0.01),
    }


def test_without_anything_there_is_one_group(model):
    handle = tnpeft.attach(model, "lora", match="q_proj")
    (group,) = handle.parameter_groups(lr=0.1)
    assert group == {"params": [*handle.parameters()], "lr": 0.1, "name": "adapter"}
    groups = handle.parameter_groups(lr=0.1, no_decay=["up", "norm"])  # no norm trains, and none needs to
    assert [(g["name"], g.get("weight_decay")) for g in groups] == [("adapter", None), ("adapter, no decay", 0.0)]
    torch.optim.AdamW(groups, weight_decay=0.3)


def test_cores_of_one_of_several_specs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    recipe = tnpeft.Recipe.from_yaml(
        "tnpeft: 1\nname: two\nadapters: [{spec: lora, match: '0'}, {spec: dora, match: '1'}]\n"
    )
    handle = tnpeft.attach(model, recipe)
    found = settings(handle, handle.parameter_groups(lr=1, lr_factors={"dora.up": 2, "magnitude": 3}))
    assert found == {
        "0.down": (1, None), "0.up": (1, None), "1.down": (1, None), "1.up": (2, None), "1.magnitude": (3, None),
    }  # fmt: skip


def test_a_shared_core_is_of_all_its_layers(model):
    handle = tnpeft.attach(model, "lotr", match="_proj")
    shared = [row for row in handle.report().shared if row.trained]
    assert shared
    name = f"{shared[0].holder}.{shared[0].core}"
    plain = settings(handle, handle.parameter_groups(lr=1, lr_factors={r"layers\.0\.": 2}))
    assert plain[name] == (1, None)  # it is of the other layers too
    assert settings(handle, handle.parameter_groups(lr=1, lr_factors={r"layers\.": 2}))[name] == (2, None)
    assert settings(handle, handle.parameter_groups(lr=1, lr_factors={shared[0].core: 2}))[name] == (2, None)
    with pytest.raises(tnpeft.AttachError) as caught:
        handle.parameter_groups(lr=1, no_decay=[rf"layers\.0\.q_proj\.{shared[0].core}$"])
    assert str(caught.value).endswith(
        f"found some of the layers that share '{name}'. Name the core, `{shared[0].core}`, or match all of its layers."
    )


def test_every_mistake_is_told(model):
    handle = tnpeft.attach(model, "lora", match="q_proj", train={"norm": True})
    known = (
        "expected one of down, up, norm, bias, also, or a regular expression on names such as 'layers.0.q_proj.down'"
    )
    with pytest.raises(tnpeft.AttachError) as caught:
        handle.parameter_groups(lr="fast", lr_factors={"upp": -1, "k_proj": 2}, no_decay=["nrom", 3], weight_decay=True)
    assert str(caught.value).splitlines() == [
        "`lr`: expected a finite number, zero or more, found 'fast'. Write a number, such as 0.01.",
        "`lr_factors` 'upp': expected a finite number, zero or more, found -1. Write a number, such as 0.01.",
        "`weight_decay`: expected a finite number, zero or more, found True. Write a number, such as 0.01.",
        f"`lr_factors` 'upp': {known}, found nothing that is called so. Did you mean `up`?",
        f"`lr_factors` 'k_proj': {known}, found nothing that is called so. Did you mean `q_proj`?",
        f"`no_decay` 'nrom': {known}, found nothing that is called so. Did you mean `norm`?",
        "`no_decay` 3: expected a core, a role or a regular expression, found 3. Write it as a text.",
    ]
    for given, said in (
        ({"lr_factors": 16}, "`lr_factors`: expected factors by core, layer or role, found 16. "
                             'For example `lr_factors={"up": 16}`.'),
        ({"no_decay": "bias"}, "`no_decay`: expected a list of cores, layers or roles, found 'bias'. "
                               'For example `no_decay=["bias", "norm"]`.'),
    ):  # fmt: skip
        with pytest.raises(tnpeft.AttachError) as caught:
            handle.parameter_groups(lr=1, **given)
        assert str(caught.value) == said
    with pytest.raises(tnpeft.SpecError, match=r"pattern '\[': expected a regular expression"):
        handle.parameter_groups(lr=1, no_decay=["["])


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW])
def test_pefts_lora_plus_takes_the_same_steps(model, optimiser):
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], bias="lora_only")
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    handle = tnpeft.attach(model, "lora", match="_proj$", r=2, alpha=4, train={"bias": "adapted"})
    ours = dict(handle.named_parameters())
    pairs = {
        "base_model.model."
        + name.replace(".down", ".lora_A.default.weight")
        .replace(".up", ".lora_B.default.weight")
        .replace(".bias", ".base_layer.bias"): name
        for name in ours
    }
    known = {name: parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert known.keys() == pairs.keys()
    with torch.no_grad():
        for name, parameter in known.items():
            ours[pairs[name]].copy_(parameter)
    their_optimiser = create_loraplus_optimizer(
        theirs, optimiser, lr=0.01, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    groups = handle.parameter_groups(lr=0.01, lr_factors={"up": 16, "bias": 16}, no_decay=["bias"], weight_decay=0.1)
    our_optimiser = optimiser(groups)
    x = torch.randn(5, 6)
    for _ in range(4):
        for what, each in ((theirs, their_optimiser), (model, our_optimiser)):
            each.zero_grad()
            what(x).square().mean().backward()
            each.step()
    for name, parameter in known.items():
        torch.testing.assert_close(ours[pairs[name]], parameter, rtol=1e-5, atol=1e-6)


def test_methods_do_what_the_functions_do(model, tmp_path):
    x = torch.randn(3, 6)
    base = model(x)
    first = tnpeft.attach(model, "lora", match="q_proj", name="first")
    second = tnpeft.attach(model, "lora", match="v_proj", name="second")
    with torch.no_grad():
        for handle in (first, second):
            for parameter in handle.parameters():
                parameter.add_(0.1)
    first.activate(0.5)
    assert tnpeft.scales_of(model) == {"first": 0.5}
    second.scale(2)
    assert tnpeft.scales_of(model) == {"first": 0.5, "second": 2.0}
    with first.disabled():
        assert torch.equal(model(x), base)
    first.activate()
    expected = model(x)
    first.merge()
    torch.testing.assert_close(model(x), expected)
    first.unmerge()
    torch.testing.assert_close(model(x), expected)
    first.save(tmp_path / "first")
    torch.manual_seed(0)
    assert tnpeft.load(Model(), tmp_path / "first").name == "first"
    assert [*first.adapters] == ["layers.0.q_proj", "layers.1.q_proj"]
    second.detach()
    assert tnpeft.names_of(model) == ("first",)
    first.hot_swap(tmp_path / "first")
    torch.testing.assert_close(model(x), expected)
    first.detach(merge=True)
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(tnpeft.AttachError):
        first.merge()
