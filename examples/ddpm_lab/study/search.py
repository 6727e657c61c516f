"""Which rate a method trains at: each of its rates is tried once on each data set, and volumes to validate choose.

The volumes to test on are not looked at here, and the seed is one that no table uses.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddpm_lab.study.run import Outcome, Run
from ddpm_lab.study.settings import StudyConfig
from ddpm_lab.support.faults import fault

__all__ = ["Choice", "change_of", "check_rates", "choices", "folder_of", "read_choice", "score"]


@dataclass(frozen=True)
class Choice:
    """The rates that were tried, each with its change of the error on volumes to validate, in percent."""

    rates: tuple[float, ...]
    changes: Mapping[float, float]  # infinite where training diverged; those that are not done are missing

    @property
    def best(self) -> float | None:
        """The rate of the lowest error, the smaller of equal ones; None while one is not tried or where none works."""
        if set(self.changes) != set(self.rates):
            return None
        best = min(sorted(self.rates), key=lambda rate: self.changes[rate])
        return best if math.isfinite(self.changes[best]) else None

    @property
    def edge(self) -> str:
        """`largest` or `smallest` where the best rate is that: a better one may lie beyond."""
        if self.best is None or len(self.rates) < 2:
            return ""
        return {max(self.rates): "largest", min(self.rates): "smallest"}.get(self.best, "")


def check_rates(study: str, config: StudyConfig) -> None:
    """Raise LabError unless every method of a study has as many rates, each once, and no other rate beside them."""
    members = {name: config.methods[name] for name in config.members(study) if config.searcher(name) == name}
    for name, method in members.items():
        where = f"methods.{name}.rates"
        if len(set(method.rates)) < len(method.rates):
            raise fault(where, "the rates", "each once", str(list(method.rates)), "Remove one of the two.")
        if method.rates and "learning_rate" in method.training.model_fields_set:
            fix = "Give `rates` to have the best of them, or one `training.learning_rate`."
            raise fault(where, "the rate of a method", "one of two ways to say it", "both", fix)
    numbers = {name: len(method.rates) for name, method in members.items()}
    if len(set(numbers.values())) > 1:
        found = ", ".join(f"{name} {number}" for name, number in numbers.items())
        fix = "Try as many for each: more tries find a better rate."
        raise fault(study, "the number of rates", "the same for every method", found, fix)
    if any(numbers.values()) and config.search_seed in config.seeds:
        fix = "Choose another: the tables' seeds must not have chosen the rates."
        raise fault("search_seed", "the seed of the search", "none of `seeds`", str(config.search_seed), fix)


def folder_of(out: Path, method: str, dataset: str, rate: float) -> Path:
    return out / "search" / method / dataset / f"rate-{rate:g}"


def score(outcome: Outcome | None) -> float | None:
    """The change of the error on volumes to validate, in percent; infinite for a diverged run, None for none."""
    return None if outcome is None else change_of(outcome.status, outcome.errors)


def change_of(status: str, errors: Mapping[str, Mapping[str, Sequence[float]]]) -> float | None:
    """The same, of a run or a row."""
    if status == "diverged":
        return math.inf
    if status != "done" or "validation" not in errors:
        return None
    before, after = (statistics.fmean(part) for part in zip(*errors["validation"].values(), strict=True))
    return 100 * (after / before - 1)


def choices(runs: Iterable[Run]) -> dict[tuple[str, str], Choice]:
    """What the runs of a search say so far, by method and data set."""
    rates: dict[tuple[str, str], list[float]] = {}
    changes: dict[tuple[str, str], dict[float, float]] = {}
    for run in runs:
        assert run.rate is not None
        rates.setdefault((run.method, run.dataset), []).append(run.rate)
        found = changes.setdefault((run.method, run.dataset), {})
        if run.done and (change := score(run.outcome)) is not None:
            found[run.rate] = change
    return {key: Choice(tuple(each), changes[key]) for key, each in rates.items()}


def read_choice(out: Path, method: str, dataset: str, rates: Sequence[float]) -> Choice:
    """What the search in `out` says of a method on a data set, for a report."""
    found = {rate: score(Outcome.read(folder_of(out, method, dataset, rate))) for rate in rates}
    return Choice(tuple(rates), {rate: change for rate, change in found.items() if change is not None})
