"""`study`: methods x data sets x seeds, as one of the paper's tables or figures has them.

First the rates of each method are tried (OUT/search/METHOD/DATASET/rate-R), then the seeds run at the best.
Runs lie in OUT/runs/METHOD/DATASET/seed-N, whatever table asked for them: what tables share is run once.
Several `study` commands on one OUT share the work, one on each device.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ddpm_lab.config.settings import Base
from ddpm_lab.evaluation.encoder import Encoder, load_encoder
from ddpm_lab.model.method import check_method
from ddpm_lab.sampling.draw import check_sampling
from ddpm_lab.study.check import check_inputs, inside
from ddpm_lab.study.cost import measure_costs
from ddpm_lab.study.domains import tell_domains
from ddpm_lab.study.dry_run import dry_run
from ddpm_lab.study.plan import Plan
from ddpm_lab.study.rows import Rows
from ddpm_lab.study.run import BASE, Outcome, Run
from ddpm_lab.study.screen_linear import LinearPlan
from ddpm_lab.study.screen_peft import check_anchors
from ddpm_lab.study.screen_settings import SCREENS
from ddpm_lab.study.search import Choice, check_rates, choices
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

SAID = 8  # runs that a line names


@alone_in_out("study", shared=True)
def study(name: str, config: StudyConfig, out: Path, screen: Screen) -> None:
    """Run what `name` needs and is not there yet; raises LabError at the end where a run failed."""
    check_study(name, config)
    config = config.with_variants(name)
    if not config.dry_run and name != "screen_linear":  # which need no data and no base
        check_inputs(name, config, out)
    make_folder(out)
    if config.dry_run:
        dry_run(name, config, out, screen)
        return
    with writing(out, "the settings of the study"):
        write_record(out, f"study-{name}", config)
        encoder = load_encoder(config.metrics) if name not in ("table4", *SCREENS) else None  # no samples there
        _remember(name, config, out, encoder)
    if name == "table4":
        measure_costs(config, out, screen)
        return
    work = _Work(out, screen, Rows(config.rows), config.minutes)
    plan = LinearPlan.sketch(name, config, out) if name == "screen_linear" else Plan.of(name, config, out, screen)
    if encoder is not None:
        tell_domains(plan, encoder, screen)
    searches = plan.searches()
    for run in searches:
        run.check()
    if searches:
        work.do(searches, "runs to choose rates")
    chosen = choices(searches)
    _say_rates(chosen, screen)
    runs, waiting = plan.finals(chosen)
    measures = plan.measures(runs)
    for run in (*runs, *measures):
        run.check()
    work.do(runs, "runs")
    if measures:
        work.do(measures, "costs" if name == "screen" else "shares of an update")
    work.sum_up([*runs, *measures], waiting)


def check_study(name: str, config: StudyConfig) -> None:
    """Everything that can be wrong before anything runs; raises TnpeftError."""
    if name not in STUDIES:
        fix = near_miss(name, STUDIES) or "Choose one of these."
        raise fault("study", "a study", f"one of {', '.join(STUDIES)}", f"`{name}`", fix)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        fix = "Start `study` without torchrun, once for each device: the commands share the runs."
        raise fault("study", "its processes", "one", os.environ["WORLD_SIZE"], fix)
    config.check_names()
    config = config.with_variants(name)
    members = config.members(name)
    if not members:
        fix = f"List methods under `{name}`."
        raise fault(name, "the methods of this study", "at least one", "none", fix)
    for method in members:
        _check_method(method, config)
    check_rates(name, config)
    if name == "table4":
        if not config.cost.shapes:
            raise fault(
                "cost.shapes", "the volumes", "at least one size", "none", "Write `shapes: {small: [16, 16, 16]}`."
            )
        return
    if name == "screen_linear":
        check_anchors(config.screen_linear.anchors)
        return
    if name == "screen" and not config.cost.shapes:
        fix = "Write `shapes: {small: [16, 16, 16]}`."
        raise fault("cost.shapes", "the volume of the steps that are timed", "one size", "none", fix)
    check_sampling(config.diffusion, config.sampling)
    if not config.datasets:
        raise fault("datasets", "the data sets", "at least one", "none", "Describe one under `datasets`.")


def _check_method(name: str, config: StudyConfig) -> None:
    """A method's own mistakes, said to be its."""
    with inside(f"methods.{name}"):
        check_method(config.methods[name].method, Base(checkpoint=Path(BASE)))
        steps_of(config.training_of(name, 0), 1)


def _remember(name: str, config: StudyConfig, out: Path, encoder: Encoder | None) -> None:
    """The settings, which studies ran and whose features their distances compare, for `report`."""
    known = read_json(out / "study.json") or {}
    studies = [each for each in STUDIES if each == name or each in known.get("studies", ())]
    settled = config.with_variants(*studies).settled()
    content = {"version": 1, "studies": studies, "config": settled.model_dump(mode="json")}
    features = known.get("features")
    if encoder is not None:
        features = {"encoder": encoder.note, "encoder_mark": encoder.mark, "encoder_digest": encoder.digest}
    write_json(out / "study.json", {**content, "features": features})


class _Work:
    """What a command does on its runs, one after the other, leaving those that another command holds."""

    def __init__(self, out: Path, screen: Screen, rows: Rows, minutes: float | None) -> None:
        self.out, self.screen, self.rows, self.minutes = out, screen, rows, minutes
        self.started = time.perf_counter()
        self.failed: list[tuple[Run, str]] = []
        self.taken: list[Run] = []
        self.late: list[Run] = []

    def do(self, runs: Sequence[Run], what: str) -> None:
        """Run what is left of them; a failure does not stop the rest."""
        laid_out = self.rows.lay_out(runs)
        left = [run for run in runs if not run.done]
        from_rows = f", {laid_out} of those by the rows" if laid_out else ""
        self.screen.line(f"{len(runs)} {what}, {len(runs) - len(left)} of them done before{from_rows}")
        for run in runs:
            self.rows.add(run)  # of an earlier command that had no file
        times: list[float] = []
        for number, run in enumerate(left, 1):
            if not self._fits(run):
                self.late.append(run)
                continue
            with alone(self.out / "locks" / run.lock) as mine:
                if not mine:
                    self.taken.append(run)
                    continue
                if run.done:  # by another command meanwhile
                    continue
                started = time.perf_counter()
                outcome = run.execute(_Inner(self.screen))
            times.append(time.perf_counter() - started)
            if not run.done:
                self.failed.append((run, outcome.reason))
            self.rows.add(run)
            self.screen.line(_progress(number, len(left), run, outcome, times))

    def _fits(self, run: Run) -> bool:
        """Whether a run may end in time; one of which nothing is known may."""
        expected = self.rows.expected(run)
        if self.minutes is None or expected is None:
            return self.minutes is None or time.perf_counter() - self.started < 60 * self.minutes
        return time.perf_counter() - self.started + expected <= 60 * self.minutes

    def sum_up(self, runs: Sequence[Run], waiting: Sequence[str]) -> None:
        """What is done and what is not; raises LabError where a run failed."""
        screen, done, total = self.screen, sum(run.done for run in runs), len(runs) + len(waiting)
        screen.line(f"{done} of {total} runs are done. `report --out {self.out}` makes the tables.")
        if self.taken:
            names = "; ".join(map(str, self.taken))
            screen.line(f"{len(self.taken)} were in the hands of another command: {names}")
        if self.late:
            screen.line(
                f"{len(self.late)} are left for another part: they would not end within {self.minutes:g} minutes"
            )
        if waiting:
            screen.line(f"{len(waiting)} wait for a rate that is not chosen yet: {_some(waiting)}")
        for run, reason in self.failed:
            screen.line(f"failed: {run}: {reason}")
        if self.failed:
            fix = "Mend what the list above says; the same command tries them again."
            raise fault(self.out, "runs of the study", "all done", f"{len(self.failed)} failed", fix)


def _say_rates(chosen: Mapping[tuple[str, str], Choice], screen: Screen) -> None:
    """Which rates were chosen, and where a better one may lie beyond them."""
    for (method, dataset), choice in chosen.items():
        what = f"{method} on {dataset}"
        if choice.best is not None:
            beyond = f", the {choice.edge} tried: a better one may lie beyond" if choice.edge else ""
            screen.line(f"{what}: rate {choice.best:g}{beyond}")
        elif len(choice.changes) == len(choice.rates):
            screen.line(f"{what}: training diverged at every rate: try smaller ones")


def _some(names: Sequence[str]) -> str:
    """The first few, and how many more there are: a screen has hundreds."""
    more = f" and {len(names) - SAID} more" if len(names) > SAID else ""
    return "; ".join(names[:SAID]) + more


def _progress(number: int, total: int, run: Run, outcome: Outcome, times: Sequence[float]) -> str:
    rest = sum(times) / len(times) * (total - number)
    after = f", about {clock(rest)} left" if number < total else ""
    word = f"done in {clock(times[-1])}" if outcome.status == "done" else outcome.status
    return f"run {number} of {total}: {run}: {word}{after}"


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
