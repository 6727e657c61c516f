"""What the runs of a study share: the data sets, indexed once, and the pretrained base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

from ddpm_lab.config.settings import Base, Config, Method, Sampling, Training
from ddpm_lab.data.anatomies import tissues_of
from ddpm_lab.data.manifest import read_manifest, root_of
from ddpm_lab.data.population import write_population
from ddpm_lab.data.prepare import prepare_data
from ddpm_lab.data.volumes import transforms
from ddpm_lab.study.run import Outcome, digest, made_of, refuse_others
from ddpm_lab.study.settings import DataSet, Made, StudyConfig
from ddpm_lab.support.console import Screen
from ddpm_lab.support.durable import digest_of_file, read_json, write_json, writing
from ddpm_lab.support.folders import make_folder
from ddpm_lab.support.locks import alone
from ddpm_lab.training.driver import pretrain

__all__ = ["base_of", "described", "identity", "settled"]

PREVIEWS = 4  # real volumes kept as the model sees them, for the report's montage


def described(config: StudyConfig, dataset: DataSet) -> dict[str, Any]:
    """How the subjects of a data set are made, if they are, and what becomes of a volume; not where files lie."""
    where = {"cache", "checksums", "root", "manifest", "keep"}
    where |= {"strata", "unseen"} if dataset.made is not None else set()  # as `made` has them
    data = config.data_of(dataset).model_dump(mode="json", exclude=where)
    return data if dataset.made is None else {"made": dataset.made.model_dump(mode="json"), **data}


def _wanted(config: StudyConfig, dataset: DataSet) -> dict[str, Any]:
    """What the manifest that was made depends on."""
    data = config.data_of(dataset)
    files = {} if dataset.made is not None else data.model_dump(mode="json", include={"root", "keep"})
    return {**described(config, dataset), **files}


def identity(config: StudyConfig, dataset: DataSet) -> dict[str, Any]:
    """What a result on a settled data set depends on: its files and their split, wherever they lie.

    Of made subjects the names suffice, whose bytes other machines may round otherwise.
    """
    data = config.data_of(dataset)
    manifest = read_manifest(data)
    made = dataset.made is not None
    parts = {"train": manifest.train, "validation": manifest.validation, "test": manifest.test}
    parts |= {"unseen": manifest.unseen} if manifest.unseen else {}
    split = {
        name: [entry.path if made else [entry.path, entry.sha256] for entry in entries]
        for name, entries in parts.items()
    }
    return {**described(config, dataset), "split": digest(split)}


def settled(name: str, config: StudyConfig, dataset: DataSet, out: Path, screen: Screen) -> DataSet:
    """The data set with its manifest, which is made unless it is given or an earlier command made it."""
    folder = out / "data" / name
    with alone(folder / "lock", wait=True):
        own: dict[str, Any] = {}
        if dataset.made is not None:
            with writing(folder, "the made subjects"):
                own["root"] = _population(folder, config, dataset.made, name, screen)
        data = config.data_of(dataset).model_copy(update=own)
        wanted = _wanted(config, dataset)
        if data.manifest is None:
            if not (folder / "manifest.json").is_file() or read_json(folder / "data.json") != wanted:
                prepare_data(_only(config, data), folder, screen)
                _forget(folder / "real")
                write_json(folder / "data.json", wanted)
            own |= {"manifest": folder / "manifest.json", "keep": None}  # the manifest has the files that were kept
        found = dataset.model_copy(update={"data": dataset.data.model_copy(update=own)})
        _previews(config, found, folder / "real")
    return found


def _only(config: StudyConfig, data: Any) -> Config:
    return Config(data=data, model=config.model, method=Method(kind="full"), training=config.training)


def _population(folder: Path, config: StudyConfig, made: Made, name: str, screen: Screen) -> Path:
    """Made subjects as NIfTI files, unless they are there."""
    root = folder / "subjects"
    wanted = made.model_dump(mode="json")
    if read_json(folder / "population.json") != wanted:
        groups = [(made.anatomies, made.count)]
        groups += [(made.unseen.anatomies, made.unseen.count)] if made.unseen is not None else []
        written: list[Path] = []
        with screen.bar(f"make {name}", sum(count for _, count in groups)) as bar:
            for anatomies, count in groups:
                brains = [tissues_of(each, made.side, config.templates) for each in anatomies]
                first = len(written) + 1
                written += write_population(
                    root, brains, made.domain, count, made.seed, bar, named=made.named, first=first
                )
        for extra in sorted({*root.glob("*.nii.gz")} - {*written}):
            extra.unlink()  # of another population that stood here before
        write_json(folder / "population.json", wanted)
    return root


def _forget(folder: Path) -> None:
    """Remove the volumes that stood for an earlier split."""
    for file in folder.glob("*.nii.gz"):
        file.unlink()
    if folder.is_dir():
        folder.rmdir()


def _previews(config: StudyConfig, dataset: DataSet, folder: Path) -> None:
    """A few held-out volumes after their transforms."""
    if folder.is_dir():
        return
    data = config.data_of(dataset)
    manifest = read_manifest(data)
    root = root_of(data, manifest)
    files = [root / entry.path for entry in (*manifest.test, *manifest.validation)][:PREVIEWS]
    save_volumes([transforms(data)(file) for file in files], folder)


def save_volumes(volumes: Sequence[torch.Tensor], folder: Path) -> None:
    """Volumes (1, D, H, W) as NIfTI files with the axes R, A, S, all or none."""
    part = folder.with_name(folder.name + ".part")
    make_folder(part)
    for number, volume in enumerate(volumes):
        image = nibabel.Nifti1Image(np.asarray(volume[0], dtype=np.float32), np.eye(4))
        nibabel.save(image, part / f"real-{number:04d}.nii.gz")
    part.replace(folder)


def base_of(config: StudyConfig, out: Path, screen: Screen) -> tuple[Base, str]:
    """The base of all runs and a name for it: the given checkpoint, or one pretrained on the source, once."""
    if config.base.checkpoint is not None:
        return config.base, digest_of_file(config.base.checkpoint)
    training = config.pretraining
    assert training is not None  # `check_inputs` has seen to it
    folder, checkpoint = out / "base", out / "base" / "model.safetensors"
    with alone(out / "base.lock", wait=True):
        source = settled("source", config, config.pretrained_on, out, screen)
        run = _pretraining(config, source, training)
        settings = made_of(run, identity(config, source), "")
        key = digest(settings)
        outcome = Outcome.read(folder)
        if outcome is not None and outcome.key != key:
            refuse_others(folder, "the pretrained base", outcome, settings)
        if outcome is None or outcome.status != "done" or not checkpoint.is_file():
            screen.line("Pretraining the base, once for all runs")
            make_folder(folder)
            Outcome("running", key, made_of=settings).write(folder)
            pretrain(run, folder, screen)
            Outcome("done", key, made_of=settings).write(folder)
    return Base(checkpoint=checkpoint), key


def _pretraining(config: StudyConfig, source: DataSet, training: Training) -> Config:
    """Every weight, from nothing, on the source."""
    return Config(
        data=config.data_of(source),
        model=config.model,
        diffusion=config.diffusion,
        method=Method(kind="full"),
        training=training,
        validation=config.validation,
        sampling=Sampling(count=0),  # the study's own settings of sampling and metrics do not make another base
    )
