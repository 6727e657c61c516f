"""The command line: what it prints, as JSON and as text, and what it says when used wrongly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import tnpeft
from tnpeft.cli import app

ROOT = Path(__file__).parent.parent
SPECS = ROOT / "specs"

TYPOS = """\
tnpeft: 1
name: typos
layers: [Linear]
sizes: {o: out_channels, i: in_chanels}
cores:
  up: o r
  down: {legs: r i, init: zeroes}
weight: o i
start: zero
"""


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def text(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return "\n".join(line.rstrip() for line in result.stdout.splitlines())


def data(*arguments: str | Path) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def mistakes(*arguments: str | Path, status: int = 1) -> list[str]:
    result = run(*arguments)
    assert result.exit_code == status, result.output
    return [line.removeprefix("error ") for line in result.stderr.splitlines()]


def test_version():
    assert text("version") == f"tnpeft {tnpeft.__version__}"
    assert data("version") == {"version": tnpeft.__version__}


def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "tnpeft", "version"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == f"tnpeft {tnpeft.__version__}\n"
    assert done.stderr == ""


def test_showing_a_spec_takes_no_torch():
    code = (
        "import sys; from tnpeft.cli import app;"
        "app(['show', 'tenvoo_l', '--layer', 'Conv3d:64,128,3', '--json'], standalone_mode=False);"
        "assert 'torch' not in sys.modules, 'torch'"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT)


# list


def test_list_names_everything_shipped():
    listed = data("list")
    assert {spec["name"] for spec in listed["specs"]} == set(tnpeft.list_specs())
    assert {recipe["name"] for recipe in listed["recipes"]} == set(tnpeft.list_recipes())
    printed = text("list")
    for name in (*tnpeft.list_specs(), *tnpeft.list_recipes()):
        assert name in printed.split()
    rows = [line.split() for line in printed.splitlines()]
    assert ["locon_tucker", "conv,", "conv_transpose", "zero"] in [row[:4] for row in rows]
    assert ["tenvoo_q_ddpm", "tenvoo_q,", "quanta"] in [row[:3] for row in rows]


# check


def test_check_a_folder():
    lines = text("check", SPECS).splitlines()
    assert lines[0] == f"ok     {SPECS / 'factors' / 'tenvoo.yaml'} (factors)"
    assert f"ok     {SPECS / 'tenvoo_l.yaml'} (spec)" in lines
    assert f"ok     {SPECS / 'recipes' / 'tenvoo_l_ddpm.yaml'} (recipe)" in lines
    assert lines[-1] == f"{len(lines) - 1} files, {len(lines) - 1} without mistakes, 0 mistakes"


def test_check_shipped_names():
    assert text("check", "lora", "lora_ddpm") == (
        "ok     lora (spec)\nok     lora_ddpm (recipe)\n2 files, 2 without mistakes, 0 mistakes"
    )


def test_check_prints_every_mistake_of_every_file(tmp_path: Path):
    bad, missing, table = tmp_path / "bad.yaml", tmp_path / "missing.yaml", tmp_path / "table.yaml"
    bad.write_text(TYPOS)
    table.write_text("12: [4, 4]\n")
    with pytest.raises(tnpeft.SpecError) as in_bad:
        tnpeft.load_spec(bad)
    assert len(in_bad.value.problems) == 4
    assert mistakes("check", bad, "lora", missing, table) == [
        *str(in_bad.value).splitlines(),
        f"{missing}: cannot read this spec: expected a readable file, found No such file or directory. Check the path.",
        f"{table}:1:1: `factors`, 12: expected factors with product 12, found 4 x 4 = 16. "
        "Mend the entry; others are factorised by rule.",
    ]


def test_check_as_json(tmp_path: Path):
    bad = tmp_path / "table.yaml"
    bad.write_text("12: [4, 4]\n")
    result = run("check", bad, "lora", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {
        "files": [
            {
                "file": str(bad),
                "kind": "factors",
                "ok": False,
                "problems": [
                    {
                        "where": f"{bad}:1:1",
                        "what": "`factors`, 12",
                        "expected": "factors with product 12",
                        "found": "4 x 4 = 16",
                        "fix": "Mend the entry; others are factorised by rule.",
                        "core": None,
                        "index": None,
                    }
                ],
            },
            {"file": "lora", "kind": "spec", "ok": True, "problems": []},
        ],
        "mistakes": 1,
    }


def test_check_an_empty_folder(tmp_path: Path):
    assert mistakes("check", tmp_path) == [
        f"{tmp_path}: nothing to check: expected YAML files in this folder, found none. Name another folder."
    ]


# show

LOHA = """\
loha: Low-rank Hadamard product
Hyeon-Woo et al. (FedPara), ICLR 2022, arXiv:2108.06098; Yeh et al., ICLR 2024, arXiv:2309.14859
on Conv2d(6, 8, 3x5), r = 2, alpha = 1

core    legs         shape          init             elements
up_1    o r          8 x 2          normal(std=0.1)        16
down_1  r i k.0 k.1  2 x 6 x 3 x 5  normal(std=1)         180
up_2    o s          8 x 2          zeros                  16
down_2  s i k.0 k.1  2 x 6 x 3 x 5  normal(std=1)         180

        o   r i  k.0 k.1 s
        8   2 6  3   5   2
up_1    ●───●
down_1  │   ●─●──●───●
up_2    ●─────┼──┼───┼───●
down_2  │     ●──●───●───●
weight  out   in k0  k1

parameters    392 = 2(o + i k...) r
of the weight 54.44% of 720
scale         0.5
start         zero
einsum        ab,bcde,af,fcde->acde
"""


def test_show_as_text():
    printed = text("show", "loha", "--layer", "Conv2d:6,8,3x5", "--set", "r=2", "--set", "alpha=1")
    assert printed.startswith(LOHA)
    facts = {line[:14].strip(): line[14:] for line in printed[len(LOHA) :].splitlines() if not line.startswith(" ")}
    assert list(facts) == ["path", "FLOPs", "memory", "largest", "mode"]
    assert facts["largest"] == "720 elements in one step's result"
    assert facts["mode"] == "dense"


def test_show_as_json():
    shown = data("show", "tenvoo_l", "--layer", "Conv3d:64,128,3", "--set", "r=8")
    network = tnpeft.load_spec("tenvoo_l").bind("Conv3d", in_channels=64, out_channels=128, kernel_size=3, r=8)
    plan = tnpeft.plan(network)
    assert list(shown) == [
        *("spec", "title", "source", "layers", "start", "cores", "layer", "params", "sizes", "weight", "weight_shape"),
        *("scale", "einsum", "parameters", "formula", "share", "plan"),
    ]
    assert shown["parameters"] == network.num_parameters == 21504
    assert shown["formula"] == network.formula
    assert shown["einsum"] == network.einsum
    assert shown["params"] == {"r": 8}
    assert shown["sizes"] == dict(network.sizes)
    assert shown["weight"] == [["o1", "o2", "o3"], ["i1", "i2", "i3"], ["kd"], ["kh"], ["kw"]]
    assert shown["weight_shape"] == [128, 64, 3, 3, 3]
    assert shown["layer"] == {
        "kind": "Conv3d",
        "in_channels": 64,
        "out_channels": 128,
        "kernel_size": [3, 3, 3],
        "groups": 1,
    }
    assert shown["cores"][-1] == {
        "name": "centre",
        "legs": ["j", "s", "t"],
        "frozen": False,
        "shape": [8, 8, 8],
        "init": {"name": "kaiming_uniform", "arguments": {"fan": 16.0, "gain": pytest.approx(2**0.5)}},
        "elements": 512,
    }
    assert shown["plan"] == {
        "mode": "dense",
        "path": [list(pair) for pair in plan.path],
        "flops": plan.flops,
        "largest_intermediate": 128 * 64 * 27,
        "peak_bytes": plan.peak_bytes,
    }


def test_show_without_a_layer():
    assert text("show", "quanta") == (
        "quanta: Quantum-informed tensor adaptation, three factors\n"
        "Chen et al., NeurIPS 2024, arXiv:2406.00132\n"
        "layers: Linear; start: frozen_copy\n"
        "\n"
        "core     legs\n"
        "gate_23  e f i2 i3\n"
        "gate_13  d o3 i1 f\n"
        "gate_12  o1 o2 d e\n"
        "\n"
        "Add --layer for shapes, parameters and costs, e.g. --layer Conv3d:64,128,3"
    )
    assert list(data("show", "quanta")) == ["spec", "title", "source", "layers", "start", "cores"]


def test_show_writes_wide_networks_as_a_list(tmp_path: Path):
    chain = "\n".join(f"  core_{n}: bond_number_{n} bond_number_{n + 1}" for n in range(30))
    wide = tmp_path / "wide.yaml"
    wide.write_text(
        "tnpeft: 1\nname: wide\nlayers: [Linear]\nbond: 2\n"
        "sizes: {bond_number_0: out_channels, bond_number_30: in_channels}\n"
        f"init: normal(0.1)\ncores:\n{chain}\nweight: bond_number_0 bond_number_30\nstart: frozen_copy\n"
    )
    lines = text("show", wide, "--layer", "Linear:6,4").splitlines()
    assert "bond_number_0 (4)  core_0, weight out" in lines
    assert "bond_number_1 (2)  core_0, core_1" in lines
    assert "bond_number_30 (6)  core_29, weight in" in lines


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            "Conv4d:64,128,3",
            "the kind of layer: expected one of Linear, Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, "
            "ConvTranspose3d, found 'Conv4d'. Did you mean `Conv3d`?",
        ),
        (
            "64,128",
            "the kind of layer: expected one of Linear, Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, "
            "ConvTranspose3d, found '64,128'. Write it like Conv3d:64,128,3.",
        ),
        (
            "Conv3d",
            "the layer's numbers: expected in,out,k or in,out,kxkxk[,groups=g], found ''. "
            "Write it like Conv3d:64,128,3.",
        ),
        (
            "Conv1d:8,8,x",
            "the layer's numbers: expected in,out,k[,groups=g], found '8,8,x'. Write it like Conv1d:64,128,3.",
        ),
        ("Linear:64", "the layer's numbers: expected in,out, found '64'. Write it like Linear:64,128."),
        ("Linear:64,128,3", "the kernel's axes: expected 0 for Linear, found 1. A Linear has no kernel: leave it out."),
        ("Conv3d:8,8,3x3", "the kernel's axes: expected 3 for Conv3d, found 2. Write it like Conv3d:64,128,3."),
        ("Conv2d:8,0,3", "the layer's numbers: expected positive numbers, found a zero. Mend that number."),
        ("Linear:8,8,groups=2", "groups: expected none for Linear, found 2. Leave `groups` out."),
        (
            "Conv2d:8,6,3,groups=4",
            "groups: expected channel counts that 4 divides, found 8 and 6. Mend `groups` or the channel counts.",
        ),
    ],
)
def test_show_on_a_layer_that_is_none(layer: str, message: str):
    assert mistakes("show", "lora", "--layer", layer, status=2) == [f"--layer {layer}: {message}"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("r", "a setting: expected name=number, found 'r'. Write it like --set r=8."),
        ("=4", "a setting: expected name=number, found '=4'. Write it like --set r=8."),
        ("r=eight", "a setting: expected a number, found 'eight'. Write it like --set r=8."),
        ("r=nan", "a setting: expected a finite number, found 'nan'. Write it like --set r=8."),
    ],
)
def test_show_with_a_setting_that_is_none(setting: str, message: str):
    assert mistakes("show", "lora", "--layer", "Linear:4,4", "--set", setting, status=2) == [
        f"--set {setting}: {message}"
    ]


def test_show_with_settings_but_no_layer():
    assert mistakes("show", "lora", "--set", "r=8", status=2) == [
        "--set without --layer: expected a layer to bind the params on, found none. "
        "Add --layer, e.g. --layer Conv3d:64,128,3."
    ]


def test_show_an_unknown_spec():
    known = ", ".join(tnpeft.list_specs())
    assert mistakes("show", "tenvoo_m") == [
        f"spec 'tenvoo_m': expected a file, or one of {known}, found neither. Did you mean `tenvoo_q`?"
    ]


def test_show_a_spec_on_a_layer_it_is_not_for():
    assert mistakes("show", "quanta", "--layer", "Conv1d:4,4,3") == [
        f"{SPECS / 'quanta.yaml'}: spec 'quanta': expected one of Linear, found Conv1d(4, 4, 3). "
        "Choose another spec, or add the kind to its `layers`."
    ]


def test_an_unknown_command_is_a_usage_error():
    result = run("chek", "lora")
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert "chek" in result.output


# count

MODELS = """
import torch
from torch import nn

def tiny():
    return nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Conv1d(6, 4, 3, bias=False))

def reads():
    return nn.Linear(2, 2).weight.sum().item()

def none():
    return None

number = 3
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with factories in the working directory, where the console script must find it."""
    (tmp_path / "some_models.py").write_text(MODELS)
    (tmp_path / "broken_models.py").write_text("def oh no")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "some_models", raising=False)
    return "some_models"


def test_count_a_spec(models: str):
    printed = text("count", "lora", "--model", f"{models}:tiny", "--match", "0|2", "--set", "r=2").splitlines()
    assert [line.split() for line in printed] == [
        ["lora", "on", f"{models}:tiny"],
        ["layer", "kind", "spec", "params", "weight", "cores", "bias"],
        ["0", "Linear(8,", "6)", "lora", "r=2", "alpha=2", "48", "28", "0"],
        ["2", "Conv1d(6,", "4,", "3)", "lora", "r=2", "alpha=2", "72", "44", "0"],
        [],
        ["layers", "2,", "their", "weights", "120"],
        ["cores", "72"],
        ["biases", "0"],
        ["norms", "0"],
        ["others", "0"],
        ["trained", "72", "of", "138", "(52.174%)"],
    ]


def test_count_a_recipe_of_ones_own(models: str, tmp_path: Path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "tnpeft: 1\nname: mine\nadapters: [{spec: lora, match: ^0$}]\ntrain: {bias: adapted, norm: true}\n"
    )
    counted = data("count", recipe, "--model", f"{models}:tiny", "--set", "r=1", "--set", "alpha=3")
    assert counted == {
        "what": str(recipe),
        "model": f"{models}:tiny",
        "name": "default",
        "layers": [
            {
                "name": "0",
                "layer": "Linear(8, 6)",
                "spec": "lora",
                "params": {"r": 1, "alpha": 3},
                "mode": "dense",
                "cores": 14,
                "bias": 6,
                "weight": 48,
            }
        ],
        "cores": 14,
        "bias": 6,
        "norm": 12,
        "also": 0,
        "trained": 32,
        "base": 138,
        "share": 32 / 138,
    }


def test_count_on_the_papers_model():
    pytest.importorskip("monai", reason="MONAI is not installed")
    counted = data("count", "tenvoo_l_ddpm", "--model", "monai:ddpm-paper")
    assert len(counted["layers"]) == 111
    assert (counted["cores"], counted["bias"], counted["norm"]) == (539_392, 23_168, 38_464)
    assert (counted["trained"], counted["base"]) == (601_024, 166_669_313)


def test_count_without_monai(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "monai.networks.nets.diffusion_model_unet", None)
    (line,) = mistakes("count", "lora_ddpm", "--model", "monai:ddpm-paper")
    assert line.startswith("--model monai:ddpm-paper: MONAI: expected monai 1.6 or newer, found ModuleNotFoundError: ")
    assert line.endswith(". Install it with `pip install 'tnpeft[demo]'`.")


ON_META = "It is called without arguments, on the meta device: what reads values or files cannot stand in it."


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "monai:ddpm-papr",
            "the model: expected one of monai:ddpm-paper, found 'monai:ddpm-papr'. Did you mean `monai:ddpm-paper`?",
        ),
        (
            "no_models:tiny",
            "importing no_models: expected a module, found ModuleNotFoundError: No module named 'no_models'. "
            "Run it where 'no_models' can be imported.",
        ),
        (
            "some_models:tony",
            "the factory: expected a function in some_models, found no 'tony' there. Did you mean `tiny`?",
        ),
        (
            "some_models:number",
            "the factory: expected a function or class, found a int. Name a function or class that makes the model.",
        ),
        (
            "some_models:none",
            "what the factory returns: expected a torch.nn.Module, found a NoneType. "
            "Let the factory return the model itself.",
        ),
    ],
)
def test_count_on_a_model_that_is_none(models: str, model: str, message: str):
    assert mistakes("count", "lora_ddpm", "--model", model) == [f"--model {model}: {message}"]


def test_count_on_a_factory_that_fails(models: str):
    (line,) = mistakes("count", "lora_ddpm", "--model", f"{models}:reads")
    assert line.startswith("--model some_models:reads: calling the factory: expected a model, found RuntimeError: ")
    assert line.endswith(ON_META)


def test_count_on_a_module_that_fails(models: str):
    (line,) = mistakes("count", "lora_ddpm", "--model", "broken_models:tiny")
    assert line.startswith(
        "--model broken_models:tiny: importing broken_models: expected a module, found SyntaxError: "
    )
    assert line.endswith(". Mend the module.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("lora", "--model", "tiny"),
            "spec 'lora': expected --match, which layers it goes on, found none. "
            r"Add --match, e.g. --match 'attn\.to_[qv]$'.",
        ),
        (
            ("lora_ddpm", "--model", "m:f", "--match", "x"),
            "recipe 'lora_ddpm': expected its own patterns, found --match 'x'. Leave --match out, or count a spec.",
        ),
        (
            ("lora", "--model", "m:f", "--match", "x", "--set", "alpa=1"),
            "--set alpa: expected one of alpha, r, found none of them. Did you mean `alpha`?",
        ),
        (
            ("lora", "--model", "m:f", "--match", "x", "--set", "seed=1"),
            "--set seed: expected one of alpha, r, found none of them. Remove it.",
        ),
        (
            ("lora", "--model", "tiny", "--match", "x"),
            "--model: the model: expected package.module:factory, found 'tiny'. "
            "Write it like `my_package.models:build_unet`, or one of monai:ddpm-paper.",
        ),
    ],
)
def test_count_used_wrongly(arguments: tuple[str, ...], message: str):
    assert mistakes("count", *arguments, status=2) == [message]


def test_count_an_unknown_name():
    known = ", ".join((*tnpeft.list_recipes(), *tnpeft.list_specs()))
    assert mistakes("count", "lora_ddmp", "--model", "m:f") == [
        f"recipe or spec 'lora_ddmp': expected a file, or one of {known}, found neither. Did you mean `lora_ddpm`?"
    ]


def test_count_a_pattern_that_matches_nothing(models: str):
    (line,) = mistakes("count", "lora", "--model", f"{models}:tiny", "--match", "conv")
    assert line.startswith("spec 'lora', match 'conv': expected at least one layer, found none.")
