"""Short fine-tunes of the best networks by a command of the user's, each at every rate."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import optuna
from optuna import Study, Trial, TrialPruned
from optuna.trial import TrialState

from tnpeft.errors import Problem, TnpeftError, in_one_line
from tnpeft.network import Spec
from tnpeft.searching.engine import storage_of
from tnpeft.searching.results import Finetune
from tnpeft.searching.task import Task

__all__ = ["run_finetunes"]

UNSTOPPED = 4  # runs before any is stopped


def run_finetunes(
    task: Task, networks: Mapping[int, Spec], command: str, rates: Sequence[float], storage: str | None
) -> tuple[list[Finetune], bool]:
    """Run the command for every network, by its number, at every rate; those clearly behind are stopped.

    Returns the runs, and whether Ctrl-C ended them early.

    Raises TnpeftError where no run gave a score.
    """
    grid: dict[str, list[float]] = {"network": [*networks], "rate": [*rates]}
    settings = hashlib.sha256(f"{task.digest} {command} {json.dumps(grid)}".encode()).hexdigest()
    study = optuna.create_study(
        storage=None if storage is None else storage_of(storage),
        sampler=optuna.samplers.GridSampler(grid, seed=task.seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=UNSTOPPED),
        study_name=f"fine-tunes {settings}",
        direction="maximize",
        load_if_exists=True,
    )
    interrupted = False
    with TemporaryDirectory() as folder:

        def objective(trial: Trial) -> float:
            number = int(trial.suggest_categorical("network", grid["network"]))
            rate = trial.suggest_categorical("rate", grid["rate"])
            path = Path(folder) / f"network_{number}.yaml"
            path.write_text(networks[number].to_yaml(), encoding="utf-8")
            return _score(trial, command, path, rate)

        if sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False)) < len(networks) * len(rates):
            interrupted = _optimized(study, objective)
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
    scored = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if not scored and not interrupted:
        found = next((str(trial.user_attrs["failed"]) for trial in trials if "failed" in trial.user_attrs), "none")
        fix = 'Let its last line be {"score": NUMBER}, the higher the better.'
        raise TnpeftError(Problem("--command", "a score from at least one run", found, fix))
    runs = [
        Finetune(trial.params["network"], trial.params["rate"], trial.value if trial in scored else None)
        for trial in trials
        if trial.state != TrialState.FAIL
    ]
    return runs, interrupted


def _optimized(study: Study, objective: Callable[[Trial], float]) -> bool:
    """Run all trials; true where Ctrl-C ended them."""
    try:
        study.optimize(objective)
    except KeyboardInterrupt:
        return True
    return False


def _score(trial: Trial, command: str, spec: Path, rate: float) -> float:
    """What the command's last line says; a run that fails or is behind has none."""
    values = {"{spec}": str(spec), "{rate}": repr(rate)}
    words = [_filled(word, values) for word in shlex.split(command)]
    last: dict[str, Any] = {}
    with _process(words) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = _data(line)
            if isinstance(step := last.get("step"), int) and (score := _number(last)) is not None:
                trial.report(score, step)
                if trial.should_prune():
                    raise TrialPruned
    score = _number(last)
    if process.returncode or score is None:
        said = f"exit status {process.returncode}" if process.returncode else "no score in the last line"
        trial.set_user_attr("failed", f"{said} of `{in_one_line(shlex.join(words))}`")
        raise TrialPruned
    return score


def _filled(word: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        word = word.replace(name, value)
    return word


@contextmanager
def _process(words: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that does not outlive the block; what it says on stderr is seen."""
    try:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    except OSError as error:
        fix = "For example --command 'python train.py --spec {spec} --rate {rate}'."
        found = error.strerror or str(error)
        raise TnpeftError(Problem("--command", "a program that can be run", found, fix)) from error
    with process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def _data(line: str) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def _number(data: Mapping[str, Any]) -> float | None:
    score = data.get("score")
    is_number = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
    return float(score) if is_number and score is not None else None
