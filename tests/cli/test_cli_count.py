"""`tnpeft count`: what trains on a model, and models that are none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from terminal import data, mistakes, text

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
                "mode": "auto",
                "chosen": None,
                "cores": 14,
                "bias": 6,
                "weight": 48,
            }
        ],
        "shared": [],
        "cores": 14,
        "bias": 6,
        "norm": 12,
        "also": 0,
        "trained": 32,
        "base": 138,
        "share": 32 / 138,
        "factors": {},
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
    assert line.endswith(". Run `pip install 'tnpeft[demo]'`.")


ON_META = "It is called without arguments, on the meta device: what reads values or files cannot stand in it."


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "monai:ddpm-papr",
            "the model: expected one of monai:ddpm-paper, monai:maisi, monai:maisi-controlnet, "
            "found 'monai:ddpm-papr'. Did you mean `monai:ddpm-paper`?",
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
            r"Add --match, e.g. --match 'attn\.to_[qv]$', or --match all.",
        ),
        (
            ("lora_ddpm", "--model", "m:f", "--match", "x"),
            "recipe 'lora_ddpm': expected its own patterns, found --match 'x'. Leave --match out, or count a spec.",
        ),
        (
            ("lora", "--model", "m:f", "--match", "x", "--set", "alpa=1"),
            "--set alpa: expected one of r, alpha, found `alpa`. Did you mean `alpha`?",
        ),
        (
            ("lora", "--model", "m:f", "--match", "x", "--set", "seed=1"),
            "--set seed: expected one of r, alpha, found `seed`. Remove it.",
        ),
        (
            ("lora", "--model", "tiny", "--match", "x"),
            "--model: the model: expected package.module:factory, found 'tiny'. "
            "Write it like `my_package.models:build_unet`, or one of monai:ddpm-paper, monai:maisi, "
            "monai:maisi-controlnet.",
        ),
    ],
)
def test_count_used_wrongly(arguments: tuple[str, ...], message: str):
    assert mistakes("count", *arguments, status=2) == [message]


def test_count_an_unknown_name():
    assert mistakes("count", "lora_ddmp", "--model", "m:f") == [
        "recipe or spec 'lora_ddmp': expected a YAML file, or the name of a shipped recipe or spec, found neither. "
        "Did you mean `lora_ddpm`?"
    ]


def test_count_a_pattern_that_matches_nothing(models: str):
    (line,) = mistakes("count", "lora", "--model", f"{models}:tiny", "--match", "conv")
    assert line.startswith("spec 'lora', match 'conv': expected at least one layer, found none.")
