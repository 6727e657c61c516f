"""What a search is compared with: random search, and shipped specs that start from zero, with equal budgets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tnpeft.documents.writing import as_yaml
from tnpeft.errors import TnpeftError, in_one_line
from tnpeft.network import Spec, load_spec
from tnpeft.searching.results import Search
from tnpeft.searching.search import searched
from tnpeft.searching.task import mean
from tnpeft.searching.updates import Update

__all__ = ["PEERS", "Row", "compared", "finetuned", "from_zero"]

PEERS = ("cp", "tucker5", "lora", "lokr", "tenvoo_l")
LAYERS = "other layers"


@dataclass(frozen=True)
class Row:
    """One thing compared: its parameters on the searched layers and its scores, or in `missing` why it has none.

    `selection_score` and `test_score` are shares of the updates' energy. `tests` splits the latter: held-out layers in
    the searched pairs, and each held-out pair. `finetune_score` is the best over all learning rates, and `rate` is that
    best rate. `finetune_tests` has the test commands' scores at `rate`. `step` is the time of a training step, relative
    to full fine-tuning.
    """

    name: str
    parameters: int | None
    selection_score: float | None
    test_score: float | None
    missing: str = ""
    tests: Mapping[str, float] = field(default_factory=dict)
    finetune_score: float | None = None
    rate: float | None = None
    finetune_tests: Mapping[str, float | None] = field(default_factory=dict)
    step: float | None = None
    spec: Spec | None = None

    def as_dict(self) -> dict[str, Any]:
        """The row as plain data; the spec as a text."""
        row = asdict(replace(self, spec=None, tests=dict(self.tests), finetune_tests=dict(self.finetune_tests)))
        return row | {"spec": None if self.spec is None else self.spec.to_yaml()}


def compared(found: Search, storage: str | None = None, jobs: int = 1, until: float | None = None) -> list[Row]:
    """The search, a random search with as many evaluations, and shipped specs from zero, within the same budget."""
    task = found.task
    tests = _by_group(found, [*found.test_scores.values()])
    rows = [Row("found", found.best.parameters, found.best.score, found.test_score, tests=tests, spec=found.spec)]
    draws = replace(task, sampler="random", from_known=False, evaluations=len(found.candidates))
    try:
        other = searched(draws, storage, jobs, name="random search", until=until)
        late = f"{len(other.candidates)} of {len(found.candidates)} evaluations, the same command goes on"
        rows.append(_row(found, "random search", other.best.spec(), {}, other.best.parameters, other.best.score))
        if other.interrupted:
            rows[-1] = replace(rows[-1], missing=late)
    except TnpeftError as error:
        rows.append(Row("random search", None, None, None, _said(error)))
    return [*rows, *_peers(found)]


def _peers(found: Search) -> Iterator[Row]:
    for name in PEERS:
        spec = load_spec(name)
        try:
            within = found.task.within_budget(spec)
            ranks = ", ".join(f"{param}={value}" for param, value in within.settings.items())
            row = _row(found, f"{name}, {ranks}", spec, within.settings, within.total)
            yield replace(row, spec=from_zero(spec, within.settings))
        except TnpeftError as error:
            yield Row(name, None, None, None, _said(error))


def _row(
    found: Search, name: str, spec: Spec, ranks: Mapping[str, int], parameters: int, score: float | None = None
) -> Row:
    task = found.task
    if score is None:
        score = mean([*task.captured(spec, ranks, task.updates)])
    shares = [*task.captured(spec, ranks, found.tests)]
    test_score = mean(shares) if shares else None
    return Row(name, parameters, score, test_score, tests=_by_group(found, shares), spec=spec)


def _by_group(found: Search, shares: Sequence[float]) -> dict[str, float]:
    """Means over the held-out layers in the searched pairs, and over each held-out pair."""
    groups: dict[str, list[float]] = {}
    for update, share in zip(found.tests, shares, strict=True):
        groups.setdefault(_group(found, update), []).append(share)
    return {group: mean(each) for group, each in groups.items()}


def _group(found: Search, update: Update) -> str:
    searched_pairs = {each.pair for each in found.task.updates}
    return LAYERS if update.pair in searched_pairs else update.source


def _said(error: TnpeftError) -> str:
    problem = error.problems[0]
    return in_one_line(f"expected {problem.expected}, found {problem.found}", 100)


def from_zero(spec: Spec, params: Mapping[str, Any]) -> Spec:
    """A spec with other params. If it starts from a frozen copy, it gets zeros in its last core instead."""
    data = spec.root.plain()
    data["params"] = {**data.get("params", {}), **params}
    if spec.start == "frozen_copy":
        *_, last = data["cores"]
        core = data["cores"][last]
        core = {**core} if isinstance(core, dict) else {"legs": core}
        data |= {"cores": {**data["cores"], last: {**core, "init": "zeros"}}, "start": "zero"}
        data.pop("start_std", None)
    return Spec.from_yaml(as_yaml(data), spec.file, spec.tables)


def finetuned(
    found: Search, rows: Sequence[Row], test_commands: Mapping[str, str], storage: str | None, until: float | None
) -> list[Row]:
    """The rows with fine-tunes: each at the same rates as the networks of the search, and tested at its best rate."""
    from tnpeft.searching.finetunes import Case, run_cases

    tuning = found.tuning
    if tuning is None:
        return [*rows]
    best: dict[str, tuple[float, float]] = {}
    if (run := found.best_finetune) is not None and run.score is not None:
        best["found"] = run.score, run.rate
    others = [(row.name, row.spec) for row in rows if row.spec is not None and row.name != "found"]
    cases = [Case(name, spec, rate, tuning.command) for name, spec in others for rate in tuning.rates]
    outcomes = run_cases(found.task, cases, storage, until)
    for place, case in enumerate(cases):
        score = outcomes.scores.get(place)
        if score is not None and score > best.get(case.network, (float("-inf"), 0.0))[0]:
            best[case.network] = score, case.rate
    able = [(name, spec, best[name][1]) for name, spec in [("found", found.spec), *others] if name in best]
    tests = [Case(*each, command) for each in able for command in test_commands.values()]
    told = run_cases(found.task, tests, storage, until) if tests and not outcomes.unfinished else None
    filled = []
    for row in rows:
        score, rate = best.get(row.name, (None, None))
        own = [told.scores.get(place) for place, case in enumerate(tests) if case.network == row.name] if told else []
        by_name = dict(zip(test_commands, own, strict=False))
        filled.append(replace(row, finetune_score=score, rate=rate, finetune_tests=by_name))
    return filled
