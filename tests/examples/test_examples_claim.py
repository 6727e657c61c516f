"""A claim of a found network: the file that says it before the runs, and the verdict on runs that are there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from ddpm_lab.config.reader import read_config
from ddpm_lab.evaluation.paired import mean_difference
from ddpm_lab.searching.claim import claim, judged, lines
from ddpm_lab.searching.settings import ClaimConfig, SearchConfig
from ddpm_lab.study.run import Outcome
from ddpm_lab.study.settings import StudyConfig
from ddpm_lab.support.console import Screen
from ddpm_lab.support.durable import write_json
from ddpm_lab.support.faults import LabError
from studies import TINY_STUDY

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
CLAIM = """
study: study.yaml
found: lora
rivals: [full, tenvoo_l]
controls: [tenvoo_q]
budget_of: tenvoo_l
held_out: [{dataset: contrast, part: test}, {dataset: lesion, part: unseen}]
seeds: [3, 4, 5]
"""
VOLUMES = ("a.nii.gz", "b.nii.gz", "c.nii.gz")
PARAMETERS = {"lora": 90, "full": 1000, "tenvoo_l": 100, "tenvoo_q": 95}
LEVELS = {"lora": 0.5, "full": 0.6, "tenvoo_l": 0.55, "tenvoo_q": 0.4}


def claim_of(folder: Path, **changed: str) -> ClaimConfig:
    (folder / "study.yaml").write_text(TINY_STUDY, encoding="utf-8")
    text = CLAIM
    for key, value in changed.items():
        text = re.sub(rf"^{key}: .*$", f"{key}: {value}", text, flags=re.MULTILINE)
    (folder / "claim.yaml").write_text(text, encoding="utf-8")
    return read_config(folder / "claim.yaml", [], ClaimConfig)


def after(method: str, dataset: str, seed: int, volume: int) -> float:
    """An error after training; methods are as far apart as `LEVELS`, up to noise that is theirs."""
    generator = np.random.default_rng([len(method), ord(method[-1]), len(dataset), seed, volume])
    return LEVELS[method] * (1 + volume) + 0.01 * float(generator.random())


def before(dataset: str, volume: int) -> float:
    return (1 + volume) * (1.0 if dataset == "contrast" else 2.0)


def written(out: Path, config: ClaimConfig) -> None:
    """The folders of runs that are done."""
    for method in config.members:
        for kind in config.held_out:
            for seed in config.seeds:
                folder = out / "runs" / method / kind.dataset / f"seed-{seed}"
                folder.mkdir(parents=True)
                errors = {name: [before(kind.dataset, number), after(method, kind.dataset, seed, number)]
                          for number, name in enumerate(VOLUMES)}  # fmt: skip
                Outcome("done", "key", errors={kind.part: errors}).write(folder)
                write_json(folder / "summary.json", {"run": {"trainable_parameters": PARAMETERS[method]}})


def expected(one: str, other: str, seeds: tuple[int, ...], datasets: tuple[str, ...]) -> tuple[float, float, float]:
    """The paired difference with its interval, from the definition."""
    rows = [
        [
            100 * (after(one, dataset, seed, number) - after(other, dataset, seed, number))
            / np.mean([before(dataset, each) for each in range(3)])
            for dataset in datasets
            for number in range(3)
        ]
        for seed in seeds
    ]  # fmt: skip
    found = mean_difference(np.array(rows))
    return found.mean, found.low, found.high


def test_a_claim_holds_where_every_rival_is_beaten(tmp_path: Path):
    config = claim_of(tmp_path)
    written(tmp_path, config)
    verdict = judged(config, tmp_path)
    assert verdict.holds
    assert str(verdict) == "The claim holds: all 2 rivals are beaten on what was held out."
    for rival in (*verdict.rivals, *verdict.controls):
        found = rival.together
        both = ("contrast", "lesion")
        want = expected("lora", rival.method, config.seeds, both)
        assert (found.mean, found.low, found.high) == pytest.approx(want)
        alone = rival.by_kind["lesion, unseen"]
        want = expected("lora", rival.method, config.seeds, both[1:])
        assert (alone.mean, alone.low, alone.high) == pytest.approx(want)
    assert [rival.beaten for rival in verdict.rivals] == [True, True]
    assert verdict.controls[0].together.low > 0  # a control is better, and decides nothing
    text = lines(config, verdict)
    assert text[4] == "| | parameters | change | difference | contrast, test | lesion, unseen | beaten |"
    assert text[6].startswith("| lora | 90 | -6")
    assert text[-3].startswith("| tenvoo_q | 95 | -")
    assert text[-3].endswith("| control |")


def test_a_claim_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = claim_of(tmp_path, found="tenvoo_l", rivals="[full, lora]", budget_of="lora")
    written(tmp_path, config)
    assert str(judged(config, tmp_path)) == "The claim does not hold: 100 parameters are more than 90."
    monkeypatch.setitem(PARAMETERS, "tenvoo_l", 90)
    written(tmp_path / "equal", config)
    verdict = judged(config, tmp_path / "equal")
    assert not verdict.holds
    assert str(verdict) == "The claim does not hold: not beaten are lora."


def test_a_claim_is_not_decided_while_runs_are_missing(tmp_path: Path):
    config = claim_of(tmp_path)
    written(tmp_path, config)
    folder = tmp_path / "runs" / "full" / "lesion" / "seed-4"
    Outcome("failed", "key").write(folder)
    verdict = judged(config, tmp_path)
    assert verdict.missing == ("full on lesion, seed 4",)
    assert str(verdict) == "The claim is not decided: 1 runs are missing."
    assert verdict.rivals[0].together is not None  # of the seeds that both have
    assert not verdict.holds


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (
            {"budget_of": "tenvoo_q"},
            "budget_of: a rival: expected one of full, tenvoo_l, found `tenvoo_q`. Name one of them.",
        ),
        (
            {"held_out": "[{dataset: brain, part: test}]"},
            "held_out: a data set: expected one of contrast, lesion, found `brain`. Correct the name.",
        ),
    ],
)
def test_what_no_claim_can_be(tmp_path: Path, changed: dict[str, str], text: str):
    with pytest.raises(LabError) as caught:
        claim_of(tmp_path, **changed).as_study(None)
    assert str(caught.value) == text


def test_a_claim_needs_the_base_of_the_study(tmp_path: Path):
    with pytest.raises(LabError) as caught:
        claim(tmp_path / "study", None, claim_of(tmp_path), tmp_path / "out", Screen(quiet=True))
    assert str(caught.value) == (
        f"{tmp_path}/study/base: the base of the study: expected model.safetensors, found none. "
        "Run `study` first: a claim is about its base."
    )


def test_the_committed_claim_is_about_what_the_search_never_saw():
    config = read_config(CONFIGS / "claim.yaml", [], ClaimConfig)
    search = read_config(CONFIGS / "search_cpu.yaml", [], SearchConfig)
    study = read_config(CONFIGS / "study_cpu.yaml", [], StudyConfig)
    assert {"tenvoo_l", "tenvoo_q", "tenvoo_l_zero", "lora", "lokr", "loha", "cp", "tucker"} == {*config.rivals}
    assert {*config.rivals} <= {*study.methods}
    tested = {kind.dataset for kind in config.held_out}
    assert not tested & {*search.selected}
    seen = {seed for seeds in (*search.selected.values(), *search.tested.values()) for seed in seeds}
    assert not {*config.seeds} & {*seen, study.search_seed}
    numbers = {len(each.rates) for each in (*config.methods.values(), *(study.methods[name] for name in config.rivals))}
    assert len(numbers | {len(search.rates)}) == 1
    assert json.loads(config.model_dump_json())["confidence"] == 0.95
