"""`search`: a network that captures the updates of fine-tunes at a number of parameters, found by trying many."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from tnpeft.errors import AttachError, Problem, TnpeftError, clip
from tnpeft.network import Layer
from tnpeft.searching.needs import need_optuna
from tnpeft.searching.results import EQUAL, Candidate, Finetune, Search, Tuning
from tnpeft.searching.task import Task
from tnpeft.searching.updates import Pairs, Update, check_kinds, layers_matching, named, updates_of

__all__ = ["search", "searched", "time_after"]

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # of fine-tunes


def search(
    model: nn.Module,
    pairs: Pairs,
    params: int,
    /,
    *,
    match: str | Sequence[str],
    evaluations: int = 100,
    test_pairs: Pairs = (),
    test_match: str | Sequence[str] | None = None,
    sampler: str = "mixed",
    seed: int = 0,
    jobs: int = 1,
    storage: str | Path | None = None,
    iterations: int = 15,
    cores: int = 8,
    from_known: bool = True,
    command: str | None = None,
    rates: Sequence[float] = RATES,
    finalists: int = 3,
    minutes: float | None = None,
    progress: Callable[[Candidate | None, int], None] | None = None,
) -> Search:
    """Search for the network of at most `params` parameters that captures most of some full fine-tunes.

    `model` says which layers there are (it may be on the meta device), `match` which of them are searched. Each of
    `pairs`, which may have names, holds the state dicts of a base and of its full fine-tune. A network gets the largest
    ranks at which the adapters of all searched layers train at most `params` parameters (`budget`). Its score is the
    mean share of the updates' energy that `fit` captures in at most `iterations` sweeps.

    `sampler` draws networks of up to `cores` cores: `random`, `tpe`, `evolution`, `local` (one choice away from the
    best) or `mixed`, the last three in turn. The search begins with known networks (LoRA, CP, Tucker, a tensor train),
    unless `from_known=False`. Equal networks are evaluated once, and what is clearly behind is given up before the last
    update. Layers that match `test_match`, whether `match` finds them or not, and all layers of `test_pairs` take no
    part in the search: the winner's test score is measured on them.

    With a `command` the best `finalists` are fine-tuned at each of the learning `rates`, and the one that ends best
    wins. In it `{spec}` stands for the network's file, `{rate}` for the rate. Its last line on stdout is JSON,
    `{"score": ...}`, the higher the better. Earlier lines `{"step": ..., "score": ...}` let those behind be stopped.

    `storage` is a journal's path, a `.db` file or a database's URL. Several processes and machines may share it, and a
    search that ended, also by Ctrl-C or after `minutes`, goes on from it. `jobs` processes run here; with one, equal
    arguments give equal results. After each trial `progress` is called with its candidate, if any, and their number.

    Raises TnpeftError, also where Optuna is not installed.
    """
    need_optuna()
    _check(jobs, command, rates, finalists, minutes)
    until, place = time_after(minutes), None if storage is None else str(storage)
    pairs = named(pairs)
    test_pairs = named(test_pairs, first=len(pairs))
    layers, beside, kinds = _layers(model, match, test_match)
    updates = tuple(updates_of(layers, pairs))
    task = Task(layers, kinds, updates, params, evaluations, iterations, cores, sampler, seed, from_known)
    task.check()
    tests = [*updates_of(beside, pairs), *updates_of({**layers, **beside}, test_pairs, len(pairs))]
    found = searched(task, place, jobs, progress, until=until)
    if command is not None and not found.interrupted:
        found = _finetuned(found, Tuning(command, tuple(rates)), finalists, place, until)
    return _tested(found, tests)


def time_after(minutes: float | None) -> float | None:
    """The time in that many minutes."""
    return None if minutes is None else time.time() + 60 * minutes


def _layers(
    model: nn.Module, match: str | Sequence[str], test_match: str | Sequence[str] | None
) -> tuple[dict[str, Layer], dict[str, Layer], tuple[str, ...]]:
    """The searched layers, the held-out layers, and the kinds of both. Raises AttachError."""
    beside = {} if test_match is None else layers_matching(model, test_match)
    layers = {name: layer for name, layer in layers_matching(model, match).items() if name not in beside}
    check_kinds([*layers.values(), *beside.values()])
    if not layers:
        fix = "Let `test_match` match fewer layers."
        raise AttachError(Problem("search", "layers that `match` has and `test_match` has not", "none", fix))
    return layers, beside, tuple(sorted({layer.kind for layer in (*layers.values(), *beside.values())}))


def _check(jobs: object, command: str | None, rates: Sequence[float], finalists: object, minutes: float | None) -> None:
    problems = []
    for name, value in (("jobs", jobs), ("finalists", finalists)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            fix = f"For example `{name}=2`."
            problems.append(Problem(f"search, `{name}`", "a whole number from 1 on", clip(value), fix))
    if command is not None and not ("{spec}" in command and "{rate}" in command):
        fix = "For example 'python train.py --spec {spec} --rate {rate}'."
        problems.append(Problem("search, `command`", "{spec} and {rate} in it", clip(command), fix))
    if not rates or len(set(rates)) < len(rates) or not all(rate > 0 for rate in rates):
        fix = "For example `rates=(1e-4, 1e-3)`."
        problems.append(Problem("search, `rates`", "different positive numbers", clip([*rates]), fix))
    if minutes is not None and not minutes > 0:
        problems.append(Problem("search, `minutes`", "a positive number", clip(minutes), "For example `minutes=60`."))
    if problems:
        raise TnpeftError(*problems)


def searched(
    task: Task,
    storage: str | None,
    jobs: int,
    progress: Callable[[Candidate | None, int], None] | None = None,
    name: str = "search",
    until: float | None = None,
) -> Search:
    """Run a task, without testing the winner."""
    from tnpeft.searching.engine import evaluated, is_late, open_study, quiet, run, shared_storage

    def tell(trial: Any, count: int) -> None:
        if progress is not None:
            progress(_candidate(task, trial) if trial.user_attrs.get("evaluated") else None, count)

    interrupted = False
    with quiet(), shared_storage(storage, jobs) as place:
        study = open_study(task, place, name)
        try:
            run(task, study, place, jobs, tell, until)
        except KeyboardInterrupt:
            interrupted = True
        trials = study.get_trials(deepcopy=False)
        candidates = [_candidate(task, trial) for trial in evaluated(study) if trial.state.is_finished()]
    candidates.sort(key=_worth, reverse=True)
    late = is_late(until) and len(candidates) < task.evaluations
    if not candidates or candidates[0].score is None:
        if interrupted:
            raise KeyboardInterrupt
        found = f"none in {sum(trial.state.is_finished() for trial in trials)} trials"
        fix = "Allow more parameters (`params`), or match fewer layers."
        if late:
            fix = "Allow more `minutes`, or match fewer layers."
        raise TnpeftError(Problem("search", "a network that meets the budget", found, fix))
    return Search(
        task,
        tuple(candidates),
        {},
        sum("same_as" in trial.user_attrs for trial in trials),
        sum("refused" in trial.user_attrs for trial in trials),
        interrupted or late,
    )


def _finetuned(found: Search, tuning: Tuning, finalists: int, storage: str | None, until: float | None) -> Search:
    """The search with fine-tunes of its best networks. Raises TnpeftError if all are done and none gave a score."""
    from tnpeft.searching.finetunes import Case, run_cases

    best = [candidate for candidate in found.candidates if candidate.score is not None][:finalists]
    cases = [
        Case(f"network {candidate.number}", candidate.spec(), rate, tuning.command)
        for candidate in best
        for rate in tuning.rates
    ]
    numbers = [candidate.number for candidate in best for _ in tuning.rates]
    outcomes = run_cases(found.task, cases, storage, until, stop_behind=True)
    if not outcomes.unfinished and all(score is None for score in outcomes.scores.values()):
        said = next(filter(None, outcomes.reasons.values()), "none")
        fix = 'Let its last line be {"score": NUMBER}, the higher the better.'
        raise TnpeftError(Problem("--command", "a score from at least one run", said, fix))
    runs = [Finetune(numbers[place], cases[place].rate, score) for place, score in sorted(outcomes.scores.items())]
    return replace(found, tuning=tuning, finetunes=tuple(runs), interrupted=outcomes.unfinished)


def _tested(found: Search, tests: Sequence[Update]) -> Search:
    """The search with the test scores of its best network."""
    shares = found.task.captured(found.spec, {}, tests)
    scores = {str(update): share for update, share in zip(tests, shares, strict=True)}
    return replace(found, test_scores=scores, tests=tuple(tests))


def _worth(candidate: Candidate) -> tuple[float, int, int]:
    """Of equal scores the smaller network comes first, and of those the earlier one."""
    score = -1.0 if candidate.score is None else round(candidate.score, EQUAL)
    return score, -candidate.parameters, -candidate.number


def _candidate(task: Task, trial: Any) -> Candidate:
    attrs = trial.user_attrs
    score = trial.value if trial.state.name == "COMPLETE" else None
    topology = task.space.topology(trial.params)
    return Candidate(trial.number, attrs["origin"], attrs["parameters"], score, topology, task.kinds, attrs["ranks"])
