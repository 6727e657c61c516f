"""Files that are something else: said by their first bytes, wherever an adapter, a checkpoint or a spec is expected."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from saved import refused, trained
from small import net
from terminal import mistakes, run

import tnpeft
from tnpeft.documents.recognise import recognise
from tnpeft.errors import AdapterFileError, SpecError
from tnpeft.fitting.checkpoint import Checkpoint
from tnpeft.spec.library import shipped_folder

EXPORT = "Save the weights as safetensors with the library that made it."
UNPACK = "Unpack it, and pass the file inside."
DAMAGED = "Copy or download the file again, or save the adapter once more."


def of(make) -> bytes:
    stream = io.BytesIO()
    make(stream)
    return stream.getvalue()


def zipped(stream: io.BytesIO) -> None:
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.txt", "a")


def tarred(stream: io.BytesIO) -> None:
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"))


KINDS = {
    "gzip": (gzip.compress(b"a"), "a gzip archive", UNPACK),
    "tar": (of(tarred), "a tar archive", UNPACK),
    "zip": (of(zipped), "a zip archive", UNPACK),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "an HDF5 file", EXPORT),
    "onnx": (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:", "an ONNX model", "Pass the weights that it was exported from."),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(20), "a GGUF file", "Pass the safetensors that it was made from."),
    "html": (
        b"\n<!DOCTYPE html>\n<html><body>404",
        "a web page",
        "Download the file itself: on the Hugging Face Hub its address has `resolve`, not `blob`.",
    ),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "a pointer of git-lfs, not the file itself",
        "Run `git lfs pull` where it was cloned.",
    ),
    "empty": (b"", "an empty file", DAMAGED),
    "json": (b'{"r": 4}', "a JSON file", DAMAGED),
    "text": (b"r: 4\n", "a text file", DAMAGED),
    "torch": (
        of(lambda stream: torch.save({"a": torch.ones(2), "epoch": 1}, stream)),
        "a torch pickle",
        "Pass a file written by `tnpeft.save`; `tnpeft.load_foreign` reads those of other libraries.",
    ),
    "pickle": (
        pickle.dumps({"a": 1}),
        "a pickle",
        "Pass a file written by `tnpeft.save`; `tnpeft.load_foreign` reads those of other libraries.",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_adapter_file(kind, tmp_path):
    data, found, fix = KINDS[kind]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    text = f"FILE: adapter file: expected a complete safetensors file, found {found}. {fix}"
    assert refused(net(), path) == text
    with pytest.raises(AdapterFileError) as excinfo:
        Checkpoint(path)
    assert f"{path}: checkpoint: expected a complete safetensors file, found {found}. " in str(excinfo.value)
    if kind not in ("torch", "pickle"):
        with pytest.raises(AdapterFileError) as excinfo:
            tnpeft.load_foreign(net(), path)
        start = f"{path}: adapter file: expected a complete safetensors or torch file, found {found}. "
        assert str(excinfo.value).startswith(start)


def test_a_torch_pickle_says_how_to_convert_it_and_that_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(3, 2)
    state = {**model.state_dict(), "tied": model.weight, "turned": torch.ones(2, 3).T}
    torch.save({"model": state}, "base.pt")
    with pytest.raises(AdapterFileError) as excinfo:
        Checkpoint("base.pt")
    assert str(excinfo.value) == (
        "base.pt: checkpoint: expected a complete safetensors file, found a torch pickle. Write "
        "`safetensors.torch.save_file({k: v.clone().contiguous() for k, v in torch.load('base.pt', weights_only=True)"
        "['model'].items()}, 'base.safetensors')` once."
    )
    import safetensors.torch

    exec(str(excinfo.value).split("`")[1], {"safetensors": safetensors, "torch": torch})
    assert set(load_file("base.safetensors")) == set(state)


@pytest.mark.parametrize("file", ["base.pt", "base.safetensors"])
def test_a_state_dict_of_torch_is_read_as_it_is(file, tmp_path):
    state = {"w": A, "turned": A.T, "tied": A, "half": A.half(), "steps": torch.tensor(3)}
    torch.save(state, tmp_path / file)
    read = Checkpoint(tmp_path / file)
    assert list(read) == list(state)
    assert all(torch.equal(read[name], state[name]) and read[name].dtype == state[name].dtype for name in state)


def test_a_tensor_that_is_not_whole_in_its_file_is_not_read(tmp_path):
    torch.save({"w": torch.zeros(1).expand(1 << 20, 1 << 20)}, tmp_path / "small.pt")
    with pytest.raises(AdapterFileError) as excinfo:
        Checkpoint(tmp_path / "small.pt")
    assert "found a torch pickle" in str(excinfo.value)


W, A = torch.ones(2, 3), torch.arange(6.0).reshape(2, 3)
STATES = {
    "numbers beside tensors": ({"w": W, "epoch": 3}, "", " if isinstance(v, torch.Tensor)", {"w": W}),
    "one entry": ({"unet_state_dict": {"w": W, "b": A.T}, "scale_factor": 1.0}, "['unet_state_dict']", "", None),
    "a tensor beside it": ({"state": {"w": W, "b": A.T}, "scale": torch.ones(())}, "['state']", "", None),
    "an entry of an entry": ({"a": {"model": {"w": W, "b": A.T}}, "n": {}}, "['a']['model']", "", None),
    "beside an optimiser": (
        {"model": {"w": W, "b": A.T}, "opt": {"state": {0: {"m": W}}, "m": {"x": W}}},
        *("['model']", "", None),
    ),
}


@pytest.mark.parametrize("file", ["base.pt", "base.safetensors"])
@pytest.mark.parametrize("kind", STATES)
def test_the_advice_on_a_torch_pickle_takes_the_entry_with_the_tensors(kind, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, place, only, expected = STATES[kind]
    start = "Write" if file == "base.pt" else "Rename it to `base.pt`, then write"
    torch.save(content, file)
    (line,) = mistakes("fit", file, file, "--spec", "lora", "--match", "all", "-m", "torch.nn:Flatten",
                       "-o", "x.safetensors")  # fmt: skip
    assert line == (
        f"{file}: checkpoint: expected a complete safetensors file, found a torch pickle. {start} "
        "`safetensors.torch.save_file({k: v.clone().contiguous() for k, v in "
        f"torch.load('base.pt', weights_only=True){place}.items(){only}}}, 'base.safetensors')` once."
    )
    import safetensors.torch

    Path(file).rename("base.pt")
    exec(line.split("`")[-2], {"safetensors": safetensors, "torch": torch})
    found, expected = load_file("base.safetensors"), expected or {"w": W, "b": A.T}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_the_advice_on_torch_pickles_of_several_models_and_of_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"w": W}, "ema": {"w": A}}, "both.pt")
    with pytest.raises(AdapterFileError) as excinfo:
        Checkpoint("both.pt")
    assert str(excinfo.value).endswith(
        "for k, v in torch.load('both.pt', weights_only=True)['model'].items()}, 'both.safetensors')` once. "
        "It takes `['model']`: write `['ema']` there for the other tensors."
    )
    for content in ({"epoch": 3}, 5, {"model": torch.nn.Linear(1, 1)}):
        torch.save(content, "none.pt")
        with pytest.raises(AdapterFileError) as excinfo:
            Checkpoint("none.pt")
        assert str(excinfo.value) == (
            "none.pt: checkpoint: expected a complete safetensors file, found a torch pickle. Load its state dict and "
            "write it with `safetensors.torch.save_file(state_dict, 'none.safetensors')`."
        )


def test_folders(tmp_path):
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    assert refused(net(), tmp_path / "peft") == (
        "FILE: adapter file: expected a file, found a folder with PEFT's adapter. "
        "Put it on a model with `tnpeft.load_foreign`."
    )
    (tmp_path / "run").mkdir()
    tnpeft.save(trained(), tmp_path / "run" / "best.safetensors")
    assert refused(net(), tmp_path / "run") == (
        "FILE: adapter file: expected a file, found a folder. Name a file in it, for example `best.safetensors`."
    )


def test_an_adapter_file_where_a_spec_is_expected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tnpeft.save(trained(), "adapter.safetensors")
    fix = "`tnpeft inspect adapter.safetensors` shows it. `tnpeft.load` puts it on a model."
    for command in (["show"], ["verify"], ["draw", "-o", "x.svg"], ["check"]):
        name, *options = command
        (line,) = mistakes(name, "adapter.safetensors", *options)
        what = "spec or recipe" if name == "check" else "spec"
        assert line == f"{what} 'adapter.safetensors': expected a YAML file, found an adapter file. {fix}"
    with pytest.raises(SpecError) as excinfo:
        tnpeft.attach(net(), "adapter.safetensors", match=".")
    assert str(excinfo.value) == (
        f"recipe or spec 'adapter.safetensors': expected a YAML file, found an adapter file. {fix}"
    )
    save_file({"a": torch.ones(1)}, "sub.safetensors")
    assert mistakes("show", "./sub.safetensors") == [
        "spec 'sub.safetensors': expected a YAML file, found a safetensors file. "
        "`tnpeft inspect sub.safetensors` shows it."
    ]
    torch.save({}, "base.pt")
    assert mistakes("show", "base.pt") == [
        "spec 'base.pt': expected a YAML file, found a torch pickle. Give the name of a shipped spec, or a YAML file."
    ]
    Path("spec").write_text((shipped_folder() / "lora.yaml").read_text())
    assert run("show", "./spec").exit_code == 0


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    head=st.sampled_from([data for data, *_ in KINDS.values()]) | st.binary(max_size=40),
    cut=st.integers(0, 400),
    more=st.binary(max_size=300),
)
def test_any_bytes_are_recognised_or_not_without_a_crash(tmp_path, head, cut, more):
    path = tmp_path / "x"
    path.write_bytes(head[:cut] + more)
    kind = recognise(path)
    assert kind is None or (kind.text[0].islower() and "\n" not in kind.text + kind.fix)
    text = refused(net_, path)
    assert text.startswith("FILE: ")
    assert "\n" not in text


net_ = net()


def test_safetensors_headers(tmp_path):
    path = tmp_path / "x"
    header = json.dumps({"__metadata__": {"tnpeft": "x"}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert recognise(path).name == "adapter"
    path.write_bytes((len(header) + 1).to_bytes(8, "little") + header)
    assert recognise(path).name == "cut"
    path.write_bytes((5).to_bytes(8, "little") + b"{1, 2}")
    assert recognise(path).name == "safetensors"
    assert recognise(tmp_path / "none") is None
