"""What can be wrong with a study beside its own settings: looked at before anything is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from ddpm_lab.config.settings import Data, Training
from ddpm_lab.data.anatomies import find_template
from ddpm_lab.data.files import find_volumes, held_out_counts, rooted, split_volumes
from ddpm_lab.data.manifest import read_manifest
from ddpm_lab.data.volumes import check_sizes
from ddpm_lab.evaluation.encoder import load_encoder
from ddpm_lab.model.accelerator import make_accelerator
from ddpm_lab.model.method import check_fit
from ddpm_lab.model.unet import build_unet, divisor, load_base
from ddpm_lab.study.settings import DataSet, Made, StudyConfig
from ddpm_lab.support.faults import LabError, fault
from ddpm_lab.training.train import steps_of
from tnpeft import TnpeftError
from tnpeft.documents.paths import is_file
from tnpeft.errors import Problem

__all__ = ["check_inputs", "inside"]


@contextmanager
def inside(section: str) -> Iterator[None]:
    """Say of a mistake that it is this section's."""
    try:
        yield
    except TnpeftError as error:
        raise LabError(*(_placed(section, problem) for problem in error.problems)) from None


def _placed(section: str, problem: Problem) -> Problem:
    where = problem.where
    if not isinstance(where, str):
        return replace(problem, where=where or section)
    return replace(problem, where=where if Path(where).is_absolute() else f"{section}.{where}")


def check_inputs(name: str, config: StudyConfig, out: Path) -> None:
    """Raise TnpeftError for a base, a method, a precision or data that a run of this study could not work with."""
    members = config.members(name)
    build_unet(config.model, config.base)
    for method in members:
        with inside(f"methods.{method}"):
            check_fit(config.model, config.base, config.methods[method].method)
            make_accelerator(config.training_of(method, config.seeds[0]))
    if name == "table4":
        for size, shape in config.cost.shapes.items():
            _check_shape(shape, f"cost.shapes.{size}", config)
        return
    load_encoder(config.metrics)
    if config.metrics.reference != "test":
        fix = "Write `metrics: {reference: test}`."
        expected = "those to test on, which nothing else sees"
        raise fault("metrics.reference", "the volumes of a study's tables", expected, config.metrics.reference, fix)
    trainings = [config.training_of(method, config.seeds[0]) for method in members]
    for each, about in config.datasets.items():
        with inside(f"datasets.{each}"):
            _check_data(about, trainings, config)
            _check_tested(config.data_of(about))
    _check_base(config, pretrained=is_file(out / "base" / "model.safetensors"))


def _check_base(config: StudyConfig, pretrained: bool) -> None:
    """A checkpoint that fits, or data and settings to pretrain with."""
    if config.base.checkpoint is not None:
        load_base(build_unet(config.model, config.base), config.base)
        return
    if config.pretraining is None:
        fix = "Pass `--set base.checkpoint=FILE`, or give `source` and `pretraining`."
        raise fault("base.checkpoint", "the base", "a checkpoint, or `pretraining`", "neither", fix)
    with inside("pretraining"):
        steps_of(config.pretraining, 1)
        make_accelerator(config.pretraining)
    if pretrained:  # by an earlier command: its data may have gone since
        return
    with inside("source"):
        _check_data(config.pretrained_on, [config.pretraining], config)


def _check_data(dataset: DataSet, trainings: Sequence[Training], config: StudyConfig) -> None:
    """Enough volumes for a batch, of a size that the network can take; files are counted, not read."""
    data = config.data_of(dataset)
    shape = _known_shape(data)
    if shape is not None:
        _check_shape(shape, "data.resize" if data.resize else "data.crop", config)
    if dataset.made is not None:
        _check_anatomies(dataset.made, data, config)
        if shape is None and data.spacing is None:
            _check_shape((dataset.made.side,) * 3, "made.side", config)
        files, held_out = dataset.made.count, sum(held_out_counts(dataset.made.count, data))
        fix, where = "Lower `training.batch_size` or raise `made.count`.", "made.count"
    else:
        data = rooted(data)
        paths = find_volumes(data)
        files = len(paths)
        held_out = files - len(split_volumes(paths, data).train)
        fix, where = "Lower `training.batch_size` or add files.", "data"
    needed = max(training.batch_size for training in trainings)
    if files - held_out < needed:
        found = f"{files - held_out} of {files} after holding {held_out} out"
        raise fault(where, "files to train on", f"at least {needed}, one batch", found, fix)


def _check_anatomies(made: Made, data: Data, config: StudyConfig) -> None:
    """Templates that are there, and subjects enough that each anatomy is among those that are held out."""
    for anatomy in (*made.anatomies, *made.held_out):
        find_template(anatomy, config.templates)
    smallest = min(count for count in held_out_counts(made.count, data) if count)
    if smallest < len(made.anatomies):
        expected, fix = f"at least {len(made.anatomies)}, one of each anatomy", "Raise `made.count` or the shares."
        raise fault("made.count", "subjects to validate or test on", expected, str(smallest), fix)


def _check_tested(data: Data) -> None:
    """Subjects that tables report on: rates are chosen on others."""
    if data.manifest is not None:
        there, found = bool(read_manifest(data).test), f"none in {data.manifest}"
        fix = "Run `prepare` again with `--set data.test_share=0.2`."
    else:
        there, found, fix = data.test_share > 0, "`test_share` 0", "Write `data: {test_share: 0.2}`."
    if not there:
        raise fault("data.test_share", "subjects to test on", "some", found, fix)


def _known_shape(data: Data) -> tuple[int, ...] | None:
    """The size of a volume after its transforms, where the settings alone tell it."""
    return data.resize or (None if data.paper_order and data.spacing else data.crop)


def _check_shape(shape: Sequence[int], where: str, config: StudyConfig) -> None:
    check_sizes([torch.empty((1, *shape), device="meta")], [Path(where)], divisor(config.model))
