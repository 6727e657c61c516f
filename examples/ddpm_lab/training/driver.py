"""`finetune` and `pretrain`: one configuration, one folder of results."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tnpeft
from ddpm_lab.config.settings import Config, Method
from ddpm_lab.data.files import rooted
from ddpm_lab.data.grid import grid_of
from ddpm_lab.model.unet import build_unet, divisor, load_base
from ddpm_lab.support.console import Screen
from ddpm_lab.support.durable import write_json, writing
from ddpm_lab.support.faults import fault
from ddpm_lab.support.folders import files_in
from ddpm_lab.support.locks import alone_in_out
from ddpm_lab.support.processes import missing, together
from ddpm_lab.support.record import write_record
from ddpm_lab.training.checkpoint import Checkpoints
from ddpm_lab.training.finetune import Run, Setup, prepare, probe, run_training, sample
from ddpm_lab.training.plots import Curve, plot_curves, plot_montage
from ddpm_lab.training.resume import check_same_checkpoint, earlier_checkpoint, finished_summary
from ddpm_lab.training.summary import (
    describe_run,
    describe_samples,
    describe_setup,
    error_table,
    headline,
    sample_table,
    time_line,
)

__all__ = ["finetune", "finish", "pretrain"]


@alone_in_out("finetune")
def finetune(config: Config, out: Path, screen: Screen) -> dict[str, Any] | None:
    """Run `config` and write its results to `out`; returns the summary, or None in all processes but the first.

    The same call goes on where an earlier one was cut short, and only reads the summary of one that ended.
    """
    return _run("finetune", config, out, screen, "fine-tune")


@alone_in_out("pretrain")
def pretrain(config: Config, out: Path, screen: Screen) -> dict[str, Any] | None:
    """Train every weight of the model from nothing, whatever `config.method` says; else like `finetune`."""
    if config.base.checkpoint is not None:
        fix = "Remove it; or go on from it: `finetune` with `method.kind=full`."
        expected = "nothing, for weights start anew"
        raise fault("base.checkpoint", "the base of `pretrain`", expected, str(config.base.checkpoint), fix)
    return _run("pretrain", config.model_copy(update={"method": Method(kind="full")}), out, screen, "pretrain")


def _run(command: str, config: Config, out: Path, screen: Screen, title: str) -> dict[str, Any] | None:
    started = time.perf_counter()
    config = config.model_copy(update={"data": rooted(config.data)})  # as the summary and the checkpoints have it
    done = finished_summary(config, out)
    if done is not None:
        screen.line(f"Nothing to do: the run in {out} is done, with these settings")
        _tidy(config, out)
        return done
    found = earlier_checkpoint(config, out, screen.line)
    setup = prepare(config, out, screen)
    check_same_checkpoint(out, found)
    with together(), writing(out, "the record of the run"):
        if setup.accelerator.is_main_process:
            write_record(out, command, config, processes=setup.accelerator.num_processes)
    if found is not None:
        screen.line(f"Going on after step {found.step}, from {found.folder.parent.name}/{found.folder.name}")
    with missing():
        run = run_training(setup, screen, title, found=found, safe=True)
    first = setup.accelerator.is_main_process
    if not (first or setup.sharded):
        return None
    with missing(), writing(out, "the results"):
        summary = finish(setup, run, screen)
        if not first:
            return None
        summary = _results(command, setup, run, summary, screen, started)
    _tidy(config, out)
    _show(summary, out, screen)
    return summary


def _results(
    command: str, setup: Setup, run: Run, found: dict[str, Any], screen: Screen, started: float
) -> dict[str, Any]:
    """Write what `finish` has not; the summary, which says that the run is done, last."""
    summary = {"command": command, "result": run.trained.file_name, **found}
    with screen.phase("pictures"):
        curves = [Curve(run.trained.title, run.history, run.before, run.after)]
        plot_curves(setup.out / "loss_curves.png", curves, None, "")
    summary["history"] = run.history.as_data()
    summary["seconds"] = {name: round(value, 2) for name, value in screen.seconds.items()}
    summary["seconds_total"] = round(time.perf_counter() - started, 2)
    write_json(setup.out / "summary.json", summary)
    return summary


def _tidy(config: Config, out: Path) -> None:
    """Remove what a run that is done needs no more, and what one that was killed left half-written."""
    Checkpoints(out, config.training.keep_checkpoints).clear()
    for waste in (*out.glob(".*.tmp"), *out.glob("*.part")):
        waste.unlink(missing_ok=True)


def _show(summary: dict[str, Any], out: Path, screen: Screen) -> None:
    screen.line("")
    screen.console.print(error_table({summary["run"]["method"]: summary["run"]}))
    if "samples" in summary:
        screen.console.print(sample_table(summary["samples"]))
    screen.line(time_line(screen.seconds, summary["seconds_total"]))
    screen.line(f"Results in {out}: {', '.join(files_in(out))}")


def finish(setup: Setup, run: Run, screen: Screen, held_out: str = "real (held out)") -> dict[str, Any]:
    """Save what trained, sample, measure and draw the montage; returns the summary's data.

    `held_out` is what the montage calls the volumes that the samples are to look like. Where the model is sharded
    every process saves and samples, and the first one does the rest.
    """
    path = run.trained.save(setup.out)
    summary = {**describe_setup(setup), "run": describe_run(run)}
    if run.trained.report is not None:
        summary["run"]["reload_difference"] = _reload_difference(setup, path)
    if setup.config.sampling.count == 0:
        return summary
    samples = {}
    if setup.config.base.checkpoint is not None:
        with _base_model(setup, run) as base:
            samples["base samples"] = sample(setup, screen, "sample the base", base)
    samples["fine-tuned samples"] = sample(setup, screen, "sample the fine-tuned model")
    if not setup.accelerator.is_main_process:
        return summary
    with screen.phase("metrics"):
        summary["samples"] = describe_samples(setup, samples)
    real = setup.volumes.validation
    rows = {held_out: torch.stack([real[index] for index in range(min(8, len(real)))]), **samples}
    with screen.phase("pictures"):
        title = headline(setup.config, setup.volumes.shape)
        spacing = grid_of(setup.config.data, divisor(setup.config.model)).spacing
        plot_montage(setup.out / "montage.png", rows, setup.config.data.intensity, title, spacing=spacing)
    return summary


@contextmanager
def _base_model(setup: Setup, run: Run) -> Iterator[nn.Module]:
    """The model as it was before training: adapters step aside, other methods need the checkpoint again."""
    if run.trained.report is not None:
        with tnpeft.disabled(setup.unet):
            yield setup.unet
        return
    base = _fresh_base(setup)
    setup.place(base)
    yield base


def _fresh_base(setup: Setup) -> nn.Module:
    unet: nn.Module = build_unet(setup.config.model, setup.config.base)
    load_base(unet, setup.config.base)
    return unet


def _reload_difference(setup: Setup, path: Path) -> float:
    """The largest difference between the trained model and a fresh base that loads the adapter's file."""
    unet = _fresh_base(setup)
    tnpeft.load(unet, path)
    setup.place(unet)
    for one in (setup.unet, unet):  # a first pass plans how later ones run, which may round otherwise
        probe(setup, one)
    difference = probe(setup, setup.unet) - probe(setup, unet)
    return float(torch.as_tensor(difference).abs().max())
