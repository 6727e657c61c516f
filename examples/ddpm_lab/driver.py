"""`finetune`: one configuration, one folder of results."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tnpeft
from ddpm_lab.config import Config
from ddpm_lab.console import Screen
from ddpm_lab.files import write_json
from ddpm_lab.finetune import Run, Setup, prepare, probe, run_training, sample
from ddpm_lab.plots import Curve, plot_curves, plot_montage
from ddpm_lab.summary import (
    describe_run,
    describe_samples,
    describe_setup,
    error_table,
    headline,
    sample_table,
    time_line,
)
from ddpm_lab.unet import build_unet, load_base

__all__ = ["finetune", "finish"]


def finetune(config: Config, out: Path, screen: Screen) -> dict[str, Any] | None:
    """Run `config` and write its results to `out`; returns the summary, or None in all processes but the first."""
    started = time.perf_counter()
    setup = prepare(config, out, screen)
    run = run_training(setup, screen, "fine-tune")
    if not setup.accelerator.is_main_process:
        return None
    summary = finish(setup, run, screen)
    summary["history"] = run.history.as_data()
    with screen.phase("pictures"):
        plot_curves(out / "loss_curves.png", [Curve(run.trained.title, run.history, run.before, run.after)], None, "")
    summary["seconds"] = {name: round(value, 2) for name, value in screen.seconds.items()}
    summary["seconds_total"] = round(time.perf_counter() - started, 2)
    write_json(out / "summary.json", summary)
    screen.line("")
    screen.console.print(error_table({run.trained.title: summary["run"]}))
    if "samples" in summary:
        screen.console.print(sample_table(summary["samples"]))
    screen.line(time_line(screen.seconds, summary["seconds_total"]))
    screen.line(f"Results in {out}: {', '.join(sorted(path.name for path in out.iterdir() if path.is_file()))}")
    return summary


def finish(setup: Setup, run: Run, screen: Screen) -> dict[str, Any]:
    """Save what trained, sample, measure and draw the montage; returns the summary's data."""
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
    with screen.phase("metrics"):
        summary["samples"] = describe_samples(setup, samples)
    real = setup.volumes.validation
    rows = {"real target": torch.stack([real[index] for index in range(min(8, len(real)))]), **samples}
    with screen.phase("pictures"):
        title = headline(setup.config, setup.volumes.shape)
        plot_montage(setup.out / "montage.png", rows, setup.config.data.intensity, title)
    return summary


@contextmanager
def _base_model(setup: Setup, run: Run) -> Iterator[nn.Module]:
    """The model as it was before training: adapters step aside, other methods need the checkpoint again."""
    if run.trained.report is not None:
        with tnpeft.disabled(setup.unet):
            yield setup.unet
        return
    yield _fresh_base(setup)


def _fresh_base(setup: Setup) -> nn.Module:
    unet: nn.Module = build_unet(setup.config.model, setup.config.base)
    load_base(unet, setup.config.base)
    unet.to(setup.accelerator.device)
    return unet


def _reload_difference(setup: Setup, path: Path) -> float:
    """The largest difference between the trained model and a fresh base that loads the adapter's file."""
    unet = _fresh_base(setup)
    tnpeft.load(unet, path)
    unet.to(setup.accelerator.device)
    difference = probe(setup, setup.unet) - probe(setup, unet)
    return float(torch.as_tensor(difference).abs().max())
