"""The paper's tables from the results, and how a table is written as Markdown, CSV and HTML."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ddpm_lab.evaluation.permutation import LEVEL
from ddpm_lab.study.columns import NOTHING, Column, set_intervals, set_powers
from ddpm_lab.study.results import BASE, METRICS, Metric, Results

__all__ = [
    "EDGE",
    "Row",
    "Table",
    "as_csv",
    "as_html",
    "as_markdown",
    "change_table",
    "cost_table",
    "detail_table",
    "method_table",
    "millions",
    "rate_notes",
    "rate_of",
    "sizes_of",
]

PAPER = METRICS[:3]  # what the paper's tables have
EDGE = "\N{DAGGER}"
UNSEEN = "not seen by this encoder"


@dataclass(frozen=True)
class Row:
    """One line: its name, its cells, and which of them are the best of their column."""

    title: str
    cells: tuple[str, ...]
    best: frozenset[int] = frozenset()
    reference: bool = False  # no competitor: real volumes, the base


@dataclass(frozen=True)
class Table:
    """A title, groups of columns with the number of columns in each, headings, rows and notes."""

    name: str
    title: str
    groups: tuple[tuple[str, int], ...]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


def method_table(results: Results, name: str, title: str, methods: Sequence[str]) -> Table:
    """Methods by metrics on each data set, as the paper's Tables 1 and 2 have them."""
    datasets = tuple(results.config.datasets)
    groups = [("", 2), *((results.dataset_title(each), len(PAPER)) for each in datasets)]
    keys = [(dataset, metric) for dataset in datasets for metric in PAPER]
    columns = [Column(metric, confidence=results.confidence) for _, metric in keys]
    return _table(results, name, title, methods, groups, columns, keys)


def change_table(results: Results, name: str, methods: Sequence[str]) -> Table:
    """How the error on test volumes changed on each data set, beside the rate."""
    datasets = tuple(results.config.datasets)
    keys = [(dataset, metric) for dataset in datasets for metric in results.metrics(dataset) if metric.part]
    groups = [("", 2), *((results.dataset_title(each), sum(key[0] == each for key in keys)) for each in datasets)]
    columns = [Column(metric, confidence=results.confidence) for _, metric in keys]
    table = _table(results, name, "Error", methods, groups, columns, keys)
    places = [2 + place + datasets.index(dataset) + 1 for place, (dataset, _) in enumerate(keys)]  # a rate before each
    starts = [place for place, (_, metric) in enumerate(keys) if metric.part == "test"]
    rows = []
    for row, method in zip(table.rows[2:], methods, strict=True):
        cells = list(row.cells)
        for place in reversed(starts):
            cells.insert(2 + place, rate_of(results, method, keys[place][0]))
        best = frozenset(places[place - 2] for place in row.best)
        rows.append(replace(row, cells=tuple(cells), best=best))
    headings = list(table.columns)
    for place in reversed(starts):
        headings.insert(2 + place, "rate")
    notes = ["Change of the denoising error on test volumes from the first step to the last, in percent."]
    if any(metric.part == "unseen" for _, metric in keys):
        notes.append("Unseen anatomy: the same on volumes of an anatomy that no base, no method and no rate has seen.")
    return replace(
        table,
        groups=(table.groups[0], *((title, number + 1) for title, number in table.groups[1:])),
        columns=tuple(headings),
        rows=tuple(rows),
        notes=(*notes, *_against_the_next(results, keys, methods, columns), *rate_notes(results, methods)),
    )


def _against_the_next(
    results: Results, keys: Sequence[tuple[str, Metric]], methods: Sequence[str], columns: Sequence[Column]
) -> list[str]:
    """On each data set the best method less the next one, in points."""
    lines = []
    for (dataset, metric), column in zip(keys, columns, strict=True):
        order = column.order(range(2, 2 + len(methods)))
        found = column.difference(order[0], order[1]) if len(order) > 1 else None
        if found is not None:
            one, other = (results.title(methods[row - 2]) for row in order[:2])
            where = f"{found.low:+.2f} to {found.high:+.2f}"
            title = results.dataset_title(dataset) + (", unseen anatomy" if metric.part == "unseen" else "")
            lines.append(f"{title}: {one} less {other}, {found.mean:+.2f} points ({where}).")
    return lines


def rate_of(results: Results, method: str, dataset: str) -> str:
    """The rate of a method, marked where it is the largest or the smallest that was tried."""
    rate, choice = results.rate(method, dataset), results.choice(method, dataset)
    if rate is None:
        return NOTHING
    return f"{rate:.1e}" + (EDGE if choice is not None and choice.edge else "")


def rate_notes(results: Results, methods: Sequence[str]) -> list[str]:
    """How rates were found."""
    tried = max((len(results.config.methods[method].rates) for method in methods), default=0)
    if tried < 2:
        return ["Rates were given, not searched."]
    notes = [
        f"Each method's rate is the best of {tried} on the data set's volumes to validate, with seed "
        f"{results.config.search_seed}, which no table has."
    ]
    pairs = [results.choice(method, dataset) for method in methods for dataset in results.config.datasets]
    if any(choice is not None and choice.edge for choice in pairs):
        notes.append(f"{EDGE} The largest or the smallest rate that was tried: a better one may lie beyond.")
    return notes


def detail_table(results: Results, name: str, dataset: str, methods: Sequence[str]) -> Table:
    """Every metric on one data set."""
    keys = [(dataset, metric) for metric in results.metrics(dataset)]
    columns = [Column(metric, confidence=results.confidence) for _, metric in keys]
    groups = [("", 2), ("", len(keys))]
    return _table(results, name, results.dataset_title(dataset), methods, groups, columns, keys)


def _table(
    results: Results,
    name: str,
    title: str,
    methods: Sequence[str],
    groups: Sequence[tuple[str, int]],
    columns: Sequence[Column],
    keys: Sequence[tuple[str, Metric]],
) -> Table:
    confidence = results.config.metrics.confidence
    rows = [
        ("Real, held out", None),
        (results.title(BASE), BASE),
        *((_title(results, name, each), each) for each in methods),
    ]
    for column, (dataset, metric) in zip(columns, keys, strict=True):
        column.unseen = results.unseen(metric, dataset)
        for _, method in rows:
            result = results.result(method or BASE, dataset)
            column.cells.append(result.cell(metric, confidence, real=method is None))
            column.numbers.append(result.numbers(metric) if method is not None else {})
    set_powers(columns)
    without = () if set_intervals(columns) else ("No ± in this table: some of its numbers have no interval.",)
    best = [column.best(range(2, len(rows)), base=1) for column in columns]
    made = [
        Row(
            row_title,
            (*sizes_of(results, method), *(column.text(number) for column in columns)),
            frozenset(place + 2 for place, winners in enumerate(best) if number in winners),
            reference=number < 2,
        )
        for number, (row_title, method) in enumerate(rows)
    ]
    mark = str(results.features.get("encoder_mark", ""))
    headings = ["#P", "of base", *(_heading(column, mark) for column in columns)]
    return Table(name, title, tuple(groups), tuple(headings), tuple(made), (*without, *_notes(results, methods)))


def _title(results: Results, table: str, method: str) -> str:
    return results.title(method, ranked=table == "figure4")


def sizes_of(results: Results, method: str | None) -> tuple[str, str]:
    known = results.parameters(method) if method not in (None, BASE) else None
    if known is None:
        return NOTHING, NOTHING
    trained, total = known
    return millions(trained), f"{trained / total:.2%}"


def millions(number: int) -> str:
    """A number of parameters: 0.60 M, 73.8 k."""
    return f"{number / 1e6:.2f} M" if number >= 5e5 else f"{number / 1e3:.1f} k"


def _evaluation(results: Results) -> dict[str, object]:
    for result in results.found.values():
        for evaluation in result.evaluations.values():
            return evaluation
    return {}


def _heading(column: Column, mark: str) -> str:
    metric = column.metric
    unit = f" (1e{column.power})" if column.power else f" ({metric.unit})" if metric.unit else ""
    unit = f", {UNSEEN}" if column.unseen else unit
    return f"{metric.title}{mark if metric.marked else ''} {'↓' if metric.less else '↑'}{unit}"


def _notes(results: Results, methods: Sequence[str]) -> list[str]:
    """What a reader must know to read a table right."""
    seeds = len(results.config.seeds)
    about = _evaluation(results)
    percent = f"{results.config.metrics.confidence:.0%}"
    if seeds > 2:
        interval = f"mean over {seeds} seeds ± half of Student's {percent} interval"
    elif seeds == 2:
        interval = "mean of two seeds ± half their difference"
    else:
        interval = f"one seed ± half of the bootstrap's {percent} interval"
    few = ["Fewer than five seeds: a first look, no result."] if seeds < 5 else []
    notes = [
        f"Each number: {interval}. #P: parameters that train. Bold: the best method of a "
        "column, where it is better than the base and its paired difference from the next one has a "
        f"{percent} interval without zero: over seeds and, for errors, volumes. (1e-3): in units of 0.001."
    ]
    notes += few
    if about:
        encoder = results.features.get("encoder", "")
        notes.append(
            f"FID and MMD: {encoder}; MMD is the paper's (kernel scaled by the median distance). "
            f"MS-SSIM: {about.get('ms_ssim', '')}. Samples are compared with {about.get('reference', 'real volumes')}."
        )
    notes += _encoder_notes(results, methods)
    if results.templates:
        names = ", ".join(results.templates)
        made = f"the {names} template" if len(results.templates) == 1 else f"templates ({names})"
        notes.append(f"Volumes that are called real are made from {made}, where the data set is.")
    for method in methods:
        note = results.config.methods[method].note if method in results.config.methods else None
        if note:
            notes.append(f"{results.title(method)}: {note}")
    return notes + [f"Missing: {line}" for line in results.failures(methods)]


def _encoder_notes(results: Results, methods: Sequence[str]) -> list[str]:
    """Which data sets the encoder tells from the source, and which runs have distances by another one."""
    notes = []
    known = {name: found for name, found in results.domains.items() if found is not None and found["p"] is not None}
    if known:
        said = ", ".join(f"{results.dataset_title(name)} {found['p']:.2g}" for name, found in known.items())
        notes.append(
            "Does the encoder tell a data set's held-out volumes from the source's? p-values of a permutation test of "
            f"the MMD: {said}. Above {LEVEL} it does not, or volumes are too few: {UNSEEN}, so that no FID or MMD is "
            "compared."
        )
    if left_out := results.left_out((BASE, *methods)):
        notes.append(
            f"FID and MMD of {left_out} runs are left out: another encoder measured them. Their errors and MS-SSIM "
            "stand. Remove their folders, and their lines in `rows`, to run them again."
        )
    return notes


def cost_table(results: Results) -> Table:
    """Inference, training time and memory as percentages of full fine-tuning."""
    costs = results.costs
    assert costs is not None
    sizes = costs["sizes"]
    first = next(iter(sizes.values()))["methods"]
    rows = []
    for name, about in first.items():
        share = about["trainable_parameters"] / about["base_parameters"]
        cells = [millions(about["trainable_parameters"]), f"{share:.2%}"]
        for size in sizes.values():
            own = size["methods"][name]
            cells += [_percent(own["inference"]["value"]), _percent(own["training"]["value"]), _percent(own["memory"])]
        title = results.title(name) if name in results.config.methods else name.capitalize()
        rows.append(Row(title, tuple(cells), reference=name not in results.config.methods))
    groups = (("", 2), *(("x".join(map(str, size["shape"])), 3) for size in sizes.values()))
    columns = ("#P", "of base", *("Inference", "Training", "Memory") * len(sizes))
    full = [
        f"{'x'.join(map(str, size['shape']))}: full fine-tuning takes {seconds(size['methods'], 'training')} a step "
        f"and {seconds(size['methods'], 'inference')} a call"
        for size in sizes.values()
    ]
    machine = costs["machine"]
    hardware = f"{machine['device']} ({machine['processor']}, {machine['threads']} threads)"
    precision = {"no": "fp32"}.get(costs["precision"], costs["precision"])
    notes = (
        f"Measured: medians over {costs['rounds']} rounds in which the methods take turns, batch "
        f"{costs['batch_size']}, {precision}, {hardware}. {'; '.join(full)}.",
        f"Inference is with merged weights. Memory is the peak of a training step, by {costs['counted']}.",
    )
    return Table("table4", "Cost in percent of full fine-tuning", groups, columns, tuple(rows), notes)


def seconds(methods: dict[str, dict[str, float]], what: str) -> str:
    value = next(iter(methods.values()))[f"{what}_seconds"]
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.2f} s"


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.1f} %"


def as_markdown(table: Table) -> str:
    """A table of GitHub's kind; the groups of columns stand in the headings."""
    headings: list[str] = []
    for group, number in table.groups:
        for _ in range(number):
            heading = table.columns[len(headings)]
            headings.append(f"{group}: {heading}" if group else heading)
    lines = ["| Method | " + " | ".join(headings) + " |", "|-|" + "-:|" * len(headings)]
    for row in table.rows:
        cells = [f"**{cell}**" if place in row.best else cell for place, cell in enumerate(row.cells)]
        lines.append(f"| {row.title} | " + " | ".join(cells) + " |")
    notes = "".join(f"\n- {note}" for note in table.notes)
    return "\n".join(lines) + "\n" + (notes + "\n" if notes else "")


def as_html(table: Table) -> str:
    """A table with groups of columns; numbers are aligned to the right."""
    top = "".join(
        f'<th colspan="{number}" scope="colgroup"{" class=group" if title else ""}>{html.escape(title)}</th>'
        for title, number in table.groups
    )
    starts = _starts(table.groups)
    headings = "".join(
        f"<th scope=col{' class=first' if place in starts else ''}>{html.escape(each).replace(' (1e', '<br>(1e')}</th>"
        for place, each in enumerate(table.columns)
    )
    body = "".join(_html_row(row, starts) for row in table.rows)
    head = f"<tr><td></td>{top}</tr>" if any(title for title, _ in table.groups) else ""
    return (
        f'<div class="scroll" tabindex="0"><table><thead>{head}<tr><th scope="col">Method</th>{headings}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _starts(groups: Sequence[tuple[str, int]]) -> set[int]:
    """The places of the first column of each group after the first."""
    places, at = set(), 0
    for _, number in groups:
        places.add(at)
        at += number
    return places - {0}


def _html_row(row: Row, starts: set[int]) -> str:
    cells = ""
    for place, cell in enumerate(row.cells):
        kind = " ".join(word for word, on in (("first", place in starts), ("best", place in row.best)) if on)
        cells += f"<td{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{_html_cell(cell)}</td>"
    kind = " class=reference" if row.reference else ""
    return f'<tr{kind}><th scope="row">{html.escape(row.title)}</th>{cells}</tr>'


def _html_cell(cell: str) -> str:
    """The interval in a lighter hand than the number."""
    number, sign, half = cell.partition(" ± ")
    minus = "&minus;" if number.startswith("-") and len(number) > 1 else ""
    shown = minus + html.escape(number[1:] if minus else number)
    return shown + (f'<span class="pm"> ± {html.escape(half)}</span>' if sign else "")


def as_csv(results: Results, methods: Sequence[str]) -> str:
    """Every number behind a table: a line for each method, data set, metric and seed.

    Beside distances stand the encoder and the p-value of its test on the data set.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["method", "title", "parameters", "dataset", "rate", "metric", "seed", "value", "low", "high", "encoder", "p"]
    )
    for method in (BASE, *methods):
        known = results.parameters(method)
        for dataset in results.config.datasets:
            rate = results.rate(method, dataset)
            domain = results.domains.get(dataset) or {}
            for metric in METRICS:
                about = (results.features.get("encoder"), domain.get("p")) if metric.marked else (None, None)
                cell = results.result(method, dataset).cell(metric, results.config.metrics.confidence)
                for each in cell.values if cell is not None else ():
                    row = [method, results.title(method), known[0] if known else "", dataset, rate, metric.key]
                    writer.writerow([*row, each.seed, each.value, each.low, each.high, *about])
    return text.getvalue()
