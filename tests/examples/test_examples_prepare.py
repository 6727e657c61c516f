"""`prepare`: what it finds, rejects and writes; and runs that take their files from its manifest."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("monai", reason="the example driver needs the `demo` extra")

import ddpm
import nibabel
from accelerate.state import AcceleratorState
from ddpm_lab.config.settings import Config, Data
from ddpm_lab.data import files
from ddpm_lab.data.files import LAYOUTS, check_data, find_volumes, held_out_counts, rooted, split_volumes
from ddpm_lab.data.prepare import prepare_data
from ddpm_lab.support.console import Screen
from ddpm_lab.support.durable import write_json
from ddpm_lab.support.faults import LabError
from ddpm_lab.support.folders import make_folder
from rich.console import Console
from typer.testing import CliRunner


def write_nifti(path: Path, seed: int, shape: tuple[int, ...] = (4, 4, 6), mm: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(seed).uniform(0, 100, shape).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([mm, 1.5, 2.0, 1.0])), path)
    return path


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Six volumes and three files that are none: text, a series and a copy."""
    root = tmp_path / "scans"
    for number in range(6):
        write_nifti(root / f"{number}.nii", number, mm=1.0 if number < 4 else 0.7)
    (root / "text.nii").write_text("hello", encoding="utf-8")
    write_nifti(root / "series.nii.gz", 9, (4, 4, 6, 2))
    (root / "copy.nii").write_bytes((root / "3.nii").read_bytes())
    return root


def prepared(data: Data, out: Path) -> tuple[dict[str, Any], str]:
    """The manifest that `prepare` writes, and what it prints."""
    text = io.StringIO()
    path = prepare_data(Config(data=data), out, Screen(Console(file=text, width=120)))
    assert path == out / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")), text.getvalue()


def refusal(work: Callable[[], object]) -> str:
    with pytest.raises(LabError) as excinfo:
        work()
    return str(excinfo.value)


def test_the_manifest_has_every_file_with_its_size_and_checksum(scans: Path, tmp_path: Path) -> None:
    manifest, _ = prepared(Data(root=scans), tmp_path / "out")
    head = {key: manifest[key] for key in ("version", "root", "layout", "seed", "validation_share")}
    assert head == {"version": 2, "root": str(scans), "layout": "plain", "seed": 0, "validation_share": 0.1}
    entries = {entry["path"]: entry for entry in manifest["train"] + manifest["validation"]}
    assert (len(manifest["train"]), len(manifest["validation"])) == (5, 1)
    assert sorted(entries) == ["0.nii", "1.nii", "2.nii", "3.nii", "4.nii", "5.nii"]
    content = (scans / "4.nii").read_bytes()
    assert entries["4.nii"] == {
        "path": "4.nii",
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "shape": [4, 4, 6],
        "spacing": [0.7, 1.5, 2.0],
    }
    assert manifest["rejected"] == [
        {"path": "copy.nii", "reason": "expected a scan of its own, found the bytes of 3.nii"},
        {"path": "series.nii.gz", "reason": "expected one 3D volume, found shape 4x4x6x2"},
        {"path": "text.nii", "reason": "expected a NIfTI file, found Cannot work out file type of \"text.nii\""},
    ]  # fmt: skip


def test_what_prepare_prints(scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _, printed = prepared(Data(root=scans), out)
    size = sum((scans / f"{number}.nii").stat().st_size for number in range(6))
    assert f"6 of 9 files are volumes ({size / 1000:.1f} kB); 5 files train, 1 files are held out (seed 0)" in printed
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    assert ["4x4x6", "1x1.5x2", "4"] in rows
    assert ["4x4x6", "0.7x1.5x2", "2"] in rows
    assert ["series.nii.gz", "expected one 3D volume, found shape 4x4x6x2"] in rows
    assert "Their sizes differ: set `data.crop` or `data.resize` before training." in printed
    record = json.loads((out / "record-prepare.json").read_text(encoding="utf-8"))
    assert record["volumes"] == {"train": 5, "validation": 1, "test": 0, "rejected": 3}
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "record-prepare.json"]


def test_the_same_folder_and_seed_give_the_same_bytes(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again, other = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    prepared(Data(root=scans), first)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "THREADS", 1)
    prepared(Data(root=Path("scans")), again)
    manifest, _ = prepared(Data(root=scans, split_seed=1), other)
    text = (first / "manifest.json").read_bytes()
    assert text == (again / "manifest.json").read_bytes()
    assert manifest["seed"] == 1
    assert manifest["validation"] != json.loads(text)["validation"]


@pytest.mark.parametrize("layout", ["adni", "ppmi", "ukb"])
def test_a_subject_is_never_on_both_sides(tmp_path: Path, layout: str) -> None:
    name = {"adni": "{}/MPR/{}/I/scan.nii", "ppmi": "{}/{}/scan.nii", "ukb": "{}/{}/T1/T1_brain_to_MNI.nii.gz"}[layout]
    for number in range(24):
        write_nifti(tmp_path / "scans" / name.format(f"s{number // 4}", number), number)
    data = Data(root=tmp_path / "scans", layout=layout, validation_share=0.4)  # type: ignore[arg-type]
    manifest, printed = prepared(data, tmp_path / "out")
    sides = [{entry["path"].split("/")[0] for entry in manifest[side]} for side in ("train", "validation")]
    assert [len(side) for side in sides] == [4, 2]
    assert not sides[0] & sides[1]
    assert "16 files of 4 subjects train, 8 files of 2 subjects are held out" in printed
    by_file = split_volumes(find_volumes(data), data.model_copy(update={"layout": "plain"}))
    shared = [
        {path.relative_to(tmp_path / "scans").parts[0] for path in side} for side in (by_file.train, by_file.validation)
    ]
    assert shared[0] & shared[1], "by file, these subjects would be on both"


@pytest.mark.parametrize("layout", ["adni", "ppmi"])
def test_subjects_to_test_on_are_seen_by_nothing_else(tmp_path: Path, layout: str) -> None:
    name = {"adni": "{}/MPR/{}/I/scan.nii", "ppmi": "{}/{}/scan.nii"}[layout]
    for number in range(30):
        write_nifti(tmp_path / "scans" / name.format(f"s{number // 3}", number), number)
    data = Data(root=tmp_path / "scans", layout=layout, validation_share=0.2, test_share=0.3)  # type: ignore[arg-type]
    manifest, printed = prepared(data, tmp_path / "out")
    train, validation, test = (
        {entry["path"].split("/")[0] for entry in manifest[side]} for side in ("train", "validation", "test")
    )
    assert (len(train), len(validation), len(test)) == (5, 2, 3)
    assert len(train | validation | test) == 10
    assert (
        "15 files of 5 subjects train, 6 files of 2 subjects are held out to validate, 9 files of 3 subjects to test"
    ) in " ".join(printed.split())
    path = tmp_path / "out" / "manifest.json"
    split = split_volumes([], Data(manifest=path))
    assert [len(files) for _, files in split.named()] == [15, 6, 9]
    split.write(tmp_path / "split.json", tmp_path / "scans")
    written = json.loads((tmp_path / "split.json").read_text(encoding="utf-8"))
    assert written["test"] == [entry["path"] for entry in manifest["test"]]
    assert refusal(lambda: find_volumes(Data(manifest=path, test_share=0.2))) == (
        f"data.test_share: a setting of the manifest: expected 0.3, as there, found 0.2. "
        f"Remove it, or run `prepare` with it: {path} has the files and the split."
    )


@pytest.mark.parametrize(
    ("subjects", "validation", "test", "counts"),
    [(2, 0.1, 0, (1, 0)), (3, 0.1, 0.1, (1, 1)), (3, 0.9, 0.9, (1, 1)), (4, 0.9, 0.1, (2, 1)), (60, 0.1, 0.2, (6, 12))],
)
def test_at_least_one_subject_trains_and_one_stands_in_every_list(
    subjects: int, validation: float, test: float, counts: tuple[int, int]
) -> None:
    assert held_out_counts(subjects, Data(validation_share=validation, test_share=test)) == counts


def test_too_few_subjects_for_three_lists(tmp_path: Path) -> None:
    for number in range(2):
        write_nifti(tmp_path / f"{number}.nii", number)
    assert refusal(lambda: prepared(Data(root=tmp_path, test_share=0.1), tmp_path / "out")) == (
        f"{tmp_path}: layout `plain`: expected at least 3 files matching **/*.nii or **/*.nii.gz, found 2. "
        f"Check the folder and `data.layout` ({', '.join(LAYOUTS)})."
    )


def test_a_manifest_of_the_first_version_has_nothing_to_test_on(manifest: Path) -> None:
    values = json.loads(manifest.read_text(encoding="utf-8"))
    values["version"] = 1
    del values["test"], values["test_share"]
    manifest.write_text(json.dumps(values), encoding="utf-8")
    split = split_volumes([], Data(manifest=manifest))
    assert [name for name, _ in split.named()] == ["train", "validation"]
    assert refusal(lambda: split.reference("test")) == (
        "metrics.reference: volumes to compare with: expected some to test on, found none in the split. "
        "Set `data.test_share`, or run `prepare` with it."
    )


def test_one_subject_cannot_be_split(tmp_path: Path) -> None:
    for number in range(3):
        write_nifti(tmp_path / "s1" / f"v{number}" / "scan.nii", number)
    data = Data(root=tmp_path, layout="ppmi")
    assert refusal(lambda: split_volumes(find_volumes(data), data)) == (
        f"{tmp_path}: subjects to split: expected at least 2, found 1, s1. "
        "Add subjects, or split by file with `--set data.layout=plain`."
    )


def test_too_few_volumes_are_an_error_that_names_the_others(tmp_path: Path) -> None:
    good, bad = write_nifti(tmp_path / "a.nii", 0), write_nifti(tmp_path / "b.nii", 1, (4, 4))
    assert refusal(lambda: prepared(Data(root=tmp_path), tmp_path / "out")).splitlines() == [
        f"{bad}: an unreadable volume: expected one 3D volume, found shape 4x4. Replace or remove the file.",
        f"{tmp_path}: usable volumes: expected at least 2, found 1 of 2 files. Mend or add files.",
    ]
    bad.write_bytes(good.read_bytes())
    assert refusal(lambda: prepared(Data(root=tmp_path), tmp_path / "out")).splitlines() == [
        f"{bad}: a copy: expected a scan of its own, found the bytes of {good}. Remove one of the two.",
        f"{tmp_path}: usable volumes: expected at least 2, found 1 of 2 files. Mend or add files.",
    ]
    assert list((tmp_path / "out").iterdir()) == []


def test_many_rejected_files_are_counted_on_the_screen(tmp_path: Path) -> None:
    for number in range(3):
        write_nifti(tmp_path / f"{number}.nii", number)
    for number in range(15):
        (tmp_path / f"bad[{number:02d}].nii").write_bytes(b"")
    manifest, printed = prepared(Data(root=tmp_path), tmp_path / "out")
    assert len(manifest["rejected"]) == 15
    assert "bad[11].nii" in printed
    assert "bad[12].nii" not in printed
    assert "... and 3 more, in manifest.json" in printed


def test_files_that_vanish_or_have_odd_names_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write_nifti(tmp_path / f"{number}.nii", number) for number in range(2)]
    odd = tmp_path / os.fsdecode(b"\xff.nii")
    paths[0].rename(odd)
    write_nifti(paths[0], 5)
    gone = tmp_path / "gone.nii"
    monkeypatch.setattr("ddpm_lab.data.prepare.find_volumes", lambda _: sorted([*paths, odd, gone]))
    manifest, _ = prepared(Data(root=tmp_path), tmp_path / "out")
    assert manifest["rejected"] == [
        {"path": "gone.nii", "reason": "expected a NIfTI file, found No such file or directory"},
        {"path": "\\udcff.nii", "reason": "expected a name in UTF-8, found other bytes"},
    ]


def test_a_zipped_copy_is_a_copy_and_a_link_to_nothing_is_rejected(tmp_path: Path) -> None:
    """Tools that convert DICOM leave both; in `plain` they would stand on both sides of the split."""
    for number in range(3):
        write_nifti(tmp_path / f"{number}.nii", number)
    (tmp_path / "0.nii.gz").write_bytes(gzip.compress((tmp_path / "0.nii").read_bytes()))
    (tmp_path / "link.nii").symlink_to("1.nii")
    (tmp_path / "lost.nii.gz").symlink_to("annex/key")
    (tmp_path / "folder.nii").mkdir()
    manifest, _ = prepared(Data(root=tmp_path), tmp_path / "out")
    assert manifest["rejected"] == [
        {"path": "0.nii.gz", "reason": "expected a scan of its own, found the voxels of 0.nii"},
        {"path": "link.nii", "reason": "expected a scan of its own, found the bytes of 1.nii"},
        {"path": "lost.nii.gz", "reason": "expected a NIfTI file, found No such file or directory"},
    ]


def test_an_unwritable_folder_is_found_before_files_are_read(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddpm_lab.data.prepare.inspect", lambda _: pytest.fail("a file was read"))
    out = tmp_path / "file"
    out.write_text("", encoding="utf-8")
    expected = "{}: `--out`: expected a folder to write to, found {}. Choose another."
    assert refusal(lambda: prepared(Data(root=scans), out)) == expected.format(out, "File exists")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert refusal(lambda: make_folder(tmp_path)) == expected.format(tmp_path, "one that is read-only")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.json"
    write_json(path, {"a": 1})
    assert path.read_text(encoding="utf-8") == '{\n "a": 1\n}\n'

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert refusal(lambda: write_json(path, {"a": 2})) == (
        f"{path}: a file of results: expected a place to write it, found No space left on device. "
        "Free space, or choose another `--out`."
    )
    assert [file.name for file in tmp_path.iterdir()] == ["data.json"]
    assert json.loads(path.read_bytes()) == {"a": 1}


def test_prepare_takes_no_manifest(tmp_path: Path) -> None:
    assert refusal(lambda: prepared(Data(manifest=tmp_path / "m.json"), tmp_path / "out")) == (
        "data.manifest: `prepare`: expected a folder to index, found a manifest. "
        "Remove it, or give the files with `--set data.root=FOLDER`."
    )


@pytest.fixture
def manifest(scans: Path, tmp_path: Path) -> Path:
    prepared(Data(root=scans, split_seed=7, validation_share=0.3), tmp_path / "out")
    return tmp_path / "out" / "manifest.json"


def test_runs_take_files_and_split_from_the_manifest(scans: Path, manifest: Path, tmp_path: Path) -> None:
    data, seen = Data(manifest=manifest), []
    paths = find_volumes(data)
    assert paths == [scans / f"{number}.nii" for number in range(6)]
    check_data(data, paths, seen.append)
    assert seen == []
    check_data(Data(manifest=manifest, checksums=True), paths, seen.append)
    assert seen == [1, 2, 3, 4, 5, 6]
    written = json.loads(manifest.read_text(encoding="utf-8"))
    split = split_volumes(paths, data)
    assert [path.name for path in split.validation] == [entry["path"] for entry in written["validation"]]
    assert (len(split.train), len(split.validation), split.seed) == (4, 2, 7)
    assert rooted(data).root == scans
    moved = tmp_path / "elsewhere"
    scans.rename(moved)
    assert find_volumes(Data(manifest=manifest, root=moved)) == [moved / path.name for path in paths]
    assert split_volumes(paths, Data(manifest=manifest, root=moved)).train[0].parent == moved
    assert refusal(lambda: find_volumes(data)) == (
        f"{manifest}: the manifest's root: expected a folder, found none at {scans}. "
        "Pass `--set data.root=FOLDER` where the data moved."
    )
    assert refusal(lambda: rooted(Data(manifest=manifest, root=scans))) == (
        f"data.root: the manifest's root: expected a folder, found none at {scans}. "
        "Pass `--set data.root=FOLDER` where the data moved."
    )


def test_missing_and_changed_files_are_named(scans: Path, manifest: Path) -> None:
    size = (scans / "0.nii").stat().st_size
    content = bytearray((scans / "1.nii").read_bytes())
    content[-1] ^= 1
    (scans / "1.nii").write_bytes(content)
    data = Data(manifest=manifest)
    paths = find_volumes(data)
    text = refusal(lambda: check_data(Data(manifest=manifest, checksums=True), paths))
    entries = json.loads(manifest.read_text(encoding="utf-8"))
    (before,) = [
        entry["sha256"] for side in ("train", "validation") for entry in entries[side] if entry["path"] == "1.nii"
    ]
    assert text.startswith(f"{scans / '1.nii'}: a changed file: expected sha256 {before[:12]}..., found ")
    assert text.endswith("... Run `prepare` again.")
    (scans / "0.nii").unlink()
    (scans / "2.nii").write_bytes(b"short")
    assert sorted(refusal(lambda: find_volumes(data)).splitlines()) == [
        f"{scans / '0.nii'}: a missing file: expected the {size:,} bytes of the manifest, found No such file or "
        "directory. Pass `--set data.root=FOLDER` where the data moved, or run `prepare` again.",
        f"{scans / '2.nii'}: a changed file: expected the {size:,} bytes of the manifest, found 5. "
        "Run `prepare` again.",
    ]


def test_settings_that_contradict_the_manifest_are_named(manifest: Path, tmp_path: Path) -> None:
    keep = tmp_path / "keep.txt"
    data = Data(manifest=manifest, keep=keep, layout="brats", split_seed=3, validation_share=0.2)
    fix = f"Remove it, or run `prepare` with it: {manifest} has the files and the split."
    assert refusal(lambda: find_volumes(data)).splitlines() == [
        f"data.keep: a list of files: expected none beside a manifest, found {keep}. {fix}",
        f"data.layout: a setting of the manifest: expected plain, as there, found brats. {fix}",
        f"data.split_seed: a setting of the manifest: expected 7, as there, found 3. {fix}",
        f"data.validation_share: a setting of the manifest: expected 0.3, as there, found 0.2. {fix}",
    ]
    same = Data(manifest=manifest, layout="plain", split_seed=7, validation_share=0.3)
    assert len(find_volumes(same)) == 6


Mend = Callable[[dict[str, Any]], None]
MISTAKES: dict[str, tuple[Mend, str]] = {
    "version": (lambda m: m.update(version=3), "the manifest: expected version 2, found version 3."),
    "no version": (lambda m: m.pop("version"), "the manifest: expected version 2, found no version."),
    "missing": (lambda m: m.pop("seed"), "`seed`: expected a value, found nothing."),
    "extra": (lambda m: m.update(more=1), "`more`: expected no such key, found 1."),
    "layout": (
        lambda m: m.update(layout="bids"),
        "`layout`: expected 'plain', 'ukb', 'adni', 'ppmi' or 'brats', found \"bids\".",
    ),
    "number": (lambda m: m["train"][1].update(bytes="12"), '`train.1.bytes`: expected a whole number, found "12".'),
    "shape": (lambda m: m["train"][0]["shape"].pop(), "`train.0.shape.2`: expected a value, found nothing."),
    "infinite": (
        lambda m: m["train"][0].update(spacing=[1.0, float("nan"), 1.0]),
        "`train.0.spacing.1`: expected a finite number, found NaN.",
    ),
    "outside": (
        lambda m: m["train"][0].update(path="../x.nii"),
        '`train.0.path`: expected a path below the root, found "../x.nii".',
    ),
    "absolute": (
        lambda m: m["validation"][0].update(path="/x.nii"),
        '`validation.0.path`: expected a path below the root, found "/x.nii".',
    ),
    "digest": (
        lambda m: m["train"][0].update(sha256="12"),
        '`train.0.sha256`: expected 64 hexadecimal digits, found "12".',
    ),
    "empty": (
        lambda m: m.update(validation=[]),
        "`validation`: expected at least one file, found [].",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_manifest_is_located(manifest: Path, name: str) -> None:
    mend, expected = MISTAKES[name]
    values = json.loads(manifest.read_text(encoding="utf-8"))
    mend(values)
    manifest.write_text(json.dumps(values), encoding="utf-8")
    text = refusal(lambda: find_volumes(Data(manifest=manifest)))
    assert text == f"{manifest}: {expected} Run `prepare` again."


def test_a_file_that_trains_is_not_held_out(manifest: Path) -> None:
    values = json.loads(manifest.read_text(encoding="utf-8"))
    values["validation"].append(values["train"][0])
    manifest.write_text(json.dumps(values), encoding="utf-8")
    text = refusal(lambda: find_volumes(Data(manifest=manifest)))
    name = values["train"][0]["path"]
    assert text.startswith(f"{manifest}: `manifest`: expected each file once, in one of the lists, not '{name}' twice")


def test_what_is_no_manifest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    data = Data(manifest=path)
    assert refusal(lambda: find_volumes(data)) == (
        f"{path}: `data.manifest`: expected a readable manifest, found No such file or directory. "
        "Check the path, or run `prepare`."
    )
    path.write_text('{"version": 1,\n  oops}', encoding="utf-8")
    assert refusal(lambda: find_volumes(data)) == (
        f"{path}:2:3: the manifest: expected JSON, found expecting property name enclosed in double quotes. "
        "Run `prepare` again."
    )
    path.write_text("[1]", encoding="utf-8")
    assert refusal(lambda: find_volumes(data)) == (
        f"{path}: the manifest: expected version 2, found no version. Run `prepare` again."
    )


def test_the_command_line(scans: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("data: {validation_share: 0.3}\n", encoding="utf-8")
    arguments = ["prepare", "--config", config, "--out", tmp_path / "out", "--set", f"data.root={scans}"]
    done = CliRunner().invoke(ddpm.app, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert len(json.loads((tmp_path / "out" / "manifest.json").read_bytes())["validation"]) == 2
    arguments[-1] = f"data.root={scans / 'none'}"
    done = CliRunner().invoke(ddpm.app, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 1
    assert done.stderr == (
        f"error: {scans / 'none'}: `data.root`: expected a folder of NIfTI files, found nothing there. "
        "Check the path.\n"
    )


@pytest.mark.slow
def test_a_run_on_a_manifest(scans: Path, manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "data: {resize: [8, 8, 8]}\n"
        "model: {channels: [8, 8], attention_levels: [false, true], head_channels: [0, 8], res_blocks: 1, "
        "norm_groups: 4}\n"
        "method: {kind: full}\n"
        "training: {steps: 1, accumulation: 1, threads: 1}\n"
        "validation: {buckets: 1}\n"
        "sampling: {count: 0}\n",
        encoding="utf-8",
    )
    (scans / "extra.nii").write_bytes((scans / "0.nii").read_bytes())  # came later, so that no run reads it
    AcceleratorState._reset_state(reset_partial_state=True)
    command = ["finetune", "--config", tmp_path / "c.yaml", "--out", tmp_path / "run"]
    chosen = ["--set", f"data.manifest={manifest}", "--set", "data.checksums=true"]
    done = CliRunner().invoke(ddpm.app, [*map(str, command), *chosen], catch_exceptions=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert done.exit_code == 0, done.output
    written = json.loads(manifest.read_text(encoding="utf-8"))
    split = json.loads((tmp_path / "run" / "split.json").read_text(encoding="utf-8"))
    for side in ("train", "validation"):
        assert split[side] == [entry["path"] for entry in written[side]]
    assert (split["root"], split["seed"]) == (str(scans), 7)
