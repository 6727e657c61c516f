"""The language reference: every example loads, and has the parameters it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tnpeft
from tnpeft.cli.arguments import parse_layer
from tnpeft.cli.catalogue import BEGIN, END, catalogue
from tnpeft.spec import map_kinds

README = Path(__file__).parents[2] / "specs" / "README.md"
TEXT = README.read_text()
BLOCKS = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
SPECS = {re.search(r"name: (\w+)", block).group(1): block for block in BLOCKS if "adapters:" not in block}
CLAIM = re.compile(r"(\S+) has (\d+) parameters")

TYPO = """\
tnpeft: 1
name: typo
layers: [Linear]
sizes: {o: out_channels, i: in_chanels}
cores:
  up: a o
  down: {legs: i, init: zeros}
weight: o i
start: zero
"""


@pytest.mark.parametrize("block", SPECS.values(), ids=SPECS)
def test_examples_have_the_parameters_they_say(block: str):
    spec = tnpeft.Spec.from_yaml(block)
    claims = CLAIM.findall(block.splitlines()[0])
    assert claims
    for layer, parameters in claims:
        assert spec.bind(parse_layer(layer)).num_parameters == int(parameters), layer


DERIVED = {name: block for name, block in SPECS.items() if "tnpeft: 2" in block}


@pytest.mark.parametrize("block", DERIVED.values(), ids=DERIVED)
def test_examples_of_version_2_start_at_the_base_and_train(block: str):
    spec = tnpeft.Spec.from_yaml(block)
    for layer, _ in CLAIM.findall(block.splitlines()[0]):
        known = parse_layer(layer)
        sides = (known.in_channels, known.out_channels)
        base = nn.Linear(*sides) if known.kind == "Linear" else nn.Conv2d(*sides, known.kernel_size)
        model = nn.Sequential(base)
        x = torch.randn(2, known.in_channels, *known.kernel_size)
        expected = model(x)
        tnpeft.attach(model, spec, match="0")
        assert torch.equal(model(x), expected)
        optimiser = torch.optim.SGD([tensor for tensor in model.parameters() if tensor.requires_grad], lr=1e-2)
        model(x).square().mean().backward()
        optimiser.step()
        assert not torch.equal(model(x), expected)


def test_a_map_of_ones_own_acts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(map_kinds, "_registered", {})
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "register_map" in block)
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    adapter = tnpeft.compile(names["spec"], nn.Linear(6, 8))
    with torch.no_grad():
        adapter.cores["up"].normal_()
    product = adapter.cores["up"] @ adapter.cores["down"]
    torch.testing.assert_close(adapter.delta_weight(), product / (1 + product.abs()))


def test_every_map_has_a_word_here():
    table = TEXT.partition("## Maps")[2].partition("`tnpeft.register_map`")[0]
    assert set(map_kinds.map_names()) <= set(re.findall(r"\w+", table))


def test_the_recipe_is_one():
    (recipe,) = (block for block in BLOCKS if "adapters:" in block)
    assert len(tnpeft.Recipe.from_yaml(recipe).entries) == 2


def test_the_mistakes_are_real():
    (shown,) = re.findall(r"```text\n(.*?)```", TEXT, re.DOTALL)
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.Spec.from_yaml(TYPO, "typo.yaml")
    assert set(shown.splitlines()) <= set(str(caught.value).splitlines())


def test_links_lead_somewhere():
    headings = {
        "#" + re.sub(r"[^a-z -]", "", line[3:].lower()).replace(" ", "-") for line in re.findall(r"^## .*", TEXT, re.M)
    }
    assert set(re.findall(r"\]\((#[^)]+)\)", TEXT)) <= headings


def test_the_table_of_specs_is_made_from_the_files():
    kept = TEXT.partition(BEGIN)[2].partition(END)[0]
    assert kept == f"\n{catalogue()}\n", "run `make catalogue`"
