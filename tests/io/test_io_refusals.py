"""Files that are no adapter, models that cannot be saved, bases that are others: each with its whole text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from saved import X, refused, rewritten, trained
from small import Net, attach, net, train
from torch import nn

from tnpeft.errors import AdapterFileError, AttachError
from tnpeft.io import load, save
from tnpeft.surgery import merge, trained_of

FOREIGN = "Pass a file written by `tnpeft.save`."
DAMAGED = "Copy or download the file again, or save the adapter once more."


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "adapter.safetensors"
    save(trained(), path)
    return path


def test_models_that_cannot_be_saved(tmp_path):
    path = tmp_path / "x.safetensors"
    assert refused(net(), path, save) == (
        "model: expected an attached adapter, found none. "
        "Attach one with `tnpeft.attach`, or pass the whole model that it was attached to."
    )
    model = trained()
    merge(model)
    assert refused(model, path, save) == (
        "FILE: model: expected an unmerged model, found a merged one. Call `tnpeft.unmerge(model)` first."
    )
    with torch.device("meta"):
        empty = Net()
    attach(empty)
    with pytest.raises(AdapterFileError) as excinfo:
        save(empty, path)
    assert str(excinfo.value) == (
        f"{path}: cores of layer 'first': expected values, found none (they were made on the meta device). "
        "Call `reset_parameters` of the adapted layer, or load the adapter, first."
    )
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    model = trained()
    assert refused(model, tmp_path, save) == (
        "FILE: adapter file: expected a file name, found a folder. Add a name, for example `adapter.safetensors`."
    )
    fix = "Choose a folder that exists, can be written to and has room."
    assert refused(model, tmp_path / "no" / "a", save) == (
        f"FILE: adapter file: expected to be written, found No such file or directory. {fix}"
    )
    (tmp_path / "plain").write_text("")
    assert refused(model, tmp_path / "plain" / "a", save) == (
        f"FILE: adapter file: expected to be written, found Not a directory. {fix}"
    )

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "kept"
    path.write_text("kept")
    monkeypatch.setattr(os, "fsync", full)
    assert (
        refused(model, path, save)
        == f"FILE: adapter file: expected to be written, found No space left on device. {fix}"
    )

    def interrupted(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(model, path)
    assert path.read_text() == "kept"
    assert sorted(found.name for found in tmp_path.iterdir()) == ["kept", "plain"]


def test_missing_files_and_folders(tmp_path):
    assert refused(net(), tmp_path / "no") == f"FILE: adapter file: expected a file, found no such file. {FOREIGN}"
    assert refused(net(), tmp_path) == f"FILE: adapter file: expected a file, found a folder. {FOREIGN}"


def test_devices_and_pipes_are_no_files(tmp_path):
    model, pipe, link = trained(), tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        assert refused(model, path, save) == (
            "FILE: adapter file: expected a new or an ordinary file, found a device, pipe or socket. "
            "Choose another path."
        )
        assert refused(net(), path) == (
            f"FILE: adapter file: expected a file, found a device, pipe or socket. {FOREIGN}"
        )
    assert pipe.is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"]


@pytest.mark.parametrize("act", [save, load])
def test_what_is_no_path(act, tmp_path):
    fix = "For example `adapter.safetensors`."
    for path, found in ((None, "None"), (5, "5"), (b"x", "b'x'"), ([], "[]")):
        assert refused(trained(), path, act) == f"path: expected a text or a `pathlib.Path`, found {found}. {fix}"
    for name, found in (("a\0b", r"'a\x00b'"), ("\ud800", r"'\ud800'")):
        assert refused(trained(), name, act) == (
            f"path: expected characters that a file's name can have, found {found}. {fix}"
        )
    long = tmp_path / ("x" * 300)
    assert refused(trained(), long, act) == (
        f"{ascii(str(long))[:196]}...': adapter file: expected a path that can be used, found File name too long. "
        "Choose another path."
    )
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_model_and_no_name(file):
    for model, found in ((None, "None"), (3, "3"), (nn.Linear, "the class Linear")):
        text = f"model: expected a torch.nn.Module, found {found}. Pass the model itself."
        with pytest.raises(AdapterFileError) as excinfo:
            save(model, file)
        assert str(excinfo.value) == text
        with pytest.raises(AttachError) as excinfo:
            load(model, file)
        assert str(excinfo.value) == text
    for name, found in (([], "[]"), (3, "3"), ("a\nb", r"'a\nb'")):
        assert refused(trained(), file, lambda model, path, name=name: save(model, path, name)) == (
            f"FILE: adapter name: expected one of 'adni', found {found}. Pass one of these names."
        )
        text = refused(net(), file, lambda model, path, name=name: load(model, path, name), AttachError)
        assert text == (
            "FILE: adapter name: expected ASCII letters, digits, `_` and `-`, the first a letter or a digit, "
            f"found {found}. Choose another name."
        )


def test_the_longest_name_can_be_saved(tmp_path):
    path = tmp_path / ("x" * 255)
    save(trained(), path)
    load(net(), path)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert refused(trained(), loop, save) == (
        "FILE: adapter file: expected a path that can be used, found Too many levels of symbolic links. "
        "Choose another path."
    )
    assert "\n" not in refused(net(), tmp_path / "a\nb")


def test_foreign_files(tmp_path):
    path = tmp_path / "x"
    safetensors.torch.save_file({"lora_A.weight": torch.zeros(2)}, path)
    assert refused(net(), path) == (
        f"FILE: adapter file: expected one written by tnpeft, found a safetensors file without its metadata. "
        f"{FOREIGN[:-1]}; `tnpeft.load_foreign` reads those of other libraries."
    )
    torch.save({"a": torch.zeros(3)}, path)
    assert refused(net(), path).startswith("FILE: adapter file: expected a complete safetensors file, found ")
    path.write_bytes(b"")
    assert refused(net(), path).startswith("FILE: adapter file: expected a complete safetensors file, found ")


def test_truncated_files(file):
    data = file.read_bytes()
    for length in (0, 4, 8, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        text = refused(net(), file)
        assert text.startswith("FILE: adapter file: expected a complete safetensors file, found ")
        assert text.endswith(DAMAGED)


def test_changed_numbers_are_noticed(file):
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    assert refused(net(), file) == (
        f"FILE: checksum: expected the one it was saved with, found another: the file was changed. {DAMAGED}"
    )


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_changed_bit_goes_unnoticed_or_raises_anything_else(file, place, bit):
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    path = file.with_name("changed")
    path.write_bytes(data)
    refused(net(), path)


def _drop(name: str):
    return lambda fields, tensors: fields.pop(name)


def _set(**values: object):
    return lambda fields, tensors: fields.update(values)


def _layer(**values: object):
    return lambda fields, tensors: fields["layers"]["up"].update(values)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_set(format=5), "FILE: file format: expected at most 4, found 5. Update tnpeft."),
        (_set(format="x"), f"FILE: file format: expected at most 4, found x. {FOREIGN}"),
        (_drop("base"), f"FILE: metadata: expected that of an adapter, found `base`: Field required. {FOREIGN}"),
        (
            _set(more=1),
            f"FILE: metadata: expected that of an adapter, found `more`: Extra inputs are not permitted. {FOREIGN}",
        ),
        (
            _set(scale="much"),
            "FILE: metadata: expected that of an adapter, found `scale`: Input should be a valid number, "
            f"unable to parse string as a number. {FOREIGN}",
        ),
        (
            _set(scale=1e308),
            "FILE: `scale`: expected a number that float32 can hold, found 1e+308. Use a smaller scale.",
        ),
        (
            _layer(mode="fast"),
            "FILE: layer 'up': the execution mode: expected one of `dense`, `factored`, `hybrid`, `auto`, "
            "found `fast`. Leave `mode` out for the default.",
        ),
        (
            _layer(choices={"cpu, 64 rows": "auto"}),
            "FILE: layer 'up': the mode chosen for 'cpu, 64 rows': expected one of `dense`, `factored`, `hybrid`, "
            "found `auto`. Leave it out: it is chosen again.",
        ),
        (
            _layer(choices={"cpu, 64 rows": "hybird"}),
            "FILE: layer 'up': the mode chosen for 'cpu, 64 rows': expected one of `dense`, `factored`, `hybrid`, "
            "found `hybird`. Did you mean `hybrid`?",
        ),
        (
            _layer(choices={"cpu, 64 rows": 3}),
            "FILE: metadata: expected that of an adapter, found `layers.up.choices.cpu, 64 rows`: "
            f"Input should be a valid string. {FOREIGN}",
        ),
        (
            _layer(choices=["hybrid"]),
            "FILE: metadata: expected that of an adapter, found `layers.up.choices`: "
            f"Input should be a valid dictionary. {FOREIGN}",
        ),
        (
            lambda fields, tensors: fields["layers"].update(norm=fields["layers"]["up"]),
            "FILE: layer 'norm': unsupported layer: expected one of Linear, Conv1d, Conv2d, Conv3d, ConvTranspose1d, "
            "ConvTranspose2d, ConvTranspose3d, found GroupNorm. "
            "Adapt the layers inside it, or train it as a whole with `also`.",
        ),
        (
            _set(specs=[{"text": "[1]", "file": "x.yaml", "tables": {}}]),
            "FILE: x.yaml:1:1: the file: expected a mapping, found a list. "
            "A spec is `key: value` lines, the first one `tnpeft: 1`.",
        ),
        (
            _layer(seed=2**63),
            "FILE: layer 'up': seed: expected a whole number of at most 64 bits, found a larger one. "
            "For example `seed=0`.",
        ),
        (
            _layer(spec=1),
            f"FILE: metadata: expected that of an adapter, found a layer 'up' that does not fit. {FOREIGN}",
        ),
        (
            lambda fields, tensors: tensors.pop("layers.up.core_left"),
            f"FILE: tensor 'layers.up.core_left': expected float32(4, 3), found no such tensor. {FOREIGN}",
        ),
        (
            lambda fields, tensors: tensors.update({"trained.norm.bias": torch.zeros(5)}),
            f"FILE: tensor 'trained.norm.bias': expected float32(4,), found float32(5,). {FOREIGN}",
        ),
        (
            lambda fields, tensors: tensors.update({"layers.down.core_left": torch.zeros(5)}),
            f"FILE: tensors: expected those of the adapter alone, found also 'layers.down.core_left'. {FOREIGN}",
        ),
    ],
)
def test_files_that_were_made_by_something_else(file, change, expected):
    rewritten(file, change)
    assert refused(net(), file) == expected


@pytest.mark.parametrize(
    "change",
    [
        _set(specs=[]),
        _set(specs=[{"text": "tnpeft: 1", "file": "x", "tables": {}}] * 2),
        _set(layers={"first": {"spec": 0, "params": {"r": 3}, "seed": 0, "mode": "dense"}}),
        _set(layers=[1]),
        _set(trained=[["nothing"]]),
        _set(trained=[[]]),
        _set(statistics=[["first.weight"]]),
        _set(statistics=[]),
        _set(trained=[["norm.bias"]] * 2),
        _set(trained=[["norm.bias", "norm.weight"]]),
        _set(base={}),
        _layer(params={"q": 1}),
        _layer(params={"r": 10**9}),
        _layer(params={"r": 2}),
        _layer(mode="fast"),
        _layer(seed="x"),
        lambda fields, tensors: tensors.clear(),
        lambda fields, tensors: fields.clear(),
    ],
)
def test_whatever_else_a_file_says_ends_in_a_clear_error(file, change):
    rewritten(file, change)
    assert refused(net(), file)


def test_another_base_is_refused_with_the_first_differences(file):
    model = net()
    model.wide = nn.Conv3d(4, 4, 3)
    model.more = nn.Linear(2, 2)
    model.head[2] = nn.Linear(6, 5)
    assert refused(model, file) == (
        "FILE: base model: expected the one the adapter was saved from, "
        "found 'wide.bias' is float32(4) here and missing there; "
        "'more.weight' is float32(2, 2) here and missing there; 'more.bias' is float32(2) here and missing there; "
        "and 2 more. Build the base model as it was when the adapter was saved."
    )
    del model.more
    model.wide = net().wide
    assert refused(model, file) == (
        "FILE: base model: expected the one the adapter was saved from, "
        "found 'head.2.weight' is float32(3, 6) there and float32(5, 6) here; "
        "'head.2.bias' is float32(3) there and float32(5) here. "
        "Build the base model as it was when the adapter was saved."
    )
    del model.head
    assert refused(model, file) == (
        "FILE: base model: expected the one the adapter was saved from, "
        "found 'head.0.weight' is float32(6, 4) there and missing here; "
        "'head.0.bias' is float32(6) there and missing here; "
        "'head.2.weight' is float32(3, 6) there and missing here; and 1 more. "
        "Build the base model as it was when the adapter was saved."
    )


def test_a_cast_base_is_told_apart(file):
    model = net().bfloat16()
    assert refused(model, file).endswith("and 12 more. Load the adapter before casting the model to another type.")
    model = net()
    load(model, file)
    assert model.bfloat16()(X.bfloat16()).dtype == torch.bfloat16


def test_a_base_on_meta_is_refused(file):
    with torch.device("meta"):
        model = Net()
    with pytest.raises(AdapterFileError) as excinfo:
        load(model, file)
    assert str(excinfo.value) == (
        f"{file}: base model: expected values, found none in layer 'first' (it is on the meta device). "
        "Give the model its weights before loading an adapter."
    )


def test_ties_of_the_base_are_part_of_it(tmp_path):
    def model(tied: bool) -> nn.Module:
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4))
        made[2].bias = made[0].bias if tied else nn.Parameter(made[0].bias.detach().clone())
        return made

    first, x = model(True), torch.randn(2, 4)
    attach(first, targets=("0",), trained=("0.bias",))
    train(first, x)
    save(first, tmp_path / "x")
    second = model(True)
    load(second, tmp_path / "x")
    assert torch.equal(first(x), second(x))
    assert list(trained_of(second, "default")) == ["0.bias"]
    assert refused(model(False), tmp_path / "x") == (
        "FILE: base model: expected the one the adapter was saved from, "
        "found '2.bias' is float32(4) tied to '0.bias' there and float32(4) here. "
        "Build the base model as it was when the adapter was saved."
    )
