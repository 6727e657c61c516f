"""The tables and the picture of a screen: every row by its error within its budget, and what no other row beats."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ddpm_lab.study.columns import NOTHING
from ddpm_lab.study.plots import Line, Panel
from ddpm_lab.study.results import Results
from ddpm_lab.study.run import Outcome
from ddpm_lab.study.screen_cost import costs_of
from ddpm_lab.study.screen_linear import TEXT
from ddpm_lab.study.screen_settings import Screen, Screened
from ddpm_lab.study.search import read_choice
from ddpm_lab.study.tables import EDGE, Row, Table, millions
from ddpm_lab.support.durable import read_json

__all__ = ["Point", "front", "points_of", "screen_csv", "screen_panels", "screen_tables"]

COLUMNS = ("family", "#P", "rate", "Error change \N{DOWNWARDS ARROW} (%)", "step (ms)", "of full", "memory (MB)")
PERCENT, MS, MB = 100, 1e3, 1e6


@dataclass(frozen=True)
class Point:
    """One method of a screen; what is not measured yet is None."""

    name: str
    title: str
    about: Screened
    rate: float | None = None
    edge: bool = False
    parameters: int | None = None
    change: float | None = None  # of the error on what is tested on, in percent
    seconds: float | None = None
    of_full: float | None = None
    memory: float | None = None
    failure: str = "not run yet"


def screen_of(results: Results, study: str) -> tuple[Screen, str]:
    """The settings of a screen, and the name of what it trains on."""
    config = results.config
    return (config.screen, config.screen.dataset) if study == "screen" else (config.screen_linear, TEXT)


def points_of(results: Results, study: str) -> list[Point]:
    """What OUT has of every method of a screen."""
    return [_point(results, study, name) for name in results.config.members(study)]


def _point(results: Results, study: str, name: str) -> Point:
    config, (_, dataset) = results.config, screen_of(results, study)
    about = config.methods[name].screened
    assert about is not None
    title = results.title(name)
    folder = results.out / "runs" / name / dataset / f"seed-{config.seeds[0]}"
    outcome, summary = Outcome.read(folder), read_json(folder / "summary.json")
    if outcome is None or outcome.status != "done" or summary is None:
        return Point(name, title, about, failure=outcome.reason or outcome.status if outcome else "not run yet")
    lead = config.searcher(name)
    choice = read_choice(results.out, lead, dataset, config.methods[lead].rates)
    run = {**summary["run"], **((read_json(costs_of(results.out, name) / "summary.json") or {}).get("run") or {})}
    return Point(
        name,
        title,
        about,
        rate=summary["config"]["training"]["learning_rate"],
        edge=bool(choice.edge),
        parameters=run["trainable_parameters"],
        change=run["test_change_percent"],
        seconds=run.get("step_seconds"),
        of_full=run.get("step_of_full"),
        memory=run.get("memory_bytes"),
        failure="",
    )


def screen_tables(results: Results, study: str) -> list[Table]:
    """A table for each budget, the lowest error first; the last one has what is above all budgets."""
    screen, _ = screen_of(results, study)
    points = points_of(results, study)
    tables = []
    for budget in (*sorted(screen.budgets), None):
        own = [point for point in points if point.about.budget == budget]
        done = sorted((point for point in own if point.change is not None), key=lambda point: point.change or 0.0)
        if not own:
            continue
        title = f"At most {budget:,} parameters" if budget is not None else "More parameters than any budget"
        missing = [f"Missing: {point.title}: {point.failure}" for point in own if point.change is None]
        rows = tuple(Row(point.title, _cells(screen, point)) for point in done)
        groups = (("", len(COLUMNS)),)
        tables.append(Table(f"{study}-{budget or 'more'}", title, groups, COLUMNS, rows, tuple(missing)))
    if tables:
        tables[0] = replace(tables[0], notes=(*_notes(results, study), *tables[0].notes))
    return tables


def _cells(screen: Screen, point: Point) -> tuple[str, ...]:
    def number(value: float | None, scale: float, form: str) -> str:
        return NOTHING if value is None else format(value * scale, form)

    rate = NOTHING if point.rate is None else f"{point.rate:.1e}{EDGE if point.edge else ''}"
    return (
        screen.families[point.about.family].title,
        NOTHING if point.parameters is None else millions(point.parameters),
        rate,
        number(point.change, 1, "+.1f"),
        number(point.seconds, MS, ".0f"),
        number(point.of_full, PERCENT, ".0f") + " %" if point.of_full is not None else NOTHING,
        number(point.memory, 1 / MB, ".1f"),
    )


def _notes(results: Results, study: str) -> list[str]:
    config, (screen, _) = results.config, screen_of(results, study)
    tried = max((len(family.rates) for family in screen.families.values()), default=0)
    steps = config.methods[config.members(study)[0]].training.steps
    unit = "denoising error on test volumes" if study == "screen" else "cross-entropy on test sequences"
    notes = [
        f"A screen, no comparison: one seed ({config.seeds[0]}), {steps} steps, no intervals, nothing "
        "bold. Methods a point or two apart may change places with another seed.",
        f"Error change: of the {unit}, from the first step to the last. A method stands under the least budget that "
        "holds it, at the largest params that `tnpeft budget` finds within it; where a larger budget allows the same "
        "params it is not repeated.",
        f"Rates: the best of {tried}, tried with seed {config.search_seed} by one spec of each family at "
        f"{screen.middle:,} parameters; the family trains at it, which may not be the best of every member.",
        "step: the median over rounds in turns with full fine-tuning; of full: the median ratio. memory: the peak of a "
        "step by what operations allocate, the model included.",
    ]
    if study == "screen":
        notes.append("Specs for convolutions alone adapt convolutions alone; the others the linear layers too.")
    else:
        notes.append("PEFT: PEFT's own code at the same params. Cores alone train.")
    notes += [f"{EDGE} The largest or the smallest rate that the family's search tried: a better one may lie beyond."]
    if screen.left_out:
        notes.append("Not here: " + "; ".join(f"{name}: {why}" for name, why in screen.left_out.items()) + ".")
    return notes


def front(points: Sequence[Point], cost: Callable[[Point], float | None]) -> list[Point]:
    """Points that no other beats in error and cost at once, by rising cost."""
    known = [point for point in points if point.change is not None and cost(point) is not None]
    best: list[Point] = []
    for point in sorted(known, key=lambda point: (cost(point), point.change)):
        if not best or (point.change or 0.0) < (best[-1].change or 0.0):
            best.append(point)
    return best


def screen_panels(results: Results, study: str) -> list[Panel]:
    """Error against parameters and seconds a step, a colour for each budget, and the front with its names."""
    points = points_of(results, study)
    costs: tuple[tuple[str, Callable[[Point], float | None]], ...] = (
        ("parameters that train", lambda point: point.parameters),
        ("seconds a step, % of full fine-tuning", lambda point: point.of_full and point.of_full * PERCENT),
    )
    return [_panel(points, label, cost) for label, cost in costs if front(points, cost)]


def _panel(points: Sequence[Point], label: str, cost: Callable[[Point], float | None]) -> Panel:
    budgets = sorted({point.about.budget for point in points}, key=lambda budget: budget or float("inf"))
    lines = []
    for colour, budget in enumerate(budgets):
        own = [point for point in points if point.about.budget == budget]
        known = [(x, point.change) for point in own if (x := cost(point)) is not None and point.change is not None]
        name = f"{budget:,}" if budget is not None else "more"
        lines.append(Line(name, [x for x, _ in known], [y for _, y in known], colour=colour + 1, dots=True))
    best = front(points, cost)
    costs, changes = [cost(point) or 0.0 for point in best], [point.change or 0.0 for point in best]
    lines.append(Line("front", costs, changes, colour=0, names=[point.title for point in best]))
    return Panel("Error change (%)", label, lines, marks=True, labels=False, log_x=True)


def screen_csv(results: Results, study: str) -> str:
    """Every number behind the tables."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heads = ["method", "spec", "family", "peft", "budget", "parameters", "rate", "change_percent", "step_seconds"]
    writer.writerow([*heads, "step_of_full", "memory_bytes"])
    for point in points_of(results, study):
        about = point.about
        known = [point.parameters, point.rate, point.change, point.seconds, point.of_full, point.memory]
        writer.writerow([point.name, about.spec, about.family, about.peft, about.budget, *known])
    return text.getvalue()
