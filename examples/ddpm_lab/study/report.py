"""`report`: tables, pictures and one page of everything that `study` left in a folder."""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError

from ddpm_lab.data.grid import grid_of
from ddpm_lab.data.slices import CONVENTION
from ddpm_lab.model.unet import divisor
from ddpm_lab.study.page import Picture, Section, write_page
from ddpm_lab.study.plots import DARK_THEME, LIGHT_THEME, Line, Panel, Theme, plot_montage_page, plot_panels, smoothed
from ddpm_lab.study.results import BASE, METRICS, Cell, Results, Value, read_results
from ddpm_lab.study.screen_page import points_of, screen_csv, screen_panels, screen_tables
from ddpm_lab.study.screen_settings import SCREENS
from ddpm_lab.study.starts import start_panels, start_table
from ddpm_lab.study.tables import as_csv, as_markdown, change_table, cost_table, detail_table, method_table, millions
from ddpm_lab.support.console import Screen
from ddpm_lab.support.durable import write_whole, writing
from ddpm_lab.support.faults import fault, reason
from ddpm_lab.support.folders import files_in, make_folder
from ddpm_lab.support.locks import alone_in_out

__all__ = ["check_filled", "report"]

TITLES = {
    "table1": "Table 1. Generation quality",
    "table2": "Table 2. Joint fine-tuning",
    "table3": "Table 3. Frozen copy against zero start",
    "table4": "Table 4. Cost",
    "figure4": "Figure 4. Rank",
    "start": "The start",
    "screen": "Every shipped spec: a screen",
    "screen_linear": "Every shipped spec on a Linear model: a screen",
}
TEXTS = {
    "table1": "Each method fine-tunes one base on each data set. Samples are compared with the data set's volumes.",
    "table2": "The methods of Table 1 while other layers (resampling, skip connections and the rest) train whole.",
    "table3": "How an adapter starts: its update minus a frozen copy of itself, or from a last core of zeros.",
    "table4": "Time and memory of each method as percentages of full fine-tuning, measured on this machine.",
    "figure4": "The number of parameters and MS-SSIM as the rank grows.",
    "start": "Methods from starts of several sizes, and what each start holds of the update of full fine-tuning.",
    "screen": "Every shipped spec that fits convolutions at three budgets: error, parameters, time and memory.",
    "screen_linear": "Every shipped spec that fits Linear layers on a small transformer, beside PEFT's own code.",
}
COLUMNS = 3  # samples of each data set in a montage
SSIM = next(metric for metric in METRICS if metric.key == "ms_ssim")


@alone_in_out("report", shared=True)
def report(out: Path, screen: Screen) -> Results:
    """Write OUT/report: report.md, CSV files, PNG files and index.html; raises LabError where no study ran."""
    results = read_results(out)
    folder = out / "report"
    make_folder(folder)
    with writing(folder, "the report"):
        _write_all(results, folder, screen)
    screen.line(f"Report in {folder}: {', '.join(files_in(folder))}")
    return results


def check_filled(results: Results) -> None:
    """Raise LabError for a report in which nothing stands yet."""
    screens = [study for study in results.studies if study in SCREENS]
    screened = any(point.change is not None for study in screens for point in points_of(results, study))
    if results.empty and not screened:
        fix = f"Run `study {results.studies[0] if results.studies else 'table1'}` to its end, with the same `--out`."
        raise fault(results.out, "the results of a study", "at least one run that is done", "none", fix)


def _write_all(results: Results, folder: Path, screen: Screen) -> None:
    sections = []
    with screen.bar("report", len(results.studies)) as bar:
        for number, study in enumerate(results.studies, 1):
            sections += [_section(results, study, folder)]
            bar(number, study)
    config = results.config
    facts = _facts(results)
    lead = _lead(results)
    settings = json.dumps(config.model_dump(mode="json"), indent=1)
    write_page(folder / "index.html", config.title, lead, config.caveat, sections, facts, settings)
    write_whole(folder / "report.md", _markdown(config.title, lead, config.caveat, sections, facts).encode())


def _section(results: Results, study: str, folder: Path) -> Section:
    section = Section(study, TITLES[study], [TEXTS[study]])
    if study == "table4":
        if results.costs is None:
            section.text.append("Not measured yet.")
            return section
        table = cost_table(results)
        section.tables.append(table)
        write_whole(folder / "table4.csv", _cost_csv(results).encode())
        return section
    if study in SCREENS:
        section.tables += screen_tables(results, study)
        write_whole(folder / f"{study}.csv", screen_csv(results, study).encode())
        section.pictures += _fronts(results, study, folder)
        return section
    methods = results.config.members(study)
    if study == "start":
        section.tables.append(start_table(results))
    else:
        section.tables += [method_table(results, study, TITLES[study], methods), change_table(results, study, methods)]
        section.details += [detail_table(results, study, each, methods) for each in results.config.datasets]
    write_whole(folder / f"{study}.csv", as_csv(results, methods).encode())
    section.pictures += _pictures(results, study, methods, folder)
    return section


def _pictures(results: Results, study: str, methods: Sequence[str], folder: Path) -> list[Picture]:
    pictures = []
    if study == "figure4":
        pictures += _figure4(results, folder)
    if study == "start":
        pictures += _starts(results, folder)
    for dataset in results.config.datasets:
        panels = _curves(results, dataset, methods)
        if panels:
            caption = (
                f"{results.dataset_title(dataset)}: error on validation volumes, mean over seeds with its interval"
                f"{', and training loss of the first seed (smoothed)' if len(panels) > 1 else ''}."
            )
            pictures.append(_chart(folder / f"{study}-curves-{dataset}.png", caption, panels))
    return pictures if study == "start" else [*pictures, *_montage(results, study, methods, folder)]


def _starts(results: Results, folder: Path) -> list[Picture]:
    panels = start_panels(results)
    if not any(len(line.y) for panel in panels for line in panel.lines):
        return []
    caption = "Change of the error on test volumes by the size of the start; bands are intervals over seeds."
    return [_chart(folder / "start-sizes.png", caption, panels)]


def _fronts(results: Results, study: str, folder: Path) -> list[Picture]:
    panels = screen_panels(results, study)
    if not panels:
        return []
    caption = (
        "Change of the error by parameters and by time, one seed: a dot for each spec and budget, a colour for each "
        "budget, and on the line what no other beats in both."
    )
    return [_chart(folder / f"{study}-front.png", caption, panels)]


def _chart(path: Path, caption: str, panels: Sequence[Panel], share: bool = False) -> Picture:
    """A chart for light screens as a file, and for dark and narrow ones as bytes."""

    def drawn(theme: Theme, narrow: bool = False) -> bytes:
        return _png(lambda place: plot_panels(place, panels, theme, share, narrow))

    write_whole(path, drawn(LIGHT_THEME))
    return Picture(path, caption, drawn(DARK_THEME), drawn(LIGHT_THEME, True), drawn(DARK_THEME, True))


def _png(draw: Callable[[Path], None]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder) / "picture.png")
        return (Path(folder) / "picture.png").read_bytes()


def _curves(results: Results, dataset: str, methods: Sequence[str]) -> list[Panel]:
    """Errors on validation volumes over the steps, which rows have too, and the losses of runs that are in OUT."""
    errors, losses = [], []
    for colour, method in enumerate(methods):
        summaries = results.result(method, dataset).summaries
        curves = [points for seed in sorted(summaries) if (points := _error_curve(summaries[seed]))]
        if not curves:
            continue
        name, by_step = results.title(method), [dict(curve) for curve in curves]
        steps = [step for step, _ in curves[0] if all(step in each for each in by_step)]
        cells = [
            Cell(tuple(Value(seed, each[step]) for seed, each in enumerate(by_step)), results.confidence)
            for step in steps
        ]
        errors.append(
            Line(name, steps, [cell.mean for cell in cells], [cell.half or 0.0 for cell in cells], colour=colour)
        )
        history = summaries[min(summaries)]["history"]
        if "losses" in history:  # not of a row
            losses.append(smoothed(name, history["losses"], colour))
    panels = [Panel("Error on validation volumes", "optimiser step", errors, marks=True)] if errors else []
    if losses:
        panels.insert(0, Panel("Training loss", "optimiser step", losses, log=True, labels=False))
    return panels


def _error_curve(summary: dict[str, Any]) -> list[tuple[int, float]]:
    """The error on validation volumes before, on the way and after, with the steps."""
    history, run = summary["history"], summary["run"]
    points = [(0, run["held_out_error_before"]), *((step, mean) for step, mean, _ in history["validation"])]
    return [*points, (run["steps"], run["held_out_error_after"])]


def _figure4(results: Results, folder: Path) -> list[Picture]:
    """Parameters by rank, and MS-SSIM by rank on each data set."""
    figure = results.config.figure4
    sizes = []
    for colour, name in enumerate(figure.methods):
        points = [(rank, results.parameters(results.config.ranked(name, rank))) for rank in figure.ranks]
        known = [(rank, found[0] / 1e6) for rank, found in points if found is not None]
        sizes.append(Line(results.title(name), [x for x, _ in known], [y for _, y in known], colour=colour))
    pictures = []
    if any(len(line.y) for line in sizes):
        panel = Panel("Parameters that train, in millions", "rank", sizes, marks=True, ticks=figure.ranks, zero=True)
        caption = "Figure 4 (a). The number of parameters that train, by rank."
        pictures.append(_chart(folder / "figure4-parameters.png", caption, [panel]))
    panels = [_ssim_panel(results, dataset) for dataset in results.config.datasets]
    if any(len(line.y) for panel in panels for line in panel.lines):
        caption = (
            "Figure 4 (b). MS-SSIM of samples with the data set's volumes, by rank; bands are intervals over seeds."
        )
        pictures.append(_chart(folder / "figure4-ms-ssim.png", caption, panels, share=True))
    return pictures


def _ssim_panel(results: Results, dataset: str) -> Panel:
    figure, lines = results.config.figure4, []
    for colour, name in enumerate(figure.methods):
        found = [
            (rank, results.result(results.config.ranked(name, rank), dataset).cell(SSIM, results.confidence))
            for rank in figure.ranks
        ]
        known = [(rank, cell) for rank, cell in found if cell is not None]
        halves = [cell.half or 0.0 for _, cell in known]
        ranks, means = [rank for rank, _ in known], [cell.mean for _, cell in known]
        lines.append(Line(results.title(name), ranks, means, halves, colour=colour))
    return Panel(f"MS-SSIM, {results.dataset_title(dataset)}", "rank", lines, marks=True, ticks=figure.ranks)


def _montage(results: Results, study: str, methods: Sequence[str], folder: Path) -> list[Picture]:
    """Held-out volumes, samples of the base and of each method, from the same noise."""
    low, high = results.config.data.intensity
    volumes: dict[tuple[str, str], list[np.ndarray]] = {}
    rows = [
        (f"Target ({results.source})", None),
        (results.title(BASE), BASE),
        *((results.title(method), method) for method in methods),
    ]
    columns = [results.dataset_title(dataset) for dataset in results.config.datasets]
    for dataset, column in zip(results.config.datasets, columns, strict=True):
        for row, method in rows:
            files = _files(results, dataset, method)[:COLUMNS]
            volumes[row, column] = [(_volume(file) - low) / (high - low) for file in files]
    rows = [(row, method) for row, method in rows if any(volumes[row, column] for column in columns)]
    if len(rows) < 2:
        return []
    path = folder / f"{study}-montage.png"
    names = [row for row, _ in rows]
    spacing = grid_of(results.config.data, divisor(results.config.model)).spacing

    def drawn(narrow: bool) -> bytes:
        return _png(lambda place: plot_montage_page(place, names, columns, volumes, spacing, narrow))

    write_whole(path, drawn(False))
    caption = f"{CONVENTION} Samples in one column start from the same noise, with whatever method."
    return [Picture(path, caption, narrow=drawn(True))]


def _files(results: Results, dataset: str, method: str | None) -> list[Path]:
    if method is None:
        return sorted((results.out / "data" / dataset / "real").glob("*.nii.gz"))
    folders = results.result(method, dataset).folders
    return sorted(folders[min(folders)].glob("samples/*/sample-*.nii.gz")) if folders else []


def _volume(path: Path) -> np.ndarray:
    try:
        return np.asarray(nibabel.as_closest_canonical(nibabel.load(path)).get_fdata(dtype=np.float32))
    except (ImageFileError, OSError, EOFError, ValueError, zlib.error) as error:
        fix = "Remove it and the run's run.json; `study` then draws it again."
        raise fault(path, "a sample", "a NIfTI file", reason(error), fix) from None


def _cost_csv(results: Results) -> str:
    assert results.costs is not None
    lines = ["size,shape,method,parameters,inference,training,memory,inference_seconds,training_seconds,memory_bytes"]
    for name, size in results.costs["sizes"].items():
        shape = "x".join(map(str, size["shape"]))
        for method, each in size["methods"].items():
            ratios = (each["inference"]["value"], each["training"]["value"], each["memory"])
            absolute = (each["inference_seconds"], each["training_seconds"], each["memory_bytes"])
            numbers = ",".join(map(str, (each["trainable_parameters"], *ratios, *absolute)))
            lines.append(f"{name},{shape},{method},{numbers}")
    return "\n".join(lines) + "\n"


def _lead(results: Results) -> str:
    config = results.config
    known = [found for name in config.methods if (found := results.parameters(name)) is not None]
    model = f"A model of {millions(known[0][1])} parameters; " if known else ""
    seeds = f"{len(config.seeds)} seed{'s' if len(config.seeds) > 1 else ''}"
    methods = {name for study in results.studies for name in config.members(study)}
    datasets = f"{len(config.datasets)} data sets, " if config.datasets else ""
    return f"{model}{len(methods)} methods, {datasets}{seeds}."


def _facts(results: Results) -> list[tuple[str, str]]:
    record, config = results.record, results.config
    machine: dict[str, Any] = record.get("machine", {})
    versions: dict[str, str] = record.get("versions", {})
    training = config.training
    length = f"{training.steps} steps" if training.steps is not None else f"{training.epochs} epochs"
    volumes = [
        ("Training", f"{length} of {training.batch_size} x {training.accumulation} volumes, {training.loss}"),
        ("Prediction", config.diffusion.prediction),
        ("Sampling", f"{config.sampling.count} volumes, {config.sampling.scheduler}, {config.sampling.steps} steps"),
    ]
    facts = [
        ("Machine", f"{machine.get('device', 'unknown')}, {machine.get('processor', 'unknown')}"),
        ("Threads", str(training.threads or machine.get("threads", "unknown"))),
        *(volumes if config.datasets else []),
        ("Seeds", ", ".join(map(str, config.seeds))),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("Source revision", str(record.get("revision") or "unknown")),
    ]
    seconds = [outcome for outcome in results.seconds.values() if outcome]
    if seconds:
        facts.insert(2, ("Time", f"{sum(seconds) / 60:.0f} min for {len(seconds)} runs"))
    return facts


def _markdown(title: str, lead: str, caveat: str, sections: Sequence[Section], facts: Sequence[tuple[str, str]]) -> str:
    parts = [f"# {title}", lead, *([f"> {caveat}"] if caveat else [])]
    for section in sections:
        parts += [f"## {section.title}", *section.text]
        parts += [as_markdown(table) for table in section.tables]
        parts += [f"![{picture.caption}]({picture.path.name})\n\n{picture.caption}" for picture in section.pictures]
    parts += ["## Setup", "\n".join(f"- {name}: {value}" for name, value in facts)]
    return "\n\n".join(part.strip() for part in parts) + "\n"
