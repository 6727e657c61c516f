"""Short fine-tunes by the user's command: each network at each learning rate once, also after a resumed search."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import optuna
from optuna import Study, Trial, TrialPruned
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.trial import FrozenTrial, TrialState

from tnpeft.errors import Problem, TnpeftError, in_one_line
from tnpeft.network import Spec
from tnpeft.searching.engine import fail_the_dead, is_late, name_process, quiet, storage_of
from tnpeft.searching.task import Task

__all__ = ["Case", "Outcomes", "run_cases"]

UNSTOPPED = 4  # runs before any is stopped


@dataclass(frozen=True)
class Case:
    """A run of a `command`: the `network` by its name, its spec, and a learning rate."""

    network: str
    spec: Spec
    rate: float
    command: str

    @property
    def made_of(self) -> tuple[str, ...]:
        """All that tells this run from another."""
        return self.network, self.spec.to_yaml(), repr(self.rate), self.command


@dataclass(frozen=True)
class Outcomes:
    """The score of each finished case, by its place; None if it was stopped, or failed for a `reason`.

    `unfinished` is true if Ctrl-C or the time limit ended the runs, or if another process runs some of them.
    """

    scores: Mapping[int, float | None]
    reasons: Mapping[int, str]
    unfinished: bool


def run_cases(
    task: Task, cases: Sequence[Case], storage: str | None, until: float | None = None, stop_behind: bool = False
) -> Outcomes:
    """Run the cases not done yet; with `stop_behind`, stop those that are behind the median of earlier ones."""
    settings = hashlib.sha256(repr((task.digest, [case.made_of for case in cases])).encode()).hexdigest()
    pruner: BasePruner = MedianPruner(n_startup_trials=UNSTOPPED) if stop_behind else NopPruner()
    with quiet(), TemporaryDirectory() as folder:
        study = optuna.create_study(
            storage=None if storage is None else storage_of(storage),
            sampler=optuna.samplers.RandomSampler(task.seed),
            pruner=pruner,
            study_name=f"fine-tunes {settings}",
            direction="maximize",
            load_if_exists=True,
        )
        fail_the_dead(study)
        for place in sorted(set(range(len(cases))) - {_place(trial) for trial in _valid(study)}):
            study.enqueue_trial({"case": place})
        interrupted = _run(study, cases, Path(folder), until)
        done = {_place(trial): trial for trial in _valid(study) if trial.state.is_finished()}
    scores = {place: trial.value if trial.state == TrialState.COMPLETE else None for place, trial in done.items()}
    reasons = {place: str(trial.user_attrs.get("failed", "")) for place, trial in done.items()}
    return Outcomes(scores, reasons, interrupted or len(done) < len(cases))


def _run(study: Study, cases: Sequence[Case], folder: Path, until: float | None) -> bool:
    """Run the waiting cases; true if Ctrl-C ended them."""

    def objective(trial: Trial) -> float:
        name_process(trial)
        place = int(trial.suggest_categorical("case", range(len(cases))))
        if any(_place(each) == place and each.number < trial.number for each in _valid(study)):
            trial.set_user_attr("again", True)  # another process was quicker, and this was drawn
            raise TrialPruned
        path = folder / f"network_{place}.yaml"
        path.write_text(cases[place].spec.to_yaml(), encoding="utf-8")
        return _score(trial, cases[place].command, path, cases[place].rate)

    try:
        while study.get_trials(deepcopy=False, states=(TrialState.WAITING,)) and not is_late(until):
            study.optimize(objective, n_trials=1)
    except KeyboardInterrupt:
        return True
    return False


def _valid(study: Study) -> list[FrozenTrial]:
    """The trials that count for their case."""
    trials = study.get_trials(deepcopy=False)
    return [trial for trial in trials if trial.state != TrialState.FAIL and "again" not in trial.user_attrs]


def _place(trial: FrozenTrial) -> int:
    """The case of a trial, begun or waiting."""
    place: int = {**trial.system_attrs.get("fixed_params", {}), **trial.params}.get("case", -1)
    return place


def _score(trial: Trial, command: str, spec: Path, rate: float) -> float:
    """The score in the command's last line; a run that fails or is stopped has none."""
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
    """A process that ends with the block; its stderr is shown."""
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
