"""`search`: `tnpeft.search` on a study's model, in parts, with fine-tunes of the driver and a report."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tnpeft
from ddpm_lab.config.settings import Base
from ddpm_lab.model.unet import build_unet, load_base
from ddpm_lab.searching.checkpoints import Checkpoints
from ddpm_lab.searching.settings import SearchConfig
from ddpm_lab.study.settings import StudyConfig
from ddpm_lab.support.console import Screen
from ddpm_lab.support.durable import read_json, write_json
from ddpm_lab.support.folders import make_folder
from ddpm_lab.support.locks import alone_in_out
from ddpm_lab.support.record import machine, write_record
from tnpeft.searching import Candidate, Search
from tnpeft.searching.updates import layers_matching

__all__ = ["search_study"]

DRIVER = Path(__file__).resolve().parents[2] / "ddpm.py"
FOUND, JOURNAL, REPORT, PARTS, HISTORY = "found.yaml", "search.journal", "report", "parts.json", "history.json"


@alone_in_out("search")
def search_study(
    config_path: Path,
    study_out: Path,
    minutes: float | None,
    jobs: int,
    config: SearchConfig,
    out: Path,
    screen: Screen,
) -> Search:
    """Go on with a search, for so many minutes: OUT/search.journal has what was done before.

    The best so far is OUT/found.yaml, with all networks in OUT/history.json. When all is evaluated and fine-tuned,
    OUT/report compares it.
    """
    started = time.time()
    study = config.read_study()
    config.check(study)
    make_folder(out)
    write_record(out, "search", config)
    checkpoints = Checkpoints(study, study_out, out, screen)
    base = checkpoints.base()
    unet = _unet(study, base)
    params = _params(config, unet)
    screen.line(f"{params:,} parameters: {config.budget.spec} on the searched layers")
    how = _how(config, out, jobs)
    pairs = checkpoints.pairs(config.selected)
    how["progress"] = lambda candidate, count: _say(candidate, count, screen)
    found = tnpeft.search(unet, pairs, params, **how, minutes=_left(minutes, started))
    command, by_test = _commands(config, config_path, study_out)
    if not found.interrupted:  # nothing is evaluated again
        how |= {"command": command, "rates": config.rates, "finalists": config.finalists}
        how["test_pairs"] = checkpoints.pairs(config.tested)
        found = tnpeft.search(unet, pairs, params, **how, minutes=_left(minutes, started))
    found.save(out / FOUND)
    write_json(out / HISTORY, found.as_dict())
    if not found.interrupted:
        left, example = _left(minutes, started), _example(study)
        tnpeft.search_report(
            found, out / REPORT, out / JOURNAL, jobs, minutes=left, test_commands=by_test, model=unet, example=example
        )
    _remember(out, found, started)
    screen.line(str(found) + (": the same command goes on" if found.interrupted else ""))
    return found


def _left(minutes: float | None, started: float) -> float | None:
    """What is left of the minutes, if only for what takes none."""
    return None if minutes is None else max(0.01, minutes - (time.time() - started) / 60)


def _how(config: SearchConfig, out: Path, jobs: int) -> dict[str, Any]:
    names = ("match", "test_match", "evaluations", "sampler", "seed", "iterations", "cores")
    return {name: getattr(config, name) for name in names} | {"jobs": jobs, "storage": out / JOURNAL}


def _unet(study: StudyConfig, base: Base) -> nn.Module:
    unet = build_unet(study.model, base)
    load_base(unet, base)
    found: nn.Module = unet
    return found


def _params(config: SearchConfig, unet: nn.Module) -> int:
    """The parameters of the budget's spec on the layers that are searched."""
    beside = {} if config.test_match is None else layers_matching(unet, config.test_match)
    spec = tnpeft.load_spec(config.budget.spec)
    searched = [layer for name, layer in layers_matching(unet, config.match).items() if name not in beside]
    return sum(spec.bind(layer, **config.budget.params).num_parameters for layer in searched)


def _commands(config: SearchConfig, config_path: Path, study_out: Path) -> tuple[str, dict[str, str]]:
    """What fine-tunes a network to choose, and what tests one, by name."""
    words = [sys.executable, str(DRIVER), "score", "--config", str(config_path), "--study", str(study_out)]
    words += ["--spec", "{spec}", "--rate", "{rate}"]
    chosen = [word for name in config.selected for word in ("--dataset", name)]
    tests = {
        f"{name}, seed {seed}": shlex.join([*words, "--dataset", name, "--seed", str(seed)])
        for name, seeds in config.tested.items()
        for seed in seeds
    }
    return shlex.join([*words, *chosen]), tests


def _example(study: StudyConfig) -> tuple[Any, ...]:
    """A batch as the study trains on: noise and timesteps."""
    size = study.data.resize or study.data.crop
    assert size is not None
    batch = study.training.batch_size
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 1, *size, generator=generator), torch.randint(0, 1000, (batch,), generator=generator)


def _say(candidate: Candidate | None, count: int, screen: Screen) -> None:
    if candidate is not None:
        score = "given up" if candidate.score is None else f"captures {candidate.score:.2%}"
        screen.line(f"[{count}] {candidate.origin}: {candidate.parameters:,} parameters, {score}")


def _remember(out: Path, found: Search, started: float) -> None:
    """Which parts the search had, how long each, on what."""
    parts = [*((read_json(out / PARTS) or {}).get("parts", []))]
    part = {
        "minutes": round((time.time() - started) / 60, 1),
        "evaluations": len(found.candidates),
        "finetunes": len(found.finetunes),
        "machine": machine(),
    }
    write_json(out / PARTS, {"parts": [*parts, part]})
