"""`parameters` of an entry: from files and from Python, what they find, and what is said where they cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import nn

import tnpeft
from tests.beside_layers import PARAMETERS, Model, model
from tnpeft.errors import AttachError, SpecError
from tnpeft.recipe.json_schema import recipe_schema

HEAD = "tnpeft: 1\nname: mine\nadapters:\n"


def test_a_recipe_and_arguments_say_the_same(tmp_path: Path) -> None:
    text = HEAD + (
        "  - spec: lora\n"
        "    match: [embed, blocks.0.line]\n"
        "    parameters: {'\\.square$': i o, experts$: 'e  o i'}\n"
        "    params: {r: 2}\n"
        "    ranks: {experts$: {r: 3}, embed: {r: 1}}\n"
    )
    recipe = tnpeft.Recipe.from_yaml(text)
    from_file = tnpeft.attach(model(), recipe).report()
    ranks = {"experts$": {"r": 3}, "embed": {"r": 1}}
    from_python = tnpeft.attach(
        model(), "lora", match=["embed", "blocks.0.line"], parameters=PARAMETERS, r=2, ranks=ranks
    ).report()
    assert [(row.name, row.layer, row.cores, row.mode) for row in from_file.layers] == [
        ("embed", "Linear(20, 8, turned)", 28, "auto"),
        ("blocks.0.line", "Linear(8, 8)", 32, "auto"),
        ("blocks.0.square", "Linear(8, 8, turned)", 32, "dense"),
        ("blocks.0.experts", "Linear(8, 6) x 3", 3 * 3 * 14, "dense"),
        ("blocks.1.square", "Linear(8, 8, turned)", 32, "dense"),
        ("blocks.1.experts", "Linear(8, 6) x 3", 3 * 3 * 14, "dense"),
    ]
    assert from_file.layers == from_python.layers
    jsonschema.validate(
        {"tnpeft": 1, "name": "mine", "adapters": [{"spec": "lora", "parameters": "w"}]}, recipe_schema()
    )
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"tnpeft": 1, "name": "mine", "adapters": [{"spec": "lora"}]}, recipe_schema())


def test_parameters_are_narrowed_with_the_layers() -> None:
    both = {"match": "line$", "parameters": PARAMETERS}
    names = list(tnpeft.attach(model(), "lora", **both, exclude=r"0\.experts|1\.line", kinds="Linear").adapters)
    assert names == ["blocks.0.line", "blocks.0.square", "blocks.1.square", "blocks.1.experts"]
    assert list(tnpeft.attach(model(), "lora", **both, layers="1").adapters) == [
        "blocks.1.line",
        "blocks.1.square",
        "blocks.1.experts",
    ]


def test_all_layers_and_parameters() -> None:
    report = tnpeft.attach(model(), "lora", match="all", parameters=PARAMETERS).report()
    assert len(report.layers) == 6
    assert report.passed == {"Embedding": 1}


class Odd(Model):
    """Every parameter that cannot be adapted, and why."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))
        self.deep = nn.Parameter(torch.zeros(2, 2, 2, 2))
        self.attend = nn.MultiheadAttention(8, 2)
        self.row = nn.Sequential(nn.Linear(8, 8))
        self.row.register_parameter("own", nn.Parameter(torch.zeros(8, 8)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"parameters": r"0\.square$"},
            "parameter 'blocks.0.square': its orientation: expected `o i` or `i o` for the shape (8, 8), found none. "
            "Say "
            "which of its axes are outputs (`o`) and inputs (`i`): `parameters: {'blocks.0.square': o i}`.",
        ),
        (
            {"parameters": {r"0\.experts$": "o i"}},
            "parameter 'blocks.0.experts': its orientation: expected `e o i` or `e i o` for the shape (3, 6, 8), found "
            "'o i'. Say which of its axes are outputs (`o`) and inputs (`i`): `parameters: {'blocks.0.experts': e o "
            "i}`.",
        ),
        (
            {"parameters": {r"experts$": "e o i", r"0\.experts$": "e i o"}},
            "parameter 'blocks.0.experts': its orientation: expected one, found `e o i` and `e i o`. Let one of the "
            "patterns alone find it: 'experts$', '0\\\\.experts$'.",
        ),
        (
            {"parameters": ["blocks.0.squares"]},
            "parameter 'blocks.0.squares': expected the name of a parameter, found no such parameter. Did you mean "
            "`blocks.0.square`?",
        ),
        (
            {"parameters": {"expert_$": "e o i"}},
            "spec 'lora', parameters 'expert_$': expected at least one parameter, found none. Did you mean `experts`?",
        ),
        (
            {"parameters": {"0.line.weight": "o i"}},
            "parameter 'blocks.0.line.weight': its owner: expected no layer that can be adapted, found that of the "
            "layer "
            "'blocks.0.line'. Match 'blocks.0.line' as a layer (`match`).",
        ),
        (
            {"parameters": {"embed.weight": "i o"}},
            "parameter 'embed.weight': its owner: expected no layer that can be adapted, found that of the layer "
            "'embed'. Match 'embed' as a layer (`match`).",
        ),
        (
            {"parameters": {"0.shift": "o i"}},
            "parameter 'blocks.0.shift': its axes: expected 2 (outputs and inputs), or 3 (a stack), found 1. Match "
            "other "
            "parameters.",
        ),
        (
            {"parameters": {"deep": "e o i"}},
            "parameter 'deep': its axes: expected 2 (outputs and inputs), or 3 (a stack), found 4. Match other "
            "parameters.",
        ),
        (
            {"parameters": {"whole": "o i"}},
            "parameter 'whole': weight dtype: expected one of float16, bfloat16, float32, float64, found complex64. "
            "Match other layers.",
        ),
        (
            {"parameters": {"row.own": "o i"}},
            "parameter 'row.own': its owner: expected a module that a submodule can be added to, found a Sequential. "
            "Hold "
            "the parameter in a module with a `forward` of its own.",
        ),
        (
            {"parameters": {"in_proj_weight": "e o i"}},
            "parameter 'attend.in_proj_weight': its orientation: expected `o i` or `i o` for the shape (24, 8), found "
            "'e o i'. Say which of its axes are outputs (`o`) and inputs (`i`): "
            "`parameters: {'attend.in_proj_weight': o i}`.",
        ),
        (
            {"parameters": {"square$": "o x"}},
            "the orientation of 'square$': expected one of `o i`, `i o`, `e o i`, `e i o`, found 'o x'. Did you mean "
            "`o i`?",
        ),
        (
            {"parameters": {"(": "o i"}},
            "pattern '(': expected a regular expression, found missing ), unterminated subpattern at position 0. A dot "
            "of a module's name is written `\\.`.",
        ),
        (
            {"parameters": 5},
            "`parameters`: expected regular expressions on parameters' names, with orientations, found 5. For example "
            "`parameters: {'experts\\.down_proj$': e o i}`.",
        ),
        (
            {"match": [], "parameters": None},
            "`match`: expected a regular expression or layer names, found []. Give full module names, as "
            "`model.named_modules()` has them.",
        ),
    ],
)
def test_what_is_said_where_nothing_can_be_adapted(settings: dict[str, Any], message: str) -> None:
    odd = Odd()
    modules, keys = list(odd.modules()), list(odd.state_dict())
    with pytest.raises((AttachError, SpecError)) as caught:
        tnpeft.attach(odd, "lora", **settings)
    assert str(caught.value) == message
    assert list(odd.modules()) == modules
    assert list(odd.state_dict()) == keys


def test_a_spec_for_convolutions_takes_no_parameter() -> None:
    with pytest.raises(AttachError) as caught:
        tnpeft.attach(model(), "tucker5", parameters={r"0\.square$": "i o"})
    assert str(caught.value) == (
        "layer 'blocks.0.square': spec 'tucker5': expected one of Conv3d, ConvTranspose3d, found Linear. Choose "
        "another "
        "spec, or add the kind to its `layers`."
    )


def test_two_entries_that_claim_one_parameter() -> None:
    text = HEAD + "  - {spec: lora, parameters: {experts$: e o i}}\n" * 2
    with pytest.raises(AttachError, match=r"experts', 'blocks\.1\.experts': expected one adapter, found two, lora"):
        tnpeft.attach(model(), tnpeft.Recipe.from_yaml(text))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            "{spec: lora, params: {r: 2}}",
            "mine.yaml:4:5: `adapters`, entry 1 has no `match`: expected a regular expression, a list of layer names, "
            "or "
            "`all`, found nothing. For example `match: 'conv[12]\\.conv$'`; `match: all` takes every layer of the "
            "spec's "
            "kinds.",
        ),
        (
            "{spec: lora, parameters: {square: oi}}",
            "mine.yaml:4:39: the orientation of 'square': expected one of `o i`, `i o`, `e o i`, `e i o`, found 'oi'. "
            "Did "
            "you mean `o i`?",
        ),
        (
            "{spec: lora, parameters: {'(': o i}}",
            "mine.yaml:4:36: pattern '(': expected a regular expression, found missing ), unterminated subpattern at "
            "position 0. A dot of a module's name is written `\\.`.",
        ),
        (
            "{spec: lora, parameters: 3}",
            "mine.yaml:4:30: `adapters`, entry 1, `parameters`: expected regular expressions on parameters' names with "
            "orientations, or parameters of known owners, found 3. For example "
            "`parameters: {'experts\\.down_proj$': e o i}`: slices, outputs, inputs, as they are stored.",
        ),
    ],
)
def test_mistakes_in_files_have_their_places(entry: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        tnpeft.Recipe.from_yaml(f"{HEAD}  - {entry}\n", "mine.yaml")
    assert str(caught.value) == message
