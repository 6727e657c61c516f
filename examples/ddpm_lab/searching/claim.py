"""`claim`: the runs of a claim that was written down before them, and what they say."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ddpm_lab.evaluation.paired import Difference, Numbers, compare
from ddpm_lab.searching.settings import ClaimConfig, HeldOut
from ddpm_lab.study.run import Outcome
from ddpm_lab.study.study import study
from ddpm_lab.support.console import Screen
from ddpm_lab.support.durable import read_json, write_json, write_whole, writing
from ddpm_lab.support.faults import fault
from ddpm_lab.support.folders import make_folder
from ddpm_lab.support.record import machine

__all__ = ["Against", "Verdict", "claim", "judged"]


@dataclass(frozen=True)
class Against:
    """The found network less another method: on all held-out volumes together, and on each kind of them.

    None where runs are missing. Less is better: it is the change of the error, in percent.
    """

    method: str
    parameters: int | None
    change: float | None
    together: Difference | None
    by_kind: dict[str, Difference | None]

    @property
    def beaten(self) -> bool:
        return self.together is not None and self.together.high < 0


@dataclass(frozen=True)
class Verdict:
    """What the runs in a folder say of a claim; `missing` are those that are not done."""

    parameters: int | None
    most: int | None
    change: float | None
    rivals: tuple[Against, ...]
    controls: tuple[Against, ...]
    missing: tuple[str, ...]

    @property
    def decided(self) -> bool:
        return not self.missing

    @property
    def holds(self) -> bool:
        """Every rival is beaten, with no more parameters than are allowed, and no run is missing."""
        small = self.parameters is not None and self.most is not None and self.parameters <= self.most
        return self.decided and small and all(rival.beaten for rival in self.rivals)

    def __str__(self) -> str:
        if not self.decided:
            return f"The claim is not decided: {len(self.missing)} runs are missing."
        if self.holds:
            return f"The claim holds: all {len(self.rivals)} rivals are beaten on what was held out."
        if self.parameters is None or self.most is None or self.parameters > self.most:
            return f"The claim does not hold: {self.parameters} parameters are more than {self.most}."
        left = ", ".join(rival.method for rival in self.rivals if not rival.beaten)
        return f"The claim does not hold: not beaten are {left}."


def claim(study_out: Path, minutes: float | None, config: ClaimConfig, out: Path, screen: Screen) -> Verdict:
    """Run what is left of a claim's study in `out`, from the base in `study_out`, and write claim.md and claim.json."""
    own = config.as_study(minutes)
    base = study_out / "base"
    if not (out / "base").exists():
        if not (base / "model.safetensors").is_file():
            fix = "Run `study` first: a claim is about its base."
            raise fault(base, "the base of the study", "model.safetensors", "none", fix)
        make_folder(out)
        with writing(out, "the base of the study"):
            shutil.copytree(base, out / "base", ignore=shutil.ignore_patterns(".lock"))
    study("table1", own, out, screen)
    verdict = judged(config, out)
    with writing(out, "the verdict"):
        write_json(out / "claim.json", {**asdict(verdict), "holds": verdict.holds, "decided": verdict.decided,
                                        "config": config.model_dump(mode="json"), "machine": machine()})  # fmt: skip
        text = "\n".join(lines(config, verdict)) + "\n"
        write_whole(out / "claim.md", text.encode())
    for line in lines(config, verdict):
        screen.line(line)
    return verdict


def judged(config: ClaimConfig, out: Path) -> Verdict:
    """What the runs in `out` say."""
    missing = [
        f"{method} on {dataset}, seed {seed}"
        for method in config.members
        for dataset in dict.fromkeys(kind.dataset for kind in config.held_out)
        for seed in config.seeds
        if not _is_done(_folder(out, method, dataset, seed), [k.part for k in config.held_out if k.dataset == dataset])
    ]
    rivals, controls = (
        tuple(_against(config, out, method) for method in methods) for methods in (config.rivals, config.controls)
    )
    own = _numbers(config, out, config.found, config.held_out)
    most = _parameters(config, out, config.budget_of)
    return Verdict(_parameters(config, out, config.found), most, _mean(own), rivals, controls, tuple(missing))


def _folder(out: Path, method: str, dataset: str, seed: int) -> Path:
    return out / "runs" / method / dataset / f"seed-{seed}"


def _is_done(folder: Path, parts: Iterable[str]) -> bool:
    outcome = Outcome.read(folder)
    return outcome is not None and outcome.status == "done" and all(outcome.errors.get(part) for part in parts)


def _against(config: ClaimConfig, out: Path, method: str) -> Against:
    def difference(kinds: Sequence[HeldOut]) -> Difference | None:
        one, other = (_numbers(config, out, name, kinds) for name in (config.found, method))
        return compare(one, other, config.confidence)

    by_kind = {_title(kind): difference([kind]) for kind in config.held_out}
    change = _mean(_numbers(config, out, method, config.held_out))
    return Against(method, _parameters(config, out, method), change, difference(config.held_out), by_kind)


def _title(kind: HeldOut) -> str:
    return f"{kind.dataset}, {kind.part}"


def _numbers(config: ClaimConfig, out: Path, method: str, kinds: Sequence[HeldOut]) -> Numbers:
    """The change of each held-out volume's error, in percent of the mean before on its kind, by seed and volume."""
    found: dict[int, dict[str, float]] = {}
    for seed in config.seeds:
        volumes: dict[str, float] = {}
        for kind in kinds:
            folder = _folder(out, method, kind.dataset, seed)
            if not _is_done(folder, [kind.part]):
                break
            outcome = Outcome.read(folder)
            assert outcome is not None
            errors = outcome.errors[kind.part]
            before = statistics.fmean(each[0] for each in errors.values())
            volumes |= {
                f"{_title(kind)}, {name}": 100 * (after - first) / before for name, (first, after) in errors.items()
            }
        else:
            found[seed] = volumes
    return found


def _mean(numbers: Numbers) -> float | None:
    values = [value for volumes in numbers.values() for value in volumes.values()]
    return statistics.fmean(values) if values else None


def _parameters(config: ClaimConfig, out: Path, method: str) -> int | None:
    """How many parameters a method trains."""
    for kind in config.held_out:
        for seed in config.seeds:
            summary = read_json(_folder(out, method, kind.dataset, seed) / "summary.json")
            if summary is not None:
                return int(summary["run"]["trainable_parameters"])
    return None


def lines(config: ClaimConfig, verdict: Verdict) -> list[str]:
    """The verdict as a text: a table, and one sentence."""
    kinds = [_title(kind) for kind in config.held_out]
    share = f"{config.confidence:.0%}"
    rows = [
        f"# {config.found} against {len(config.rivals)} rivals on what was held out",
        "",
        "The change of the error in percent: less is better. Differences are paired over seeds and volumes, with "
        f"their {share} intervals; below zero the found network is better.",
        "",
        f"| | parameters | change | difference | {' | '.join(kinds)} | beaten |",
        "|-" * (5 + len(kinds)) + "|",
        f"| {config.found} | {_count(verdict.parameters)} | {_percent(verdict.change)} |{' |' * (len(kinds) + 2)}",
    ]
    for each in (*verdict.rivals, *verdict.controls):
        cells: list[Any] = [each.method, _count(each.parameters), _percent(each.change), _interval(each.together)]
        cells += [_interval(each.by_kind[kind]) for kind in kinds]
        decides = ("yes" if each.beaten else "no") if each in verdict.rivals else "control"
        rows.append(f"| {' | '.join([*cells, decides])} |")
    return [*rows, "", str(verdict)]


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _percent(number: float | None) -> str:
    return "-" if number is None else f"{number:+.1f}"


def _interval(found: Difference | None) -> str:
    return "-" if found is None else f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
