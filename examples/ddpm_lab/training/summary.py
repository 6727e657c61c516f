"""What a run found, as data for `summary.json` and as tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch.utils.data import ConcatDataset, Subset

from ddpm_lab.config.settings import Config
from ddpm_lab.evaluation.distances import TITLES, Measured, distances
from ddpm_lab.evaluation.encoder import Encoder
from ddpm_lab.evaluation.metrics import ssim_scales
from ddpm_lab.support.record import machine, revision, versions
from ddpm_lab.training.finetune import Run, Setup

__all__ = [
    "describe_run",
    "describe_samples",
    "describe_setup",
    "error_table",
    "headline",
    "sample_table",
    "time_line",
]

SampleData = dict[str, Any]
Volumes = Sequence[torch.Tensor] | torch.Tensor  # a dataset, or (N, 1, D, H, W)


def describe_setup(setup: Setup) -> dict[str, Any]:
    """The data, the machine and the versions behind the numbers."""
    split = setup.volumes.split
    return {
        "data": {
            "root": str(setup.config.data.root),
            "train": len(split.train),
            "validation": len(split.validation),
            **({"test": len(split.test)} if split.test else {}),
            **({"unseen": len(split.unseen)} if split.unseen else {}),
            "shape": list(setup.volumes.shape),
        },
        "machine": {
            **machine(),
            "processes": setup.accelerator.num_processes,
            "precision": {"no": "fp32"}.get(setup.accelerator.mixed_precision, setup.accelerator.mixed_precision),
        },
        "versions": versions(),
        "revision": revision(),
        "config": setup.config.model_dump(mode="json"),
    }


def describe_run(run: Run) -> dict[str, Any]:
    """One trained method: its size, its errors and its speed.

    `by_volume` has the errors of every held-out volume before and after, in the order of `split.json`.
    """
    steps = len(run.history.losses)
    pairs = {"validation": (run.before, run.after), **run.tested}
    tested: dict[str, Any] = {}
    for part, (before, after) in run.tested.items():
        tested |= {f"{part}_error_before": before.mean, f"{part}_error_after": after.mean}
        tested |= {f"{part}_change_percent": after.change(before)}
    return {
        "method": run.trained.title,
        "trainable_parameters": run.trained.parameters,
        "base_parameters": run.trained.total,
        "steps": steps,
        "held_out_error_before": run.before.mean,
        "held_out_error_after": run.after.mean,
        "change_percent": run.change,
        **tested,
        "by_timestep_before": list(run.before.buckets),
        "by_timestep_after": list(run.after.buckets),
        "by_volume": {
            name: {"before": list(before.volumes), "after": list(after.volumes)}
            for name, (before, after) in pairs.items()
        },
        "start_difference": run.start_difference,
        "training_seconds": run.history.seconds,
        "seconds_per_step": run.history.seconds / max(1, steps),
        "left_out": dict(run.history.damaged),
    }


def describe_samples(setup: Setup, samples: Mapping[str, torch.Tensor]) -> SampleData:
    """FID, MMD and MS-SSIM of each set of samples against real volumes, and of held-out against training volumes.

    The last is what a perfect generator would show with as few volumes.
    """
    most = setup.config.metrics.most
    chosen = setup.volumes.test if setup.config.metrics.reference == "test" else setup.volumes.validation
    held_out, train = (_some(volumes, most) for volumes in (chosen, setup.volumes.train))
    both = setup.config.metrics.reference == "all"
    reference: Volumes = _some(ConcatDataset([held_out, train]), most) if both else held_out
    sets: dict[str, tuple[Volumes, Volumes]] = {name: (volumes, reference) for name, volumes in samples.items()}
    sets["real, held out"] = (held_out, train)
    return {
        "count": setup.config.sampling.count,
        "reference": f"{len(reference)} real volumes" + ("" if both else ", held out"),
        "encoder": setup.encoder.note,
        "encoder_mark": setup.encoder.mark,
        "ms_ssim": ssim_scales(setup.volumes.shape).note,
        "sets": {name: _distances(setup, one, other) for name, (one, other) in sets.items()},
    }


def _some(volumes: Any, most: int) -> Any:
    """A dataset, or `most` of its volumes evenly chosen."""
    if len(volumes) <= most:
        return volumes
    return Subset(volumes, [int(index) for index in torch.linspace(0, len(volumes) - 1, most).tolist()])


def _distances(setup: Setup, one: Volumes, other: Volumes) -> dict[str, float | None]:
    """The distances alone: `evaluate` adds intervals."""
    encoder: Encoder = setup.encoder
    device = setup.accelerator.device
    first, second = (Measured(volumes, encoder.features(volumes, device)) for volumes in (one, other))
    low, high = setup.config.data.intensity
    metrics = setup.config.metrics.model_copy(update={"resamples": 0})
    found = distances(first, second, high - low, metrics, device)
    return {key: each.value for key, each in found.items()}


def error_table(runs: Mapping[str, Mapping[str, Any]]) -> Table:
    """Held-out errors before and after, a row for each run."""
    table = Table(title="Error on held-out target volumes", title_justify="left", title_style="bold")
    table.add_column("run", no_wrap=True)
    for name in ("trains", "of base", "before", "after", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, run in runs.items():
        share = run["trainable_parameters"] / run["base_parameters"]
        table.add_row(
            name,
            f"{run['trainable_parameters']:,}",
            f"{share:.2%}",
            f"{run['held_out_error_before']:.5f}",
            f"{run['held_out_error_after']:.5f}",
            f"{run['change_percent']:+.1f} %",
        )
    return table


def sample_table(samples: SampleData) -> RenderableType:
    """Distances of samples to real volumes, with what the labels leave out as notes."""
    mark = samples["encoder_mark"]
    table = Table(title=f"{samples['count']} samples against {samples['reference']}", title_justify="left")
    table.title_style = "bold"
    table.add_column("volumes", no_wrap=True)
    for title in TITLES.values():
        table.add_column(title.replace("*", mark), justify="right")
    for title, values in samples["sets"].items():
        table.add_row(title, *("-" if values[key] is None else f"{values[key]:.4g}" for key in TITLES))
    note = (
        f"FID and MMD: lower is better, {samples['encoder']}. MS-SSIM: higher is better, {samples['ms_ssim']}. "
        "The last row compares held-out with training volumes."
    )
    return Group(table, Text(note, style="dim"))


def time_line(seconds: Mapping[str, float], total: float) -> str:
    """Where the time went, the longest phases first."""
    parts = sorted(seconds.items(), key=lambda item: -item[1])
    return f"{total:.0f} s in all; the longest: " + ", ".join(f"{name} {value:.0f} s" for name, value in parts[:5])


def headline(config: Config, shape: tuple[int, ...]) -> str:
    """The run in one line, for pictures."""
    sampling = config.sampling
    size = "x".join(str(side) for side in shape)
    return f"{sampling.scheduler.upper()}, {sampling.steps} steps, {size} voxels"
