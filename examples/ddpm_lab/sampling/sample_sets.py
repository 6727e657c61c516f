"""A folder of samples: `sample-0000.nii.gz` and so on, and `samples.json`, which says what they were drawn from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm_lab.support.durable import read_json, write_json
from ddpm_lab.support.faults import fault
from ddpm_lab.support.folders import make_folder

__all__ = ["SampleSet", "find_sample_sets"]

RECORD = "samples.json"
AGAIN = "Run `sample` again: it draws what is missing."


@dataclass(frozen=True)
class SampleSet:
    """The samples of one model."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    def path(self, number: int) -> Path:
        return self.folder / f"sample-{number:04d}.nii.gz"

    def missing(self, numbers: Sequence[int]) -> list[int]:
        """Those of the numbers that have no file yet; files are written whole or not at all."""
        return [number for number in numbers if not self.path(number).is_file()]

    def record(self) -> dict[str, Any] | None:
        """What `samples.json` says, or None where there is none that can be read."""
        found = read_json(self.folder / RECORD) or {}
        sound = isinstance(found.get("settings"), dict) and type(found.get("count")) is int
        return found if sound else None

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise LabError where the folder holds samples of other settings: they are never thrown away or mixed."""
        if not any(self.folder.glob("sample-*.nii.gz")):
            return
        fix = "Remove the folder, or choose another `--out`."
        record = self.record()
        if record is None:
            raise fault(self.folder, "samples of an earlier run", f"a {RECORD} beside them", "none to read", fix)
        found = record["settings"]
        for name in [*settings, *(name for name in found if name not in settings)]:
            if settings.get(name) != found.get(name):
                wanted, there = (json.dumps(values.get(name)) for values in (settings, found))
                raise fault(self.folder, "samples of an earlier run", f"{name} {wanted}", there, fix)

    def write_record(self, count: int, settings: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Write `samples.json`, before the first volume; `count` says how many there will be."""
        make_folder(self.folder)
        seed = settings["sampling.seed"]
        seeds = [[seed, number] for number in range(count)]
        record = {"version": 1, "name": self.name, "count": count, "seeds": seeds, **about, "settings": settings}
        write_json(self.folder / RECORD, record)

    def paths(self) -> list[Path]:
        """The files of a finished set in order; raises LabError for one that is not."""
        record = self.record()
        if record is None:
            raise fault(self.folder, "the samples", f"{RECORD}, as `sample` writes it", "none to read", AGAIN)
        numbers = range(record["count"])
        if missing := self.missing(numbers):
            found = f"{len(numbers) - len(missing)}, without {self.path(missing[0]).name}"
            raise fault(self.folder, "the samples", f"{len(numbers)} volumes", found, AGAIN)
        return [self.path(number) for number in numbers]


def find_sample_sets(out: Path, names: Sequence[str] = ()) -> list[SampleSet]:
    """The sets of these names, or all that `sample` left in `out`, the base first; raises LabError where one misses."""
    folder, fix = out / "samples", "Run `sample` first, with the same `--out`."
    there = [path for path in sorted(folder.glob("*")) if path.is_dir()]
    found = [SampleSet(folder / name) for name in names] or [SampleSet(path) for path in there]
    if not found:
        raise fault(folder, "the samples", "a folder for each model", "none", fix)
    for each in found:
        if each.folder not in there:
            raise fault(each.folder, "the samples", "a folder", "nothing there", fix)
    return sorted(found, key=lambda each: each.name != "base")
