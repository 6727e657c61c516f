"""The JSON Schemas for editors: they are what the command prints, accept what is shipped and mark typical mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

import tnpeft
from tnpeft.cli import app
from tnpeft.documents.nodes import read_document

SPECS = Path(__file__).parents[2] / "specs"
SCHEMAS = {kind: json.loads((SPECS / "schema" / f"{kind}.json").read_text()) for kind in ("spec", "recipe")}

SPEC = """\
tnpeft: 1
name: demo
layers: [Conv3d]
params: {r: 4}
sizes: {o: out_channels, i: in_channels}
factors: {32: [4, 4, 2]}
cores:
  up:   {legs: o r, init: zeros}
  down: r i k...
weight: o i k...
start: zero
"""
RECIPE = """\
tnpeft: 1
name: demo
adapters:
  - {spec: lora, match: to_q, params: {r: 8}}
train: {bias: adapted, norm: true}
"""
# what is replaced, what by, where the schema finds fault
MISTAKES = [
    ("name: demo\n", "", ""),
    ("tnpeft: 1", "tnpeft: 3", "tnpeft"),
    ("layers: [Conv3d]", "layers: [Conv4d]", "layers"),
    ("layers: [Conv3d]", "layer: [Conv3d]", ""),
    ("params: {r: 4}", "params: [r]", "params"),
    ("params: {r: 4}", "params: {r-1: 4}", "params"),
    ("init: zeros", "inti: zeros", "cores/up"),
    ("init: zeros", "init: 3", "cores/up"),
    ("init: zeros", "frozen: 1", "cores/up"),
    ("init: zeros", "from: wieght", "cores/up"),
    ("{legs: o r, init: zeros}", "{init: zeros}", "cores/up"),
    ("weight: o i k...", "weight: [o, i]", "weight"),
    ("weight: o i k...", "weight: o, i", "weight"),
    ("weight: o i k...\n", "", ""),
    ("weight: o i k...", "weight: o i\nterms: [{cores: [up, down], weight: o i}]", ""),
    ("weight: o i k...", "terms: [{core: [up, down], weight: o i}]", "terms/0"),
    ("start: zero", "start: zeros", "start"),
    ("start: zero", "start: zero\nseed: one", "seed"),
    ("start: zero", "start: zero\ncompose: Dora", "compose"),
]
RECIPE_MISTAKES = [
    ("spec: lora", "spec: lorra", "adapters/0/spec"),
    (", match: to_q", "", "adapters/0"),
    ("params: {r: 8}", "params: {r: eight}", "adapters/0/params/r"),
    ("params: {r: 8}", "layers: '0-5; 8'", "adapters/0/layers"),
    ("params: {r: 8}", "layers: -1", "adapters/0/layers"),
    ("params: {r: 8}", "layers: {decoder.layers: first}", "adapters/0/layers"),
    ("params: {r: 8}", "kinds: Linaer", "adapters/0/kinds"),
    ("params: {r: 8}", "exclude: 3", "adapters/0/exclude"),
    ("params: {r: 8}", "ranks: {q_proj: 8}", "adapters/0/ranks/q_proj"),
    ("bias: adapted", "bias: some", "train/bias"),
    ("train:", "trains:", ""),
]


def plain(text: str) -> Any:
    """As an editor sees the file: keys are texts."""
    return json.loads(json.dumps(read_document(text, "demo.yaml").plain()))


def faults(kind: str, text: str) -> list[str]:
    found = jsonschema.Draft7Validator(SCHEMAS[kind]).iter_errors(plain(text))
    return ["/".join(map(str, error.absolute_path)) for error in found]


@pytest.mark.parametrize("kind", SCHEMAS)
def test_the_kept_schema_is_the_printed_one(kind: str):
    result = CliRunner().invoke(app, ["schema", kind])
    assert result.exit_code == 0
    assert json.loads(result.output) == SCHEMAS[kind], f"run `tnpeft schema {kind} > specs/schema/{kind}.json`"
    jsonschema.Draft7Validator.check_schema(SCHEMAS[kind])


def test_spec_is_the_default_and_other_words_are_refused():
    assert json.loads(CliRunner().invoke(app, ["schema"]).output) == SCHEMAS["spec"]
    result = CliRunner().invoke(app, ["schema", "specs"])
    assert result.exit_code == 2
    assert "expected one of spec, recipe, found 'specs'. Did you mean `spec`?" in result.output


@pytest.mark.parametrize("path", sorted(SPECS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_specs_name_the_schema_and_fit_it(path: Path):
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=schema/spec.json\n")
    assert faults("spec", text) == []


@pytest.mark.parametrize("path", sorted(SPECS.glob("recipes/*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_name_the_schema_and_fit_it(path: Path):
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=../schema/recipe.json\n")
    assert faults("recipe", text) == []


@pytest.mark.parametrize(("old", "new", "where"), MISTAKES, ids=lambda text: text.strip())
def test_mistakes_in_specs_are_marked_where_they_stand(old: str, new: str, where: str):
    assert faults("spec", SPEC) == []
    tnpeft.Spec.from_yaml(SPEC)
    assert old in SPEC
    assert where in faults("spec", SPEC.replace(old, new))


@pytest.mark.parametrize(("old", "new", "where"), RECIPE_MISTAKES, ids=lambda text: text.strip())
def test_mistakes_in_recipes_are_marked_where_they_stand(old: str, new: str, where: str):
    assert faults("recipe", RECIPE) == []
    tnpeft.Recipe.from_yaml(RECIPE)
    assert where in [fault[: len(where)] for fault in faults("recipe", RECIPE.replace(old, new))]


@pytest.mark.parametrize(
    "text",
    [
        "layers: 3", "layers: '0-5, 8'", "layers: 16-", "layers: [0, 1]", "layers: {decoder.layers: 0-1}",
        "kinds: Linear", "kinds: [Linear, conv]", "exclude: lm_head$", "exclude: [a, b]",
        "ranks: {q$: {r: 2, alpha: 1}}",
    ],
)  # fmt: skip
def test_what_narrows_a_recipe_fits_the_schema(text: str):
    recipe = RECIPE.replace("params: {r: 8}", text)
    assert faults("recipe", recipe) == []
    tnpeft.Recipe.from_yaml(recipe)


def test_every_key_has_a_sentence():
    waiting = [*SCHEMAS.values()]
    while waiting:
        node = waiting.pop()
        for key, value in node.get("properties", {}).items():
            assert value.get("description"), key
        waiting += [value for value in node.values() if isinstance(value, dict)]
        waiting += [
            item for value in node.values() if isinstance(value, list) for item in value if isinstance(item, dict)
        ]
