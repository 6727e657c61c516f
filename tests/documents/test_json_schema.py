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
from tnpeft.documents.nodes import Node, read_document
from tnpeft.errors import Position, Problems
from tnpeft.spec.map_kinds import map_names
from tnpeft.spec.maps import parse_map

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
DERIVED = """\
tnpeft: 2
name: derived
layers: [Linear]
params: {b: 4}
sizes: {o: out_features, n: in_features // b, x y: b, e: b * (b - 1) // 2, m: 9}
cores:
  W:      {legs: o (n y), from: weight}
  R:      {legs: n e, init: zeros}
  turn:   {of: R, legs: n x y, map: [skew(e -> x y), "neumann(x y, terms=5)"]}
  places: {legs: m, frozen: true, init: choice(o n x)}
  values: {legs: m, init: zeros}
  some:   {of: values, scale: 2, legs: o n x, map: "scatter(m -> o n x, at=places)"}
  mixed:  {of: [{cores: [W, turn]}, {cores: [some], scale: -1 / 2}], legs: o n x}
  gain:   {legs: o 1, init: ones}
terms:
  - {cores: [gain, mixed(o n x)], weight: o (n x)}
start: frozen_copy
"""
# what is replaced, what by, where the schema finds fault
DERIVED_MISTAKES = [
    ("tnpeft: 2", "tnpeft: 1", "cores/turn"),
    ("legs: n x y, map", "legs: n x y, init: zeros, map", "cores/turn"),
    ("of: R, legs: n x y", "legs: n x y", "cores/turn"),
    ("of: values, scale: 2, legs: o n x, map: ", "scale: 2, legs: o n x, map: ", "cores/some"),
    ("of: R", "of: [R, 3]", "cores/turn"),
    ("of: R", "of: 'R[n e]'", "cores/turn"),
    ("{cores: [W, turn]}", "{core: [W, turn]}", "cores/mixed"),
    ("[skew(e -> x y), ", "[skew -> x y, ", "cores/turn"),
    ("cores: [gain, mixed(o n x)]", "cores: [gain, mixed o n x]", "terms/0/cores/1"),
]
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


@pytest.mark.parametrize(("old", "new", "where"), DERIVED_MISTAKES, ids=lambda text: text.strip())
def test_mistakes_in_derived_cores_are_marked_where_they_stand(old: str, new: str, where: str):
    assert faults("spec", DERIVED) == []
    tnpeft.Spec.from_yaml(DERIVED)
    assert old in DERIVED
    assert where in [fault[: len(where)] for fault in faults("spec", DERIVED.replace(old, new))]
    with pytest.raises(tnpeft.SpecError):
        tnpeft.Spec.from_yaml(DERIVED.replace(old, new))


def test_every_map_is_offered_as_a_file_may_write_it():
    """What completion puts into a file is read: the usages are maps with their legs."""
    offered = SCHEMAS["spec"]["properties"]["cores"]["additionalProperties"]["anyOf"][1]["properties"]["map"]
    usages = offered["anyOf"][0]["anyOf"][0]["enum"]
    assert [usage.partition("(")[0] for usage in usages] == list(map_names())
    for usage in usages:
        problems = Problems()
        assert parse_map(Node("scalar", usage, Position("demo.yaml", 1, 1), usage), problems, "core 'x'"), usage
        assert not len(problems), usage


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
