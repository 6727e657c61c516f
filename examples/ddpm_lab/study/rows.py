"""Finished runs as lines of a file that is committed: a study runs in parts, on several machines, and none twice.

A row has all that the tables need of a run: settings, errors of every held-out volume, distances, seconds, hardware.
Lines are added and never changed. Without a file the rows live as long as the command, which estimates by them.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ddpm_lab.study.run import Outcome, Run
from ddpm_lab.support.durable import read_json, write_json, writing
from ddpm_lab.support.faults import fault, reason
from ddpm_lab.support.folders import make_folder
from ddpm_lab.support.locks import alone
from ddpm_lab.support.record import machine, revision, versions

__all__ = ["Row", "Rows", "alike"]

Row = Mapping[str, Any]
VERSION = 1
# Settings in which runs of one study differ, and which say little about how long one takes.
OWN = ("method.", "data.made.", "data.split", "training.seed", "training.learning_rate", "sampling.seed", "base")
KEPT = (
    "encoder",
    "encoder_mark",
    "encoder_digest",
    "ms_ssim",
    "reference",
    "resamples",
    "confidence",
    "counts",
    "sets",
)


class Rows:
    """The rows of a file, those that a crash cut short left out; raises LabError for lines that are no rows."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.known: dict[str, Row] = {}
        self._read()

    def _read(self) -> None:
        for number, line in enumerate(self._lines(), 1):
            try:
                row = json.loads(line)
                if row["version"] != VERSION:
                    raise ValueError(f"version {row['version']}")
                self.known.setdefault(row["key"], row)
            except (ValueError, KeyError, TypeError) as error:
                fix = "Take the file from version control again, or remove the line: its run is then done anew."
                raise fault(f"{self.path}:{number}", "a row", "a finished run as JSON", reason(error), fix) from None

    def _lines(self) -> list[str]:
        """Whole lines: what follows the last end of a line was cut short."""
        if self.path is None or not self.path.exists():
            return []
        try:
            return self.path.read_text(encoding="utf-8").split("\n")[:-1]
        except (OSError, ValueError) as error:
            raise fault(self.path, "`rows`", "a readable text file", reason(error), "Check the path.") from None

    def lay_out(self, runs: Iterable[Run]) -> int:
        """Write the folders of runs that a row has and this OUT has not, without samples; how many these were."""
        missing = [run for run in runs if run.key in self.known and not run.done]
        for run in missing:
            row = self.known[run.key]
            if run.folder.exists():
                shutil.rmtree(run.folder)  # begun and never finished
            make_folder(run.folder)
            with writing(run.folder, "a run of the rows"):
                for name in ("summary", "evaluation"):
                    if row[name] is not None:
                        write_json(run.folder / f"{name}.json", row[name])
            errors, status = row["errors"], row["status"]
            Outcome(status, run.key, row["seconds"], row["reason"], run.made_of, errors).write(run.folder)
        return len(missing)

    def add(self, run: Run) -> None:
        """Add a line for a run that is done, unless another command did; what was cut short at the end goes."""
        if not run.done or run.key in self.known:
            return
        row = row_of(run)
        if self.path is None:
            self.known[run.key] = row
            return
        make_folder(self.path.parent)
        with alone(self.path.with_name(f".{self.path.name}.lock"), wait=True), writing(self.path, "a row"):
            self._read()
            if run.key in self.known:
                return
            with self.path.open("ab+") as file:
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
                file.write((json.dumps(row, sort_keys=True, allow_nan=False) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
        self.known[run.key] = row

    def expected(self, run: Run) -> float | None:
        """How many seconds a run may take: the median of the method's runs, else the most of any; None for none."""
        rows = [row for row in self.known.values() if row["search"] == run.search and _same_work(row, run)]
        own = [float(row["seconds"]) for row in rows if row["method"] == run.method and row["status"] == "done"]
        if own:
            return statistics.median(own)
        return max((float(row["seconds"]) for row in rows), default=None)


def _same_work(row: Row, run: Run) -> bool:
    """Whether a run has the settings of a row but for those in which the runs of a study differ."""
    one, other = (
        {name: value for name, value in settings.items() if not name.startswith(OWN)}
        for settings in (row["settings"], run.made_of)
    )
    return one == other


def alike(row: Row, run: Run) -> bool:
    """Whether a row is of a run whose data and base are not there yet, so that their digests are not known."""
    if (row["method"], row["dataset"], row["search"]) != (run.method, run.dataset, run.search):
        return False
    one, other = (
        {name: value for name, value in settings.items() if name not in ("data.split", "base")}
        for settings in (row["settings"], run.made_of)
    )
    return one == other


def row_of(run: Run) -> dict[str, Any]:
    """A finished run as its line has it: no paths, no losses of single steps."""
    outcome = run.outcome
    assert outcome is not None
    return {
        "version": VERSION,
        "key": run.key,
        "search": run.search,
        "method": run.method,
        "dataset": run.dataset,
        "rate": run.rate,
        "seed": run.seed,
        "status": outcome.status,
        "reason": outcome.reason,
        "seconds": round(outcome.seconds, 1),
        "errors": outcome.errors,
        "summary": _summary(run),
        "evaluation": _evaluation(run),
        "settings": dict(run.made_of),
        "machine": machine(),
        "versions": versions(),
        "revision": revision(),
    }


def _summary(run: Run) -> dict[str, Any] | None:
    """The numbers of a trained method, and its errors on the way."""
    found = read_json(run.folder / "summary.json")
    if found is None or "run" not in found:
        return None
    numbers = {name: value for name, value in found["run"].items() if isinstance(value, int | float | str)}
    points = [[step, mean, []] for step, mean, _ in found.get("history", {}).get("validation", [])]
    rate = run.config.training.learning_rate
    return {"run": numbers, "history": {"validation": points}, "config": {"training": {"learning_rate": rate}}}


def _evaluation(run: Run) -> dict[str, Any] | None:
    found = read_json(run.folder / "evaluation.json")
    return None if found is None else {name: found[name] for name in KEPT if name in found}
