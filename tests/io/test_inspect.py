"""`tnpeft inspect`: what a file holds and needs, without a model."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign import Net, adapted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from saved import rewritten, trained
from terminal import data, mistakes, run, text
from torch import nn

import tnpeft
from tnpeft.surgery import activate, adapters_of, base_tensors

OTHER = "Pass the file with the tensors, for example `adapter.safetensors`."
DATA = Path(__file__).parents[1] / "data"


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
        "language          1",
        f"library           tnpeft {tnpeft.__version__}",
        "file format       4",
        "dtype             float32",
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


def test_ranks_alphas_shapes_types_and_headers_of_other_libraries(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = adapted("lora", "line|conv2", r=2, alpha=3)
    tnpeft.save_foreign(model, "kohya.safetensors", "kohya")
    tensors = {key: value.bfloat16() if "up" in key else value for key, value in load_file("kohya.safetensors").items()}
    header = {"format": "pt", "ss_network_dim": "2", "ss_tags": "x" * 99}
    save_file(tensors, "kohya.safetensors", header)
    assert text("inspect", "kohya.safetensors").splitlines()[1:] == [
        "",
        "layer            weight           spec  params       trains  frozen",
        "lora_unet_conv2  24 x 20 x 3 x 2  LoRA  r=2 alpha=3     288       0",
        "lora_unet_line   18 x 12          LoRA  r=2 alpha=3      60       0",
        "",
        "dtype             float32 (4), bfloat16 (2)",
        "layers            2",
        "parameters        348 train",
        f"metadata          2: ss_network_dim=2, ss_tags={'x' * 35}...",
    ]
    found = tnpeft.inspect("kohya.safetensors")
    assert (found.metadata, found.dtypes) == (
        {key: value for key, value in header.items() if key != "format"},
        {"bfloat16": 2, "float32": 4},
    )
    tnpeft.save_foreign(model, "theirs", "diffusers")
    lines = text("inspect", "theirs").splitlines()
    assert lines[2:9] == [
        "layer              weight           spec  params  trains  frozen",
        "transformer.conv2  24 x 20 x 3 x 2  LoRA  r=2        288       0",
        "transformer.line   18 x 12          LoRA  r=2         60       0",
        "",
        "transformer.peft type       LORA",
        "transformer.r               2",
        "transformer.lora alpha      2",
    ]
    save_file(load_file("theirs/pytorch_lora_weights.safetensors"), "bare.safetensors")
    assert "alpha             not told: the rank" in text("inspect", "bare.safetensors").splitlines()
    for spec, name in (("loha", "LoHa"), ("lokr", "LoKr")):
        tnpeft.save_foreign(adapted(spec, "line"), f"{spec}.safetensors", "lycoris")
        (layer,) = tnpeft.inspect(f"{spec}.safetensors").layers
        assert (layer.spec, layer.weight, "alpha" in layer.params) == (name, None, True)
        assert layer.trained == sum(
            tensor.numel() for key, tensor in load_file(f"{spec}.safetensors").items() if not key.endswith("alpha")
        )


def test_a_file_that_was_fitted_without_a_model_says_as_what(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "tuned")):
        torch.manual_seed(seed)
        save_file(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(8, 6)).state_dict(), f"{name}.safetensors")
    options = ("--spec", "lora", "--match", "0|1", "-o", "fitted.safetensors", "--quiet")
    assert run("fit", "base.safetensors", "tuned.safetensors", *options).exit_code == 0
    assert text("inspect", "fitted.safetensors").splitlines()[2:5] == [
        "layer  weight         taken for          spec  params       mode  trains  frozen",
        "0      8 x 4 x 3 x 3  Conv2d(4, 8, 3x3)  lora  r=4 alpha=4  auto     176       0",
        "1      6 x 8          Linear(8, 6)       lora  r=4 alpha=4  auto      56       0",
    ]
    assert data("inspect", "fitted.safetensors")["layers"][1]["fitted_as"] == "Linear(8, 6)"


def test_checkpoints_and_what_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file({"a.weight": torch.ones(2, 3)}, "base.safetensors")
    torch.save({"state_dict": {"a.weight": torch.ones(2, 3)}}, "base.pt")
    for name in ("base.safetensors", "base.pt"):
        size = Path(name).stat().st_size
        assert text("inspect", name).splitlines() == [
            f"{name}: a checkpoint, not an adapter, {size:,} bytes",
            "",
            "dtype             float32",
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


CORE = "numpy._core" if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else "numpy.core"  # as pickles name it

NO_STATE_DICT = {
    "optimizer": (
        torch.optim.Adam([nn.Parameter(torch.ones(2))]).state_dict(),
        "a dict with values that are no tensors: 'state' (dict), 'param_groups' (list)",
    ),
    "keys": ({1: torch.ones(2)}, "a dict with keys that are no texts: 1"),
    "mixed": ({"w": torch.ones(2), "epoch": 3}, "a dict with values that are no tensors: 'epoch' (int)"),
    "many": (
        dict.fromkeys("abcdef", 1),
        "a dict with values that are no tensors: 'a' (int), 'b' (int), 'c' (int), 'd' (int) and more",
    ),
    "tensor": (torch.ones(2), "a Tensor"),
}
RUN = {
    "arguments": (Namespace(lr=1e-3), "argparse.Namespace"),
    "module": (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    "numpy": ({"numpy": np.random.default_rng(0).random(2)}, f"{CORE}.multiarray._reconstruct"),
    "command": ({"a": os.system}, "posix.system"),
}


@pytest.mark.parametrize("name", NO_STATE_DICT)
def test_a_torch_file_that_is_no_state_dict_is_told_by_what_is_in_it(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, found = NO_STATE_DICT[name]
    torch.save(content, "x.pt")
    assert mistakes("inspect", "x.pt") == [
        f"x.pt: adapter file: expected a mapping of names to tensors, found {found}. Save the model's state dict alone."
    ]


@pytest.mark.parametrize("name", RUN)
@pytest.mark.parametrize("file", ["training_args.bin", "x.safetensors"])
def test_nobody_is_advised_to_run_a_pickle(name, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, code = RUN[name]
    torch.save(content, file)
    assert mistakes("inspect", file) == [
        f"{file}: adapter file: expected a state dict that `weights_only` can load, found a pickle with `{code}`, "
        "which would run code. Save the model's state dict alone; nothing else is loaded from a pickle."
    ]


@pytest.mark.parametrize("file", ["x.safetensors", "x.ckpt", "x.txt", "x"])
def test_a_torch_file_is_read_by_what_it_holds(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1]), *sys.path])
    torch.save({"a.weight": torch.ones(2, 3)}, file)
    assert tnpeft.inspect(file).others == {"a.weight": (2, 3)}
    model = adapted("lora", "line", r=2)
    tnpeft.save_foreign(model, "theirs.safetensors", "lycoris")
    torch.save(load_file("theirs.safetensors"), file)
    assert tnpeft.inspect(file).format == "lycoris"
    again = Net()
    tnpeft.load_foreign(again, file)
    torch.testing.assert_close(*(adapters_of(each, "default")["line"].delta_weight() for each in (again, model)))
    text("convert", file, "ours.safetensors", "-m", "foreign:Net")
    assert tnpeft.inspect("ours.safetensors").format == "tnpeft"


@pytest.mark.parametrize(
    ("file", "content", "found", "fix"),
    [
        ("model.py", "x = 1", "a text file", OTHER),
        ("README.md", "# Title", "a text file", OTHER),
        ("config.json", "{}", "a JSON file", OTHER),
        ("adapter_config.json", "{}", "a JSON file", "Pass the folder that it stands in."),
        ("x.safetensors", "Entry not found", "a text file", "Copy or download the file again."),
    ],
)
def test_texts(file, content, found, fix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(file).write_text(content)
    assert mistakes("inspect", file) == [
        f"{file}: adapter file: expected a complete safetensors or torch file, found {found}. {fix}"
    ]


def test_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("d").mkdir()
    expected = "d: folder: expected `adapter_model.safetensors` or `pytorch_lora_weights.safetensors` in it, "
    assert mistakes("inspect", "d") == [
        f"{expected}found no such file. Pass the folder that PEFT or diffusers saved to, or a file."
    ]
    save_file({"a.weight": torch.ones(2, 3)}, "d/model.safetensors")
    assert mistakes("inspect", "d") == [
        f"{expected}found no such file. Name a file in it, for example `model.safetensors`."
    ]
    model = nn.Sequential(nn.Linear(3, 4))
    tnpeft.attach(model, "lora", match="0", r=2)
    tnpeft.save_foreign(model, "theirs", "diffusers")
    size = Path("theirs/pytorch_lora_weights.safetensors").stat().st_size
    assert text("inspect", "theirs").splitlines()[0] == f"theirs: an adapter of diffusers, {size:,} bytes"


def test_state_dicts_of_adapted_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = small()
    whole, base = dict(model.state_dict()), tnpeft.plain_state_dict(model)
    save_file(whole, "whole.safetensors")
    save_file({key: tensor for key, tensor in whole.items() if key not in base}, "cores.safetensors")
    sizes = {name: Path(name).stat().st_size for name in ("whole.safetensors", "cores.safetensors")}
    lines = text("inspect", "cores.safetensors").splitlines()
    assert lines[:4] == [
        "cores.safetensors: what adapters of tnpeft add to a model's state dict, without the base, "
        f"{sizes['cores.safetensors']:,} bytes",
        "",
        "adapters          adni",
        "to load it        on a model with the same adapters attached, `load_state_dict(..., strict=False)`",
    ]
    assert text("inspect", "whole.safetensors").splitlines()[:4] == [
        f"whole.safetensors: a checkpoint, not an adapter, {sizes['whole.safetensors']:,} bytes",
        "",
        "adapters          adni",
        "to load it        on a model with the same adapters attached, `load_state_dict`",
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
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1]), *sys.path])
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
