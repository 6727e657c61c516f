"""Adapter files: there and back to the bit, and every kind of file that is none."""

from __future__ import annotations

import copy
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from saved import X, metadata, refused, trained
from small import attach, bits, chain, net, same_bits, train
from torch import nn

import tnpeft
from tnpeft.errors import AttachError
from tnpeft.io import load, save, save_foreign
from tnpeft.network import load_spec
from tnpeft.surgery import activate, adapters_of, detach, disabled, merge, names_of, record_of


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "adapter.safetensors"
    save(trained(), path)
    return path


@pytest.mark.parametrize("spec", [chain(), chain(frozen=True), load_spec("lora"), load_spec("lokr_both")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_fresh_base_with_the_file_computes_the_same_bits(tmp_path, spec, dtype):
    model, x = net().to(dtype), X.to(dtype)
    base = model(x)
    attach(model, spec, "adni")
    model.train()
    train(model, x, rate=1.0)
    model.eval()
    path = tmp_path / "adapter.safetensors"
    save(model, path)
    fresh = net().to(dtype)
    handle = load(fresh, path)
    assert handle.name == "adni"
    assert torch.equal(fresh(x), model(x))
    assert not torch.equal(fresh(x), base)
    assert same_bits(bits(fresh), bits(model))
    assert record_of(fresh, "adni") == record_of(model, "adni")
    assert {n: p.requires_grad for n, p in fresh.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    for layer, adapter in adapters_of(fresh, "adni").items():
        other = adapters_of(model, "adni")[layer]
        assert adapter.network.spec == other.network.spec
        assert (adapter.network.params, adapter.seed, adapter.plan) == (other.network.params, other.seed, other.plan)
    assert train(fresh, x) == train(model, x)
    with disabled(fresh):
        assert torch.equal(fresh(x), base)
    detach(fresh)
    assert torch.equal(fresh(x), base)


def test_saving_again_gives_the_same_bytes_and_overwrites(tmp_path, file):
    model = net()
    load(model, file)
    again = tmp_path / "again.safetensors"
    again.write_text("something else")
    save(model, str(again))
    assert again.read_bytes() == file.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "again.safetensors"]


def test_the_file_carries_all_that_is_needed_and_nothing_of_this_machine(file):
    fields = metadata(file)
    names = "about base digests format layers library name scale sha256 specs statistics trained"
    assert sorted(fields) == names.split()
    assert fields["library"] == tnpeft.__version__
    assert fields["format"] == 4
    assert fields["specs"] == [{"text": chain().text, "file": "<spec>", "tables": {}}]
    assert fields["layers"]["up"] == {
        "spec": 0,
        "params": {"r": 3},
        "seed": 0,
        "mode": "auto",
        "choices": {},
        "captured": {},
        "drawn": {},
        "dropout": {},
        "orientation": None,
        "label": None,
    }
    layers = {f"{layer}.{key}" for layer in ("first", "wide", "up", "head.0") for key in ("weight", "bias")}
    assert set(fields["digests"]) == layers - {"wide.bias"} | {"norm.weight", "norm.bias"}
    assert fields["base"]["first.weight"] == {"shape": [4, 2, 3, 3, 3], "dtype": "float32", "tied": None}
    assert fields["trained"] == [["first.bias"], ["norm.weight"], ["norm.bias"]]
    assert str(file.parent) not in json.dumps(fields)
    with safe_open(file, framework="pt") as opened:
        names = set(opened.keys())
    assert {
        "layers.up.core_left",
        "layers.up.start_left",
        "trained.norm.bias",
        "statistics.batch_norm.running_var",
    } < names


def test_shipped_tables_travel_with_the_spec(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Conv3d(32, 64, 3))
    x = torch.randn(1, 32, 3, 3, 3)
    other = copy.deepcopy(model)
    attach(model, load_spec("tenvoo_l"), targets=("0",), trained=())
    train(model, x, rate=1e-3)
    save(model, tmp_path / "a.safetensors")
    fields = metadata(tmp_path / "a.safetensors")
    assert fields["specs"][0]["tables"]["tenvoo"]["32"] == [4, 4, 2]
    assert fields["specs"][0]["file"] == "tenvoo_l.yaml"
    monkeypatch.setattr("tnpeft.network.spec.shipped_tables", dict)
    load(other, tmp_path / "a.safetensors")
    assert torch.equal(other(x), model(x))


def test_the_scale_of_an_active_adapter_is_kept(tmp_path):
    model = trained()
    activate(model, {"adni": 0.5})
    save(model, tmp_path / "half.safetensors")
    fresh = net()
    load(fresh, tmp_path / "half.safetensors")
    assert torch.equal(fresh(X), model(X))
    activate(fresh, "adni")
    activate(model, "adni")
    assert torch.equal(fresh(X), model(X))


def test_several_adapters_go_into_several_files(tmp_path):
    model = trained("a")
    attach(model, load_spec("lora"), "b", trained=("norm.bias", "head.2.bias"))
    train(model, X)
    for name in ("a", "b"):
        save(model, tmp_path / name, name)
    assert refused(model, tmp_path / "c", save) == (
        "FILE: adapter name: expected one of 'a', 'b', found none. Pass `name=`: a file holds one adapter."
    )
    assert refused(model, tmp_path / "c", lambda model, path: save(model, path, "c")) == (
        "FILE: adapter name: expected one of 'a', 'b', found 'c'. Pass one of these names."
    )
    fresh = net()
    load(fresh, tmp_path / "a")
    load(fresh, tmp_path / "b", "ppmi")
    assert names_of(fresh) == ("a", "ppmi")
    assert torch.equal(fresh(X), model(X))
    activate(fresh, {"a": 0.5, "ppmi": 2.0})
    activate(model, {"a": 0.5, "b": 2.0})
    assert torch.equal(fresh(X), model(X))
    assert not list(tmp_path.glob("c*"))


@pytest.mark.slow
def test_another_process_computes_the_same_bits(file):
    code = (
        "import sys, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[1])\n"
        "from small import net, net_input\n"
        "import tnpeft; model = net(); tnpeft.load(model, sys.argv[2])\n"
        "sys.stdout.buffer.write(model(net_input()).detach().numpy().tobytes())"
    )
    arguments = [sys.executable, "-c", code, str(Path(__file__).parents[1]), str(file)]
    environment = {**os.environ, "PYTHONPATH": str(Path(tnpeft.__file__).parents[1])}
    output = subprocess.run(arguments, check=True, capture_output=True, env=environment).stdout
    model = net()
    load(model, file)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert output == model(X).detach().numpy().tobytes()
    torch.set_num_threads(threads)


def test_a_second_name_stands_beside_the_first(file):
    model = trained()
    load(model, file, name="second")
    assert names_of(model) == ("adni", "second")


def test_a_model_that_nothing_can_be_attached_to_loads_nothing(file):
    model = trained("other")
    for name, found in (("a b", "'a b'"), ("", "''"), (3, "3"), ("_a", "'_a'"), ("ä", r"'\xe4'")):
        assert refused(model, file, lambda model, path, name=name: load(model, path, name), AttachError) == (
            "FILE: adapter name: expected ASCII letters, digits, `_` and `-`, the first a letter or a digit, "
            f"found {found}. Choose another name."
        )
    with disabled(model):
        assert refused(model, file, error=AttachError) == (
            "FILE: model: expected enabled adapters, found adapters disabled by `tnpeft.disabled`. "
            "Leave the `disabled` context first."
        )
    merge(model, "other")
    assert refused(model, file, error=AttachError) == (
        "FILE: model: expected an unmerged model, found a merged one. Call `tnpeft.unmerge(model)` first."
    )
    assert names_of(model) == ("other",)


def test_a_disabled_model_saves_what_was_trained(tmp_path, file):
    model = net()
    load(model, file)
    with disabled(model):
        save(model, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == file.read_bytes()


def test_links_are_written_through_and_permissions_are_ordinary(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    save(trained(), link)
    assert link.is_symlink()
    load(net(), target)
    (tmp_path / "touched").touch()
    assert target.stat().st_mode == (tmp_path / "touched").stat().st_mode


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o664, 0o755])
def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path, mode):
    path, link, folder, new = (tmp_path / name for name in ("x.safetensors", "link", "peft", "new"))
    path.write_text("old")
    path.chmod(mode)
    link.symlink_to(path)
    (folder).mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).touch()
        (folder / name).chmod(mode)
    model = nn.Sequential(nn.Linear(3, 3))
    attach(model, load_spec("lora"), targets=("0",), trained=())
    for target in (path, link):
        save(model, target)
        assert stat.S_IMODE(path.stat().st_mode) == mode
    save_foreign(model, folder, "peft")
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {mode}
    before = os.umask(0o027)
    try:
        save(model, new)
    finally:
        os.umask(before)
    assert stat.S_IMODE(new.stat().st_mode) == 0o640


def test_cores_that_were_widened_keep_their_digits(tmp_path):
    model = trained().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-12) if parameter.requires_grad else None
    model.float()
    save(model, tmp_path / "x")
    fresh = net()
    load(fresh, tmp_path / "x")
    assert torch.equal(fresh(X), model(X))


def test_wrapped_models_are_saved_by_what_they_hold(tmp_path, file):
    model = net()
    load(model, file)
    wrapped = torch.compile(model, backend="eager")
    save(wrapped, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == file.read_bytes()
    assert refused(torch.compile(net(), backend="eager"), file, error=AttachError) == (
        "model: expected a plain module, found a OptimizedModule. Attach to the plain model first, then wrap it."
    )
