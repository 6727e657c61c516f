"""The table and the picture of study `start`: each method from starts of several sizes."""

from __future__ import annotations

from collections.abc import Iterator

from ddpm_lab.evaluation.paired import Difference, compare
from ddpm_lab.study.columns import NOTHING, Column
from ddpm_lab.study.plots import Line, Panel
from ddpm_lab.study.results import CHANGE, Results
from ddpm_lab.study.shares import SHARES
from ddpm_lab.study.tables import Row, Table, rate_notes, rate_of, sizes_of

__all__ = ["start_panels", "start_table"]

COLUMNS = ("rate", "Error change \N{DOWNWARDS ARROW} (%)", "less own start", "std T / std W", *SHARES)
NOTES = (
    "Change of the denoising error on test volumes from the first step to the last, in percent.",
    "less own start: the change less that of the method as its recipe starts it, in points, paired by seed and volume. "
    "Bold: the interval excludes zero.",
)


def start_table(results: Results) -> Table:
    """Each method at each start on each data set: rate, error, difference from its own start, shares of the update."""
    datasets = tuple(results.config.datasets)
    update = results.config.start.update
    rows = [_row(results, update, update)]
    for name in results.config.start.methods:
        rows += [_row(results, each, name) for each in results.config.started(name)]
    groups = (("", 2), *((results.dataset_title(each), len(COLUMNS)) for each in datasets))
    columns = ("#P", "of base", *(COLUMNS * len(datasets)))
    members = results.config.members("start")
    missing = [f"Missing: {line}" for line in results.failures(members)]
    notes = (*NOTES, *_about_shares(results), *rate_notes(results, members), *missing)
    return Table("start", "Start", groups, columns, tuple(rows), notes)


def _row(results: Results, method: str, own: str) -> Row:
    cells, best = list(sizes_of(results, method)), set()
    for dataset in results.config.datasets:
        column = Column(CHANGE, confidence=results.confidence)
        column.cells.append(results.result(method, dataset).cell(CHANGE, results.confidence))
        found = _difference(results, method, own, dataset)
        if found is not None and found.clear:
            best.add(len(cells) + 2)
        cells += [rate_of(results, method, dataset), column.text(0), _points(found), *_shares(results, method, dataset)]
    title = results.title(method) + (", its own" if method == own != results.config.start.update else "")
    return Row(title, tuple(cells), frozenset(best), reference=method == results.config.start.update)


def _difference(results: Results, method: str, own: str, dataset: str) -> Difference | None:
    if method == own:
        return None
    one, other = (results.result(each, dataset).numbers(CHANGE) for each in (method, own))
    return compare(one, other, results.confidence)


def _points(found: Difference | None) -> str:
    return NOTHING if found is None else f"{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f})"


def _shares(results: Results, method: str, dataset: str) -> Iterator[str]:
    found = results.shares.get((method, dataset))
    if found is None:
        yield from [NOTHING] * (1 + len(SHARES))
        return
    yield f"{found['std']:.3g}"
    yield from (f"{found[key]:.1%}" for key in SHARES)


def _about_shares(results: Results) -> list[str]:
    """What the columns of shares are, and of which layers."""
    start = results.config.start
    layers = "; ".join(sorted({str(found["layers"]) for found in results.shares.values()})) or "not measured yet"
    return [
        f"Shares are of the squared norm of the update of {results.title(start.update)}, seed "
        f"{results.config.seeds[0]}, over some layers of each kind together ({layers}). tangent: what the tangent "
        "space at the start holds; noise: its share of all directions, which it holds of white noise; reach: what "
        f"{start.sweeps} sweeps of `fit` find from there; free: what they find where the frozen copy may be zeros as "
        "well. std T / std W: the size of the start, the median of these layers."
    ]


def start_panels(results: Results) -> list[Panel]:
    """The change of the error by the size of the start, from zero on the left: a panel for each data set."""
    return [_panel(results, dataset) for dataset in results.config.datasets]


def _panel(results: Results, dataset: str) -> Panel:
    lines = []
    for colour, name in enumerate(results.config.start.methods):
        points = []
        for method in results.config.started(name):
            found = results.shares.get((method, dataset))
            cell = results.result(method, dataset).cell(CHANGE, results.confidence)
            if found is not None and cell is not None:
                points.append((float(found["std"]), cell.mean, cell.half or 0.0))
        x, y, half = ([point[place] for point in sorted(points)] for place in range(3))
        lines.append(Line(results.title(name), x, y, half, colour=colour))
    title = f"Error change (%), {results.dataset_title(dataset)}"
    return Panel(title, "std T / std W at the start", lines, marks=True, sizes=True)
