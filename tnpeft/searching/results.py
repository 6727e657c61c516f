"""What a search found: its candidates, their scores, and the file of the best one."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tnpeft.network import Spec
from tnpeft.searching.needs import write
from tnpeft.searching.space import Topology
from tnpeft.searching.task import Task, mean
from tnpeft.searching.updates import Update
from tnpeft.version import __version__

__all__ = ["EQUAL", "Candidate", "Finetune", "Search", "Tuning"]

EQUAL = 6  # digits of scores


@dataclass(frozen=True)
class Candidate:
    """A network that was evaluated.

    `score` is the mean share of the updates' energy that it captures, or None if the search gave it up early.
    `parameters` counts those of all searched layers. `origin` is the sampler that drew it, or a known network's name.
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
        """The candidate as plain data, ready for JSON."""
        row = {"number": self.number, "origin": self.origin, "parameters": self.parameters, "score": self.score}
        return row | {"ranks": dict(self.ranks), "network": self.topology.key}


class Finetune(NamedTuple):
    """A short fine-tune of candidate `number` at a learning rate; without a score it was stopped, or failed."""

    number: int
    rate: float
    score: float | None


class Tuning(NamedTuple):
    """How networks are fine-tuned: by a command, each at every rate."""

    command: str
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Search:
    """What a search found: the `candidates` that were evaluated, the best first.

    `best.score` is optimistic: it is the best of many, on the updates that chose it. `test_scores` has the winner's
    score on each update that the search never saw, and `test_score` is their mean, or None. `shared` counts drawn
    networks that had been evaluated before, `refused` those that exceed the budget at rank 1. `interrupted` says
    whether Ctrl-C or the time limit ended the search.
    """

    task: Task
    candidates: tuple[Candidate, ...]
    test_scores: Mapping[str, float]
    shared: int
    refused: int
    interrupted: bool
    tests: tuple[Update, ...] = ()
    finetunes: tuple[Finetune, ...] = ()
    tuning: Tuning | None = None

    @property
    def best(self) -> Candidate:
        """The candidate that captures most; after fine-tunes, the one with the best score at any of its rates."""
        run = self.best_finetune
        number = self.candidates[0].number if run is None else run.number
        return next(candidate for candidate in self.candidates if candidate.number == number)

    @property
    def best_finetune(self) -> Finetune | None:
        """The fine-tune with the highest score (of equal ones the first), or None."""
        scored = [run for run in self.finetunes if run.score is not None]
        return max(scored, key=lambda run: run.score or 0.0) if scored else None

    @property
    def spec(self) -> Spec:
        """The best network as a spec."""
        return self.best.spec()

    @property
    def score(self) -> float:
        """The best network's score on the updates that chose it, which is optimistic."""
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
            "finetunes": [run._asdict() for run in self.finetunes],
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
            *self._said_of_finetunes(),
            "Versions: " + ", ".join(f"{key} {value}" for key, value in _versions().items()) + ".",
        ]
        return "".join(f"# {line}\n" for line in lines) + self.best.spec(name).to_yaml()

    def _said_of_finetunes(self) -> list[str]:
        run = self.best_finetune
        if run is None:
            return []
        networks, rates = ({each[place] for each in self.finetunes} for place in (0, 1))
        tried = f"{len(networks)} networks at {len(rates)} rates each"
        return [f"Fine-tuned: the best of {tried}, at rate {run.rate!r}, selection score, optimistic: {run.score:.6g}."]

    def save(self, path: str | Path) -> None:
        """Write `to_yaml` to a file, whole or not at all. Raises TnpeftError."""
        path = Path(path)
        name = re.sub(r"\W", "_", path.stem.lower(), flags=re.ASCII)
        write(path, self.to_yaml(name if name[:1].isalpha() else f"found_{name}"))

    def __str__(self) -> str:
        test = "none held out" if self.test_score is None else f"{self.test_score:.2%}"
        return (
            f"{len(self.best.topology.legs)} cores, {self.best.parameters:,} of {self.task.params:,} parameters, "
            f"selection score (optimistic) {self.score:.2%}, test score {test}, "
            f"{len(self.candidates)} networks evaluated"
        )


def _versions() -> dict[str, str]:
    import optuna

    return {
        "tnpeft": __version__,
        "optuna": optuna.__version__,
        "torch": str(torch.__version__),
        "Python": platform.python_version(),
    }
