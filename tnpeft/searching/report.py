"""The report of a search and of what it is compared with: data, a text and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from tnpeft.documents.files import replace_files
from tnpeft.draw import Point, draw_front
from tnpeft.draw.front import front_of
from tnpeft.errors import Problem, TnpeftError, clip
from tnpeft.network import Spec
from tnpeft.searching.compared import Row, compared, finetuned
from tnpeft.searching.needs import unwritten
from tnpeft.searching.results import Candidate, Search
from tnpeft.searching.search import time_after
from tnpeft.searching.steps import ROUNDS, measured_steps, predicted_steps

__all__ = ["search_report"]

FILES = "report.json", "report.md", "front.svg"
TIMED = 16  # networks whose steps are measured, beside those that none as small betters
MEASURED = f"step, as a ratio to full fine-tuning (measured in turn, median of {ROUNDS})"
PREDICTED = "step, as a ratio to full fine-tuning (predicted by the cost model)"


def search_report(
    found: Search,
    folder: str | Path,
    storage: str | Path | None = None,
    jobs: int = 1,
    *,
    minutes: float | None = None,
    test_commands: Mapping[str, str] | None = None,
    model: nn.Module | None = None,
    example: Sequence[Any] | None = None,
) -> list[Row]:
    """Compare the winner with random search and shipped specs; write `report.json`, `report.md` and `front.svg`.

    After a search with a command, the command also fine-tunes what the winner is compared with, at the same rates. Then
    each of the `test_commands`, which have names, is run for each row at the best of its rates, with `{spec}` and
    `{rate}` filled in.

    The time of a training step is measured on `model(*example)`; without both it is predicted. After `minutes` the
    report holds what is done by then; with a `storage`, the next call goes on from there. Raises TnpeftError.
    """
    tests = dict(test_commands or {})
    _check(found, tests, model, example)
    until = time_after(minutes)
    place = None if storage is None else str(storage)
    rows = finetuned(found, compared(found, place, jobs, until), tests, place, until)
    steps = _steps(found, rows, model, example)
    rows = [replace(row, step=steps.get(f"row {number}")) for number, row in enumerate(rows)]
    measured = model is not None
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritten(folder, error.strerror or str(error)) from error
    data: dict[str, Any] = {**found.as_dict(), "steps": "measured" if measured else "predicted"}
    data |= {"comparison": [row.as_dict() for row in rows]}
    texts = json.dumps(data, indent=2, allow_nan=False) + "\n", _text(found, rows, tests, measured)
    contents = {folder / name: text.encode() for name, text in zip(FILES, texts, strict=False)}
    replace_files(contents | {folder / FILES[2]: _picture(found, rows, steps, measured)}, unwritten)
    return rows


def _check(found: Search, tests: Mapping[str, str], model: object, example: object) -> None:
    problems = []
    if (model is None) != (example is None):
        fix = "Pass the model and the arguments of a call, or neither to have steps predicted."
        given = "`model` alone" if example is None else "`example` alone"
        problems.append(Problem("search, `model` and `example`", "both or neither", given, fix))
    if tests and found.tuning is None:
        fix = "Search with a `command`, which finds the rates."
        problems.append(Problem("search, `test_commands`", "a search with fine-tunes", "one without", fix))
    for name, command in tests.items():
        if not ("{spec}" in command and "{rate}" in command):
            fix = "For example 'python test.py --spec {spec} --rate {rate}'."
            problems.append(Problem(f"search, test command {name!r}", "{spec} and {rate} in it", clip(command), fix))
    if problems:
        raise TnpeftError(*problems)


def _steps(
    found: Search, rows: Sequence[Row], model: nn.Module | None, example: Sequence[Any] | None
) -> dict[str, float]:
    """The step ratios of candidates (`network 3`) and rows (`row 0`): all predicted, or the best ones measured."""
    specs: dict[str, Spec] = {f"row {number}": row.spec for number, row in enumerate(rows) if row.spec is not None}
    scored = [candidate for candidate in found.candidates if candidate.score is not None]
    if model is None or example is None:
        specs |= {f"network {candidate.number}": candidate.spec() for candidate in scored}
        return predicted_steps([*found.task.layers.values()], specs)
    timed = {candidate.number for candidate in scored[:TIMED]} | _chosen(found)
    specs |= {f"network {candidate.number}": candidate.spec() for candidate in scored if candidate.number in timed}
    return measured_steps(model, [*found.task.layers], specs, example)


def _chosen(found: Search, steps: Mapping[str, float] | None = None) -> set[int]:
    """The Pareto-optimal networks by parameters, and by step time where it is known, and the best one."""
    points = {
        Point(each.parameters, 1 - each.score, step=(steps or {}).get(f"network {each.number}")): each.number
        for each in reversed(found.candidates)
        if each.score is not None
    }
    fronts = [*front_of([*points]), *front_of([*points], lambda point: point.step)]
    return {points[point] for point in fronts} | {found.best.number}


def _text(found: Search, rows: Sequence[Row], test_commands: Mapping[str, str], measured: bool) -> str:
    task, best = found.task, found.best
    given_up = sum(candidate.score is None for candidate in found.candidates)
    groups = [*dict.fromkeys(group for row in rows for group in row.tests)]
    tested = f"{len(found.tests)} updates, {', '.join(groups)}" if groups else "none"
    lines = [
        f"# A search for networks of at most {task.params:,} parameters",
        "",
        f"Layers: {', '.join(f'{name} ({layer})' for name, layer in task.layers.items())}.",
        f"Selected on: {', '.join(map(str, task.updates))}.",
        f"Tested on: {tested}.",
        f"Evaluations: {len(found.candidates)}, of which {given_up} were given up early; sampler {task.sampler}, "
        f"seed {task.seed}, {task.iterations} sweeps for each update.",
        f"The best is number {best.number}, drawn by {best.origin}: {len(best.topology.legs)} cores.",
        "",
        *_table(["", "parameters", "selection score", "test score", *groups, "step"],
                [_line(row, groups) for row in rows]),
        "",
        "Scores are shares of the updates' energy that `fit` captures from a free start. The selection scores of the "
        "two searches are the best of many on the updates that chose them, and optimistic; the other rows were chosen "
        "by nobody. A step is a ratio to one of full fine-tuning, "
        + ("measured in one process, in turn, a median." if measured else "predicted by the planner's cost model."),
        *(f"{row.name}: {row.missing}." for row in rows if row.missing),
        "",
        *_finetuned(found),
        *_compared_finetunes(found, rows, [*test_commands]),
        "![Networks by their parameters and by the time of a step](front.svg)",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, *rows)]
    return [lines[0].replace("|  |", "| |"), "|-" * len(heads) + "|", *lines[1:]]


def _line(row: Row, groups: Sequence[str]) -> list[str]:
    optimistic = " (optimistic)" if row.name in ("found", "random search") and row.selection_score is not None else ""
    scores = [_number(score) for score in (row.selection_score, row.test_score, *map(row.tests.get, groups))]
    count = "" if row.parameters is None else f"{row.parameters:,}"
    step = "" if row.step is None else f"{row.step:.2f}"
    return [row.name, count, f"{scores[0]}{optimistic}", *scores[1:], step]


def _number(score: float | None) -> str:
    return "" if score is None else f"{score:.4f}"


def _finetuned(found: Search) -> list[str]:
    if not found.finetunes:
        return []
    rows = [
        [f"{run.number}", f"{run.rate:g}", "stopped or failed" if run.score is None else f"{run.score:.6g}"]
        for run in found.finetunes
    ]
    return [*_table(["network", "rate", "fine-tune's score, used to select"], rows), ""]


def _compared_finetunes(found: Search, rows: Sequence[Row], tests: Sequence[str]) -> list[str]:
    """The fine-tunes of all rows: the score that chose the rate, and what was tested at that rate."""
    if found.tuning is None:
        return []
    cells = []
    for row in rows:
        scores = (row.rate, row.finetune_score, *map(row.finetune_tests.get, tests))
        cells.append([row.name, *("" if score is None else f"{score:.6g}" for score in scores)])
    heads = ["", "best rate", "score that chose it (optimistic)", *tests]
    count = len(found.tuning.rates)
    how = f"Each at {count} rate{'s' if count > 1 else ''}; the networks of the search were chosen by this score too."
    return [*_table(heads, cells), "", how, ""]


def _picture(found: Search, rows: Sequence[Row], steps: Mapping[str, float], measured: bool) -> bytes:
    layer = next(iter(found.task.layers.values()))
    chosen = _chosen(found, steps)
    points = [
        _point(candidate, steps.get(f"network {candidate.number}"), layer if candidate.number in chosen else None)
        for candidate in found.candidates
        if candidate.score is not None
    ]
    others = [
        Point(row.parameters, 1 - row.selection_score, row.name.partition(",")[0], step=row.step)
        for row in rows[1:]
        if row.parameters is not None and row.selection_score is not None
    ]
    return draw_front(points, others, MEASURED if measured else PREDICTED)


def _point(candidate: Candidate, step: float | None, layer: Any) -> Point:
    error = 1 - (candidate.score or 0.0)
    if layer is None:
        return Point(candidate.parameters, error, step=step)
    label = f"number {candidate.number}: {candidate.parameters:,} parameters, error {error:.3g}"
    return Point(candidate.parameters, error, label, candidate.spec().bind(layer), step)
