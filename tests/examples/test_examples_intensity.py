"""Volumes of which a few voxels lie far from the rest: what `prepare` and runs say, and scaling by percentiles."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="the example driver needs the `demo` extra")

import nibabel
from accelerate import Accelerator
from ddpm_lab.config.reader import read_config
from ddpm_lab.config.settings import Config, Data, Model
from ddpm_lab.data.outliers import find_outliers
from ddpm_lab.data.prepare import prepare_data
from ddpm_lab.data.volumes import _key, check_sizes, dataset, transforms
from ddpm_lab.study.run import made_of
from ddpm_lab.support.console import Screen
from ddpm_lab.support.faults import LabError
from ddpm_lab.training.finetune import prepare_volumes
from ddpm_lab.training.resume import check_settings
from monai.transforms import ScaleIntensityRangePercentiles
from rich.console import Console

SMALL = Model(channels=(8, 8), attention_levels=(False, True), head_channels=(0, 8), res_blocks=1, norm_groups=4)


def scan(seed: int = 0, side: int = 16, **voxels: float) -> np.ndarray[Any, Any]:
    """Uniform in 0..1, with the first voxels replaced: `at0=1e6`."""
    volume = np.random.default_rng(seed).uniform(size=(side, side, side)).astype(np.float32)
    for name, value in voxels.items():
        volume.reshape(-1)[int(name[2:])] = value
    return volume


def saved(folder: Path, name: str, volume: np.ndarray[Any, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), folder / name)
    return folder / name


def screen() -> tuple[Screen, io.StringIO]:
    text = io.StringIO()
    return Screen(Console(file=text, width=400)), text


@pytest.mark.parametrize(
    ("volume", "expected"),
    [
        (scan(), None),
        (scan(at0=1.5, at1=3.0), None),
        (np.random.default_rng(0).normal(size=(16, 16, 16)), None),
        (scan(at0=1e6), (0, 1)),
        (scan(at0=-1e6), (1, 0)),
        (scan(at0=-50, at1=90, at2=80), (1, 2)),
        (scan(at0=10), (0, 1)),
        (scan(side=5, at0=100), (0, 1)),
        (5 * (scan() == scan().max()), (0, 1)),
        ((scan() * 100).astype(np.int16), None),
        ((scan(at0=150) * 200).astype(np.int16), (0, 1)),
    ],
)
def test_outliers_are_few_and_far_from_the_rest(volume: Any, expected: tuple[int, int] | None) -> None:
    found = find_outliers(np.asfortranarray(volume))
    assert (None if found is None else (found.below, found.above)) == expected


def test_prepare_names_volumes_with_outliers_and_what_cuts_them_off(tmp_path: Path) -> None:
    root = tmp_path / "scans"
    for number in range(4):
        saved(root, f"{number}.nii", scan(number))
    bright = saved(root, "bright.nii", scan(7, at0=1e6))
    dark = saved(root, "dark.nii.gz", scan(8, at5=-3e4, at6=-3e4))
    shown, text = screen()
    path = prepare_data(Config(data=Data(root=root)), tmp_path / "out", shown)
    whole = {name: scan(seed) for name, seed in (("bright", 7), ("dark", 8))}
    ends = {name: (f"{np.delete(v, [0, 5, 6]).min():g}", f"{np.delete(v, [0]).max():g}") for name, v in whole.items()}
    reasons = [
        f"1 of 4,096 voxels reaches 1e+06, all others lie from {whole['bright'].reshape(-1)[1:].min():g} to "
        f"{ends['bright'][1]}: scaled by minimum and maximum they keep 1e-06 of the range",
        f"2 of 4,096 voxels reach -30000, all others lie from {ends['dark'][0]} to {ends['dark'][1]}: scaled by "
        "minimum and maximum they keep 3.3e-05 of the range",
    ]
    lines = text.getvalue().splitlines()
    assert f"Warning: {bright}: {reasons[0]}." in lines
    assert f"Warning: {dark}: {reasons[1]}." in lines
    advice = "Cut such voxels off with `--set data.percentiles=[0.1,99.9]`, or mend the files."
    assert advice in lines
    manifest = json.loads(path.read_text(encoding="utf-8"))
    assert manifest["outliers"] == [
        {"path": "bright.nii", "reason": reasons[0]},
        {"path": "dark.nii.gz", "reason": reasons[1]},
    ]
    shown, text = screen()
    prepare_data(Config(data=Data(root=root, percentiles=(0.1, 99.9))), tmp_path / "cut", shown)
    assert "Warning" not in text.getvalue()
    # The advice followed: the rest of the volume spreads over the range.
    for name in ("bright.nii", "dark.nii.gz"):
        volume = transforms(Data(root=root, percentiles=(0.1, 99.9)))(root / name)
        assert (volume.min(), volume.max()) == (0, 1)
        assert 0.4 < volume.median() < 0.6


def test_a_manifest_with_outliers_is_read_and_one_without_is_as_before(tmp_path: Path) -> None:
    root = tmp_path / "scans"
    for number in range(3):
        saved(root, f"{number}.nii", scan(number))
    quiet = Screen(quiet=True)
    assert '"outliers"' not in prepare_data(Config(data=Data(root=root)), tmp_path / "a", quiet).read_text("utf-8")
    saved(root, "bright.nii", scan(7, at0=1e6))
    path = prepare_data(Config(data=Data(root=root)), tmp_path / "b", quiet)
    config = Config(data=Data(manifest=path, root=root), model=SMALL)
    assert len(prepare_volumes(config, tmp_path / "out", quiet, Accelerator(cpu=True)).split.train) == 3


def test_runs_on_a_folder_warn_too(tmp_path: Path) -> None:
    root = tmp_path / "scans"
    for number in range(3):
        saved(root, f"{number}.nii", scan(number, at0=1e6))
    shown, text = screen()
    prepare_volumes(Config(data=Data(root=root), model=SMALL), tmp_path / "out", shown, Accelerator(cpu=True))
    assert text.getvalue().count("Warning: ") == 3
    assert "Cut such voxels off with `--set data.percentiles=[0,99.9]`, or mend the files." in text.getvalue()


def test_percentiles_are_monais_and_cut_off(tmp_path: Path) -> None:
    path = saved(tmp_path, "a.nii", scan(at0=1e6, at1=-1e6))
    data = Data(percentiles=(1, 99), intensity=(-1, 1))
    expected = ScaleIntensityRangePercentiles(1, 99, -1, 1, clip=True)(torch.from_numpy(scan(at0=1e6, at1=-1e6)))
    torch.testing.assert_close(transforms(data)(path)[0], torch.as_tensor(expected))
    plain = transforms(Data())(path)
    assert (plain.median() - 0.5).abs() < 1e-6  # of the range from -1e6 to 1e6


def test_volumes_of_one_value_after_their_transforms_are_named(tmp_path: Path) -> None:
    corner = np.zeros((16, 16, 16), np.float32)
    corner[0, 0, :4] = (1, 2, 3, 4)
    path = saved(tmp_path / "scans", "corner.nii", corner)
    for cache in ("memory", "none"):
        with pytest.raises(LabError) as excinfo:
            check_sizes(dataset([path], Data(crop=(4, 4, 4), cache=cache), tmp_path), [path], 1)
        assert str(excinfo.value) == (
            f"{path}: the intensities of a volume: expected voxels that differ, after crop and resize, found 0 "
            "everywhere. Check `data.crop`, or remove the file."
        )
    with pytest.raises(LabError) as excinfo:
        dataset([path], Data(percentiles=(5, 95)), tmp_path)
    assert str(excinfo.value) == (
        f"{path}: the intensities of a volume: expected percentiles 5 and 95 that differ, found 0. "
        "Widen `data.percentiles`, or remove the file."
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("[99, 1]", "`data.percentiles`: expected two numbers, the first below the second, found a list of 2. "),
        ("[-1, 99]", "`data.percentiles.0`: expected at least 0.0, found -1. "),
        ("[0, 101]", "`data.percentiles.1`: expected at most 100.0, found 101. "),
    ],
)
def test_impossible_percentiles_are_refused(tmp_path: Path, value: str, expected: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"data: {{percentiles: {value}}}", encoding="utf-8")
    with pytest.raises(LabError) as excinfo:
        read_config(path, [], Config)
    assert f"{expected}Change the value." in str(excinfo.value)


def test_caches_and_runs_know_the_percentiles_and_keep_their_old_names_without(tmp_path: Path) -> None:
    old, new, other = Data(), Data(percentiles=(0, 99)), Data(percentiles=(0, 99.5))
    assert len({_key(old), _key(new), _key(other)}) == 3
    assert "percentiles" not in old.model_dump(mode="json")
    assert Config.model_validate_json(Config(data=new).model_dump_json()).data == new
    assert made_of(Config(), {"data": 1}, "b") == made_of(Config(data=old), {"data": 1}, "b")
    with pytest.raises(LabError) as excinfo:
        check_settings(tmp_path, Config(data=new), Config().model_dump(mode="json"), done=True)
    assert str(excinfo.value) == (
        f"{tmp_path}: `data.percentiles` of the run in this folder: expected nothing, as when it started, found "
        "[0.0, 99.0]. Choose another `--out`, put the setting back, or remove the folder to start anew."
    )
