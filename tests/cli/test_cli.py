"""The command line: what it prints, as JSON and as text, and what it says when used wrongly."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packages import packages_after
from terminal import data, mistakes, run, text

import tnpeft
from tnpeft.planning import nominal_call
from tnpeft.schedule import predict

ROOT = Path(__file__).parents[2]
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
    show = "app(['show', 'tenvoo_l', '--layer', 'Conv3d:64,128,3', '--json'], standalone_mode=False)"
    assert "torch" not in packages_after(f"from tnpeft.cli import app; {show}")


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
    assert f"ok     {SPECS / 'factors' / 'tenvoo.yaml'} (factors)" in lines
    assert f"ok     {SPECS / 'tenvoo_l.yaml'} (spec)" in lines
    assert f"ok     {SPECS / 'recipes' / 'tenvoo_l_ddpm.yaml'} (recipe)" in lines
    count = sum(line.startswith("ok ") for line in lines)
    assert lines[-1] == f"{count} files, {count} without mistakes, 0 mistakes"


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
    assert len(in_bad.value.problems) == 3  # `r` has no size, once for both cores
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


def test_check_passes_over_other_files_of_a_folder_but_not_when_named(tmp_path: Path):
    other, hidden, spec = tmp_path / "config.yaml", tmp_path / ".venv" / "x.yaml", tmp_path / "one.yml"
    hidden.parent.mkdir()
    hidden.write_text("a: 1\n")
    other.write_text("data: {root: here}\n")
    spec.write_text((SPECS / "lora.yaml").read_text())
    assert text("check", tmp_path).splitlines() == [
        f"passed {other} (no spec, recipe or factor table)",
        f"ok     {spec} (spec)",
        "1 file, 1 without mistakes, 0 mistakes",
    ]
    assert len(mistakes("check", other)) > 1


def test_check_an_empty_name():
    assert mistakes("check", "") == [
        "spec '': expected a YAML file, or the name of a shipped spec, found neither. `tnpeft list` prints the names."
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
    assert list(facts) == ["path", "FLOPs", "memory", "largest", "mode", "auto"]
    assert facts["largest"] == "720 elements in one step's result"
    assert facts["mode"] == "dense"
    assert facts["auto"].split(" for ")[1] == "batch 1, 16x16 -> 16x16 on cpu"


def test_show_where_there_is_only_ascii():
    command = [sys.executable, "-m", "tnpeft", "show", "lora", "--layer", "Linear:6,4"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, check=True, cwd=ROOT, env=environment)
    assert done.stderr == b""
    assert b"down    o-o" in done.stdout


def test_show_as_json():
    shown = data("show", "tenvoo_l", "--layer", "Conv3d:64,128,3", "--set", "r=8")
    network = tnpeft.load_spec("tenvoo_l").bind("Conv3d", in_channels=64, out_channels=128, kernel_size=3, r=8)
    plan = tnpeft.plan(network)
    assert list(shown) == [
        *("spec", "title", "source", "layers", "start", "compose", "cores", "layer", "params", "sizes", "weight"),
        *("terms", "weight_shape", "derived", "scale", "einsum", "parameters", "formula", "share", "plan", "execution"),
        "notes",
    ]
    assert shown["notes"] == []
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
        "turned": False,
        "opaque": False,
        "slices": 0,
    }
    assert shown["cores"][-1] == {
        "name": "centre",
        "legs": ["j", "s", "t"],
        "frozen": False,
        "shared": None,
        "from": None,
        "shape": [8, 8, 8],
        "init": {"name": "kaiming_uniform", "arguments": {"fan": 16.0, "gain": pytest.approx(2**0.5)}},
        "elements": 512,
    }
    assert shown["plan"] == {
        "mode": "dense",
        "maps": 0,
        "path": [list(pair) for pair in plan.path],
        "terms": [],
        "flops": plan.flops,
        "largest_intermediate": 128 * 64 * 27,
        "peak_bytes": plan.peak_bytes,
    }


LINKS = """\

factored
  link 1: down, collects k.0 k.1: (i) 64 -> (r) 4 channels  590 kFLOP
  link 2: up: (r) 4 -> (o) 128 channels  131 kFLOP"""


def test_show_what_a_call_takes_in_each_mode():
    command = ("show", "lora", "--layer", "Conv2d:64,128,3", "--input", "2,64,8,8")
    printed = text(*command)
    assert printed.endswith(LINKS)
    heading, *rows = printed.removesuffix(LINKS).splitlines()[-4:]
    assert heading.split() == ["mode", "forward", "backward", "step", "FLOPs", "peak", "saved"]
    assert [row.split()[0] for row in rows] == ["dense", "factored", "hybrid"]
    shown = data(*command)["execution"]
    assert [row.split()[0] for row in rows if row.endswith("auto")] == [shown["auto"]]
    for row, known in zip(rows, shown["modes"].values(), strict=True):
        times = [f"{known[name]:.3g} ms" for name in ("forward_ms", "backward_ms", "step_ms")]
        assert re.split(r"  +", row)[1:5] == [*times, f"{known['flops']:,}"]
    (line,) = (line for line in printed.splitlines() if line.startswith("auto"))
    assert line.startswith(f"auto          {shown['auto']}")
    assert line.endswith("for batch 2, 8x8 -> 8x8 on cpu")
    assert ("without gradients" in line) == (shown["inference"] != shown["auto"])


def test_show_which_modes_take_more_memory_than_auto_gives():
    printed = text("show", "lora", "--layer", "Conv3d:32,32,3", "--input", "1,32,160,224,160")
    rows = {line.split()[0]: line for line in printed.splitlines() if " ms " in line}
    assert rows["dense"].rstrip().endswith("auto")
    for mode in ("factored", "hybrid"):
        assert rows[mode].rstrip().endswith("more memory than `auto` gives it")


def test_show_what_a_call_takes_as_json():
    shown = data("show", "lora", "--layer", "Conv2d:64,128,3", "--input", "2,64,8,9")["execution"]
    layer = tnpeft.load_spec("lora").bind("Conv2d", in_channels=64, out_channels=128, kernel_size=3)
    assert (shown["device"], shown["batch"], shown["inputs"], shown["outputs"]) == ("cpu", 2, [8, 9], [8, 9])
    assert list(shown["modes"]) == ["dense", "factored", "hybrid"]
    for mode in ("dense", "factored", "hybrid"):
        call = nominal_call(layer.layer, 2, (8, 9))
        plan = tnpeft.plan(layer, mode, call)
        cost = predict(plan, call)
        assert shown["modes"][mode] == {
            "runs": mode,
            "reason": None,
            "forward_ms": pytest.approx(cost.forward * 1e3),
            "backward_ms": pytest.approx(cost.backward * 1e3),
            "step_ms": pytest.approx(cost.step * 1e3),
            "flops": plan.flops,
            "peak_bytes": plan.peak_bytes,
            "saved_bytes": plan.saved_bytes,
        }
    assert shown["chain"] == [
        [
            {
                "cores": ["down"],
                "kernel": ["k.0", "k.1"],
                "spreads": False,
                "before": ["i"],
                "after": ["r"],
                "flops": 2 * 2 * 72 * 64 * 4 * 9,
            },
            {
                "cores": ["up"],
                "kernel": [],
                "spreads": True,
                "before": ["r"],
                "after": ["o"],
                "flops": 2 * 2 * 72 * 4 * 128,
            },
        ]
    ]


def test_show_says_why_a_layer_runs_dense():
    command = ("show", "lora", "--layer", "Conv2d:4,4,3,groups=2", "--input", "2,4,8,8")
    why = "groups=2: each group has its own input"
    dense, factored, hybrid = text(*command).splitlines()[-3:]
    assert dense.endswith("  auto")
    assert factored.endswith(f"  as dense ({why})")
    assert hybrid.endswith(f"  as dense ({why})")
    shown = data(*command)["execution"]
    assert (shown["auto"], shown["inference"], shown["chain"]) == ("dense", "dense", None)
    assert (shown["modes"]["hybrid"]["runs"], shown["modes"]["hybrid"]["reason"]) == ("dense", why)


@pytest.mark.parametrize(("spec", "sizes"), [("lora", "64"), ("lora", "3, 8, 64"), ("glora", "8,64")])
def test_show_a_call_of_a_linear(spec: str, sizes: str):
    shown = data("show", spec, "--layer", "Linear:64,32", "--input", sizes)["execution"]
    assert shown["batch"] == math.prod(map(int, sizes.split(",")[:-1]))
    assert shown["inputs"] == []


def test_show_the_terms_of_a_chain(tmp_path: Path):
    path = tmp_path / "two.yaml"
    path.write_text(
        "tnpeft: 1\nname: two\nlayers: [Linear]\nsizes: {o: out_channels, i: in_channels}\nbond: 2\n"
        "cores: {a: o r, b: {legs: r i, init: zeros}, c: o s, d: {legs: s i, init: zeros}}\n"
        "terms: [{cores: [a, b], weight: o i}, {cores: [c, d], weight: o i}]\nstart: zero\n"
    )
    printed = text("show", path, "--layer", "Linear:6,4", "--input", "5,6")
    assert printed.endswith(
        "\nfactored, term 1\n"
        "  link 1: b: (i) 6 -> (r) 2 channels  120 FLOP\n"
        "  link 2: a: (r) 2 -> (o) 4 channels  80 FLOP\n"
        "\nfactored, term 2\n"
        "  link 1: d: (i) 6 -> (s) 2 channels  120 FLOP\n"
        "  link 2: c: (s) 2 -> (o) 4 channels  80 FLOP"
    )


@pytest.mark.parametrize(
    ("layer", "sizes", "message"),
    [
        (
            "Conv3d:64,128,3",
            "1,64,big",
            "the input's sizes: expected whole numbers with commas, found '1,64,big'. "
            "Write it like --input 1,64,24,24,24.",
        ),
        (
            "Linear:6,4",
            "",
            "the input's sizes: expected whole numbers with commas, found ''. Write it like --input 1,6.",
        ),
        (
            "Conv3d:64,128,3",
            "1,64,24,24",
            "the input's axes: expected 5 for Conv3d: batch, channels and the kernel's 3, found 4. "
            "Write it like --input 1,64,24,24,24.",
        ),
        (
            "ConvTranspose1d:8,4,3",
            "1,4,9",
            "the input's channels: expected 8, found 4. Write it like --input 1,8,24.",
        ),
        ("Linear:6,4", "6,4", "the input's channels: expected 6, found 4. Write it like --input 1,6."),
        ("Conv1d:6,4,3", "1,6,0", "the input's sizes: expected positive numbers, found a zero. Mend that number."),
    ],
)
def test_show_with_an_input_that_is_none(layer: str, sizes: str, message: str):
    shown = f"--input {sizes}: {message}"
    assert mistakes("show", "lora", "--layer", layer, "--input", sizes, status=2) == [shown]


def test_show_with_an_input_but_no_layer():
    assert mistakes("show", "lora", "--input", "1,64", status=2) == [
        "--input without --layer: expected a layer to call, found none. Add --layer, e.g. --layer Conv3d:64,128,3."
    ]


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
    assert list(data("show", "quanta")) == ["spec", "title", "source", "layers", "start", "compose", "cores"]


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
    assert mistakes("show", "tenvoo_m") == [
        "spec 'tenvoo_m': expected a YAML file, or the name of a shipped spec, found neither. Did you mean `tenvoo_q`?"
    ]


def test_show_a_spec_on_a_layer_it_is_not_for():
    assert mistakes("show", "quanta", "--layer", "Conv1d:4,4,3") == [
        "spec 'quanta': expected one of Linear, found Conv1d. Choose another spec, or add the kind to its `layers`."
    ]


def test_an_unknown_command_is_a_usage_error():
    result = run("chek", "lora")
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert "chek" in result.output
