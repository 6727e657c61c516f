"""A study on several anatomies, one of them seen by nothing before its tables."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("monai", reason="the example driver needs the `demo` extra")

from accelerate.state import AcceleratorState
from ddpm_lab.data import anatomies
from ddpm_lab.study.plan import Plan
from ddpm_lab.study.report import report
from ddpm_lab.study.settings import Made, StudyConfig
from ddpm_lab.study.study import study
from ddpm_lab.support.faults import LabError
from studies import TINY_STUDY, Told, read, tiny_study
from templates import NAMES, write_templates

SEEN = "anatomies: [mni152, colin27]"
TEXT = (
    TINY_STUDY.replace("made: {domain: t1, count: 6", f"made: {{domain: t1, {SEEN}, count: 8")
    .replace(
        "made: {domain: t2, count: 6",
        f"made: {{domain: t2, {SEEN}, unseen: {{anatomies: [three_tissue], count: 2}}, count: 12",
    )
    .replace("  lesion: {title: Lesion, made: {domain: lesion, count: 6, side: 16}}\n", "")
    .replace("test_share: 0.2", "validation_share: 0.3, test_share: 0.3")
    .replace("table1: [full, lora, tenvoo_l]", "table1: [lora]")
    .replace("training: {learning_rate: 5.0e-3}}", "rates: [1.0e-3, 5.0e-3]}")
)


@pytest.fixture(autouse=True)
def clean_accelerator() -> Iterator[None]:
    """Accelerate lets a process choose its precision only once, unless it is reset."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def keys(config: StudyConfig) -> list[str]:
    runs, _ = Plan.sketch("table1", config, Path("out")).finals({})
    return [run.key for run in runs]


def test_runs_are_named_by_their_anatomies_and_not_by_where_templates_lie(tmp_path: Path) -> None:
    own = keys(tiny_study(tmp_path, text=TEXT))
    for change in ("made.anatomies=[mni152, icbm2009c]", "made.unseen.anatomies=[inia19]", "made.unseen=null"):
        assert not {*own} & {*keys(tiny_study(tmp_path, f"datasets.contrast.{change}", text=TEXT))}, change
    assert keys(tiny_study(tmp_path, "templates=elsewhere", text=TEXT)) == own


def test_subjects_of_mni152_alone_have_the_settings_that_they_always_had() -> None:
    assert Made(domain="t2").model_dump(mode="json") == {"domain": "t2", "count": 60, "side": 32, "seed": 0}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            ["source.made.anatomies=[mni152, three_tissue]"],
            "datasets.contrast.made.unseen: an anatomy that nothing sees: expected none to train on, found "
            "three_tissue in `source`. Take it out of one of the two.",
        ),
        (
            ["datasets.contrast.made.unseen.anatomies=[colin27]", "source.made.anatomies=[mni152]"],
            "datasets.contrast.made.unseen: an anatomy that nothing sees: expected none to train on, found colin27 in "
            "`contrast`. Take it out of one of the two.",
        ),
        (
            ["datasets.contrast.made.count=8", "datasets.contrast.data.test_share=0.1"],
            "datasets.contrast.made.count: subjects to validate or test on: expected at least 2, one of each anatomy, "
            "found 1. Raise `made.count` or the shares.",
        ),
        (
            ["datasets.contrast.made.anatomies=[inia19]", "datasets.contrast.made.unseen.anatomies=[icbm2009c]"],
            "datasets.contrast.made.anatomies: the template of inia19: expected inia19-t1-brain.nii.gz, found none "
            "in OUT/templates or OUT/system. Run `apt install mricron-data`, or set `templates` to the folder that has "
            "the file.",
        ),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_made(
    changes: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_templates(tmp_path / "templates")
    (tmp_path / "templates" / NAMES["inia19"]).unlink()
    template = replace(anatomies.TEMPLATES["inia19"], within=tmp_path / "system")
    monkeypatch.setitem(anatomies.TEMPLATES, "inia19", template)
    config = tiny_study(tmp_path, *changes, f"templates={tmp_path / 'templates'}", text=TEXT)
    with pytest.raises(LabError) as excinfo:
        study("table1", config, tmp_path / "out", Told().screen)
    assert str(excinfo.value).replace(str(tmp_path), "OUT") == expected
    assert not (tmp_path / "out").exists()


def test_volumes_of_an_unseen_anatomy_are_measured_and_stand_in_the_tables(tmp_path: Path) -> None:
    write_templates(tmp_path / "templates")
    rows, out, told = tmp_path / "rows.jsonl", tmp_path / "out", Told()
    config = tiny_study(tmp_path, f"templates={tmp_path / 'templates'}", f"rows={rows}", text=TEXT)
    study("table1", config, out, told.screen)

    manifest = read(out / "data" / "contrast" / "manifest.json")
    strata = {part: Counter(entry["stratum"] for entry in manifest[part]) for part in ("validation", "test", "unseen")}
    assert strata == {
        "validation": {"mni152": 2, "colin27": 2},
        "test": {"mni152": 2, "colin27": 2},
        "unseen": {"three_tissue": 2},
    }
    known = [json.loads(line) for line in rows.read_text().splitlines()]
    tried = [row for row in known if row["search"]]
    final = [row for row in known if not row["search"] and row["method"] == "lora"]
    assert [set(row["errors"]) for row in tried] == [{"validation"}] * 2
    for row in final:
        unseen = row["errors"]["unseen"]
        assert list(unseen) == ["sub-013_three_tissue_t2w.nii.gz", "sub-014_three_tissue_t2w.nii.gz"]
        before, after = (sum(pair[k] for pair in unseen.values()) for k in (0, 1))
        assert row["summary"]["run"]["unseen_change_percent"] == pytest.approx(100 * (after / before - 1))
    one, other = (row["errors"]["unseen"] for row in final)
    assert [pair[0] for pair in one.values()] == [pair[0] for pair in other.values()], "the same noise for each seed"

    report(out, told.screen)
    text = (out / "report" / "report.md").read_text()
    assert "| T2-like: rate | T2-like: Error change ↓ (%) | T2-like: Error change, unseen anatomy ↓ (%) |" in text
    assert "unseen_change_percent" in (out / "report" / "table1.csv").read_text()
    made = "templates (MNI152, Colin 27, deepmriprep's tissues)"
    assert f"- Volumes that are called real are made from {made}, where the data set is." in text
