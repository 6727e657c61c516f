"""What the runs of a study left in their folders, as numbers: one cell for each method, data set and metric."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from scipy.stats import t as student

from ddpm_lab.data.anatomies import TITLES
from ddpm_lab.study.domains import read_domain, unseen
from ddpm_lab.study.run import BASE, Outcome
from ddpm_lab.study.search import Choice, read_choice
from ddpm_lab.study.settings import STUDIES, StudyConfig
from ddpm_lab.support.durable import read_json
from ddpm_lab.support.faults import fault

__all__ = ["BASE", "CHANGE", "METRICS", "REAL", "Cell", "Metric", "Result", "Results", "Value", "read_results"]

REAL = "real, held out"  # the set of an evaluation that compares real volumes with each other


@dataclass(frozen=True)
class Metric:
    """A column: its key in the files, its heading, and whether less is better."""

    key: str
    title: str
    less: bool
    marked: bool = False  # with the encoder's mark
    unit: str = ""
    part: str = ""  # of the split, of whose error on each volume this is the change


METRICS = (
    Metric("fid", "FID", less=True, marked=True),
    Metric("mmd_gaussian", "MMD", less=True, marked=True),
    Metric("ms_ssim", "MS-SSIM", less=False),
    Metric("mmd_rbf", "MMD, standard", less=True, marked=True),
    Metric("mmd_linear", "MMD, linear", less=True, marked=True),
    Metric("change_percent", "Error change", less=True, unit="%", part="test"),
    Metric("unseen_change_percent", "Error change, unseen anatomy", less=True, unit="%", part="unseen"),
)
CHANGE = next(metric for metric in METRICS if metric.part == "test")


@dataclass(frozen=True)
class Value:
    """One seed's number, with the bootstrap's interval where there is one."""

    seed: int
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Cell:
    """One metric of one method on one data set, over the seeds."""

    values: tuple[Value, ...]
    confidence: float = 0.95

    @property
    def mean(self) -> float:
        return statistics.fmean(each.value for each in self.values)

    @property
    def half(self) -> float | None:
        """Half the width of the interval, or None: Student's for three seeds and more, half the range of two, and the
        bootstrap's for one (or for seeds that all say the same, as those of real volumes do)."""
        numbers = [each.value for each in self.values]
        if len(set(numbers)) == 1:
            numbers = numbers[:1]
        if len(numbers) > 2:
            width = float(student.ppf((1 + self.confidence) / 2, len(numbers) - 1))
            return width * statistics.stdev(numbers) / math.sqrt(len(numbers))
        if len(numbers) == 2:
            return abs(numbers[0] - numbers[1]) / 2
        only = self.values[0]
        return (only.high - only.low) / 2 if only.low is not None and only.high is not None else None


# Of each volume before and after, by the part of the split and by the volume.
Errors = Mapping[str, Mapping[str, Sequence[float]]]


@dataclass
class Result:
    """One method on one data set: the folders of its seeds, and what they say."""

    method: str
    dataset: str
    folders: dict[int, Path] = field(default_factory=dict)
    summaries: dict[int, dict[str, Any]] = field(default_factory=dict)
    evaluations: dict[int, dict[str, Any]] = field(default_factory=dict)
    errors: dict[int, Errors] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    others: set[int] = field(default_factory=set)  # seeds with another encoder's distances, which are no numbers here

    def numbers(self, metric: Metric) -> dict[int, dict[str, float]]:
        """What is compared with another method's: a metric by seed and, where each volume has one, by volume.

        The change of the error is in percent of the mean error before, so that its mean is the table's number.
        """
        if not metric.part:
            cell = self.cell(metric, 0.95)
            return {each.seed: {"": each.value} for each in cell.values} if cell is not None else {}
        found = {}
        for seed, parts in self.errors.items():
            if not (errors := parts.get(metric.part)):
                continue
            before = statistics.fmean(each[0] for each in errors.values())
            found[seed] = {name: 100 * (after / before - 1) for name, (_, after) in errors.items()}
        return found

    def cell(self, metric: Metric, confidence: float, real: bool = False) -> Cell | None:
        """The numbers of one metric, of the samples or of real volumes; None where no seed has one."""
        values = []
        for seed in self.folders:
            found = self._value(metric, seed, real)
            if found is not None:
                values.append(found)
        return Cell(tuple(values), confidence) if values else None

    def _value(self, metric: Metric, seed: int, real: bool) -> Value | None:
        if metric.part:
            change = self.summaries.get(seed, {}).get("run", {}).get(f"{metric.part}_change_percent")
            return Value(seed, float(change)) if change is not None and not real else None
        if metric.marked and seed in self.others:
            return None
        sets = self.evaluations.get(seed, {}).get("sets", {})
        own = [name for name in sets if (name == REAL) == real]
        found = sets[own[0]].get(metric.key) if own else None
        if isinstance(found, dict):
            number = found.get("value")
            return None if number is None else Value(seed, float(number), found.get("low"), found.get("high"))
        return None if found is None else Value(seed, float(found))


@dataclass(frozen=True)
class Results:
    """Everything in OUT."""

    out: Path
    config: StudyConfig
    studies: tuple[str, ...]
    found: dict[tuple[str, str], Result]
    seconds: dict[Path, float]  # of each finished run
    costs: dict[str, Any] | None
    record: dict[str, Any]  # of the last study: versions, machine, revision
    features: Mapping[str, Any]  # whose distances the tables have: the encoder's note, mark and digest
    domains: Mapping[str, Any]  # what the encoder tells of each data set
    shares: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)  # of an update, by method and data set

    @property
    def confidence(self) -> float:
        return self.config.metrics.confidence

    @property
    def source(self) -> str:
        """Where the volumes come from that samples are compared with."""
        if not self.templates:
            return "real"
        made = f"made from {', '.join(self.templates)}"
        return made if all(about.made is not None for about in self.config.datasets.values()) else f"real or {made}"

    @property
    def templates(self) -> tuple[str, ...]:
        """The templates from which subjects that stand in tables are made, for people."""
        made = [about.made for about in self.config.datasets.values() if about.made is not None]
        return tuple(dict.fromkeys(TITLES[each] for own in made for each in (*own.anatomies, *own.held_out)))

    def metrics(self, dataset: str) -> tuple[Metric, ...]:
        """What can be known of a data set: nothing of unseen anatomies where it has none."""
        held_out = bool(self.config.data_of(self.config.datasets[dataset]).unseen)
        return tuple(metric for metric in METRICS if metric.part != "unseen" or held_out)

    @property
    def empty(self) -> bool:
        """Whether no run is done and no cost is measured."""
        return self.costs is None and not any(result.folders for result in self.found.values())

    def result(self, method: str, dataset: str) -> Result:
        return self.found.get((method, dataset)) or Result(method, dataset)

    def parameters(self, method: str) -> tuple[int, int] | None:
        """How many parameters of a method train, and how many its base has."""
        for dataset in self.config.datasets:
            for summary in self.result(method, dataset).summaries.values():
                return int(summary["run"]["trainable_parameters"]), int(summary["run"]["base_parameters"])
        return None

    def choice(self, method: str, dataset: str) -> Choice | None:
        """The rates that were tried, of a method that has several, or of the one that searches for it."""
        method = self.config.searcher(method)
        rates = self.config.methods[method].rates if method in self.config.methods else ()
        return read_choice(self.out, method, dataset, rates) if len(rates) > 1 else None

    def rate(self, method: str, dataset: str) -> float | None:
        """The rate that the tables' runs had."""
        for summary in self.result(method, dataset).summaries.values():
            return float(summary["config"]["training"]["learning_rate"])
        return None

    def title(self, method: str, ranked: bool = False) -> str:
        """A method's name for people; with its rank where that is what a table is about."""
        if method == BASE:
            return "Base, not fine-tuned"
        about = self.config.methods.get(method)
        title = (about.title if about is not None else None) or method
        rank = about.method.params.get("r") if about is not None and ranked else None
        return title if rank is None or "rank" in title else f"{title}, rank {rank}"

    def dataset_title(self, dataset: str) -> str:
        return self.config.datasets[dataset].title or dataset

    def unseen(self, metric: Metric, dataset: str) -> bool:
        """Whether a metric is a distance between features that do not tell this data set from the source."""
        return metric.marked and unseen(self.domains.get(dataset))

    def left_out(self, methods: Sequence[str]) -> int:
        """How many runs of these methods have distances by another encoder."""
        return sum(len(result.others) for (method, _), result in self.found.items() if method in methods)

    def failures(self, methods: Sequence[str]) -> list[str]:
        """Every run of these methods that is not done, in words."""
        lines = []
        for method in methods:
            for dataset in self.config.datasets:
                result = self.result(method, dataset)
                for seed in self.config.seeds:
                    if seed in result.failures:
                        what = result.failures[seed]
                    elif seed not in result.folders:
                        what = "not run yet"
                    else:
                        continue
                    lines.append(f"{self.title(method)}, {self.dataset_title(dataset)}, seed {seed}: {what}")
        return lines


def read_results(out: Path) -> Results:
    """Read what studies left in `out`; raises LabError where there is none."""
    known = read_json(out / "study.json")
    if known is None or known.get("version") != 1:
        fix = "Run `study` first, with the same `--out`."
        raise fault(out, "the results of a study", "study.json", "none that can be read", fix)
    try:
        config = StudyConfig.model_validate_json(json.dumps(known["config"]))
        studies = tuple(study for study in STUDIES if study in known["studies"])
    except (ValidationError, KeyError, TypeError):
        fix = "Run `study` again with the same `--out`."
        raise fault(out / "study.json", "the settings of a study", "those of this version", "others", fix) from None
    found: dict[tuple[str, str], Result] = {}
    seconds = {}
    for folder in sorted((out / "runs").glob("*/*/seed-*")):
        seed = folder.name.removeprefix("seed-")
        method, dataset = folder.parent.parent.name, folder.parent.name
        if dataset in config.datasets and seed.lstrip("-").isdigit() and int(seed) in config.seeds:
            result = found.setdefault((method, dataset), Result(method, dataset))
            seconds[folder] = _add(result, int(seed), folder)
    shares = {}
    for folder in sorted((out / "shares").glob("*/*")):
        outcome, content = Outcome.read(folder), read_json(folder / "summary.json")
        if outcome is not None and outcome.status == "done" and content is not None:
            shares[folder.parent.name, folder.name] = content["run"]
    record = read_json(out / f"record-study-{studies[-1]}.json") or {} if studies else {}
    features = _only_one_encoder(known.get("features"), found)
    domains = {name: read_domain(out, name, features.get("encoder_digest")) for name in config.datasets}
    return Results(
        out, config, studies, found, seconds, read_json(out / "costs.json"), record, features, domains, shares
    )


def _only_one_encoder(features: Mapping[str, Any] | None, found: Mapping[tuple[str, str], Result]) -> Mapping[str, Any]:
    """The encoder that the study had, or the first evaluation of one that did not say; marks those of another."""
    every = [(result, seed, evaluation) for result in found.values() for seed, evaluation in result.evaluations.items()]
    own = features or (every[0][2] if every else {})
    for result, seed, evaluation in every:
        if _encoder_of(evaluation) != _encoder_of(own):
            result.others.add(seed)
    return own


def _encoder_of(evaluation: Mapping[str, Any]) -> Any:
    return evaluation.get("encoder_digest", evaluation.get("encoder"))  # an earlier version had the note alone


def _add(result: Result, seed: int, folder: Path) -> float:
    """Read one run; the seconds that it took, 0 where it is not done."""
    outcome = Outcome.read(folder)
    if outcome is not None and outcome.status in ("failed", "diverged"):
        result.failures[seed] = outcome.reason
    if outcome is None or outcome.status != "done":
        return 0.0
    result.folders[seed] = folder
    result.errors[seed] = outcome.errors
    for name, kept in (("summary.json", result.summaries), ("evaluation.json", result.evaluations)):
        content = read_json(folder / name)
        if content is not None:
            kept[seed] = content
    return outcome.seconds
