"""`sample`: volumes of a base and of any number of adapters over it, as NIfTI files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

import tnpeft
from ddpm_lab.config.settings import Config, Data
from ddpm_lab.data.grid import Grid, grid_of, write_volume
from ddpm_lab.model.accelerator import make_accelerator
from ddpm_lab.model.unet import build_unet, divisor, load_base
from ddpm_lab.sampling.draw import check_sampling, draw_batches
from ddpm_lab.sampling.sample_sets import SampleSet
from ddpm_lab.sampling.variants import Variant, find_variants
from ddpm_lab.support.console import Screen
from ddpm_lab.support.durable import digest_of_file
from ddpm_lab.support.faults import fault
from ddpm_lab.support.folders import make_folder
from ddpm_lab.support.locks import alone_in_out
from ddpm_lab.support.record import write_record
from tnpeft.documents.paths import resolved

__all__ = ["sample_volumes"]


@alone_in_out("sample")
def sample_volumes(config: Config, out: Path, screen: Screen) -> dict[str, Path]:
    """Draw what is missing in OUT/samples; returns the folder of each set by its name.

    Several processes share the volumes by number. A set that an earlier run began goes on; samples of other settings
    in its folder are refused. Raises TnpeftError, before the first volume wherever that is possible.
    """
    if config.sampling.count == 0:
        raise fault("sampling.count", "the number of samples", "at least 1", "0", "Pass `--set sampling.count=8`.")
    check_sampling(config.diffusion, config.sampling)
    _check_apart(config.data, out)
    variants = find_variants(config, out)
    unet = build_unet(config.model, config.base)
    if config.base.checkpoint is not None:
        load_base(unet, config.base, screen.line)
    accelerator = make_accelerator(config.training)
    unet.to(accelerator.device)
    for variant in variants:
        _check(variant, unet, config)
    grid = grid_of(config.data, divisor(config.model))
    base = digest_of_file(config.base.checkpoint) if config.base.checkpoint is not None else None
    tasks = [_task(variant, config, out, grid, base, _precision(accelerator)) for variant in variants]
    make_folder(out)
    accelerator.wait_for_everyone()  # every process has seen the same folders
    if accelerator.is_main_process:
        write_record(out, "sample", config, processes=accelerator.num_processes)
        for task in tasks:
            task.write_record(config.sampling.count)
    accelerator.wait_for_everyone()
    for task in tasks:
        _draw(task, unet, config, accelerator, screen)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for task in tasks:
            for waste in (*task.samples.folder.glob(".*.tmp"), *task.samples.folder.glob("*.part")):
                waste.unlink(missing_ok=True)  # what a run that was killed left half-written
    screen.line(f"Samples in {out / 'samples'}: {', '.join(task.samples.name for task in tasks)}; {_size(grid)}")
    return {task.samples.name: task.samples.folder for task in tasks}


@dataclass(frozen=True)
class Task:
    """One set of samples: the model they come from, where they go, and what they depend on."""

    variant: Variant
    samples: SampleSet
    grid: Grid
    settings: dict[str, Any]
    about: dict[str, Any]

    def write_record(self, count: int) -> None:
        self.samples.write_record(count, self.settings, self.about)


def _check_apart(data: Data, out: Path) -> None:
    """Raise LabError where `plain` would find the samples among the data, and later runs take them for real."""
    if data.root is None or data.manifest is not None or data.layout != "plain":
        return
    if resolved(out).is_relative_to(resolved(data.root)):
        fix = "Choose another `--out`, or list the data with `prepare`."
        raise fault(out, "the folder of samples", "one outside of `data.root`", f"one inside of {data.root}", fix)


def _check(variant: Variant, unet: nn.Module, config: Config) -> None:
    """Raise TnpeftError for a file that does not fit: each is put on the network and taken off once."""
    if config.base.checkpoint is None and not variant.stands_alone(unet):
        fix = "Pass `--set base.checkpoint=FILE`, the one that it was trained on."
        raise fault("base.checkpoint", f"the base of {variant.path}", "a pretrained model's checkpoint", "nothing", fix)
    with variant.on(unet):
        pass


def _task(variant: Variant, config: Config, out: Path, grid: Grid, base: str | None, precision: str) -> Task:
    """A set's settings: all that changes a volume beyond rounding. Raises LabError where the folder holds others."""
    sampling = config.sampling
    digest = digest_of_file(variant.path) if variant.path is not None else None
    settings: dict[str, Any] = {
        "sampling.scheduler": sampling.scheduler,
        "sampling.steps": sampling.steps,
        "sampling.seed": sampling.seed,
        "sampling.merge": sampling.merge if variant.is_adapter else False,
        "base.sha256": base,
        "adapter.sha256": digest,
        "shape": list(grid.shape),
        "spacing": list(grid.spacing),
        "data.intensity": list(config.data.intensity),
        "precision": precision,
    }
    for section in ("model", "diffusion"):
        settings |= {f"{section}.{name}": value for name, value in _values(config, section)}
    samples = SampleSet(out / "samples" / variant.name)
    samples.check(settings)
    about = {
        "base": str(config.base.checkpoint) if config.base.checkpoint is not None else None,
        "adapter": str(variant.path) if variant.path is not None else None,
        "spacing_from": grid.source,
        "tnpeft": tnpeft.__version__,
    }
    return Task(variant, samples, grid, settings, about)


def _values(config: Config, section: str) -> list[tuple[str, Any]]:
    """A section's settings but for those that change how a model runs and not what it computes."""
    values = getattr(config, section).model_dump(mode="json")
    return [(name, value) for name, value in values.items() if name not in ("flash_attention", "checkpointing")]


def _draw(task: Task, unet: nn.Module, config: Config, accelerator: Accelerator, screen: Screen) -> None:
    """Draw this process's share of a set and write each batch when it is done."""
    sampling, samples = config.sampling, task.samples
    own = range(accelerator.process_index, sampling.count, accelerator.num_processes)
    missing = samples.missing(own)
    if len(missing) < len(own):
        screen.line(f"{samples.name}: {len(own) - len(missing)} of {len(own)} volumes are there from an earlier run")
    if not missing:
        return
    title = f"sample {samples.name}"
    with (
        task.variant.on(unet, sampling.merge),
        screen.bar(title, len(missing) * sampling.steps) as bar,
        accelerator.autocast(),
    ):
        batches = draw_batches(
            unet, missing, task.grid.shape, config.diffusion, sampling, config.data, accelerator.device, bar
        )
        for numbers, volumes in batches:
            _write(task, config, numbers, volumes)


def _write(task: Task, config: Config, numbers: Sequence[int], volumes: Any) -> None:
    sampling = config.sampling
    for number, volume in zip(numbers, volumes, strict=True):
        about = f"synthetic: {sampling.scheduler} {sampling.steps}, seed {sampling.seed}, {number}, {task.variant.name}"
        write_volume(task.samples.path(number), volume, task.grid, config.data.intensity, about)


def _precision(accelerator: Accelerator) -> str:
    return "fp32" if accelerator.mixed_precision == "no" else str(accelerator.mixed_precision)


def _size(grid: Grid) -> str:
    shape, spacing = ("x".join(f"{value:g}" for value in values) for values in (grid.shape, grid.spacing))
    return f"{shape} voxels of {spacing} mm ({grid.source})"
