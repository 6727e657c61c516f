"""The search as an Optuna study: opened, resumed, shared by processes, and run until a time."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import optuna
import torch
from optuna import Study, Trial, TrialPruned
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from tnpeft.errors import Problem, SpecError, TnpeftError, in_one_line, shown_path
from tnpeft.searching.known import known_topologies
from tnpeft.searching.samplers import SearchSampler
from tnpeft.searching.task import Task, mean

__all__ = [
    *("Progress", "evaluated", "fail_the_dead", "is_late", "name_process"),
    *("open_study", "quiet", "run", "shared_storage", "storage_of"),
]

Progress = Callable[[FrozenTrial, int], None]  # a trial that ended, and how many networks were evaluated so far

TRIALS = 40  # for each evaluation, at most: a small space has few networks


def open_study(task: Task, storage: str | None, name: str = "search") -> Study:
    """The study of a task, new or resumed; a storage holds one search. Raises TnpeftError."""
    sampler = SearchSampler(task.sampler, task.space, task.seed)
    try:
        study = optuna.create_study(
            storage=None if storage is None else storage_of(storage),
            sampler=sampler,
            pruner=optuna.pruners.MedianPruner(),
            study_name=name,
            direction="maximize",
            load_if_exists=True,
        )
        known = study.user_attrs.get("digest")
    except (ImportError, OSError, ValueError, KeyError, SQLAlchemyError) as error:
        fix = "Name another file, or leave it out."
        where = shown_path(storage or "")
        raise TnpeftError(
            Problem("storage", "a search to go on with, or none yet", in_one_line(str(error)), fix, where)
        ) from error
    if known is None:
        study.set_user_attr("digest", task.digest)
        for origin, topology in known_topologies(task.space.axes, task.cores).items() if task.from_known else ():
            study.enqueue_trial(task.space.choices(topology), user_attrs={"origin": origin}, skip_if_exists=True)
    elif known != task.digest:
        fix = "Name another storage, or search with the files and settings that it was begun with."
        where = shown_path(storage or "")
        raise TnpeftError(Problem("storage", "this search", "one with other updates or settings", fix, where))
    return study


def storage_of(text: str) -> BaseStorage:
    """A database, given by its URL or a name that ends in .db or .sqlite; any other name is a journal file."""
    if "://" in text:
        return RDBStorage(text)
    path = Path(text)
    if path.suffix in (".db", ".sqlite"):
        return RDBStorage(f"sqlite:///{path}")
    return JournalStorage(JournalFileBackend(str(path)))


def run(
    task: Task,
    study: Study,
    storage: str | None,
    jobs: int = 1,
    progress: Progress | None = None,
    until: float | None = None,
) -> None:
    """Evaluate networks until all processes together reach the task's number, or until the time `until`.

    Raises KeyboardInterrupt.
    """
    fail_the_dead(study)
    if jobs == 1:
        _optimize(task, study, progress, until)
        return
    assert storage is not None
    context = multiprocessing.get_context("spawn")
    before = torch.get_num_threads()
    threads = max(1, before // jobs)
    workers = [
        context.Process(target=_worker, args=(task, storage, study.study_name, threads, until)) for _ in range(jobs - 1)
    ]
    for worker in workers:
        worker.start()
    torch.set_num_threads(threads)
    try:
        _optimize(task, study, progress, until)
    finally:
        torch.set_num_threads(before)
        for worker in workers:
            worker.join()


def _worker(task: Task, storage: str, name: str, threads: int, until: float | None) -> None:
    torch.set_num_threads(threads)
    try:
        with quiet():
            _optimize(task, open_study(task, storage, name), None, until)
    except KeyboardInterrupt:
        pass  # the first process tells


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, Optuna prints no line for each trial."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


@contextmanager
def shared_storage(storage: str | None, jobs: int) -> Iterator[str | None]:
    """The storage; if there is none and several processes work, a temporary journal."""
    if storage is not None or jobs == 1:
        yield storage
        return
    with TemporaryDirectory() as folder:
        yield str(Path(folder) / "search.journal")


def evaluated(study: Study) -> list[FrozenTrial]:
    """The trials that fitted a network, by number, including pruned ones."""
    trials = study.get_trials(deepcopy=False)
    return [trial for trial in trials if trial.user_attrs.get("evaluated") and trial.state != TrialState.FAIL]


def is_late(until: float | None) -> bool:
    """Whether a time is past; it is in seconds, as from `time.time`."""
    return until is not None and time.time() >= until


def _optimize(task: Task, study: Study, progress: Progress | None, until: float | None) -> None:
    def tell(study: Study, trial: FrozenTrial) -> None:
        count = sum(each.state.is_finished() for each in evaluated(study))
        if progress is not None:
            progress(trial, count)
        if count >= task.evaluations:
            study.stop()

    left = None if until is None else max(0.0, until - time.time())
    if len(evaluated(study)) < task.evaluations:
        most = TRIALS * task.evaluations
        study.optimize(lambda trial: _objective(task, trial), n_trials=most, timeout=left, callbacks=[tell])


def _objective(task: Task, trial: Trial) -> float:
    study, sampler = trial.study, trial.study.sampler
    assert isinstance(sampler, SearchSampler)
    name_process(trial)
    if "origin" not in trial.user_attrs:
        trial.set_user_attr("origin", sampler.current)
    topology = task.space.topology(task.space.drawn(lambda name, options: trial.suggest_categorical(name, options)))
    trial.set_user_attr("topology", topology.key)
    spec = topology.spec(task.kinds)
    try:
        digest = spec.canonical().hash
    except SpecError as error:  # too many cores alike
        raise TrialPruned from error
    earlier = [each for each in study.get_trials(deepcopy=False) if each.number < trial.number]
    same = next((each for each in earlier if _is_known(each, digest)), None)
    if same is not None:
        trial.set_user_attr("same_as", same.number)
        if same.state == TrialState.COMPLETE and same.value is not None:
            return same.value
        raise TrialPruned
    trial.set_user_attr("digest", digest)
    try:
        found = task.within_budget(spec, list(spec.params))
    except TnpeftError as error:
        trial.set_user_attr("refused", True)
        raise TrialPruned from error
    if len(evaluated(study)) >= task.evaluations:  # other processes were quicker
        trial.study.stop()
        raise TrialPruned
    for key, value in {"evaluated": True, "ranks": found.settings, "parameters": found.total}.items():
        trial.set_user_attr(key, value)
    shares: list[float] = []
    for share in task.captured(spec, found.settings, task.updates):
        shares.append(share)
        trial.report(mean(shares), len(shares))
        if len(shares) < len(task.updates) and trial.should_prune():
            raise TrialPruned
    return mean(shares)


def _is_known(trial: FrozenTrial, digest: str) -> bool:
    return trial.user_attrs.get("digest") == digest and trial.state != TrialState.FAIL


def name_process(trial: Trial) -> None:
    """Record which process works on a trial, for `fail_the_dead`."""
    trial.set_user_attr("process", f"{socket.gethostname()}:{os.getpid()}")


def fail_the_dead(study: Study) -> None:
    """Mark trials of killed processes on this machine as failed, and queue again those that had been queued."""
    host = socket.gethostname()
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        owner, _, number = str(trial.user_attrs.get("process", "")).rpartition(":")
        if owner == host and not _is_alive(int(number)):
            study.tell(trial.number, state=TrialState.FAIL)
            origin = trial.user_attrs.get("origin")
            if "fixed_params" in trial.system_attrs:
                study.enqueue_trial(dict(trial.system_attrs["fixed_params"]), user_attrs={"origin": origin})


def _is_alive(number: int) -> bool:
    if os.name == "nt":  # where signal 0 is no question
        return True
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
