"""What a study says of data sets that its encoder does not see, and of runs that another encoder measured."""

from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("monai", reason="the example driver needs the `demo` extra")

from ddpm_lab.config.settings import Base
from ddpm_lab.evaluation.encoder import load_encoder
from ddpm_lab.study import domains
from ddpm_lab.study.data import settled
from ddpm_lab.study.domains import tell_domains
from ddpm_lab.study.plan import Plan
from ddpm_lab.study.results import METRICS, Results, read_results
from ddpm_lab.study.tables import as_csv, detail_table, method_table
from ddpm_lab.support.durable import write_json
from studies import Told, read, tiny_study, written_study

OTHER = {"encoder": "* features of deepbet", "encoder_mark": "*", "encoder_digest": "deepbet"}


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """A finished study by the encoder `random`, which does not see lesions."""
    config = tiny_study(tmp_path)
    written_study(tmp_path, config)
    for name, p in (("contrast", 0.0001), ("lesion", 0.4)):
        found = {"key": "", "encoder_digest": "random", "p": p, "permutations": 9999, "counts": [20, 120]}
        write_json(tmp_path / "data" / name / "domain.json", found)
    return read_results(tmp_path)


def test_distances_of_a_domain_that_is_not_seen_are_not_compared(results: Results) -> None:
    table = method_table(results, "table1", "Table 1", results.config.table1)
    assert table.columns[2:] == (
        "FID* ↓ (1e-2)",
        "MMD* ↓ (1e-2)",
        "MS-SSIM ↑",
        "FID* ↓, not seen by this encoder",
        "MMD* ↓, not seen by this encoder",
        "MS-SSIM ↑",
    )
    for row in table.rows:
        assert row.cells[5:7] == ("-", "-")
        assert "-" not in (*row.cells[2:5], row.cells[7])
        assert not row.best & {5, 6}
    assert any(2 in row.best for row in table.rows)
    assert (
        "Does the encoder tell a data set's held-out volumes from the source's? p-values of a permutation test of the "
        "MMD: T2-like 0.0001, Lesion 0.4. Above 0.05 it does not, or volumes are too few: not seen by this encoder, "
        "so that no FID or MMD is compared."
    ) in table.notes
    detail = detail_table(results, "table1", "lesion", results.config.table1)
    assert sum("not seen" in each for each in detail.columns) == 4
    assert not any("not seen" in each for each in detail_table(results, "table1", "contrast", ["lora"]).columns)


def test_the_csv_keeps_the_numbers_and_says_how_far_to_trust_them(results: Results) -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(results, results.config.table1))))
    found = {(row["dataset"], row["metric"], row["encoder"], row["p"]) for row in rows}
    random = "* random features, not comparable"
    assert {each for each in found if each[1] in ("fid", "ms_ssim", "change_percent")} == {
        ("contrast", "fid", random, "0.0001"),
        ("lesion", "fid", random, "0.4"),
        *((dataset, metric, "", "") for dataset in ("contrast", "lesion") for metric in ("ms_ssim", "change_percent")),
    }
    assert all(row["value"] for row in rows)


def test_distances_of_two_encoders_never_stand_in_one_table(tmp_path: Path, results: Results) -> None:
    """The runs of seed 1 were measured with another encoder, on a machine that had it."""
    for path in tmp_path.glob("runs/*/*/seed-1/evaluation.json"):
        write_json(path, {**read(path), **OTHER})
    mixed = read_results(tmp_path)
    table = method_table(mixed, "table1", "Table 1", mixed.config.table1)
    full = next(row for row in table.rows if row.title == "Full fine-tuning")
    assert full.cells[2] == "2.00 ± 0.20", "seed 0 alone, with the bootstrap's interval"
    before = method_table(results, "table1", "Table 1", mixed.config.table1)
    assert [row.cells[4] for row in table.rows] == [row.cells[4] for row in before.rows], "MS-SSIM has no encoder"
    assert (
        "FID and MMD of 8 runs are left out: another encoder measured them. Their errors and MS-SSIM stand. "
        "Remove their folders, and their lines in `rows`, to run them again."
    ) in table.notes
    study = read(tmp_path / "study.json")
    write_json(tmp_path / "study.json", {**study, "features": OTHER})
    other = read_results(tmp_path)
    table = method_table(other, "table1", "Table 1", other.config.table1)
    full = next(row for row in table.rows if row.title == "Full fine-tuning")
    assert full.cells[2] == "2.20 ± 0.22", "seed 1 alone"
    assert not any("not seen" in each for each in table.columns), "what the other encoder sees is not known"
    assert any(note.startswith("FID and MMD: * features of deepbet; ") for note in table.notes)
    change = next(metric for metric in METRICS if metric.key == "change_percent")
    assert set(other.result("full", "lesion").numbers(change)) == {0, 1}, "errors are of both"


def test_a_study_compares_each_data_set_with_the_source_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_study(
        tmp_path,
        "source.made.count=16",
        "datasets.contrast.made={domain: t2, count: 10, side: 16}",
        "datasets.lesion.made={domain: t1, count: 10, side: 16, seed: 5}",
        "data.test_share=0.4",
        "data.resize=[16,16,16]",
    )
    told = Told()
    out = tmp_path / "out"
    named = {name: settled(name, config, about, out, told.screen) for name, about in config.datasets.items()}
    plan = Plan("table1", config, out, Base(), "key", named)
    encoder = load_encoder(config.metrics)
    tell_domains(plan, encoder, told.screen)
    found = {name: read(out / "data" / name / "domain.json") for name in named}
    assert found["contrast"]["counts"] == [4, 16], "what samples are compared with, and all of the source"
    assert found["contrast"]["p"] < 0.01
    assert found["lesion"]["p"] > 0.05, "healthy subjects again"
    assert "contrast: seen by the encoder of FID and MMD (p = " in told.text
    assert "lesion: not seen by the encoder of FID and MMD (p = " in told.text
    assert (out / "cache" / "contrast").is_dir(), "where the runs look for features"

    def never(*_: Any) -> None:
        raise AssertionError("it was found before")

    monkeypatch.setattr(domains, "p_value", never)
    tell_domains(plan, encoder, told.screen)
    with pytest.raises(AssertionError, match="it was found before"):
        tell_domains(plan, dataclasses.replace(encoder, digest="another"), told.screen)
    blind = config.model_copy(update={"sampling": config.sampling.model_copy(update={"count": 0})})
    tell_domains(dataclasses.replace(plan, config=blind), dataclasses.replace(encoder, digest="b"), told.screen)
