"""`tnpeft convert`: files between libraries, on the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from foreign import Net, X, adapted, assert_same, loaded
from safetensors.torch import load_file
from terminal import data, mistakes, run, text

import tnpeft

MODEL = "foreign:Net"


@pytest.fixture
def peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LoRA of rank 2 in PEFT's folder, and a working directory of its own."""
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1]), *sys.path])
    monkeypatch.chdir(tmp_path)
    tnpeft.save_foreign(adapted("lora", "line|conv2", r=2, alpha=3), "theirs", "peft")
    return Path("theirs")


def test_from_one_library_to_the_others(peft: Path):
    printed = text("convert", peft, "ours.safetensors", "--model", MODEL)
    assert printed.splitlines() == [
        "theirs (peft) -> ours.safetensors (tnpeft)",
        "2 layers, 348 parameters, read as lora",
    ]
    expected = loaded(peft)(X)
    model = Net()
    handle = tnpeft.load(model, "ours.safetensors")
    assert handle.name == "default"
    assert_same(model.eval()(X), expected)

    document = data("convert", "ours.safetensors", "theirs.safetensors", "--model", MODEL, "--to", "lycoris")
    assert document == {
        "source": "ours.safetensors",
        "target": "theirs.safetensors",
        "from": "tnpeft",
        "to": "lycoris",
        "model": MODEL,
        "name": "default",
        "layers": 2,
        "specs": ["lora"],
        "parameters": 348,
    }
    text("convert", "theirs.safetensors", "again", "--model", MODEL, "--from", "lycoris", "--to", "peft")
    assert_same(loaded(Path("again"))(X), expected)


@pytest.mark.parametrize("kind", ["diffusers", "kohya", "comfyui"])
def test_to_pipelines_and_back(kind: str, peft: Path):
    text("convert", peft, "theirs.safetensors", "-m", MODEL, "--to", kind)
    printed = text("convert", "theirs.safetensors", "ours.safetensors", "-m", MODEL)
    assert printed.splitlines()[0] == f"theirs.safetensors ({kind}) -> ours.safetensors (tnpeft)"
    model = Net()
    tnpeft.load(model, "ours.safetensors")
    assert_same(model.eval()(X), loaded(peft)(X))


def test_a_prefix_of_its_own(peft: Path):
    text("convert", peft, "theirs.safetensors", "-m", MODEL, "--to", "diffusers", "--prefix", "unet")
    assert all(key.startswith("unet.") for key in load_file("theirs.safetensors"))
    assert mistakes("convert", peft, "x", "-m", MODEL, "--prefix", "unet", status=2) == [
        "--prefix: expected none for a file of tnpeft, found 'unet'. Leave it out, or add --to diffusers, say."
    ]


def test_a_name_of_its_own(peft: Path):
    text("convert", peft, "ours.safetensors", "-m", MODEL, "--name", "adni")
    assert tnpeft.load(Net(), "ours.safetensors").name == "adni"


def test_mistakes(peft: Path):
    assert mistakes("convert", peft, "x", "-m", MODEL, "--to", "pft", status=2) == [
        "--to: expected one of tnpeft, peft, diffusers, lycoris, kohya, comfyui, found 'pft'. Did you mean `peft`?"
    ]
    assert mistakes("convert", peft, "x", "-m", MODEL, "--from", "onnx", status=2) == [
        "--from: expected one of peft, diffusers, lycoris, kohya, comfyui, tenvoo, tnpeft, found 'onnx'. Choose one of "
        "them."
    ]
    assert mistakes("convert", "none", "x", "-m", MODEL) == [
        "none: adapter file: expected a file, or a folder of PEFT or diffusers, found no such file. Check the path."
    ]
    assert mistakes("convert", peft, "no/where.safetensors", "-m", MODEL) == [
        "no/where.safetensors: adapter file: expected to be written, found No such file or directory. "
        "Choose a folder that exists, can be written to and has room."
    ]
    assert mistakes("convert", peft, "x", "-m", MODEL, "--alpha", "2") == [
        "theirs: `alpha`: expected none: the file holds it, found 2.0. Leave it out."
    ]
    text("convert", peft, "ours.safetensors", "-m", MODEL)
    assert mistakes("convert", "ours.safetensors", "x", "-m", MODEL, status=2) == [
        "--to: expected one of peft, diffusers, lycoris, kohya, comfyui, found none, for a file of tnpeft. Add --to "
        "peft, say."
    ]
    tnpeft.save(adapted("quanta", "line"), "quanta.safetensors")
    assert mistakes("convert", "quanta.safetensors", "x", "-m", MODEL, "--to", "peft") == [
        "x: layer 'line': spec 'quanta': expected the network of LoRA, LoCon, LoHa or LoKr, found "
        "`abcd,efgb,hiea->hifgcd`. Merge it into the model instead, or keep it in tnpeft's own file."
    ]
    assert mistakes("convert", peft, "x", "-m", "foreign:adapted") == [
        "--model foreign:adapted: calling the factory: expected a model, found TypeError: adapted() missing 2 required "
        "positional arguments: 'what' and 'match'. It is called without arguments."
    ]
    assert not Path("x").exists()
    assert run("convert", peft).exit_code == 2
