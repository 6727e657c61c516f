"""The language reference: every example loads, and has the parameters it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tnpeft
from tnpeft.cli.arguments import parse_layer
from tnpeft.cli.catalogue import BEGIN, END, catalogue

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
