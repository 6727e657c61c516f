"""The benchmarks' scripts start, and time what they say they do; the numbers themselves are not looked at."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("monai", reason="the benchmarks' models need the `demo` extra")

import torch

import tnpeft

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if 'if __name__ == "__main__"' in path.read_text())
RECIPES = {"lora_ddpm", "loha_ddpm", "lokr_ddpm", "tenvoo_l_ddpm", "tenvoo_q_ddpm"}


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Runs a script of the folder in this process, and returns the results that it wrote."""
    monkeypatch.syspath_prepend(str(FOLDER))
    modules = {path.stem for path in FOLDER.glob("*.py")}

    def run(name: str, *arguments: str) -> dict | list | None:
        out = tmp_path / "results.json"
        monkeypatch.setattr(sys, "argv", [name, "--out", str(out), *arguments])
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        return json.loads(out.read_text())["results"] if out.exists() else None

    yield run
    for name in modules & set(sys.modules):  # their names are short, and the folder leaves the path again
        del sys.modules[name]


def tiny(*arguments: str) -> tuple[str, ...]:
    return ("--model", "tiny", "--size", "8", "--rounds", "1", *arguments)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_says_how_it_is_used(name, script, capsys):
    with pytest.raises(SystemExit) as excinfo:
        script(name, "--help")
    assert excinfo.value.code == 0
    assert "--out" in capsys.readouterr().out


def test_the_readme_has_every_script():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name for name in SCRIPTS if f"`{name}.py`" not in text] == []


@pytest.mark.slow
def test_a_step_of_each_method_is_timed_beside_full_and_floor(script):
    found = script("step_time", *tiny("--no-peers", "--only", "lora_ddpm", "cp", "lora_conv2d", "--specs", "all"))
    methods = found["methods"]
    assert set(methods) == {"full", "floor", "lora_ddpm", "cp"}
    assert methods["full"]["ratio"] == 1.0
    assert methods["lora_ddpm"]["layers"] == {"Linear": 21, "Conv3d": 20}
    assert methods["cp"]["layers"] == {"Conv3d": 20}
    assert sum(methods["cp"]["modes"].values()) == 20
    assert found["skipped"] == {
        "lora_conv2d": "supports Conv2d, ConvTranspose2d, none of which is adapted here",
    }


@pytest.mark.slow
def test_specs_that_need_the_weight_s_gradient_are_reported_only(script):
    names = ("ia3", "dora", "full", "glora", "rslora")
    found = script("step_time", *tiny("--no-peers", "--specs", *names, "--only", *names, "full as a spec"))
    reported = {name for name, about in found["methods"].items() if about["reported_only"]}
    assert reported == {"ia3", "dora", "full as a spec", "glora"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "peer"),
    [("lora_ddpm", "peft LoRA r=2"), ("loha_ddpm", "lycoris LoHa r=1"), ("lokr_tucker", "lycoris LoKr Tucker r=4")],
)
def test_other_libraries_are_timed_in_the_same_rounds(recipe, peer, script):
    pytest.importorskip(peer.split()[0], reason="the `peers` extra is not installed")
    methods = script("step_time", *tiny("--only", recipe, peer, "--specs", "lokr_tucker"))["methods"]
    assert list(methods[recipe]["peers"]) == [peer]
    assert methods[recipe]["seconds"] / methods[peer]["seconds"] == pytest.approx(methods[recipe]["peers"][peer])
    if "lokr" not in recipe:  # LyCORIS stores factors whole that are no larger
        assert methods[recipe]["trained"] == methods[peer]["trained"]


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_the_same_setting(script):
    first = script("step_time", *tiny("--only", "lora_ddpm", "--no-peers"))["methods"]
    both = script("step_time", *tiny("--only", "lora_ddpm", "loha_ddpm", "--no-peers", "--resume"))["methods"]
    assert both["lora_ddpm"] == first["lora_ddpm"]
    assert len(both["full"]["batches"]) == 2
    with pytest.raises(SystemExit) as excinfo:
        script("step_time", *tiny("--only", "lora_ddpm", "--resume", "--optimiser", "fused"))
    assert str(excinfo.value).endswith("has optimiser adam, not fused: leave `--resume` out.")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "parts"),
    [
        ("dense", {"delta weight", "sum with the weight", "delta weight, gradients"}),
        ("factored", {"clusters", "chain, forward", "clusters, gradients", "chain, backward"}),
        ("hybrid", {"clusters", "delta weight", "sum with the weight", "clusters, gradients", "chain, backward"}),
    ],
)
def test_the_profile_has_the_parts_of_each_mode(mode, parts, script):
    found = script("step_time", *tiny("--profile", "tenvoo_l_ddpm", "--mode", mode))
    assert found["modes"] == {mode: 41}
    over = found["over_floor"]
    assert set(over) == parts | {"optimiser", "rest, forward", "rest, backward"}
    assert all(over[part] > 0 for part in parts)
    step, floor = (
        sum(found["seconds"][name][phase] for phase in ("forward", "backward", "optimiser"))
        for name in ("tenvoo_l_ddpm", "floor")
    )
    assert sum(over.values()) == pytest.approx(step - floor)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "method", "layers"), [("tiny", "lora_ddpm", 41), ("llama", "lora", 56)])
def test_inference_is_timed_in_four_kinds_of_equal_outputs(model, method, layers, script):
    found = script("inference", "--model", model, "--size", "8", "--tokens", "2", "--rounds", "1", "--methods", method)
    about = found["methods"][method]
    assert list(about["kinds"]) == ["plain", "attached", "serving", "merged"]
    assert about["same_bits"]
    assert about["kept"].startswith(f"{layers} of {layers} layers, ")


@pytest.mark.slow
def test_numerics_of_every_way_to_the_update(script):
    rows = script("numerics", "--specs", "quanta")
    assert [row["step"] for row in rows] == [0.0, 1e-5, 1e-4, 1e-3]
    for row in rows:
        for way in ("tnpeft", "completed", "output tnpeft", "output factored"):
            assert row[f"{way} float32"] < 1e-6
            assert row[f"{way} bfloat16"] < 1e-2
        if row["step"] == 1e-5:
            assert row["plain float32"] > 1e-4
            assert row["output plain bfloat16"] > 1.0


@pytest.mark.slow
def test_planning_is_timed_by_cores_and_ranks(script):
    found = script("plan_time", "--cores", "8", "--layers", "--ranks", "2", "--rounds", "1")
    assert {row["shape"] for row in found["cores"]} >= {"chain", "cubic", "hyperedge"}
    assert found["layers"] == []
    assert all(row["first"] > 0 and sum(row["modes"].values()) == 1 for row in found["ranks"])


def test_stacks_of_layers_are_timed(script, capsys):
    script("plan_time", "--stack", "quanta", "Linear", "5")
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"attach", "again", "first", "later", "modes"}
    assert sum(found["modes"].values()) == 5


def test_the_methods_are_the_shipped_recipes_and_every_spec(script, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import methods

    assert set(methods.RECIPES) == RECIPES == {name for name in tnpeft.list_recipes() if name.endswith("_ddpm")}
    measured = {*methods.specs_named(["all"]), *methods.SAME_AS_RECIPE, "full"} - {methods.FULL_SPEC}
    assert measured == set(tnpeft.list_specs())
    for spec, recipe in methods.SAME_AS_RECIPE.items():
        assert {entry.spec.name for entry in tnpeft.load_recipe(recipe).entries} == {spec}
    for peer in methods.PEERS.values():
        versions = {version.removesuffix(methods.ON_LINEAR) for version in peer.versions}
        assert versions <= {*tnpeft.list_specs(), *RECIPES}
    assert torch.get_num_threads() > 0


@pytest.mark.slow
def test_attaching_is_timed_and_weighed(script, capsys):
    """One recipe in a process of its own, as the script has them all, and one here."""
    small = ("--model", "tiny", "--size", "8")
    found = script("attach", *small, "--recipes", "tenvoo_l_ddpm")
    assert list(found) == ["tenvoo_l_ddpm"]
    capsys.readouterr()
    script("attach", *small, "--recipe", "lora_ddpm")
    found["lora_ddpm"] = json.loads(capsys.readouterr().out)
    for about in found.values():
        assert about["first_s"] > 0
        assert about["again_s"] > 0
        assert about["tensors_mib"] > 0
    assert found["tenvoo_l_ddpm"]["folded_mib"] > found["lora_ddpm"]["folded_mib"] >= 0


@pytest.mark.slow
def test_switches_are_timed(script):
    found = script("switch", "--model", "tiny", "--size", "8", "--rounds", "2", "--recipes", "lora_ddpm")["recipes"]
    about = found["lora_ddpm"]
    assert {"attach", "save", "remove", "load", "to one", "to a sum", "to the base", "merge"} <= about["seconds"].keys()
    assert all(value > 0 for value in about["seconds"].values())
    assert about["switch_mib"]["to one"] == 0
    assert about["switch_mib"]["to a sum"] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks transformers
def test_models_of_linear_layers_are_timed_beside_peft(script):
    pytest.importorskip("transformers", reason="the models are its own")
    pytest.importorskip("peft", reason="its LoRA stands beside ours")
    found = script("linear_models", "--models", "tiny", "--rounds", "2")["models"]["tiny"]
    methods = found["methods"]
    assert {"full", "peft LoRA", "lora", "lora hybrid", "lora factored", "lora dense", "quanta", "tt_lora"} == {
        *methods
    }
    assert methods["lora"]["trained"] == methods["peft LoRA"]["trained"]
    assert all(about["seconds"] > 0 for about in methods.values())
    saved = {name: about["saved"] for name, about in methods.items()}
    assert saved["lora factored"] <= 1.05 * saved["peft LoRA"] < saved["lora dense"]
    for name in ("lora hybrid", "lora factored"):
        assert methods[name]["modes"] == {name.split()[1]: 7}
