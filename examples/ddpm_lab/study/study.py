"""`study`: methods x data sets x seeds, as one of the paper's tables or figures has them.

Runs lie in OUT/runs/METHOD/DATASET/seed-N, whatever table asked for them: what tables share is run once.
Several `study` commands on one OUT share the work, one on each device.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ddpm_lab.config.settings import Base
from ddpm_lab.model.method import check_method
from ddpm_lab.sampling.draw import check_sampling
from ddpm_lab.study.check import check_inputs, inside
from ddpm_lab.study.cost import measure_costs
from ddpm_lab.study.data import base_of, identity, settled
from ddpm_lab.study.dry_run import dry_run
from ddpm_lab.study.run import BASE, Outcome, Run, made_of
from ddpm_lab.study.settings import STUDIES, StudyConfig
from ddpm_lab.support.console import Bar, Screen, clock
from ddpm_lab.support.durable import read_json, write_json, writing
from ddpm_lab.support.faults import fault
from ddpm_lab.support.folders import make_folder
from ddpm_lab.support.locks import alone, alone_in_out
from ddpm_lab.support.record import write_record
from ddpm_lab.training.train import steps_of
from tnpeft.errors import near_miss

__all__ = ["study"]


@alone_in_out("study", shared=True)
def study(name: str, config: StudyConfig, out: Path, screen: Screen) -> None:
    """Run what `name` needs and is not there yet; raises LabError at the end where a run failed."""
    check_study(name, config)
    config = config.with_ranks()
    if not config.dry_run:  # which needs no data and no base
        check_inputs(name, config, out)
    make_folder(out)
    if config.dry_run:
        dry_run(name, config, out, screen)
        return
    with writing(out, "the settings of the study"):
        write_record(out, f"study-{name}", config)
        _remember(name, config, out)
    if name == "table4":
        measure_costs(config, out, screen)
        return
    runs = planned(name, config, out, screen)
    for run in runs:
        run.check()
    _run_all(runs, out, screen)


def check_study(name: str, config: StudyConfig) -> None:
    """Everything that can be wrong before anything runs; raises TnpeftError."""
    if name not in STUDIES:
        fix = near_miss(name, STUDIES) or "Choose one of these."
        raise fault("study", "a study", f"one of {', '.join(STUDIES)}", f"`{name}`", fix)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        fix = "Start `study` without torchrun, once for each device: the commands share the runs."
        raise fault("study", "its processes", "one", os.environ["WORLD_SIZE"], fix)
    config.check_names()
    config = config.with_ranks()
    members = config.members(name)
    if not members:
        fix = f"List methods under `{name}`."
        raise fault(name, "the methods of this study", "at least one", "none", fix)
    for method in members:
        _check_method(method, config)
    if name == "table4":
        if not config.cost.shapes:
            raise fault(
                "cost.shapes", "the volumes", "at least one size", "none", "Write `shapes: {small: [16, 16, 16]}`."
            )
        return
    check_sampling(config.diffusion, config.sampling)
    if not config.datasets:
        raise fault("datasets", "the data sets", "at least one", "none", "Describe one under `datasets`.")


def _check_method(name: str, config: StudyConfig) -> None:
    """A method's own mistakes, said to be its."""
    with inside(f"methods.{name}"):
        check_method(config.methods[name].method, Base(checkpoint=Path(BASE)))
        steps_of(config.training_of(name, 0), 1)


def _remember(name: str, config: StudyConfig, out: Path) -> None:
    """The settings and which studies ran, for `report`."""
    known = read_json(out / "study.json") or {}
    studies = [each for each in STUDIES if each == name or each in known.get("studies", ())]
    write_json(
        out / "study.json", {"version": 1, "studies": studies, "config": config.settled().model_dump(mode="json")}
    )


def planned(name: str, config: StudyConfig, out: Path, screen: Screen) -> list[Run]:
    """The runs of a study, seed by seed, so that a whole table of the first seed stands early."""
    base, base_key = base_of(config, out, screen)
    datasets = {each: settled(each, config, about, out, screen) for each, about in config.datasets.items()}
    runs = []
    for seed in config.seeds:
        for dataset, about in datasets.items():
            for method in (BASE, *config.members(name)):
                own = config.run(None if method == BASE else method, about, seed, base)
                settings = made_of(own, identity(config, about), base_key)
                folder = out / "runs" / method / dataset / f"seed-{seed}"
                runs.append(Run(method, dataset, seed, own, folder, out / "cache" / dataset, settings))
    return runs


def _run_all(runs: Sequence[Run], out: Path, screen: Screen) -> None:
    """One after the other, leaving those that another command holds; a failure does not stop the rest."""
    left = [run for run in runs if not run.done]
    screen.line(f"{len(runs)} runs, {len(runs) - len(left)} of them done before")
    failed: list[tuple[Run, str]] = []
    taken: list[Run] = []
    times: list[float] = []
    for number, run in enumerate(left, 1):
        with alone(out / "locks" / f"{run.method}--{run.dataset}--{run.seed}") as mine:
            if not mine:
                taken.append(run)
                continue
            if run.done:  # by another command meanwhile
                continue
            started = time.perf_counter()
            outcome = run.execute(_Inner(screen))
        times.append(time.perf_counter() - started)
        if outcome.status == "failed":
            failed.append((run, outcome.reason))
        screen.line(_progress(number, len(left), run, outcome, times))
    _sum_up(runs, failed, taken, out, screen)


def _progress(number: int, total: int, run: Run, outcome: Outcome, times: Sequence[float]) -> str:
    rest = sum(times) / len(times) * (total - number)
    after = f", about {clock(rest)} left" if number < total else ""
    word = "failed" if outcome.status == "failed" else f"done in {clock(times[-1])}"
    return f"run {number} of {total}: {run}: {word}{after}"


def _sum_up(
    runs: Sequence[Run], failed: Sequence[tuple[Run, str]], taken: Sequence[Run], out: Path, screen: Screen
) -> None:
    done = sum(run.done for run in runs)
    screen.line(f"{done} of {len(runs)} runs are done. `report --out {out}` makes the tables.")
    if taken:
        screen.line(f"{len(taken)} were in the hands of another command: " + "; ".join(map(str, taken)))
    for run, reason in failed:
        screen.line(f"failed: {run}: {reason}")
    if failed:
        fix = "Mend what the list above says; the same command tries them again."
        raise fault(out, "runs of the study", "all done", f"{len(failed)} failed", fix)


class _Inner(Screen):
    """Bars of a run that vanish when they are full, and none of its lines: the study has one line for each run.

    Without a terminal a line now and then says how far the run is.
    """

    def __init__(self, outer: Screen) -> None:
        super().__init__(quiet=True)
        self._outer = outer

    @contextmanager
    def bar(self, title: str, total: int, start: int = 0, transient: bool = True) -> Iterator[Bar]:
        with self.phase(title), self._outer.bar(title, total, start, transient) as bar:
            yield bar
