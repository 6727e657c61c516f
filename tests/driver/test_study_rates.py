"""Rates as an axis of a study, chosen on volumes to validate, and finished runs as rows that are not run again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("monai", reason="the example driver needs the `demo` extra")

from ddpm_lab.config.settings import Base, Config
from ddpm_lab.study import dry_run as study_dry_run
from ddpm_lab.study import plan as study_plan
from ddpm_lab.study import run as study_run
from ddpm_lab.study.results import read_results
from ddpm_lab.study.rows import Rows
from ddpm_lab.study.run import Outcome
from ddpm_lab.study.search import Choice, score
from ddpm_lab.study.study import check_study, study
from ddpm_lab.study.tables import change_table
from ddpm_lab.support.console import Screen
from ddpm_lab.support.durable import write_json
from ddpm_lab.support.faults import DivergenceError, LabError
from studies import Told, read, tiny_study

from tnpeft.errors import Problem

RATES = "[2.0e-3, 1.0e-3, 8.0e-3]"
SEARCHED = [
    f"methods.full.rates={RATES}",
    f"methods.lora={{title: LoRA, method: {{recipe: lora_ddpm}}, rates: {RATES}}}",
    "table1=[full, lora]",
    "datasets={contrast: {title: T2-like, made: {domain: t2, count: 4, side: 8}}}",
]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["methods.full.rates=[1.0e-3, 2.0e-3]"],
            "table1: the number of rates: expected the same for every method, found full 2, lora 0, tenvoo_l 0. "
            "Try as many for each: more tries find a better rate.",
        ),
        (
            ["table1=[full]", "methods.full.rates=[1.0e-3, 1.0e-3]"],
            "methods.full.rates: the rates: expected each once, found [0.001, 0.001]. Remove one of the two.",
        ),
        (
            ["table1=[lora]", "methods.lora.rates=[1.0e-3, 2.0e-3]"],
            "methods.lora.rates: the rate of a method: expected one of two ways to say it, found both. "
            "Give `rates` to have the best of them, or one `training.learning_rate`.",
        ),
        (
            ["table1=[full]", "methods.full.rates=[1.0e-3, 2.0e-3]", "search_seed=1"],
            "search_seed: the seed of the search: expected none of `seeds`, found 1. "
            "Choose another: the tables' seeds must not have chosen the rates.",
        ),
    ],
)
def test_unfair_searches_are_refused(tmp_path: Path, overrides: list[str], expected: str) -> None:
    with pytest.raises(LabError) as excinfo:
        check_study("table1", tiny_study(tmp_path, *overrides))
    assert str(excinfo.value) == expected


def test_the_best_rate_and_whether_it_lies_at_an_edge() -> None:
    rates = (4e-3, 1e-3, 2e-3)
    assert Choice(rates, {1e-3: -3, 2e-3: -5}).best is None  # one is not tried
    inner = Choice(rates, {1e-3: -3, 2e-3: -5, 4e-3: math.inf})
    assert (inner.best, inner.edge) == (2e-3, "")
    assert Choice(rates, {1e-3: -5, 2e-3: -5, 4e-3: -1}).best == 1e-3  # the smaller of equal ones
    assert Choice(rates, {1e-3: -5, 2e-3: -4, 4e-3: -1}).edge == "smallest"
    assert Choice(rates, {1e-3: -1, 2e-3: -4, 4e-3: -5}).edge == "largest"
    none = Choice(rates, dict.fromkeys(rates, math.inf))
    assert (none.best, none.edge) == (None, "")


def test_a_score_is_the_change_of_the_mean_over_volumes_to_validate() -> None:
    errors = {"validation": {"a": [2.0, 1.0], "b": [4.0, 2.0]}, "test": {"c": [1.0, 0.1]}}
    assert score(Outcome("done", "", errors=errors)) == pytest.approx(-50)
    assert score(Outcome("diverged", "")) == math.inf
    assert score(Outcome("failed", "")) is None
    assert score(None) is None


Trained = list[tuple[str, float, int, bool]]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    """Runs that were asked for: what trains, rate, seed, and whether test volumes were measured. None trains."""
    asked: Trained = []

    def finetune(settings: Config, folder: Path, screen: Screen) -> dict[str, Any]:
        rate, tested = settings.training.learning_rate, settings.validation.test
        asked.append((settings.method.kind, rate, settings.training.seed, tested))
        if settings.method.kind == "full" and rate > 4e-3:
            raise DivergenceError(Problem("the loss", "a finite number", "nan", "Lower it.", "step 7"))
        best = 2e-3 if settings.method.kind == "full" else 1e-3
        after = 0.02 + abs(math.log(rate / best)) / 1000
        errors = {name: {"before": [0.04, 0.04], "after": [after, after]} for name in ("validation", "test")}
        if not tested:
            del errors["test"]
        run = {"by_volume": errors, "trainable_parameters": 7, "base_parameters": 70}
        run |= {"test_change_percent": 100 * (after / 0.04 - 1)}
        config = {"training": {"learning_rate": rate}}
        write_json(folder / "split.json", {name: ["a.nii", "b.nii"] for name in errors})
        write_json(folder / "summary.json", {"run": run, "config": config, "result": "x.safetensors"})
        return {"result": "x.safetensors"}

    monkeypatch.setattr(study_run, "finetune", finetune)
    monkeypatch.setattr(study_run, "sample_volumes", lambda *_: None)
    monkeypatch.setattr(study_run, "evaluate_samples", lambda *_: None)
    monkeypatch.setattr(study_plan, "base_of", lambda *_: (Base(checkpoint=Path("base.safetensors")), "key"))
    return asked


def test_rates_are_chosen_on_validation_and_the_seeds_run_at_the_best(tmp_path: Path, trained: Trained) -> None:
    out, told = tmp_path / "out", Told()
    config = tiny_study(tmp_path, *SEARCHED)
    study("table1", config, out, told.screen)
    assert {(seed, tested) for _, _, seed, tested in trained[:6]} == {(1000, False)}, "test volumes are not looked at"
    assert sorted(rate for kind, rate, _, _ in trained[:6] if kind == "full") == [1e-3, 2e-3, 8e-3]
    assert trained[6:] == [
        ("full", 2e-3, 0, True),
        ("adapter", 1e-3, 0, True),
        ("full", 2e-3, 1, True),
        ("adapter", 1e-3, 1, True),
    ]
    for line in (
        "6 runs to choose rates, 0 of them done before",
        "full on contrast, rate 0.008: diverged",
        "full on contrast: rate 0.002\n",
        "lora on contrast: rate 0.001, the smallest tried: a better one may lie beyond",
        "6 of 6 runs are done.",
    ):
        assert line in told.text
    outcome = read(out / "search" / "full" / "contrast" / "rate-0.001" / "run.json")
    assert list(outcome["errors"]) == ["validation"]
    assert outcome["errors"]["validation"]["a.nii"][0] == 0.04
    table = change_table(read_results(out), "table1", config.table1)
    assert [row.cells[2] for row in table.rows] == ["2.0e-03", "1.0e-03\N{DAGGER}"]
    assert table.notes[2:] == (
        "Each method's rate is the best of 3 on the data set's volumes to validate, with seed 1000, which no table "
        "has.",
        "\N{DAGGER} The largest or the smallest rate that was tried: a better one may lie beyond.",
    )
    before = len(trained)
    study("table1", config, out, Screen(quiet=True))
    assert len(trained) == before, "a diverged rate is not tried again"


def test_runs_wait_for_a_rate_that_another_command_tries(tmp_path: Path, trained: Trained) -> None:
    out, told = tmp_path / "out", Told()
    config = tiny_study(tmp_path, *SEARCHED, "seeds=[0]")
    with study_run.alone(out / "locks" / "lora--contrast--rate-0.002"):
        study("table1", config, out, told.screen)
    assert ("adapter", 1e-3, 0, True) not in trained
    assert "1 wait for a rate that is not chosen yet: lora on contrast, seed 0" in told.text
    assert "2 of 3 runs are done." in told.text


def test_a_method_that_diverges_at_every_rate_is_said(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(*_: Any) -> Any:
        raise DivergenceError(Problem("the loss", "a finite number", "nan", "Lower it.", "step 7"))

    monkeypatch.setattr(study_run, "finetune", diverging)
    told = Told()
    study("table1", tiny_study(tmp_path, *SEARCHED, "table1=[full]", "seeds=[0]"), tmp_path / "out", told.screen)
    assert "full on contrast: training diverged at every rate: try smaller ones" in told.text


def test_the_digest_takes_in_the_split_and_not_where_files_lie(tmp_path: Path, trained: Trained) -> None:
    def keys(name: str, *overrides: str) -> list[str]:
        config = tiny_study(tmp_path, *SEARCHED, *overrides)
        plan = study_plan.Plan.of("table1", config, tmp_path / name, Screen(quiet=True))
        return [run.key for run in plan.searches()]

    here = keys("a")
    assert here == keys("b")
    assert not set(here) & set(keys("c", "data.split_seed=1"))
    assert not set(here) & set(keys("d", "data.test_share=0.4"))
    assert here == keys("a", "sampling.count=7"), "a search draws no samples"


def test_rows_are_read_first_and_added_to(tmp_path: Path, trained: Trained) -> None:
    path = tmp_path / "rows" / "rows.jsonl"
    config = tiny_study(tmp_path, *SEARCHED, "seeds=[0]", "rows=rows/rows.jsonl")
    assert config.rows == path, "beside the configuration"
    study("table1", config, tmp_path / "one", Screen(quiet=True))
    first, asked = path.read_bytes(), len(trained)
    rows = [json.loads(line) for line in first.decode().splitlines()]
    assert len(rows) == asked + 1  # and the base's
    kinds = [(row["search"], row["method"], row["rate"], row["seed"], row["status"]) for row in rows]
    assert (True, "full", 8e-3, 1000, "diverged") in kinds
    assert (False, "lora", 1e-3, 0, "done") in kinds
    lora = next(row for row in rows if (row["search"], row["method"]) == (False, "lora"))
    assert list(lora["errors"]["test"]) == ["a.nii", "b.nii"]
    assert lora["settings"]["training.learning_rate"] == 1e-3
    assert lora["seconds"] >= 0
    assert lora["machine"]["processor"]
    assert str(tmp_path) not in first.decode(), "a row holds no paths"
    path.write_bytes(first + b'{"version": 1, "cut')  # a crash in mid-line
    told = Told()
    study("table1", tiny_study(tmp_path, *SEARCHED, "rows=rows/rows.jsonl"), tmp_path / "two", told.screen)
    assert trained[asked:] == [("full", 2e-3, 1, True), ("adapter", 1e-3, 1, True)]
    assert "6 runs to choose rates, 6 of them done before, 6 of those by the rows" in told.text
    assert "6 runs, 3 of them done before, 3 of those by the rows" in told.text
    assert path.read_bytes().startswith(first), "lines are added and never changed"
    assert [json.loads(line)["seed"] for line in path.read_text().splitlines()[len(rows) :]] == [1, 1, 1]
    tables = [change_table(read_results(tmp_path / name), "table1", config.table1) for name in ("one", "two")]
    assert [row.cells[2] for row in tables[1].rows] == [row.cells[2] for row in tables[0].rows]


def test_a_line_that_is_no_row_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for text, found in (("{}\n", "'version'"), ('{"version": 2, "key": "x"}\n', "version 2"), ("[]\n", "list indices")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(LabError) as excinfo:
            Rows(path)
        (problem,) = excinfo.value.problems
        assert (problem.where, problem.what, problem.expected) == (f"{path}:1", "a row", "a finished run as JSON")
        assert problem.found.startswith(found)
        assert problem.fix == (
            "Take the file from version control again, or remove the line: its run is then done anew."
        )


def test_no_run_starts_that_would_not_end_in_time(tmp_path: Path, trained: Trained) -> None:
    path = tmp_path / "rows.jsonl"
    one = tiny_study(tmp_path, *SEARCHED, "seeds=[0]", "rows=rows.jsonl")
    study("table1", one, tmp_path / "one", Screen(quiet=True))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    slow = [{**row, "seconds": 3600.0 if row["method"] == "full" else 1.0} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in slow), encoding="utf-8")
    before, told = len(trained), Told()
    both = tiny_study(tmp_path, *SEARCHED, "rows=rows.jsonl", "minutes=50")
    found = study_dry_run._left("table1", both, tmp_path)
    assert found == {"runs": 12, "left": 3, "seconds_left": 3602.0}
    study("table1", both, tmp_path / "two", told.screen)
    assert trained[before:] == [("adapter", 1e-3, 1, True)]
    assert "1 are left for another part: they would not end within 50 minutes" in told.text
    assert "5 of 6 runs are done." in told.text


def test_how_long_a_run_takes_is_known_by_its_method_or_by_any(tmp_path: Path, trained: Trained) -> None:
    config = tiny_study(tmp_path, *SEARCHED, "seeds=[0]")
    plan = study_plan.Plan.of("table1", config, tmp_path, Screen(quiet=True))
    searches = plan.searches()
    full = [run for run in searches if run.method == "full"]
    lora = next(run for run in searches if run.method == "lora")
    rows = Rows(None)
    assert rows.expected(lora) is None
    for run, seconds in zip(full, (10.0, 20.0, 60.0), strict=True):
        row = {"search": True, "method": "full", "status": "done", "seconds": seconds, "settings": dict(run.made_of)}
        rows.known[run.key] = row
    assert (rows.expected(full[0]), rows.expected(lora)) == (20, 60)
    longer = tiny_study(tmp_path, *SEARCHED, "seeds=[0]", "training.steps=9")
    other = study_plan.Plan.of("table1", longer, tmp_path, Screen(quiet=True)).searches()[0]
    assert rows.expected(other) is None, "of other settings"
    (final, *_), _ = plan.finals({})
    assert rows.expected(final) is None
