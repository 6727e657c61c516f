"""A search on a study's model, and a claim, in miniature: whole runs."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
from ddpm_lab.config.reader import read_config
from ddpm_lab.model.method import apply_method
from ddpm_lab.model.unet import build_unet
from ddpm_lab.searching import search
from ddpm_lab.searching.claim import claim
from ddpm_lab.searching.score import score
from ddpm_lab.searching.search import search_study
from ddpm_lab.searching.settings import ClaimConfig, SearchConfig
from ddpm_lab.support.console import Screen
from studies import TINY_STUDY

import tnpeft

SEARCH = r"""
study: study.yaml
match: 'resnets\.0\.conv1\.conv$'
test_match: 'resnets\.0\.conv2\.conv$'
budget: {spec: tenvoo_l, params: {r: 2}}
selected: {contrast: [5]}
tested: {lesion: [6]}
evaluations: 2
iterations: 1
finalists: 1
rates: [0.01, 0.02]
training: {steps: 1}
"""
CLAIM = """
study: study.yaml
found: lora
rivals: [tenvoo_l, full]
budget_of: tenvoo_l
held_out: [{dataset: lesion, part: test}]
seeds: [0, 1]
"""
QUIET = Screen(quiet=True)


def test_a_search_and_a_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for name, text in (("study", TINY_STUDY), ("search", SEARCH), ("claim", CLAIM)):
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    config = read_config(tmp_path / "search.yaml", [], SearchConfig)
    study_out, out = tmp_path / "study", tmp_path / "out"

    command, tests = search._commands(config, tmp_path / "search.yaml", study_out)
    assert shlex.split(command)[2:] == [
        *("score", "--config", str(tmp_path / "search.yaml"), "--study", str(study_out)),
        *("--spec", "{spec}", "--rate", "{rate}", "--dataset", "contrast"),
    ]
    assert [*tests] == ["lesion, seed 6"]
    assert shlex.split(tests["lesion, seed 6"])[-4:] == ["--dataset", "lesion", "--seed", "6"]

    # Each a process of the driver; here they say something at once.
    quick = shlex.join([sys.executable, "-c", "print('{\"score\": 1}') # {spec} {rate}"])
    monkeypatch.setattr(search, "_commands", lambda *_: (quick, dict.fromkeys(tests, quick)))
    found = search_study(tmp_path / "search.yaml", study_out, None, 1, config, out, QUIET)
    assert not found.interrupted
    assert next(iter(found.test_scores)).endswith("conv2.conv, contrast, seed 5")
    assert {update.source for update in found.tests} == {"contrast, seed 5", "lesion, seed 6"}
    assert {path.name for path in (out / "report").iterdir()} == {"report.json", "report.md", "front.svg"}
    report = json.loads((out / "report" / "report.json").read_text())
    assert report["steps"] == "measured"
    assert report["comparison"][0]["finetune_tests"] == {"lesion, seed 6": 1}
    assert found.best.parameters <= found.task.params
    assert json.loads((out / "history.json").read_text())["evaluations"] == 2
    assert (out / "full" / "lesion" / "seed-6" / "model.safetensors").is_file()
    assert len(json.loads((out / "parts.json").read_text())["parts"]) == 1
    assert tnpeft.load_spec(out / "found.yaml").start == "zero"

    capsys.readouterr()
    how = {"spec": out / "found.yaml", "rate": 0.01, "datasets": ["contrast", "lesion"]}
    number = score(config, study_out, QUIET, **how)
    said = json.loads(capsys.readouterr().out)
    assert said["score"] == number == pytest.approx(sum(said["datasets"].values()) / 2)
    assert score(config, study_out, QUIET, **how, seed=6) != number

    about = read_config(tmp_path / "claim.yaml", [], ClaimConfig)
    verdict = claim(study_out, None, about, tmp_path / "claim", QUIET)
    assert verdict.decided
    study = config.read_study()
    with torch.device("meta"):
        methods = [study.methods[name].method for name in ("lora", "tenvoo_l")]
        counts = [apply_method(build_unet(study.model), method).parameters for method in methods]
    assert [verdict.parameters, verdict.most] == counts
    assert (tmp_path / "claim" / "claim.md").read_text().splitlines()[-1] == str(verdict)
