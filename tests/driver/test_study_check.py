"""What can be wrong with a study is found before anything is made; a report of an empty one is an error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("monai", reason="the example driver needs the `demo` extra")

import ddpm
import nibabel
import torch
from ddpm_lab.config.settings import Base, Config, Data, Method, Model, Training
from ddpm_lab.data.prepare import prepare_data
from ddpm_lab.model.unet import build_unet, save_weights
from ddpm_lab.study.check import check_inputs
from ddpm_lab.study.study import study
from ddpm_lab.support.console import Screen
from ddpm_lab.support.durable import write_json
from ddpm_lab.training.finetune import prepare
from safetensors.torch import save_file
from studies import tiny_study
from typer.testing import CliRunner

import tnpeft

QUIET = Screen(quiet=True)


def scans(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        voxels = np.random.default_rng(number).uniform(size=(8, 8, 8)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), folder / f"{number}.nii")
    return folder


WAY_OUT = "Lower `training.batch_size` or raise `made.count`."
FILES = f"found 4 of 6 after holding 2 out. {WAY_OUT}"
REFUSED: dict[str, tuple[str, list[str], str]] = {
    "a batch": (
        "table1",
        ["training.batch_size=6"],
        f"datasets.contrast.made.count: files to train on: expected at least 6, one batch, {FILES}",
    ),
    "a method's batch": (
        "table1",
        ["methods.lora.training.batch_size=7"],
        f"datasets.contrast.made.count: files to train on: expected at least 7, one batch, {FILES}",
    ),
    "a batch of pretraining": (
        "table1",
        ["pretraining.batch_size=6"],
        "source.made.count: files to train on: expected at least 6, one batch, found 5 of 6 after holding 1 out. "
        + WAY_OUT,
    ),
    "more held out": (
        "table1",
        ["datasets.lesion.data.validation_share=0.9"],
        "datasets.lesion.made.count: files to train on: expected at least 2, one batch, found 1 of 6 after holding 5 "
        "out. Lower `training.batch_size` or raise `made.count`.",
    ),
    "a reference that was trained on": (
        "table1",
        ["metrics.reference=all"],
        "metrics.reference: the volumes of a study's tables: expected those to test on, which nothing else sees, "
        "found all. Write `metrics: {reference: test}`.",
    ),
    "none to test on": (
        "table1",
        ["datasets.lesion.data.test_share=0"],
        "datasets.lesion.data.test_share: subjects to test on: expected some, found `test_share` 0. "
        "Write `data: {test_share: 0.2}`.",
    ),
    "a manifest without any": (
        "table1",
        ["datasets.own.data={manifest: MANIFEST, test_share: 0}"],
        "datasets.own.data.test_share: subjects to test on: expected some, found none in MANIFEST. "
        "Run `prepare` again with `--set data.test_share=0.2`.",
    ),
    "few files": (
        "table1",
        ["datasets.own.data.root=ROOT", "training.batch_size=4"],
        "datasets.own.data: files to train on: expected at least 4, one batch, found 2 of 4 after holding 2 out. "
        "Lower `training.batch_size` or add files.",
    ),
    "no folder": (
        "table1",
        ["datasets.own.data.layout=plain"],
        "datasets.own.data.root: the data: expected a folder of NIfTI files, found nothing. "
        "Pass `--set data.root=FOLDER`.",
    ),
    "a size": (
        "table1",
        ["data.resize=[9, 8, 8]"],
        "datasets.contrast.data.resize: the volume's size: expected multiples of 2, for the network, found 9x8x8. "
        "Set `data.crop` or `data.resize`.",
    ),
    "the size of made subjects": (
        "table1",
        ["data.resize=null", "datasets.contrast.made.side=9"],
        "datasets.contrast.made.side: the volume's size: expected multiples of 2, for the network, found 9x9x9. "
        "Set `data.crop` or `data.resize`.",
    ),
    "a size of table 4": (
        "table4",
        ["cost.shapes.small=[8, 8, 9]"],
        "cost.shapes.small: the volume's size: expected multiples of 2, for the network, found 8x8x9. "
        "Set `data.crop` or `data.resize`.",
    ),
    "a precision": (
        "table1",
        ["methods.lora.training.precision=fp16", "methods.lora.training.device=cpu"],
        "methods.lora.training.precision: the precision: expected fp32 or bf16 on a CPU, found fp16. Use `auto`.",
    ),
    "a model": (
        "table1",
        ["model.norm_groups=3"],
        "model.channels: channels: expected multiples of `norm_groups`, 3, found [8, 8]. Change either.",
    ),
    "no base": (
        "table1",
        ["pretraining=null"],
        "base.checkpoint: the base: expected a checkpoint, or `pretraining`, found neither. "
        "Pass `--set base.checkpoint=FILE`, or give `source` and `pretraining`.",
    ),
    "another base": (
        "table1",
        ["base.checkpoint=BASE"],
        "BASE: `base.checkpoint`: expected this model's tensors, `conv_in.conv.weight`, `conv_in.conv.bias`, "
        "`time_embed.0.weight` and 139 more, found only `weight`. "
        "Give the checkpoint of this model, or set `model` to the checkpoint's.",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_mistakes_end_before_anything_is_made(tmp_path: Path, mistake: str) -> None:
    name, overrides, expected = REFUSED[mistake]
    root, base = scans(tmp_path / "scans", 4), tmp_path / "base.safetensors"
    save_file({"weight": torch.zeros(2)}, base)
    manifest = prepare_data(Config(data=Data(root=root)), tmp_path / "prepared", QUIET)
    places = {"ROOT": root, "BASE": base, "MANIFEST": manifest}
    words = overrides
    for name_of_place, place in places.items():
        words = [text.replace(name_of_place, str(place)) for text in words]
        expected = expected.replace(name_of_place, str(place))
    with pytest.raises(tnpeft.TnpeftError) as excinfo:
        study(name, tiny_study(tmp_path, *words), tmp_path / "out", QUIET)
    assert str(excinfo.value) == expected
    assert not (tmp_path / "out").exists()


def test_params_and_patterns_are_tried_on_the_model(tmp_path: Path) -> None:
    config = tiny_study(tmp_path, "methods.lora.method={spec: lora, match: 'conv9', params: {r: 4}}")
    with pytest.raises(tnpeft.TnpeftError) as excinfo:
        study("table1", config, tmp_path / "out", QUIET)
    assert "conv9" in str(excinfo.value)
    assert not (tmp_path / "out").exists()
    small = Model(channels=(8, 8), attention_levels=(False, True), head_channels=(0, 8), res_blocks=1, norm_groups=4)
    method = Method(recipe="lora_ddpm", params={"rank": 4})
    base = tmp_path / "base.safetensors"
    save_weights(build_unet(small), base)
    run = Config(
        data=Data(root=scans(tmp_path / "scans", 4)),
        model=small,
        base=Base(checkpoint=base),
        method=method,
        training=Training(steps=1, precision="fp32", device="cpu"),
    )
    with pytest.raises(tnpeft.TnpeftError) as excinfo:
        prepare(run, tmp_path / "out", QUIET)
    assert "rank" in str(excinfo.value)
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_there_needs_no_source_any_more(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    config = tiny_study(tmp_path, f"source={{data: {{root: {gone}}}}}")
    with pytest.raises(tnpeft.TnpeftError) as excinfo:
        check_inputs("table1", config, tmp_path)
    assert str(excinfo.value) == (
        f"{gone}: `data.root`: expected a folder of NIfTI files, found nothing there. Check the path."
    )
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").touch()
    check_inputs("table1", config, tmp_path)


def test_a_report_of_nothing_is_an_error(tmp_path: Path) -> None:
    settled = tiny_study(tmp_path).with_variants().settled().model_dump(mode="json")
    write_json(tmp_path / "study.json", {"version": 1, "studies": ["table1"], "config": settled})
    done = CliRunner().invoke(ddpm.app, ["report", "--out", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 1
    assert done.stderr == (
        f"error: {tmp_path}: the results of a study: expected at least one run that is done, found none. "
        "Run `study table1` to its end, with the same `--out`.\n"
    )
    assert "not run yet" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
