"""`evaluate`: how far the samples in OUT are from real volumes, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ddpm_lab.config.settings import Config
from ddpm_lab.data.files import find_volumes
from ddpm_lab.data.grid import read_volume
from ddpm_lab.evaluation.distances import KERNELS, TITLES, Measured, distances
from ddpm_lab.evaluation.encoder import load_encoder
from ddpm_lab.evaluation.metrics import ssim_scales
from ddpm_lab.evaluation.real_volumes import Files, RealVolumes, times
from ddpm_lab.model.accelerator import make_accelerator
from ddpm_lab.sampling.sample_sets import find_sample_sets
from ddpm_lab.sampling.variants import BASE, name_of
from ddpm_lab.support.console import Screen
from ddpm_lab.support.durable import write_json
from ddpm_lab.support.faults import fault
from ddpm_lab.support.folders import make_folder
from ddpm_lab.support.locks import alone_in_out
from ddpm_lab.support.record import write_record
from tnpeft.errors import Problem

__all__ = ["REAL", "evaluate_samples", "evaluation_table"]

REAL = "real, held out"  # the row that compares held-out with training volumes


@alone_in_out("evaluate")
def evaluate_samples(config: Config, out: Path, screen: Screen) -> dict[str, Any] | None:
    """Measure sets in OUT/samples and write OUT/evaluation.json; None in all processes but the first.

    Measured are those of `sampling.adapters`, beside the base where it is asked for; without a list all that are there.
    Raises LabError for samples that are missing, unfinished, damaged or of another size, and for the data; real
    volumes that are damaged are left out, and listed, with `data.skip_damaged`.
    """
    sets = {each.name: each.paths() for each in find_sample_sets(out, _names(config))}
    paths = find_volumes(config.data, changed_too=config.data.skip_damaged)
    encoder = load_encoder(config.metrics)
    accelerator = make_accelerator(config.training)
    if not accelerator.is_main_process:
        return None
    make_folder(out)
    real = RealVolumes(config, out / "cache", paths, screen)
    scales = ssim_scales(real.shape)
    samples = {name: _samples(files, real) for name, files in sets.items()}
    real.encode(encoder, accelerator, screen)
    reference = real.reference()
    low, high = config.data.intensity
    found = {}
    with screen.bar("metrics", len(sets) + 1) as bar:
        for done, (name, volumes) in enumerate(samples.items(), 1):
            measured = Measured(volumes, encoder.features(volumes, accelerator.device))
            found[name] = distances(measured, reference, high - low, config.metrics, accelerator.device)
            bar(done, name)
        held_out, train = real.measured(real.held_out), real.measured(real.train)
        found[REAL] = distances(held_out, train, high - low, config.metrics, accelerator.device)
        bar(len(sets) + 1)
    evaluation = {
        "encoder": encoder.note,
        "encoder_mark": encoder.mark,
        "encoder_digest": encoder.digest,
        "ms_ssim": scales.note,
        "reference": f"{len(reference)} real volumes" + (", held out" if config.metrics.reference != "all" else ""),
        "kernels": KERNELS,
        "resamples": config.metrics.resamples,
        "confidence": config.metrics.confidence,
        "left_out": {str(path): _why(problem) for path, problem in real.left_out.items()},
        "counts": {**{name: len(files) for name, files in sets.items()}, REAL: len(held_out)},
        "sets": {name: {key: each.as_data() for key, each in row.items()} for name, row in found.items()},
    }
    write_json(out / "evaluation.json", evaluation)
    for path, problem in real.left_out.items():
        screen.line(f"Left out {path}: {_why(problem)}")
    write_record(out, "evaluate", config)
    screen.console.print(evaluation_table(evaluation))
    return evaluation


def _why(problem: Problem) -> str:
    return f"{problem.what}: expected {problem.expected}, found {problem.found}"


def _names(config: Config) -> list[str]:
    """The sets that the settings ask for; none where they leave it open."""
    if not config.sampling.adapters:
        return []
    base = [BASE] if config.sampling.base and config.base.checkpoint is not None else []
    return [*base, *(name_of(path) for path in config.sampling.adapters)]


def _samples(paths: Sequence[Path], real: RealVolumes) -> Files:
    """The volumes of a set, each read once here to find what is damaged or of another size."""
    for path in paths:
        shape = tuple(read_volume(path).shape[1:])
        if shape != real.shape:
            expected, fix = f"{times(real.shape)}, as the real volumes", "Evaluate with the `data` of `sample`."
            raise fault(path, "a sample of another size", expected, times(shape), fix)
    return Files(paths, read_volume)


def evaluation_table(evaluation: dict[str, Any]) -> RenderableType:
    """Distances with their intervals, a row for each set, and what the labels leave out as notes."""
    mark = evaluation["encoder_mark"]
    table = Table(title=f"Samples against {evaluation['reference']}", title_justify="left", title_style="bold")
    table.add_column("volumes", no_wrap=True)
    table.add_column("number", justify="right")
    for title in TITLES.values():
        table.add_column(title.replace("*", mark), justify="right")
    for name, row in evaluation["sets"].items():
        table.add_row(Text(name), str(evaluation["counts"][name]), *(_cell(row[key]) for key in TITLES))
    intervals = (
        f"In brackets: {100 * evaluation['confidence']:g} % intervals, from {evaluation['resamples']} resamples. "
    )
    note = (
        f"FID and the three MMDs: lower is better, {evaluation['encoder']}. "
        "The MMDs are squared and unbiased: of sets that are alike they are as often below zero as above. "
        f"MS-SSIM: higher is better, {evaluation['ms_ssim']}. "
        f"{intervals if evaluation['resamples'] else ''}The last row compares held-out with training volumes."
    )
    return Group(table, Text(note, style="dim"))


def _cell(value: dict[str, float | None]) -> str:
    if value["value"] is None:
        return "-"
    if value["low"] is None:
        return f"{value['value']:.4g}"
    return f"{value['value']:.4g}\n({value['low']:.3g}, {value['high']:.3g})"
