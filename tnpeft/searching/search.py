"""`search`: a network that captures the updates of fine-tunes at a number of parameters, found by trying many."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tnpeft.errors import Problem, TnpeftError, clip
from tnpeft.network import Spec
from tnpeft.searching.needs import need_optuna, write
from tnpeft.searching.space import Topology
from tnpeft.searching.task import Task, mean
from tnpeft.searching.updates import Pair, Update, layers_matching, updates_of
from tnpeft.version import __version__

__all__ = ["Candidate", "Search", "search"]

EQUAL = 6  # digits of scores


@dataclass(frozen=True)
class Candidate:
    """A network that was evaluated.

    `score` is the mean share of the updates' energy that it captures, None where the search gave it up early;
    `parameters` are those of all searched layers. `origin` says what drew it, or the name of a known network.
    """

    number: int
    origin: str
    parameters: int
    score: float | None
    topology: Topology
    kinds: tuple[str, ...]
    ranks: Mapping[str, int]

    def spec(self, name: str = "found") -> Spec:
        """The network as a spec whose params are the ranks of the search."""
        return self.topology.spec(self.kinds, self.ranks, name)

    def as_dict(self) -> dict[str, Any]:
        """It as plain data, ready for JSON."""
        row = {"number": self.number, "origin": self.origin, "parameters": self.parameters, "score": self.score}
        return row | {"ranks": dict(self.ranks), "network": self.topology.key}


@dataclass(frozen=True)
class Search:
    """What a search found: the `candidates` that were evaluated, the best first.

    `best.score` is the best of many on the updates that chose it, so that it flatters. `test_score` is the mean over
    `test_scores`, by update, of what the search never saw; None where there is none. `shared` counts drawn networks
    that had been evaluated before, `refused` those that do not meet the budget at rank 1.
    """

    task: Task
    candidates: tuple[Candidate, ...]
    test_scores: Mapping[str, float]
    shared: int
    refused: int
    interrupted: bool

    @property
    def best(self) -> Candidate:
        return self.candidates[0]

    @property
    def spec(self) -> Spec:
        """The best network."""
        return self.best.spec()

    @property
    def score(self) -> float:
        """The selection score, optimistic."""
        return self.best.score or 0.0

    @property
    def test_score(self) -> float | None:
        return mean([*self.test_scores.values()]) if self.test_scores else None

    def as_dict(self) -> dict[str, Any]:
        """The search as plain data, ready for JSON."""
        return {
            "params": self.task.params,
            "layers": {name: str(layer) for name, layer in self.task.layers.items()},
            "updates": [str(update) for update in self.task.updates],
            "evaluations": len(self.candidates),
            "shared": self.shared,
            "refused": self.refused,
            "interrupted": self.interrupted,
            "sampler": self.task.sampler,
            "seed": self.task.seed,
            "versions": _versions(),
            "selection_score_optimistic": self.best.score,
            "test_score": self.test_score,
            "test_scores": dict(self.test_scores),
            "best": self.best.as_dict(),
            "candidates": [candidate.as_dict() for candidate in self.candidates],
        }

    def to_yaml(self, name: str = "found") -> str:
        """The best network as a spec file that carries its history in comments."""
        task, test = self.task, self.test_score
        tested = "none, no update was held out."
        if test is not None:
            tested = f"{test:.4f} of the energy of {len(self.test_scores)} updates that the search never saw."
        lines = [
            f"By `tnpeft search`: {self.best.parameters:,} of {task.params:,} parameters, layers: {len(task.layers)}",
            f"Evaluations: {len(self.candidates)} networks, sampler {task.sampler}, seed {task.seed}.",
            f"This one is number {self.best.number}, drawn by {self.best.origin}.",
            f"Selection score, optimistic: {self.score:.4f} of the energy of {len(task.updates)} updates.",
            f"Test score: {tested}",
            "Versions: " + ", ".join(f"{key} {value}" for key, value in _versions().items()) + ".",
        ]
        return "".join(f"# {line}\n" for line in lines) + self.best.spec(name).to_yaml()

    def save(self, path: str | Path) -> None:
        """Write `to_yaml` to a file, whole or not at all. Raises TnpeftError."""
        path = Path(path)
        write(path, self.to_yaml(re.sub(r"\W", "_", path.stem.lower(), flags=re.ASCII) or "found"))

    def __str__(self) -> str:
        test = "none held out" if self.test_score is None else f"{self.test_score:.2%}"
        return (
            f"{len(self.best.topology.legs)} cores, {self.best.parameters:,} of {self.task.params:,} parameters, "
            f"selection score (optimistic) {self.score:.2%}, test score {test}, "
            f"{len(self.candidates)} networks evaluated"
        )


def search(
    model: nn.Module,
    pairs: Iterable[Pair],
    params: int,
    /,
    *,
    match: str | Sequence[str],
    evaluations: int = 100,
    test_pairs: Iterable[Pair] = (),
    test_match: str | Sequence[str] | None = None,
    sampler: str = "mixed",
    seed: int = 0,
    jobs: int = 1,
    storage: str | Path | None = None,
    iterations: int = 15,
    cores: int = 8,
    from_known: bool = True,
    progress: Callable[[Candidate | None, int], None] | None = None,
) -> Search:
    """Search for the network of at most `params` parameters that captures most of full fine-tunes.

    `model` says which layers there are (it may be on the meta device), `match` which of them are searched; each of
    `pairs` has the state dicts of a base and of its full fine-tune. A network is worth the mean share of the energy
    of the updates that `fit` captures from a free start, in at most `iterations` sweeps, with the largest ranks at
    which the adapters of all searched layers train at most `params` parameters (`budget`).

    Drawn are networks of up to `cores` cores by `sampler`: `random`, `tpe`, `evolution`, `local` (one choice away from
    the best) or `mixed`, the last three in turn. It begins with known networks (LoRA, CP, Tucker, a train), but for
    `from_known=False`. Equal networks are evaluated once, and what is clearly behind is given up before the last
    update. Layers that match `test_match`, and all layers of `test_pairs`, are never searched: the winner's test score
    is theirs.

    `storage` is a journal's path, a `.db` file or a database's URL: several processes and machines may share it, and a
    search that ended goes on from there. `jobs` processes work here. With one of them, equal arguments give equal
    results. `progress` is called after each trial, with its candidate, if it was evaluated, and how many were.
    After an interrupt by Ctrl-C the search ends with what it has.

    Raises TnpeftError, among them one where Optuna is not installed.
    """
    need_optuna()
    pairs, test_pairs = list(pairs), list(test_pairs)
    layers = layers_matching(model, match)
    beside = {} if test_match is None else layers_matching(model, test_match)
    beside = {name: layer for name, layer in beside.items() if name not in layers}
    task = Task(
        layers, tuple(updates_of(layers, pairs)), params, evaluations, iterations, cores, sampler, seed, from_known
    )
    task.check()
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise TnpeftError(Problem("search, `jobs`", "a whole number from 1 on", clip(jobs), "For example `jobs=2`."))
    tests = [*updates_of(beside, pairs), *updates_of({**layers, **beside}, test_pairs, len(pairs))]
    return searched(task, tests, None if storage is None else str(storage), jobs, progress)


def searched(
    task: Task,
    tests: Sequence[Update],
    storage: str | None,
    jobs: int,
    progress: Callable[[Candidate | None, int], None] | None = None,
    name: str = "search",
) -> Search:
    """Run a task, and test its winner."""
    from tnpeft.searching.engine import evaluated, open_study, quiet, run, shared_storage

    def tell(trial: Any, count: int) -> None:
        if progress is not None:
            progress(_candidate(task, trial) if trial.user_attrs.get("evaluated") else None, count)

    interrupted = False
    with quiet(), shared_storage(storage, jobs) as place:
        study = open_study(task, place, name)
        try:
            run(task, study, place, jobs, tell)
        except KeyboardInterrupt:
            interrupted = True
        trials = study.get_trials(deepcopy=False)
        candidates = [_candidate(task, trial) for trial in evaluated(study) if trial.state.is_finished()]
    candidates.sort(key=_worth, reverse=True)
    if not candidates or candidates[0].score is None:
        if interrupted:
            raise KeyboardInterrupt
        found = f"none in {len(trials)} trials"
        fix = "Allow more parameters (`params`), or match fewer layers."
        raise TnpeftError(Problem("search", "a network that meets the budget", found, fix))
    winner = candidates[0].spec()
    shares = task.captured(winner, {}, tests)
    return Search(
        task,
        tuple(candidates),
        {str(update): share for update, share in zip(tests, shares, strict=True)},
        sum("same_as" in trial.user_attrs for trial in trials),
        sum("refused" in trial.user_attrs for trial in trials),
        interrupted,
    )


def _worth(candidate: Candidate) -> tuple[float, int, int]:
    """Of equal scores the smaller network comes first, and of those the earlier one."""
    score = -1.0 if candidate.score is None else round(candidate.score, EQUAL)
    return score, -candidate.parameters, -candidate.number


def _candidate(task: Task, trial: Any) -> Candidate:
    attrs = trial.user_attrs
    score = trial.value if trial.state.name == "COMPLETE" else None
    topology = task.space.topology(trial.params)
    return Candidate(trial.number, attrs["origin"], attrs["parameters"], score, topology, task.kinds, attrs["ranks"])


def _versions() -> dict[str, str]:
    import optuna

    return {
        "tnpeft": __version__,
        "optuna": optuna.__version__,
        "torch": str(torch.__version__),
        "Python": platform.python_version(),
    }
