"""`tnpeft inspect`: what a file holds and needs, without a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from foreign import adapted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from saved import rewritten, trained
from terminal import data, mistakes, run, text
from torch import nn

import tnpeft
from tnpeft.surgery import activate, adapters_of, base_tensors

DATA = Path(__file__).parent / "data"


def small() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.Linear(8, 8))
    tnpeft.attach(model, "lora", match="0|2", r=2, name="adni", train={"norm": True, "bias": "adapted"})
    activate(model, {"adni": 0.5})
    return model


def test_a_file_of_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tnpeft.save(small(), "a.safetensors")
    found = tnpeft.inspect("a.safetensors")
    lines = text("inspect", "a.safetensors").splitlines()
    assert lines == [
        f"a.safetensors: an adapter of tnpeft, {Path('a.safetensors').stat().st_size:,} bytes",
        "",
        "layer  weight         spec  params       mode  trains  frozen",
        "0      8 x 4 x 3 x 3  lora  r=2 alpha=2  auto      88       0",
        "2      8 x 8          lora  r=2 alpha=2  auto      32       0",
        "",
        "name              adni",
        "scale             0.5",
        "specs             lora",
        f"library           tnpeft {tnpeft.__version__}",
        "file format       4",
        "layers            2",
        "parameters        152 train",
        "trained: bias     0.bias, 2.bias",
        "trained: norm     1.weight, 1.bias",
        "to load it        a model of 6 tensors: 0.weight float32(8, 4, 3, 3), 0.bias float32(8), 1.weight float32(8), "
        "1.bias float32(8), 2.weight float32(8, 8), 2.bias float32(8)",
        f"fingerprint       {found.fingerprint}",
        f"digest            {found.digest}",
    ]
    assert str(found).splitlines() == [line for line in lines if line]
    document = data("inspect", "a.safetensors")
    assert document == json.loads(json.dumps(found.as_dict()))
    assert document["format"] == "tnpeft"
    assert document["parameters"] == 152
    assert document["layers"][0]["tensors"] == {"core_down": [2, 4, 3, 3], "core_up": [8, 2]}
    assert list(document["base"]) == list(base_tensors(small()))


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    spec=st.sampled_from(["lora", "dora", "vera", "lokr", "tt_lora", "hira", "fourierft", "pissa", "ia3"]),
    sizes=st.tuples(st.integers(2, 6), st.integers(2, 6)),
    norm=st.booleans(),
)
def test_its_counts_are_the_report_s(tmp_path, spec, sizes, norm):
    model = nn.Sequential(nn.Linear(*sizes), nn.LayerNorm(sizes[1]), nn.Linear(sizes[1], sizes[0]))
    report = tnpeft.attach(model, spec, match="0|2", train={"norm": norm}).report()
    tnpeft.save(model, tmp_path / "x")
    found = tnpeft.inspect(tmp_path / "x")
    assert found.parameters == report.trained
    assert [layer.trained for layer in found.layers] == [row.cores for row in report.layers]
    assert [layer.spec for layer in found.layers] == [row.spec for row in report.layers]
    assert [layer.weight for layer in found.layers] == [(sizes[1], sizes[0]), sizes]
    assert found.digest != tnpeft.inspect(DATA / "adapter_format_3.safetensors").digest


def test_the_same_base_has_the_same_fingerprint_and_digest(tmp_path):
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 3))
        tnpeft.attach(model, "lora", match="0", r=1 + number)
        tnpeft.save(model, tmp_path / str(number))
    first, second, third = (tnpeft.inspect(tmp_path / str(number)) for number in range(3))
    assert (first.fingerprint, first.digest) == (second.fingerprint, second.digest)
    assert first.fingerprint == third.fingerprint
    assert first.digest != third.digest


def test_earlier_files_and_numbers_that_are_none(tmp_path):
    old = tnpeft.inspect(DATA / "adapter_format_3.safetensors")
    assert (old.settings["file_format"], old.digest, old.parameters) == ("before 4", None, 9 + 5 + 6)
    model = trained()
    with torch.no_grad():
        adapters_of(model, "adni")["up"].cores["left"][0, 0] = float("nan")
    with pytest.warns(tnpeft.TnpeftWarning):
        tnpeft.save(model, tmp_path / "x")
    assert text("inspect", tmp_path / "x").splitlines()[-1] == (
        "values of the adapter: expected finite numbers, found NaN or infinity in 'up'. "
        "Training may have diverged: go back to an earlier file, or train with a smaller learning rate."
    )


def test_other_libraries_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tnpeft.save_foreign(adapted("lora", "line|conv2", r=2, alpha=3), "theirs", "peft")
    lines = text("inspect", "theirs").splitlines()
    assert lines[0].startswith("theirs: an adapter of PEFT, ")
    assert {line.split()[0] for line in lines if "LoRA" in line} == {"base_model.model.line", "base_model.model.conv2"}
    assert {"peft type         LORA", "lora alpha        3", "parameters        348 train"} <= set(lines)
    tnpeft.save_foreign(adapted("loha", "line", r=2), "theirs.safetensors", "lycoris")
    found = tnpeft.inspect("theirs.safetensors")
    assert (found.format, [layer.spec for layer in found.layers]) == ("lycoris", ["LoHa"])


def test_checkpoints_and_what_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file({"a.weight": torch.ones(2, 3)}, "base.safetensors")
    torch.save({"state_dict": {"a.weight": torch.ones(2, 3)}}, "base.pt")
    for name in ("base.safetensors", "base.pt"):
        size = Path(name).stat().st_size
        assert text("inspect", name).splitlines() == [
            f"{name}: a checkpoint, not an adapter, {size:,} bytes",
            "",
            "other tensors     1, 6 elements: a.weight",
        ]
    Path("lora.yaml").write_text("tnpeft: 1\n")
    assert mistakes("inspect", "lora.yaml") == [
        "lora.yaml: adapter file: expected a complete safetensors or torch file, found a text file. "
        "`tnpeft show` shows a spec, `tnpeft check` checks it."
    ]
    assert mistakes("inspect", "none") == [
        "none: adapter file: expected a file, or a folder of PEFT or diffusers, found no such file. Check the path."
    ]


def test_files_that_were_made_by_something_else(tmp_path):
    path = tmp_path / "x"
    tnpeft.save(trained(), path)
    rewritten(path, lambda fields, tensors: fields["layers"]["up"].update(spec=3))
    assert mistakes("inspect", path) == [
        f"{path}: metadata: expected that of an adapter, found a layer 'up' without a spec. "
        "Pass a file written by `tnpeft.save`."
    ]


def test_the_command_line_tells_warnings_as_it_tells_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
    monkeypatch.chdir(tmp_path)
    tnpeft.save_foreign(adapted("lora", "line", r=2), "theirs", "peft")
    text("convert", "theirs", "ours.safetensors", "-m", "foreign:Net")

    def spoil(fields: dict[str, object], tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.line.core_up"][0] = float("inf")

    rewritten(Path("ours.safetensors"), spoil)
    result = run("convert", "ours.safetensors", "again", "-m", "foreign:Net", "--to", "peft")
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stderr.splitlines() if "values of the adapter" in line]
    assert line.startswith("warning ours.safetensors: values of the adapter: expected finite numbers, found NaN or ")
