"""`evaluate`: every number in its place, from its own folder, with its interval; and what is refused."""

from __future__ import annotations

import gzip
import io
import json
import os
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
from ddpm_lab.config.settings import Base, Config, Data, Metrics, Model, Sampling, Training
from ddpm_lab.data.files import find_volumes, split_volumes
from ddpm_lab.data.grid import Grid, write_volume
from ddpm_lab.data.prepare import prepare_data
from ddpm_lab.data.volumes import transforms
from ddpm_lab.evaluation.encoder import load_encoder
from ddpm_lab.evaluation.evaluate import REAL, evaluate_samples
from ddpm_lab.evaluation.metrics import frechet_distance, mmd_gaussian, mmd_linear, mmd_rbf, ms_ssim
from ddpm_lab.evaluation.real_volumes import RealVolumes
from ddpm_lab.model.unet import build_unet, save_weights
from ddpm_lab.support.console import Screen
from ddpm_lab.support.durable import write_json
from ddpm_lab.support.faults import LabError
from rich.console import Console
from typer.testing import CliRunner

QUIET = Screen(quiet=True)
DATA = Data(crop=(8, 8, 8), validation_share=0.4)
GRID = Grid((8, 8, 8), (1.0, 1.0, 1.0), "")
KEYS = ["fid", "mmd_linear", "mmd_gaussian", "mmd_rbf", "ms_ssim"]


@pytest.fixture(autouse=True)
def clean_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def noise(seed: int, count: int, smooth: float = 0.0) -> torch.Tensor:
    """Volumes (count, 1, 8, 8, 8) between 0 and 1; `smooth` moves them towards a ramp."""
    ramp = torch.linspace(0, 1, 8).expand(count, 1, 8, 8, 8)
    drawn = torch.rand((count, 1, 8, 8, 8), generator=torch.Generator().manual_seed(seed))
    return (1 - smooth) * drawn + smooth * ramp


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Ten real volumes; six train."""
    root = tmp_path / "scans"
    root.mkdir()
    for number, volume in enumerate(noise(0, 10, 0.5)):
        nibabel.save(nibabel.Nifti1Image(volume[0].numpy(), np.eye(4)), root / f"{number}.nii.gz")
    return root


def config(scans: Path, **metrics: Any) -> Config:
    return Config(
        data=DATA.model_copy(update={"root": scans}),
        training=Training(precision="fp32", device="cpu", threads=1),
        metrics=Metrics(**{"encoder": "random", "pairs": 6, "resamples": 20, **metrics}),
    )


def put(out: Path, name: str, volumes: torch.Tensor, grid: Grid = GRID) -> Path:
    """A set of samples as `sample` leaves it."""
    folder = out / "samples" / name
    folder.mkdir(parents=True, exist_ok=True)
    for number, volume in enumerate(volumes):
        write_volume(folder / f"sample-{number:04d}.nii.gz", volume, grid, (0.0, 1.0), "")
    write_json(folder / "samples.json", {"version": 1, "count": len(volumes), "settings": {}})
    return folder


def read(settings: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Held-out and training volumes as the network sees them."""
    split = split_volumes(find_volumes(settings.data), settings.data)
    steps = transforms(settings.data)
    held_out, train = (torch.stack([steps(str(path)) for path in paths]) for paths in (split.validation, split.train))
    return held_out, train


def independent(one: torch.Tensor, other: torch.Tensor, pairs: int) -> dict[str, float]:
    """Each metric by its own function, from volumes."""
    encoder = load_encoder(Metrics(encoder="random"))
    features = [encoder.features(volumes) for volumes in (one, other)]
    return {
        "fid": frechet_distance(*features),
        "mmd_linear": mmd_linear(*features),
        "mmd_gaussian": mmd_gaussian(*features),
        "mmd_rbf": mmd_rbf(*features),
        "ms_ssim": ms_ssim(one, other, 1.0, pairs),
    }


@pytest.mark.slow
def test_each_number_is_in_its_place_and_from_its_folder(scans: Path, tmp_path: Path) -> None:
    """The paper's script read the samples of another folder and printed the MMD as FID."""
    settings, out = config(scans), tmp_path / "out"
    sets = {"base": noise(1, 4), "adni": noise(2, 5, 0.4), "zebra": noise(3, 3, 0.9)}
    for name, volumes in reversed(sets.items()):
        put(out, name, volumes)
    found = evaluate_samples(settings, out, QUIET)
    assert found is not None
    assert json.loads((out / "evaluation.json").read_text(encoding="utf-8")) == found
    assert list(found["sets"]) == ["base", "adni", "zebra", REAL]
    assert found["counts"] == {"base": 4, "adni": 5, "zebra": 3, REAL: 4}
    assert found["reference"] == "4 real volumes, held out"
    assert (found["encoder"], found["encoder_mark"]) == ("* random features, not comparable", "*")
    assert found["ms_ssim"] == "2 scales, window 3: non-standard, the volumes are small"
    held_out, train = read(settings)
    for name, row in found["sets"].items():
        one, other = (held_out, train) if name == REAL else (sets[name], held_out)
        assert list(row) == KEYS
        for key, value in independent(one, other, 6).items():
            assert row[key]["value"] == pytest.approx(value, rel=1e-4, abs=1e-9), (name, key)
            assert row[key]["low"] <= row[key]["value"] <= row[key]["high"]
    assert found["sets"]["adni"]["fid"]["value"] < found["sets"]["base"]["fid"]["value"]
    assert json.loads((out / "record-evaluate.json").read_text(encoding="utf-8"))["seeds"]["metrics.seed"] == 99


def test_the_table_says_what_the_numbers_are(scans: Path, tmp_path: Path) -> None:
    put(tmp_path, "adni", noise(1, 3))
    put(tmp_path, "[bold]", noise(2, 3))
    screen = Screen(Console(width=160, record=True, file=io.StringIO()))
    evaluate_samples(config(scans), tmp_path, screen)
    printed = " ".join(screen.console.export_text().split())
    for text in (
        "Samples against 4 real volumes, held out",
        "FID* ┃ MMD* linear ┃ MMD* paper's ┃ MMD* standard ┃ MS-SSIM",
        "* random features, not comparable",
        "In brackets: 95 % intervals, from 20 resamples.",
        "non-standard",
        "The MMDs are squared and unbiased: of sets that are alike they are as often below zero as above.",
        "[bold]",
    ):
        assert text in printed
    bare = Screen(Console(width=160, record=True, file=io.StringIO()))
    evaluate_samples(config(scans, resamples=0), tmp_path, bare)
    assert "In brackets" not in bare.console.export_text()


def test_all_real_volumes_can_be_the_reference_and_few_of_many(scans: Path, tmp_path: Path) -> None:
    put(tmp_path, "base", noise(1, 3))
    settings = config(scans, reference="all", resamples=0)
    found = evaluate_samples(settings, tmp_path, QUIET)
    assert found is not None
    assert found["reference"] == "10 real volumes"
    expected = independent(noise(1, 3), torch.cat(read(settings)), 6)
    assert found["sets"]["base"]["fid"]["value"] == pytest.approx(expected["fid"], rel=1e-4)
    few = evaluate_samples(config(scans, reference="all", most=3), tmp_path, QUIET)
    assert few is not None
    assert few["reference"] == "3 real volumes"
    assert few["counts"][REAL] == 3


def test_one_sample_has_a_similarity_and_no_distance(scans: Path, tmp_path: Path) -> None:
    put(tmp_path, "base", noise(1, 1))
    found = evaluate_samples(config(scans), tmp_path, QUIET)
    assert found is not None
    row = found["sets"]["base"]
    for key in ("fid", "mmd_linear", "mmd_gaussian", "mmd_rbf"):
        assert row[key] == {"value": None, "low": None, "high": None}
    assert row["ms_ssim"]["value"] is not None


def test_intervals_are_the_same_for_the_same_seed(scans: Path, tmp_path: Path) -> None:
    put(tmp_path, "base", noise(1, 4))
    runs = [evaluate_samples(config(scans, seed=seed), tmp_path, QUIET) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert runs[0]["sets"]["base"]["fid"]["value"] == runs[2]["sets"]["base"]["fid"]["value"]  # type: ignore[index]


def test_real_volumes_are_encoded_once(scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "base", noise(1, 3))
    seen: list[str] = []
    plain = RealVolumes.read

    def counted(self: RealVolumes, path: Path) -> torch.Tensor:
        seen.append(path.name)
        return plain(self, path)

    monkeypatch.setattr(RealVolumes, "read", counted)
    first = evaluate_samples(config(scans, pairs=1), tmp_path, QUIET)
    assert set(seen) == {f"{number}.nii.gz" for number in range(10)}
    seen.clear()
    assert evaluate_samples(config(scans, pairs=1), tmp_path, QUIET) == first
    assert len(set(seen)) < 5  # the shape, and the pairs of MS-SSIM
    nibabel.save(nibabel.Nifti1Image(noise(9, 1)[0, 0].numpy(), np.eye(4)), scans / "3.nii.gz")
    os.utime(scans / "3.nii.gz", ns=(1, 1))
    again = evaluate_samples(config(scans, pairs=1), tmp_path, QUIET)
    assert again != first
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(b"broken")
    assert evaluate_samples(config(scans, pairs=1), tmp_path, QUIET) == again


def test_a_list_of_adapters_chooses_sets(scans: Path, tmp_path: Path) -> None:
    for name in ("base", "adni", "ppmi"):
        put(tmp_path, name, noise(1, 2))
    settings = config(scans, pairs=1, resamples=0)
    adapters = (tmp_path / "ppmi" / "adapter.safetensors", tmp_path / "adni.safetensors")
    for changes, names in (
        ({}, ["base", "ppmi", "adni"]),
        ({"base": Base()}, ["ppmi", "adni"]),
        ({"sampling": Sampling(adapters=adapters[:1], base=False)}, ["ppmi"]),
    ):
        given = {"base": Base(checkpoint=tmp_path), "sampling": Sampling(adapters=adapters), **changes}
        found = evaluate_samples(settings.model_copy(update=given), tmp_path, QUIET)
        assert found is not None
        assert list(found["sets"]) == [*names, REAL]
    (tmp_path / "evaluation.json").unlink()
    gone = settings.model_copy(update={"sampling": Sampling(adapters=(tmp_path / "brats.safetensors",))})
    assert said(gone, tmp_path) == (
        f"{tmp_path / 'samples' / 'brats'}: the samples: expected a folder, found nothing there. "
        "Run `sample` first, with the same `--out`."
    )


# Mistakes


def said(settings: Config, out: Path) -> str:
    with pytest.raises(LabError) as excinfo:
        evaluate_samples(settings, out, QUIET)
    assert not (out / "evaluation.json").exists()
    return str(excinfo.value)


def test_samples_must_be_there_and_finished(scans: Path, tmp_path: Path) -> None:
    assert said(config(scans), tmp_path) == (
        f"{tmp_path / 'samples'}: the samples: expected a folder for each model, found none. "
        "Run `sample` first, with the same `--out`."
    )
    folder = put(tmp_path, "base", noise(1, 3))
    again = "Run `sample` again: it draws what is missing."
    (folder / "sample-0001.nii.gz").unlink()
    assert said(config(scans), tmp_path) == (
        f"{folder}: the samples: expected 3 volumes, found 2, without sample-0001.nii.gz. {again}"
    )
    (folder / "samples.json").unlink()
    assert said(config(scans), tmp_path) == (
        f"{folder}: the samples: expected samples.json, as `sample` writes it, found none to read. {again}"
    )


def test_samples_must_be_whole_and_of_the_right_size(scans: Path, tmp_path: Path) -> None:
    folder = put(tmp_path, "base", noise(1, 2))
    path = folder / "sample-0001.nii.gz"
    path.write_bytes(path.read_bytes()[:-40])
    assert said(config(scans), tmp_path).startswith(f"{path}: a damaged sample: expected a NIfTI file, found ")
    put(tmp_path, "base", noise(1, 2)[..., :6], Grid((8, 8, 6), (1.0, 1.0, 1.0), ""))
    assert said(config(scans), tmp_path) == (
        f"{folder / 'sample-0000.nii.gz'}: a sample of another size: expected 8x8x8, as the real volumes, found "
        "8x8x6. Evaluate with the `data` of `sample`."
    )


def test_real_volumes_must_be_there_and_whole(scans: Path, tmp_path: Path) -> None:
    put(tmp_path, "base", noise(1, 2))
    assert said(config(scans).model_copy(update={"data": DATA}), tmp_path) == (
        "data.root: the data: expected a folder of NIfTI files, found nothing. Pass `--set data.root=FOLDER`."
    )
    (scans / "4.nii.gz").write_bytes(b"\x1f\x8b broken")
    assert said(config(scans), tmp_path).startswith(
        f"{scans / '4.nii.gz'}: an unreadable volume: expected a NIfTI file, found "
    )
    manifest = prepare_data(config(scans), tmp_path / "data", QUIET)
    indexed = config(scans).model_copy(update={"data": Data(crop=(8, 8, 8), manifest=manifest)})
    path = scans / json.loads(manifest.read_text(encoding="utf-8"))["train"][0]["path"]
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[-4:] = np.float32(np.nan).tobytes()
    size = path.stat().st_size
    changed = gzip.compress(content)
    path.write_bytes(changed)
    text = manifest.read_text(encoding="utf-8").replace(f'"bytes": {size},', f'"bytes": {len(changed)},')
    manifest.write_text(text, encoding="utf-8")  # as if it had the same size
    assert said(indexed, tmp_path) == (
        f"{path}: an unreadable volume: expected finite numbers, found voxels that are infinite or not a number. "
        "Replace or remove the file."
    )
    path.unlink()
    nibabel.save(nibabel.Nifti1Image(noise(9, 1)[0, 0, :6].numpy(), np.eye(4)), scans / "4.nii.gz")
    whole = config(scans)
    whole = whole.model_copy(update={"data": whole.data.model_copy(update={"crop": None})})
    assert said(whole, tmp_path) == (
        f"{scans / '4.nii.gz'}: a volume of another size: expected 8x8x8, found 6x8x8. "
        "Set `data.crop` or `data.resize`."
    )


@pytest.mark.parametrize("indexed", [False, True])
def test_damaged_real_volumes_are_left_out_when_asked(scans: Path, tmp_path: Path, indexed: bool) -> None:
    """One that is held out and cut short, one that trains and is gone or has no finite voxels."""
    put(tmp_path, "base", noise(1, 4))
    settings = config(scans, resamples=0)
    if indexed:
        path = prepare_data(settings, tmp_path / "data", QUIET)
        data = Data(crop=(8, 8, 8), manifest=path)
        settings = settings.model_copy(update={"data": data})
    split = split_volumes(find_volumes(settings.data), settings.data)
    held_out, train = read(settings)
    short, lost = split.validation[0], split.train[-1]
    size, other = short.stat().st_size, lost.stat().st_size
    short.write_bytes(short.read_bytes()[:-40])
    if indexed:
        lost.unlink()
        whys = [
            f"a changed file: expected the {size:,} bytes of the manifest, found {size - 40:,}",
            f"a missing file: expected the {other:,} bytes of the manifest, found No such file or directory",
        ]
        moved = "Pass `--set data.root=FOLDER` where the data moved, or run `prepare` again."
        assert sorted(said(settings, tmp_path).splitlines()) == sorted(
            [f"{short}: {whys[0]}. Run `prepare` again.", f"{lost}: {whys[1]}. {moved}"]
        )
    else:
        voxels = np.full((8, 8, 8), np.nan, dtype=np.float32)
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), lost)
        whys = [
            "an unreadable volume: expected a NIfTI file, found Compressed file ended before the end-of-stream marker "
            "was reached",
            "an unreadable volume: expected finite numbers, found voxels that are infinite or not a number",
        ]
        assert sorted(said(settings, tmp_path).splitlines()) == sorted(
            f"{path}: {why}. Replace or remove the file." for path, why in zip((short, lost), whys, strict=True)
        )
    lenient = settings.model_copy(update={"data": settings.data.model_copy(update={"skip_damaged": True})})
    screen = Screen(Console(width=400, record=True, file=io.StringIO()))
    found = evaluate_samples(lenient, tmp_path, screen)
    assert found is not None
    assert json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8")) == found
    assert found["left_out"] == {str(short): whys[0], str(lost): whys[1]}
    printed = screen.console.export_text().splitlines()
    assert [line for line in printed if line.startswith("Left out")] == [
        f"Left out {short}: {whys[0]}",
        f"Left out {lost}: {whys[1]}",
    ]
    assert found["reference"] == "3 real volumes, held out"
    assert found["counts"][REAL] == 3
    for name, one, other in (("base", noise(1, 4), held_out[1:]), (REAL, held_out[1:], train[:-1])):
        for key, value in independent(one, other, 6).items():
            assert found["sets"][name][key]["value"] == pytest.approx(value, rel=1e-4, abs=1e-9), (name, key)


def test_volumes_may_be_too_small_for_a_similarity(scans: Path, tmp_path: Path) -> None:
    put(tmp_path, "base", noise(1, 2)[..., :2], Grid((8, 8, 2), (1.0, 1.0, 1.0), ""))
    settings = config(scans)
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"crop": (8, 8, 2)})})
    assert said(settings, tmp_path) == (
        "data: volumes for MS-SSIM: expected at least 3 voxels a side, found 8x8x2. Set `data.crop` or `data.resize`."
    )


def test_some_real_volumes_must_be_left(scans: Path, tmp_path: Path) -> None:
    put(tmp_path, "base", noise(1, 2))
    settings = config(scans)
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"skip_damaged": True})})
    held_out = split_volumes(find_volumes(settings.data), settings.data).validation
    for path in held_out:
        path.write_bytes(b"")
    assert said(settings, tmp_path).splitlines() == [
        *(
            f"{path}: an unreadable volume: expected a NIfTI file, found Empty file: '{path}'. "
            "Replace or remove the file."
            for path in held_out
        ),
        "data: held-out volumes: expected at least one that can be read, found none of 4. Mend them.",
    ]


# From the command line


@pytest.mark.slow
def test_the_commands_sample_and_evaluate(scans: Path, tmp_path: Path) -> None:
    model = Model(channels=(8, 8), attention_levels=(False, True), head_channels=(0, 8), res_blocks=1, norm_groups=4)
    base = tmp_path / "base.safetensors"
    save_weights(build_unet(model), base)
    settings = config(scans).model_copy(
        update={"model": model, "base": Base(checkpoint=base), "sampling": Sampling(steps=2, count=3, batch_size=2)}
    )
    written, out = tmp_path / "config.yaml", tmp_path / "out"
    written.write_text(settings.model_dump_json(exclude_none=True), encoding="utf-8")
    for command in ("sample", "evaluate"):
        AcceleratorState._reset_state(reset_partial_state=True)
        arguments = [command, "--config", str(written), "--out", str(out)]
        done = CliRunner(env={"COLUMNS": "160"}).invoke(ddpm.app, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.stderr
    assert "base" in done.stdout
    assert len(list((out / "samples" / "base").glob("*.nii.gz"))) == 3
    assert list(json.loads((out / "evaluation.json").read_text(encoding="utf-8"))["sets"]) == ["base", REAL]
    done = CliRunner().invoke(ddpm.app, ["evaluate", "--config", str(written), "--out", str(tmp_path / "none")])
    assert done.exit_code == 1
    assert done.stderr == (
        f"error: {tmp_path / 'none' / 'samples'}: the samples: expected a folder for each model, found none. "
        "Run `sample` first, with the same `--out`.\n"
    )
