"""`tnpeft new`, the filters of `tnpeft list`, numbers with k and M, what shells complete, and notes on factors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from terminal import data, mistakes, run, text

import tnpeft
from tnpeft.cli.arguments import parse_number
from tnpeft.cli.options import complete_kind, complete_model, complete_source, complete_target, complete_what
from tnpeft.cli.output import UsageError

ROOT = Path(__file__).parents[2]


# new


def test_a_new_file_is_the_shipped_one_under_its_own_name(tmp_path: Path):
    file = tmp_path / "my.adapter.yaml"
    assert text("new", file).splitlines() == [
        f"wrote {file}: a spec named 'my.adapter', from lora",
        f"Edit it, then `tnpeft check {file}` and `tnpeft show {file}`.",
    ]
    mine, shipped = tnpeft.load_spec(file), tnpeft.load_spec("lora")
    assert mine.name == "my.adapter"
    assert mine.canonical() == shipped.canonical()
    assert "yaml-language-server" not in mine.text


def test_every_shipped_file_can_be_begun_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names = (*tnpeft.list_specs(), *tnpeft.list_recipes())
    for name in names:
        assert data("new", f"{name}_2.yml", "--from", name)["name"] == f"{name}_2"
    assert text("check", ".").splitlines()[-1] == f"{len(names)} files, {len(names)} without mistakes, 0 mistakes"
    assert tnpeft.load_spec("tenvoo_l_2.yml").factors == tnpeft.load_spec("tenvoo_l").factors


def test_a_recipe_and_a_file_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert text("new", "a.yaml", "--from", "lora_ddpm").splitlines() == [
        "wrote a.yaml: a recipe named 'a', from lora_ddpm",
        "Edit it, then `tnpeft check a.yaml` and `tnpeft count a.yaml --model ...`.",
    ]
    made = {"file": "b.yaml", "from": "a.yaml", "kind": "recipe", "name": "b"}
    assert data("new", "b.yaml", "--from", "a.yaml") == made


@pytest.mark.parametrize("name", ["123", "1e5", "true", "null", "-", "0x1f", "wide"])
def test_a_name_is_a_word_whatever_the_file_is_called(name: str, tmp_path: Path):
    file = tmp_path / f"{name}.yaml"
    text("new", file)
    assert tnpeft.load_spec(file).name == name


def test_what_is_neither_spec_nor_recipe_is_not_begun_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("other.yaml").write_text("a: 1")
    assert mistakes("new", "x.yaml", "--from", "other.yaml", status=2) == [
        "other.yaml: --from: expected a spec or recipe, found neither. `tnpeft list` prints the names."
    ]
    assert not Path("x.yaml").exists()


def test_nothing_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("precious")
    Path("link.yaml").symlink_to("nowhere.yaml")
    for taken in ("mine.yaml", "link.yaml"):
        assert mistakes("new", taken, status=2) == [
            f"{taken}: FILE: expected a name that is free, found one that is taken. "
            "Choose another name: nothing is written over."
        ]
    assert mistakes("new", "x.txt", status=2) == [
        "x.txt: FILE: expected a name in .yaml or .yml, found '.txt'. For example my.yaml."
    ]
    assert mistakes("new", "no/x.yaml", status=2) == [
        "no/x.yaml: FILE: expected a name in a folder that exists, found no folder 'no'. "
        "Make the folder first, or choose another."
    ]
    assert "Did you mean `" in mistakes("new", "x.yaml", "--from", "lorra")[0]
    assert Path("mine.yaml").read_text() == "precious"
    assert sorted(file.name for file in Path().iterdir()) == ["link.yaml", "mine.yaml"]


# list


def names(*arguments: str) -> set[str]:
    return {spec["name"] for spec in data("list", *arguments)["specs"]}


def test_list_by_kind_and_by_source():
    specs = [tnpeft.load_spec(name) for name in tnpeft.list_specs()]
    convolutions = {spec.name for spec in specs if "Conv3d" in spec.layers}
    assert names("--layer", "Conv3d") == convolutions
    assert "quanta" not in convolutions
    assert names("--source", "DORA") == {
        spec.name for spec in specs if "dora" in spec.source.lower() or "dora" in spec.title.lower()
    }
    assert text("list", "--source", "no such author") == f"none of {len(specs)} specs"


def test_list_by_what_trains_on_a_layer():
    layer = tnpeft.Layer("Linear", 24, 32)
    expected: dict[str, int] = {}
    for name in tnpeft.list_specs():
        try:
            expected[name] = tnpeft.load_spec(name).bind(layer).num_parameters
        except tnpeft.BindError:
            continue
    arguments = ("list", "--layer", "Linear:24,32", "-p", "0.3k")
    found = {spec["name"]: spec["parameters"] for spec in data(*arguments)["specs"]}
    assert found == {name: count for name, count in expected.items() if count <= 300}
    assert found["lora"] == 4 * (24 + 32)
    lines = text(*arguments).splitlines()
    assert lines[0].split() == ["spec", "layers", "start", "parameters", "title"]
    assert not any(line.startswith("recipe") for line in lines)


def test_list_by_the_rank_of_the_start():
    few = ("list", "--layer", "Linear:10,12", "--source", "convolutions as locon")
    rows = {spec["name"]: spec["rank"] for spec in data(*few, "--rank", "1", "-q")["specs"]}
    assert rows["lora"] == 4 * 12  # at the start `up` alone moves, through four directions of the inputs
    assert "lora" not in {spec["name"] for spec in data(*few, "--rank", "49", "-q")["specs"]}
    assert run(*few, "--rank", "1").stderr.startswith("[1/")
    assert run(*few, "--rank", "1", "-q").stderr == ""


def test_filters_that_need_a_layer():
    for option, value in (("--params", "5k"), ("--rank", "3")):
        assert mistakes("list", option, value, status=2) == [
            f"{option} without a layer: expected --layer with its sizes, found none. "
            "Add --layer, e.g. --layer Linear:48,64."
        ]
        assert mistakes("list", "--layer", "Linear", option, value, status=2)
    (line,) = mistakes("list", "--layer", "Linar", status=2)
    assert "Did you mean `Linear`?" in line


# numbers


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("600000", 600_000),
        ("5k", 5_000),
        ("5K", 5_000),
        ("1.2M", 1_200_000),
        ("0.5k", 500),
        ("600,000", 600_000),
        ("1_000", 1_000),
        ("2 G", 2_000_000_000),
    ],
)
def test_numbers_with_a_unit(written: str, number: int):
    assert parse_number(written, "--params") == number


@pytest.mark.parametrize("written", ["0", "-5", "5m", "k", "1.2345k", "five", "", "1e3", "0.5", "inf"])
def test_what_is_no_number_of_parameters(written: str):
    with pytest.raises(UsageError) as error:
        parse_number(written, "--params")
    found = written if written in ("0", "-5") else repr(written)
    assert str(error.value) == (
        f"--params: expected a positive whole number, found {found}. For example --params 600000, or 5k, or 1.2M."
    )


# the shell


def completed(line: str, folder: Path = ROOT) -> list[str]:
    """What bash is offered for the last word of a line."""
    asked = {"_TNPEFT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    code = "from tnpeft.cli import app; app(prog_name='tnpeft')"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run_in = {**os.environ, **asked, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=run_in
    ).stdout.split()


def test_the_shell_completes_names_of_specs_and_files(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    for file in ("tenvoo_mine.yaml", "tenvoo.txt"):
        (tmp_path / file).write_text("")
    assert completed("tnpeft show tenvoo", tmp_path) == ["tenvoo_l", "tenvoo_q", "tenvoo_mine.yaml"]
    assert complete_what(f"{tmp_path}/fo") == [f"{tmp_path}/folder/"]
    assert complete_what(f"{tmp_path}/none/fo") == []
    assert complete_what("lora_d")[:1] == ["lora_ddpm"]
    assert complete_kind("Conv3") == ["Conv3d:"]
    assert complete_model("monai:m") == ["monai:maisi", "monai:maisi-controlnet"]
    assert (complete_source("te"), complete_target("te")) == (["tenvoo"], [])


# notes


def test_a_prime_count_is_told_and_the_advice_can_be_followed(tmp_path: Path):
    shown = data("show", "quanta", "--layer", "Linear:97,96")
    (note,) = shown["notes"]
    assert note.startswith(
        "97 is prime: i1 i2 i3 are 97 x 1 x 1. "
        "With `i1 i2 i3: factorize(in_features, 3, pad=true)` they are 5 x 5 x 4, "
    )
    assert text("show", "quanta", "--layer", "Linear:97,96").splitlines()[-1] == f"note          {note}"
    file = tmp_path / "mine.yaml"
    text("new", file, "--from", "quanta")
    file.write_text(file.read_text().replace("factorize(in_features, 3)", "factorize(in_features, 3, pad=true)"))
    after = data("show", file, "--layer", "Linear:97,96")
    assert after["notes"] == []
    assert after["parameters"] < shown["parameters"]
    assert note.endswith(f"and {after['parameters']:,} parameters train instead of {shown['parameters']:,}.")


@pytest.mark.parametrize(
    ("spec", "layer"), [("quanta", "Linear:96,96"), ("tt_lora", "Linear:97,97"), ("lora", "Linear:97,97")]
)
def test_no_note_where_counts_factor_or_are_padded(spec: str, layer: str):
    assert data("show", spec, "--layer", layer)["notes"] == []
