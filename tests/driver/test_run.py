"""The driver from its command line, end to end, on volumes of 16 voxels a side and less."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="the example driver needs the `demo` extra")

import ddpm
import nibabel
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n\x1a\n"

# `training`, `pretraining` and `bias_norm` of a run that takes a second.
QUICK = (
    "{steps: 2, batch_size: 2, accumulation: 2, learning_rate: 1.0e-3, schedule: one_cycle, clip_norm: 1.0, threads: 1}"
)
TINY = f"""\
data: {{resize: [8, 8, 8]}}
model: {{channels: [8, 8], attention_levels: [false, true], head_channels: [0, 8], res_blocks: 1, norm_groups: 4}}
diffusion: {{prediction: v_prediction}}
method: {{recipe: tenvoo_l_ddpm, params: {{r: 2}}}}
training: {QUICK}
validation: {{every: 1, buckets: 2}}
sampling: {{steps: 2, count: 2, batch_size: 2}}
metrics: {{encoder: random, pairs: 2}}
"""
DEMO = f"""\
population: {{source: 12, target: 8, side: 16}}
pretraining: {QUICK}
published: {{method: {{recipe: tenvoo_q_ddpm, params: {{r: 2}}}}, training: {QUICK}}}
bias_norm: {QUICK}
"""


def driver(*arguments: object) -> Result:
    """The command in this process; accelerate lets a process choose its precision only once, unless it is reset."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return CliRunner(env={"COLUMNS": "160"}).invoke(ddpm.app, [*map(str, arguments)], catch_exceptions=False)


@pytest.fixture(autouse=True)
def clean_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A demonstration in miniature: its configuration, its folder and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    config = folder / "tiny.yaml"
    config.write_text(TINY + DEMO, encoding="utf-8")
    done = driver("demo", "--config", config, "--out", folder / "run")
    assert done.exit_code == 0, done.stderr
    return config, folder / "run", done.stdout


@pytest.mark.slow
def test_the_demonstration_leaves_everything_it_promises(demo: tuple[Path, Path, str]) -> None:
    _, out, printed = demo
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    names = ["tenvoo_l_ddpm", "tenvoo_q_ddpm, as published", "biases and norms alone", "control: tuned on source"]
    assert list(summary["comparison"]) == names
    assert list(summary["samples"]["sets"]) == ["base samples", "fine-tuned samples", "real, held out"]
    assert summary["samples"]["encoder"] == "* random features, not comparable"
    for run in summary["comparison"].values():
        assert run["steps"] == 2
        change = 100 * (run["held_out_error_after"] / run["held_out_error_before"] - 1)
        assert run["change_percent"] == pytest.approx(change)
        assert np.mean(run["by_timestep_after"]) == pytest.approx(run["held_out_error_after"])
    assert len({run["held_out_error_before"] for run in summary["comparison"].values()}) == 1
    assert summary["run"]["start_difference"] == 0.0
    assert summary["run"]["reload_difference"] == 0.0
    assert "deformations of one average brain" in summary["caveat"]
    for name in [*names, "FID*", "not comparable", "non-standard", "deformations of one average brain"]:
        assert name in printed
    for picture in ("loss_curves.png", "montage.png"):
        assert (out / picture).read_bytes().startswith(PNG)
    assert len(list((out / "data" / "source").glob("*.nii.gz"))) == 12
    assert load_file(out / "adapter.safetensors")


@pytest.mark.slow
def test_a_second_demonstration_reuses_the_base(demo: tuple[Path, Path, str]) -> None:
    config, out, _ = demo
    before = (out / "base.safetensors").stat().st_mtime_ns
    first = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    done = driver("demo", "--config", config, "--out", out)
    assert done.exit_code == 0, done.stderr
    assert "Base: pretrained by an earlier run with the same settings" in done.stdout
    assert (out / "base.safetensors").stat().st_mtime_ns == before
    second = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert second["run"]["held_out_error_after"] == pytest.approx(first["run"]["held_out_error_after"], rel=1e-5)
    done = driver("demo", "--config", config, "--out", out, "--set", "pretraining.steps=1")
    assert done.exit_code == 0, done.stderr
    assert "earlier run with the same settings" not in done.stdout
    assert (out / "base.safetensors").stat().st_mtime_ns != before


@pytest.fixture(scope="module")
def tiny(demo: tuple[Path, Path, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A fine-tuning configuration and the overrides that give it data and a base."""
    _, run, _ = demo
    config = tmp_path_factory.mktemp("config") / "tiny.yaml"
    config.write_text(TINY, encoding="utf-8")
    root, base = run / "data" / "target", run / "base.safetensors"
    return config, ["--set", f"data.root={root}", "--set", f"base.checkpoint={base}"]


METHODS = {
    "recipe": (["method.recipe=lora_ddpm", "method.params={}"], "adapter.safetensors"),
    "spec": (
        ["method.recipe=null", "method.spec=tenvoo_q", r"method.match=conv1\.conv$", "method.params={r: 2}"],
        "adapter.safetensors",
    ),
    "full": (
        [
            "method.kind=full",
            "training.epochs=1",
            "training.steps=null",
            "data.cache=disk",
            "training.tensorboard=true",
        ],
        "model.safetensors",
    ),
    "bias_norm": (["method.kind=bias_norm", "training.precision=bf16", "sampling.count=0"], "bias_norm.safetensors"),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_on_a_folder(tiny: tuple[Path, list[str]], tmp_path: Path, method: str) -> None:
    config, given = tiny
    overrides, name = METHODS[method]
    out = tmp_path / "out"
    done = driver("finetune", "--config", config, "--out", out, *given, *(x for o in overrides for x in ("--set", o)))
    assert done.exit_code == 0, done.stderr
    left = sorted(path.name for path in out.iterdir() if path.is_file())
    assert " ".join(done.stdout.split()).endswith(f"Results in {out}: {', '.join(left)}")
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["data"] == {
        "root": given[1].partition("=")[2],
        "train": 7,
        "validation": 1,
        "shape": [8, 8, 8],
    }
    assert summary["run"]["start_difference"] == 0.0
    assert len(json.loads((out / "split.json").read_text(encoding="utf-8"))["train"]) == 7
    stored = sum(tensor.numel() for tensor in load_file(out / name).values())
    if method in ("full", "bias_norm"):
        assert stored == summary["run"]["trainable_parameters"]
    assert (out / "tensorboard").exists() == (method == "full")
    assert (out / "montage.png").exists() == (method != "bias_norm")
    assert (out / "loss_curves.png").read_bytes().startswith(PNG)


def said(*arguments: object) -> str:
    """What the driver says when it refuses: lines of text, exit status 1, no traceback."""
    done = driver("finetune", *arguments)
    assert done.exit_code == 1, done.output
    return done.stderr


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ("population.target=8", "training.batch_size=8"),
            ["population.target: files to train on: expected at least 8, one batch, found 7 of 8 after holding 1 out. "
             "Lower `training.batch_size` or raise `population.target`."],
        ),
        (
            ("population.target=4", "bias_norm.batch_size=4"),
            ["population.target: files to train on: expected at least 4, one batch, found 3 of 4 after holding 1 out. "
             "Lower `bias_norm.batch_size` or raise `population.target`."],
        ),
        (
            ("population.target=4", "published.training.batch_size=4"),
            ["population.target: files to train on: expected at least 4, one batch, found 3 of 4 after holding 1 out. "
             "Lower `published.training.batch_size` or raise `population.target`."],
        ),
        (
            ("population.source=12", "training.batch_size=11", "pretraining.batch_size=12"),
            ["population.source: files to train on: expected at least 12, one batch, found 11 of 12 after holding 1 "
             "out. Lower `pretraining.batch_size` or raise `population.source`.",
             "population.target: files to train on: expected at least 11, one batch, found 7 of 8 after holding 1 out. "
             "Lower `training.batch_size` or raise `population.target`."],
        ),
    ],
)  # fmt: skip
def test_a_population_that_is_too_small_is_told_before_anything_is_made(
    settings: tuple[str, ...], said: list[str], tmp_path: Path
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY + DEMO, encoding="utf-8")
    out = tmp_path / "run"
    done = driver("demo", "--config", config, "--out", out, *(part for each in settings for part in ("--set", each)))
    assert done.exit_code == 1, done.output
    assert done.stderr.splitlines() == [f"error: {line}" for line in said]
    assert not (out / "data").exists()


@pytest.mark.slow
def test_mistakes_end_before_training_with_one_line(tmp_path: Path) -> None:
    config, out = tmp_path / "tiny.yaml", tmp_path / "out"
    config.write_text(TINY, encoding="utf-8")
    root = tmp_path / "scans"
    for number in range(4):
        root.mkdir(exist_ok=True)
        volume = np.random.default_rng(number).uniform(size=(8, 8, 8)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), root / f"{number}.nii.gz")
    other = tmp_path / "other.pt"
    torch.save({"weight": torch.zeros(2)}, other)
    base = ["--config", config, "--out", out, "--set", f"data.root={root}"]
    full = [*base, "--set", "method.kind=full"]

    missing = tmp_path / "none.yaml"
    assert said("--config", missing, "--out", out) == (
        f"error: {missing}: cannot read this configuration: expected a readable file, found No such file or directory. "
        "Check the path.\n"
    )
    assert said(*base, "--set", "training.stepz=3") == (
        "error: --set training.stepz=3: an unknown key: expected a key of this section, found `stepz`. "
        "Did you mean `steps`?\n"
    )
    assert said(*base) == (
        "error: base.checkpoint: the base of method `adapter`: expected a pretrained model's checkpoint, found "
        "nothing. Pass `--set base.checkpoint=FILE`, or train from nothing with `--set method.kind=full`.\n"
    )
    assert said(*base, "--set", f"base.checkpoint={other}") == (
        f"error: {other}: `base.checkpoint`: expected this model's tensors, `conv_in.conv.weight`, "
        "`conv_in.conv.bias`, `time_embed.0.weight` and 139 more, found only `weight`. "
        "Give the checkpoint of this model, or set `model` to the checkpoint's.\n"
    )
    assert said(*full, "--set", "training.batch_size=4") == (
        f"error: {root}: files to train on: expected at least 4, one batch, found 3 of 4 after holding 1 out. "
        "Lower `training.batch_size` or add files.\n"
    )
    assert "Did you mean `tenvoo_l_ddpm`?" in said(*base, "--set", "method.recipe=tenvo_l_ddpm")
    (root / "3.nii.gz").write_bytes(b"\x1f\x8b broken")
    assert said(*full).startswith(f"error: {root / '3.nii.gz'}: an unreadable volume: expected a NIfTI file, found ")
    assert not out.exists()
    (root / "3.nii.gz").unlink()
    out.write_text("a file", encoding="utf-8")
    assert said(*full) == f"error: {out}: `--out`: expected a folder to write to, found File exists. Choose another.\n"


def test_the_script_stands_alone(tmp_path: Path) -> None:
    """As a user runs it: a mistake is one line on stderr, with no traceback."""
    script, missing = ROOT / "examples" / "ddpm.py", tmp_path / "none.yaml"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), "demo", "--config", str(missing)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        f"error: {missing}: cannot read this configuration: expected a readable file, found No such file or directory. "
        "Check the path.\n"
    )


def test_the_demonstration_is_not_sharded(tmp_path: Path) -> None:
    done = driver("demo", "--out", tmp_path / "out", "--set", "distributed.shard=block")
    assert done.exit_code == 1
    assert done.stderr == (
        "error: distributed.shard: the demonstration: expected nothing, for it runs whole, found block. "
        "Leave it out; `finetune` takes it.\n"
    )
