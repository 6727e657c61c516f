"""Names that people know from elsewhere: params, keys of recipes, settings of commands, files, words in expressions."""

from __future__ import annotations

from pathlib import Path

import pytest
from terminal import mistakes
from torch import nn

import tnpeft
from tnpeft.recipe.model import train_from
from tnpeft.spec.habits import advice_on

MATCH = "`match` says which layers: a regular expression on their names, a list of names, or `all`."
BLOCKS = "`layers` says in which numbered blocks: `0-5, 8`, say."
RANKS = "`ranks` has params by regular expressions on layers' names: `{'q_proj$': {'r': 8}}`, say."
ALSO = "`train` says what trains beside the cores: its `also` takes regular expressions on parameters' names."


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))


DROPOUT = "`dropout`, of `attach` and of entries of recipes, says what training drops: `{'input': 0.05}`, say."
PARAMS = {
    "rank": "Did you mean `r`?",
    "lora_r": "Did you mean `r`?",
    "linear_dim": "Did you mean `r`?",
    "RANK": "Did you mean `r`?",
    "lora_alpha": "Did you mean `alpha`?",
    "network_alpha": "Did you mean `alpha`?",
    "alhpa": "Did you mean `alpha`?",
    "target_modules": MATCH,
    "layers_to_transform": BLOCKS,
    "layers_pattern": BLOCKS,
    "exclude_modules": "`exclude` says which layers to leave out: a regular expression on their names, or a list of "
    "names.",
    "layer_types": "`kinds` says which kinds of layers of the spec's are meant: `Linear`, say.",
    "modules_to_save": ALSO,
    "bias": "`train` says what trains beside the cores: its `bias` is `none`, `adapted` or `all`.",
    "lora_dropout": DROPOUT,
    "adapter_name": "Did you mean `name`?",
    "random_state": "Did you mean `seed`?",
    "modee": "Did you mean `mode`?",
    "use_rslora": "Take the spec `rslora`.",
    "use_dora": "Take a spec with a trained magnitude, such as `dora`.",
    "init_lora_weights": "A spec says how each core starts: copy it and change `init` there, or give values by "
    "`attach(init=...)`.",
    "rank_pattern": RANKS,
    "alpha_pattern": RANKS,
    "algo": "The spec is the method: take another one, such as `loha`.",
    "task_type": "tnpeft needs no such setting: leave it out.",
    "lr": "Give it to the optimiser.",
    "zzz": "Remove it.",
}


@pytest.mark.parametrize(("name", "advice"), PARAMS.items())
def test_a_param_by_another_name_is_told_once(name, advice):
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(net(), "lora", match=r"\d", **{name: 4})
    assert str(caught.value) == f"params of spec 'lora': expected one of r, alpha, found `{name}`. {advice}"


def test_specs_that_are_said_to_be_taken_exist():
    assert {"dora", "loha", "rslora", "lokr_both", "locon_tucker", "loha_tucker", "lokr_tucker"} <= {
        *tnpeft.list_specs()
    }


def test_a_spec_without_such_a_param():
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(net(), "ia3", match=r"\d", rank=4)
    assert str(caught.value) == (
        "params of spec 'ia3': expected none, found `rank`. There is no `r` here: leave it out."
    )
    assert advice_on("rank", ["k", "rnk"]) == "Did you mean `rnk`?"


def test_a_layers_number_by_another_name():
    with pytest.raises(tnpeft.BindError) as caught:
        tnpeft.load_spec("lora").bind("Linear", in_features=4, out_features=4, rank=2, kernelsize=3)
    assert str(caught.value) == (
        "params of spec 'lora': expected one of r, alpha, found `rank`. Did you mean `r`?\n"
        "params of spec 'lora': expected one of r, alpha, found `kernelsize`. Did you mean `kernel_size`?"
    )


def test_a_recipes_params_by_other_names():
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(net(), "lora_ddpm", rank=4, target_modules=["0"])
    assert str(caught.value) == (
        "params of recipe 'lora_ddpm': expected one of r, alpha, found `rank`. Did you mean `r`?\n"
        f"params of recipe 'lora_ddpm': expected one of r, alpha, found `target_modules`. {MATCH}"
    )


def test_settings_of_commands_by_other_names(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text("from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Linear(4, 4))\n")
    count = ("count", "lora", "--model", "nets:build", "--match", "0", "--set", "rank=4", "--set", "dropout=0.1")
    assert mistakes(*count, status=2) == [
        "--set rank: expected one of r, alpha, found `rank`. Did you mean `r`?",
        f"--set dropout: expected one of r, alpha, found `dropout`. {DROPOUT}",
    ]
    budget = ("budget", "lora", "--model", "nets:build", "--match", "0", "--params", "99", "--param", "rank")
    assert mistakes(*budget) == [
        "recipe 'lora', param 'rank': expected one of alpha, r, found `rank`. Did you mean `r`?"
    ]
    assert mistakes("show", "lora", "--layer", "Linear:8,8", "--set", "rank=4") == [
        "params of spec 'lora': expected one of r, alpha, found `rank`. Did you mean `r`?"
    ]


def unknown(key: str, fix: str) -> str:
    known = "dropout, exclude, kinds, layers, match, parameters, params, ranks, spec"
    return f"3:38: unknown key '{key}' in `adapters`, entry 1: expected one of {known}, found '{key}'. {fix}"


@pytest.mark.parametrize(
    ("entry", "rest", "lines"),
    [
        ("r: 4", "", [unknown("r", "Write `params: {r: 4}`.")]),
        ("rank: 4.5", "", [unknown("rank", "Write `params: {r: 4.5}`.")]),
        ("target_modules: [a]", "", [unknown("target_modules", "Did you mean `match`?")]),
        ("lora_dropout: 0.1", "", [unknown("lora_dropout", "Write `dropout: {input: 0.1}`.")]),
        ("rank_pattern: {q: 4}", "", [unknown("rank_pattern", "Did you mean `ranks`?")]),
        ("bias: all", "", [unknown("bias", "Write it in `train`, beside `adapters`.")]),
        ("params: {rank: 4, n: 1}", "", [
            "3:46: params of spec 'lora': expected one of r, alpha, found `rank`. Did you mean `r`?",
            "3:46: params of spec 'lora': expected one of r, alpha, found `n`. Remove it."]),
        ("params: {r: 4}", "r: 4\nmatch: b\nnorm: true\n", [
            "4:1: unknown key 'r' in the file: expected one of adapters, name, scopes, source, title, tnpeft, train, "
            "found 'r'. Write `params: {r: 4}` in an entry of `adapters`.",
            "5:1: unknown key 'match' in the file: expected one of adapters, name, scopes, source, title, tnpeft, "
            "train, found 'match'. Write it in an entry of `adapters`.",
            "6:1: unknown key 'norm' in the file: expected one of adapters, name, scopes, source, title, tnpeft, "
            "train, found 'norm'. Write it in `train`, beside `adapters`."]),
    ],
)  # fmt: skip
def test_keys_at_the_wrong_place_of_a_recipe(entry, rest, lines):
    text = f"tnpeft: 1\nname: x\nadapters: [{{spec: lora, match: to_q, {entry}}}]\n{rest}"
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.Recipe.from_yaml(text, "a.yaml")
    assert str(caught.value).splitlines() == [f"a.yaml:{line}" for line in lines]


def test_a_number_beside_the_params_of_a_spec():
    text = (tnpeft.load_spec("lora").text).replace("bond: r", "").replace("layers:", "rank: 4\nlayers:")
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.Spec.from_yaml(text)
    assert str(caught.value).splitlines()[0].endswith("found 'rank'. Write `params: {r: 4}`.")


def test_what_trains_by_another_name():
    with pytest.raises(tnpeft.SpecError) as caught:
        train_from({"modules_to_save": ["head"]})
    assert str(caught.value) == (
        f"train:1:1: unknown key 'modules_to_save' in `train`: expected one of also, bias, norm, found "
        f"'modules_to_save'. {ALSO}"
    )


# files beside


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = tnpeft.load_spec("lora").text
    Path("sub").mkdir()
    for name in ("block_term.yaml", "other.yml", "sub/deep.yaml", "lorra.yaml"):
        Path(name).write_text(text)
    tnpeft.save(tnpeft.attach(net(), "lora", match="0").model, "adapter.safetensors")
    return tmp_path


NEITHER = "recipe or spec '{}': expected a YAML file, or the name of a shipped recipe or spec, found neither. {}"
NO_FILE = NEITHER.replace("found neither", "found no such file")
MISSING = "{}: cannot read this recipe or spec: expected a readable file, found No such file or directory. {}"


@pytest.mark.parametrize(
    ("name", "text", "advice"),
    [
        ("block_term", NEITHER, "Did you mean `block_term.yaml`?"),
        ("blok_term", NEITHER, "Did you mean `block_term.yaml`?"),
        ("Block_Term", NEITHER, "Did you mean `block_term.yaml`?"),
        ("block_term.json", NO_FILE, "Did you mean `block_term.yaml`?"),
        ("block_term.yml", MISSING, "Did you mean `block_term.yaml`?"),
        ("other", NEITHER, "Did you mean `other.yml`?"),
        ("other.yaml", MISSING, "Did you mean `other.yml`?"),
        ("sub/deep", NO_FILE, "Did you mean `sub/deep.yaml`?"),
        ("sub/deeep.yaml", MISSING, "Did you mean `sub/deep.yaml`?"),
        ("lorra", NEITHER, "Did you mean `lorra.yaml`?"),
        ("tenvo_l", NEITHER, "Did you mean `tenvoo_l`?"),
        ("tenvoo_l.yaml", MISSING, "Did you mean `tenvoo_l`?"),
        ("lora_ddpm.yml", MISSING, "Did you mean `lora_ddpm`?"),
        ("zzz", NEITHER, "`tnpeft list` prints the names."),
        ("README.md", NO_FILE, "Check the path; `tnpeft list` prints the names."),
        ("none/at/all", NO_FILE, "Check the path; `tnpeft list` prints the names."),
        ("weights.pth", NO_FILE, "Check the path; `tnpeft list` prints the names."),
    ],
)
def test_files_in_the_folder_come_before_shipped_names(folder, name, text, advice):
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.attach(net(), name, match="0")
    assert str(caught.value) == text.format(name, advice)


def test_recipes_and_specs_take_each_others_names(folder):
    for load, name, text in (
        (tnpeft.load_recipe, "lora_dpm", "recipe 'lora_dpm': expected a YAML file, or the name of a shipped recipe, "
                                         "found neither. Did you mean `lora_ddpm`?"),
        (tnpeft.load_recipe, "block_ter", "recipe 'block_ter': expected a YAML file, or the name of a shipped recipe, "
                                          "found neither. Did you mean `block_term.yaml`?"),
        (tnpeft.load_recipe, "loha", "recipe 'loha': expected a YAML file, or the name of a shipped recipe, "
                                     "found a spec. `tnpeft list` prints the names."),
        (tnpeft.load_spec, "lora_ddpm", "spec 'lora_ddpm': expected a YAML file, or the name of a shipped spec, "
                                        "found a recipe. `tnpeft list` prints the names."),
        (tnpeft.load_spec, "adapter.safetensors", "spec 'adapter.safetensors': expected a YAML file, found an adapter "
                                                  "file. `tnpeft inspect adapter.safetensors` shows it. "
                                                  "`tnpeft.load` puts it on a model."),
    ):  # fmt: skip
        with pytest.raises(tnpeft.SpecError) as caught:
            load(name)
        assert str(caught.value) == text


def test_a_recipe_names_the_files_beside_it(folder):
    recipe = folder / "sub" / "recipe.yaml"
    recipe.write_text("tnpeft: 1\nname: x\nadapters: [{spec: deep, match: a}, {spec: dep.yaml, match: b}]\n")
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.load_recipe(recipe)
    assert str(caught.value) == (
        "dep.yaml: cannot read this spec: expected a readable file, found No such file or directory. "
        "Did you mean `deep.yaml`?\n"
        f"{recipe}:3:19: spec 'deep': expected a YAML file, or the name of a shipped spec, found neither. "
        "Did you mean `deep.yaml`?"
    )
    recipe.write_text("tnpeft: 1\nname: x\nadapters: [{spec: deep.yaml, match: a}]\n")
    assert tnpeft.load_recipe(recipe).entries[0].spec.name == "lora"


def test_commands_suggest_files_too(folder):
    assert mistakes("show", "block_term") == [
        "spec 'block_term': expected a YAML file, or the name of a shipped spec, found neither. "
        "Did you mean `block_term.yaml`?"
    ]
    assert mistakes("check", "block_term.yml") == [MISSING.format("block_term.yml", "Did you mean `block_term.yaml`?")]


def test_shipped_files_are_told_without_the_place_of_installation():
    with pytest.raises(tnpeft.BindError) as caught:
        tnpeft.load_spec("lora").bind("Linear", in_features=4, out_features=4, r=0)
    assert str(caught.value).splitlines()[0] == (
        "lora.yaml:13:3: core 'down', index 'r', on Linear(4, 4): expected a size from 1 to 16777216, found 0. "
        "Change its size."
    )
    with pytest.raises(tnpeft.AttachError) as caught:
        tnpeft.attach(net(), "lora_ddpm")
    assert str(caught.value).startswith("lora_ddpm.yaml:")


# models


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("nets.py:build", "Write `nets:build`."),
        ("./nets.py:build", "Write `nets:build`."),
        ("sub/nets.py:build", "Write `sub.nets:build`."),
        ("sub/nets:build", "Write `sub.nets:build`."),
        ("nets.py::build", "Write `nets:build`."),
        ("nets:build()", "Write `nets:build`."),
        ("nets:build(pad=True)", "Write a function without arguments that returns `build(pad=True)`, and name that."),
        ("nets.py:build(3)", "Write a function without arguments that returns `build(3)`, and name that."),
        ("/there/nets.py:build", "Run it in its folder and write `nets:build`."),
        ("../there/nets.py:build", "Run it in the folder '../there' and write `nets:build`."),
        ("nets.build", "Write `nets:build`."),
        ("package.nets.build()", "Write `package.nets:build`."),
        ("nets.py", "Write `nets:NAME`, NAME being the function or class that makes the model."),
        ("nets", "Write it like `my_package.models:build_unet`, or one of monai:ddpm-paper, monai:maisi, "
                 "monai:maisi-controlnet."),
    ],
)  # fmt: skip
def test_a_model_by_the_path_of_its_file(text, fix):
    assert mistakes("count", "lora", "--match", "0", "--model", text, status=2) == [
        f"--model: the model: expected package.module:factory, found {text!r}. {fix}"
    ]


# expressions

YES = "Write `true`."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("factorize(in_channels, 2, pad=True)[0]", f"expected a number, found True. {YES}"),
        ("1 if False else 2", "expected a number, found False. Write `false`."),
        ("None", "expected a number, found None. Nothing has no name here: write a number."),
        ("'a'", "expected a number, found 'a'. Write a number or a name, without quotes."),
        ("r if r > 1 && r < 9 else 1", "expected an expression, found 'r if r > 1 && r < 9 else 1'. Write `and`."),
        ("r if r > 1 OR r < 9 else 1", "expected an expression, found 'r if r > 1 OR r < 9 else 1'. Write `or`."),
        ("r if !r else 1", "expected an expression, found 'r if !r else 1'. Write `not`."),
        ("r > 1 ? 1 : 2", "expected an expression, found 'r > 1 ? 1 : 2'. Write `a if c else b`."),
        ("1 if r = 2 else 3", "expected an expression, found '1 if r = 2 else 3'. Write `==` to compare."),
        ("(r > 1) & (r < 9)", "expected a size expression, found Python's BitAnd. Write `and`."),
        ("2r", "expected an expression, found '2r'. Write it as Python would: `2 * r`."),
    ],
)
def test_words_of_other_languages_in_an_expression(text, message):
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.Spec.from_yaml(tnpeft.load_spec("lora").text.replace("i: in_channels", f'i: "{text}"'))
    assert str(caught.value).splitlines()[0].partition(" ")[2].partition(": ")[2] == message


@pytest.mark.parametrize(("word", "meant"), [("yes", "true"), ("TRUE", "true"), ("off", "false"), ("FALSE", "false")])
def test_words_of_yaml_in_an_expression(word, meant):
    text = f"factorize(in_channels, 1, pad={word})[0]"
    with pytest.raises(tnpeft.SpecError) as caught:
        tnpeft.Spec.from_yaml(tnpeft.load_spec("lora").text.replace("i: in_channels", f'i: "{text}"'))
    assert str(caught.value).endswith(
        f"expected params, layer names and indices in `sizes`, found '{word}'. Write `{meant}`."
    )
