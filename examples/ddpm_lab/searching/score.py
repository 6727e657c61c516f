"""`score`: a short fine-tune with a spec at a rate, and how it ends, for `tnpeft search`."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ddpm_lab.config.settings import Config, Method
from ddpm_lab.searching.checkpoints import Checkpoints
from ddpm_lab.searching.settings import SearchConfig
from ddpm_lab.study.settings import StudyConfig, StudyMethod
from ddpm_lab.support.console import Screen
from ddpm_lab.support.faults import DivergenceError, fault
from ddpm_lab.training.driver import finetune

__all__ = ["WORST", "score"]

CANDIDATE = "candidate"
WORST = -100.0  # of training that diverged: the error has doubled


def score(
    config: SearchConfig,
    study_out: Path,
    screen: Screen,
    *,
    spec: Path,
    rate: float,
    datasets: Sequence[str],
    seed: int | None = None,
) -> float:
    """By how many percent the error falls, as a mean over data sets; printed as JSON, as `tnpeft search` reads it.

    Without a seed it is measured on volumes to validate, and those to test on are not looked at: for a choice. With
    one it is measured on those to test on.
    """
    study = config.read_study()
    unknown = [name for name in datasets if name not in study.datasets]
    if unknown:
        expected = f"one of {', '.join(study.datasets)}"
        raise fault("--dataset", "a data set", expected, f"`{unknown[0]}`", "Correct the name.")
    study = _with(config, study, spec, rate)
    scores = [_one(study, study_out, screen, rate, name, seed) for name in datasets]
    found = statistics.fmean(scores)
    print(json.dumps({"score": found, "datasets": dict(zip(datasets, scores, strict=True))}), flush=True)
    return found


def _with(config: SearchConfig, study: StudyConfig, spec: Path, rate: float) -> StudyConfig:
    """The study with a method for the spec on the searched layers, those that the search never saw among them."""
    match = config.match if config.test_match is None else f"{config.match}|{config.test_match}"
    method = Method(kind="adapter", spec=str(spec), match=match)
    own = StudyMethod(method=method, training=config.training, rates=(rate,))
    return study.model_copy(update={"methods": {**study.methods, CANDIDATE: own}})


def _one(study: StudyConfig, study_out: Path, screen: Screen, rate: float, dataset: str, seed: int | None) -> float:
    with TemporaryDirectory() as folder:
        checkpoints = Checkpoints(study, study_out, Path(folder), screen)
        own = study.search_seed if seed is None else seed
        run = checkpoints.config(CANDIDATE, checkpoints.base(), dataset, own, rate)
        try:
            summary = finetune(_watched(run, blind=seed is None), Path(folder) / "run", screen)
        except DivergenceError:
            return WORST
    assert summary is not None  # this is the only process
    return _gain(summary["run"], "change_percent" if seed is None else "test_change_percent")


def _watched(run: Config, blind: bool) -> Config:
    """Measured before and after alone; `blind` runs do not look at volumes to test on."""
    return run.model_copy(update={"validation": run.validation.model_copy(update={"test": not blind, "every": None})})


def _gain(run: dict[str, Any], key: str) -> float:
    change = float(run[key])
    return max(-change, WORST) if math.isfinite(change) else WORST
