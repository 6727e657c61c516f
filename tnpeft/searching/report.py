"""A search beside random search and beside shipped specs, at equal parameters: data, a text and a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tnpeft.documents.files import replace_files
from tnpeft.draw import Point, draw_front
from tnpeft.draw.front import front_of
from tnpeft.errors import TnpeftError, in_one_line
from tnpeft.network import load_spec
from tnpeft.searching.needs import unwritten
from tnpeft.searching.results import Candidate, Search
from tnpeft.searching.search import searched
from tnpeft.searching.task import mean

__all__ = ["PEERS", "Row", "compared", "search_report"]

PEERS = ("cp", "tucker5", "lora", "lokr", "tenvoo_l")
FILES = "report.json", "report.md", "front.svg"


@dataclass(frozen=True)
class Row:
    """What is compared: its parameters on the searched layers, and both scores; `missing` says why it has none."""

    name: str
    parameters: int | None
    selection_score: float | None
    test_score: float | None
    missing: str = ""


def compared(found: Search, storage: str | None = None, jobs: int = 1) -> list[Row]:
    """The search, a random search with as many evaluations, and shipped specs from zero at as many parameters."""
    task = found.task
    rows = [Row("found", found.best.parameters, found.best.score, found.test_score)]
    draws = replace(task, sampler="random", from_known=False, evaluations=len(found.candidates))
    try:
        best = searched(draws, storage, jobs, name="random search").best
        shares = [*task.captured(best.spec(), {}, found.tests)]
        rows.append(Row("random search", best.parameters, best.score, mean(shares) if shares else None))
    except TnpeftError as error:
        rows.append(Row("random search", None, None, None, _said(error)))
    return [*rows, *_peers(found)]


def _peers(found: Search) -> Iterator[Row]:
    for name in PEERS:
        spec = load_spec(name)
        try:
            within = found.task.within_budget(spec)
            scores = [
                mean(shares) if (shares := [*found.task.captured(spec, within.settings, updates)]) else None
                for updates in (found.task.updates, found.tests)
            ]
        except TnpeftError as error:
            yield Row(name, None, None, None, _said(error))
            continue
        ranks = ", ".join(f"{param}={value}" for param, value in within.settings.items())
        yield Row(f"{name}, {ranks}", within.total, scores[0], scores[1])


def _said(error: TnpeftError) -> str:
    problem = error.problems[0]
    return in_one_line(f"expected {problem.expected}, found {problem.found}", 100)


def search_report(found: Search, folder: str | Path, storage: str | None = None, jobs: int = 1) -> list[Row]:
    """Compare, and write `report.json`, `report.md` and `front.svg` into a folder. Raises TnpeftError."""
    rows = compared(found, storage, jobs)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritten(folder, error.strerror or str(error)) from error
    data: dict[str, Any] = {**found.as_dict(), "comparison": [asdict(row) for row in rows]}
    texts = json.dumps(data, indent=2, allow_nan=False) + "\n", _text(found, rows)
    contents = {folder / name: text.encode() for name, text in zip(FILES, texts, strict=False)}
    replace_files(contents | {folder / FILES[2]: _picture(found, rows)}, unwritten)
    return rows


def _text(found: Search, rows: list[Row]) -> str:
    task, best = found.task, found.best
    given_up = sum(candidate.score is None for candidate in found.candidates)
    tests = ", ".join(map(str, found.tests)) or "none"
    lines = [
        f"# A search for networks of at most {task.params:,} parameters",
        "",
        f"Layers: {', '.join(f'{name} ({layer})' for name, layer in task.layers.items())}.",
        f"Selected on: {', '.join(map(str, task.updates))}.",
        f"Tested on: {tests}.",
        f"Evaluations: {len(found.candidates)}, of which {given_up} were given up early; sampler {task.sampler}, "
        f"seed {task.seed}, {task.iterations} sweeps for each update.",
        f"The best is number {best.number}, drawn by {best.origin}: {len(best.topology.legs)} cores.",
        "",
        "| | parameters | selection score | test score |",
        "|-|-|-|-|",
        *(_line(row) for row in rows),
        "",
        "Scores are shares of the updates' energy that `fit` captures from a free start. The selection scores of the "
        "two searches are the best of many on the updates that chose them, and optimistic; the other rows were chosen "
        "by nobody.",
        *(f"{row.name}: {row.missing}." for row in rows if row.missing),
        "",
        *_finetuned(found),
        "![Networks by their parameters](front.svg)",
    ]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    optimistic = " (optimistic)" if row.name in ("found", "random search") and row.selection_score is not None else ""
    scores = ["" if score is None else f"{score:.4f}" for score in (row.selection_score, row.test_score)]
    count = "" if row.parameters is None else f"{row.parameters:,}"
    return f"| {row.name} | {count} | {scores[0]}{optimistic} | {scores[1]} |"


def _finetuned(found: Search) -> list[str]:
    if not found.finetunes:
        return []
    lines = ["| network | rate | fine-tune's score, used to select |", "|-|-|-|"]
    for run in found.finetunes:
        score = "stopped or failed" if run.score is None else f"{run.score:.6g}"
        lines.append(f"| {run.number} | {run.rate:g} | {score} |")
    return [*lines, ""]


def _picture(found: Search, rows: list[Row]) -> bytes:
    scored = {candidate.number: candidate for candidate in found.candidates if candidate.score is not None}
    plain = {number: Point(each.parameters, 1 - (each.score or 0)) for number, each in scored.items()}
    numbers = {point: number for number, point in reversed(plain.items())}
    chosen = {numbers[point] for point in front_of([*plain.values()])} | {found.best.number}
    layer = next(iter(found.task.layers.values()))
    points = [
        point if number not in chosen else _labelled(scored[number], point, layer) for number, point in plain.items()
    ]
    others = [
        Point(row.parameters, 1 - row.selection_score, row.name.partition(",")[0])
        for row in rows[1:]
        if row.parameters is not None and row.selection_score is not None
    ]
    return draw_front(points, others)


def _labelled(candidate: Candidate, point: Point, layer: Any) -> Point:
    network = candidate.spec().bind(layer)
    return point._replace(label=f"{candidate.number}: {point.parameters:,}, {point.error:.3f}", network=network)
