"""One run of a study: train, sample, evaluate in a folder of its own, and what became of it."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ddpm_lab.config.settings import Config
from ddpm_lab.evaluation.evaluate import evaluate_samples
from ddpm_lab.sampling.sample import sample_volumes
from ddpm_lab.support.console import Screen
from ddpm_lab.support.durable import read_json, write_json, writing
from ddpm_lab.support.faults import DivergenceError, fault, raise_all
from ddpm_lab.support.folders import make_folder
from ddpm_lab.support.locks import alone
from ddpm_lab.training.driver import finetune
from ddpm_lab.training.resume import differences, flat
from tnpeft import TnpeftError
from tnpeft.errors import Problem

__all__ = ["BASE", "Outcome", "Run", "alone", "digest", "made_of", "one_line", "refuse_others"]

BASE = "base"  # stands where a method would: samples of the base itself
STATUS = "run.json"
# How fast, where and how watched: not what comes out.
ASIDE = ("threads", "processes", "workers", "tensorboard", "checkpoint_every", "keep_checkpoints", "device")


@dataclass(frozen=True)
class Outcome:
    """What became of a run; `reason` says why it failed, `made_of` are the settings that `key` stands for.

    `errors` has each held-out volume's errors before and after: {"test": {"sub-007_t2w.nii.gz": [0.031, 0.019]}}.
    """

    status: str  # done, failed, diverged, running
    key: str
    seconds: float = 0.0
    reason: str = ""
    made_of: Mapping[str, Any] = field(default_factory=dict)
    errors: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        with writing(folder, "the record of a run"):
            write_json(folder / STATUS, vars(self))

    @classmethod
    def read(cls, folder: Path) -> Outcome | None:
        """The outcome in `folder`, or None where nothing ran."""
        found = read_json(folder / STATUS)
        return cls(**found) if found is not None else None


@dataclass(frozen=True)
class Run:
    """A method (or the base), a data set and a seed, and the rate where there was a choice.

    A `search` run tries the rate: one that diverges is done, for the same settings diverge again.
    """

    method: str
    dataset: str
    seed: int
    config: Config
    folder: Path
    cache: Path  # of volumes and features, shared by all runs on the data set
    made_of: Mapping[str, Any]  # everything that changes the result, by its dotted name
    rate: float | None = None
    search: bool = False

    def __str__(self) -> str:
        last = f"rate {self.rate:g}" if self.search else f"seed {self.seed}"
        return f"{self.method} on {self.dataset}, {last}"

    @property
    def lock(self) -> str:
        """A name that no other run has."""
        return f"{self.method}--{self.dataset}--{f'rate-{self.rate:g}' if self.search else self.seed}"

    @property
    def key(self) -> str:
        return digest(self.made_of)

    @property
    def done(self) -> bool:
        outcome = self.outcome
        ends = ("done", "diverged") if self.search else ("done",)
        return outcome is not None and outcome.status in ends and outcome.key == self.key

    @property
    def outcome(self) -> Outcome | None:
        return Outcome.read(self.folder)

    def check(self) -> None:
        """Raise LabError where the folder holds a finished run of other settings: results are never thrown away."""
        outcome = Outcome.read(self.folder)
        if outcome is not None and outcome.status == "done" and outcome.key != self.key:
            refuse_others(self.folder, "the finished run", outcome, self.made_of)

    def execute(self, screen: Screen) -> Outcome:
        """Run what is left of it; whatever a user or the data can cause is recorded, not raised."""
        make_folder(self.folder)
        earlier = Outcome.read(self.folder)
        if earlier is not None and earlier.key != self.key:
            shutil.rmtree(self.folder)  # begun with other settings, never finished
            make_folder(self.folder)
            earlier = None
        before = earlier.seconds if earlier is not None else 0.0
        self._link_cache()
        Outcome("running", self.key, before, made_of=self.made_of).write(self.folder)
        started = time.perf_counter()
        status, reason = "done", ""
        try:
            self._stages(screen)
        except DivergenceError as error:
            status, reason = "diverged", one_line(str(error))
        except TnpeftError as error:
            status, reason = "failed", one_line(str(error))
        except (torch.OutOfMemoryError, OSError) as error:
            status, reason = "failed", one_line(str(error))
        seconds = before + time.perf_counter() - started
        errors = self._errors() if status == "done" else {}
        outcome = Outcome(status, self.key, seconds, reason, self.made_of, errors)
        outcome.write(self.folder)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return outcome

    def _stages(self, screen: Screen) -> None:
        """Each stage leaves a file when it is through, and goes on where it was cut short."""
        adapters: tuple[Path, ...] = ()
        if self.method != BASE:
            summary = read_json(self.folder / "summary.json") or finetune(self._with(count=0), self.folder, screen)
            assert summary is not None  # this is the only process
            adapters = (self.folder / str(summary["result"]),)
        if self.config.sampling.count == 0:
            return
        config = self._with(adapters=adapters, base=self.method == BASE)
        sample_volumes(config, self.folder, screen)
        with alone(self.cache / "lock", wait=True):  # another command may fill the same cache
            evaluate_samples(config, self.folder, screen)

    def _errors(self) -> dict[str, dict[str, list[float]]]:
        """The errors of each held-out volume before and after, by its path below the root; none of the base's."""
        by_volume = ((read_json(self.folder / "summary.json") or {}).get("run") or {}).get("by_volume", {})
        names = read_json(self.folder / "split.json") or {}
        return {
            name: {
                path: [before, after]
                for path, before, after in zip(names[name], each["before"], each["after"], strict=True)
            }
            for name, each in by_volume.items()
        }

    def _link_cache(self) -> None:
        """The run's cache is the data set's, by a relative path so that OUT can move."""
        make_folder(self.cache)
        link = self.folder / "cache"
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(self.cache, self.folder), target_is_directory=True)

    def _with(self, **sampling: Any) -> Config:
        return self.config.model_copy(update={"sampling": self.config.sampling.model_copy(update=sampling)})


def made_of(config: Config, data: Mapping[str, Any], base: str) -> dict[str, Any]:
    """What a run's result depends on; `data` and `base` stand for files whose paths do not matter.

    Not the encoder, which changes no training: the evaluation says which one it was, and a report keeps them apart.
    """
    parts = config.model_dump(mode="json", exclude={"data": True, "base": True, "metrics": {"encoder", "medicalnet"}})
    for name in ASIDE:
        parts["training"].pop(name)
    return dict(flat({**parts, "data": dict(data), "base": base}))


def digest(settings: Mapping[str, Any]) -> str:
    """A name for settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def refuse_others(folder: Path, what: str, outcome: Outcome, wanted: Mapping[str, Any]) -> None:
    """Raise LabError for results of other settings in a folder, which names the settings that differ."""
    fix, place = "Put it back, remove the folder, or choose another `--out`.", str(folder)
    if not outcome.made_of:  # an earlier version did not say
        raise fault(folder, what, "these settings", "others", fix)
    problems = []
    for name, was, now in differences(wanted, outcome.made_of):
        if name == "base":
            problems.append(Problem(f"the base of {what}", "the one it was made from", "another", fix, place))
        else:
            problems.append(Problem(f"`{name}` of {what}", f"{was}, as when it ran", now, fix, place))
    raise_all(problems, place)


def one_line(text: str) -> str:
    return " ".join(text.split())
