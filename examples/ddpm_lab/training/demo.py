"""`demo`: from a template brain to a fine-tuned model, with the runs that put its gain in proportion."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any

from ddpm_lab.config.settings import Base, Config, DemoConfig, Method, Training
from ddpm_lab.data.anatomies import tissues_of
from ddpm_lab.data.files import held_out_counts
from ddpm_lab.data.order import Source
from ddpm_lab.data.population import write_population
from ddpm_lab.model.accelerator import make_accelerator
from ddpm_lab.model.diffusion import noise_schedule
from ddpm_lab.model.unet import build_unet, save_weights
from ddpm_lab.support.console import Screen
from ddpm_lab.support.durable import read_json, write_json
from ddpm_lab.support.faults import fault, raise_all
from ddpm_lab.support.folders import make_folder
from ddpm_lab.support.locks import alone_in_out
from ddpm_lab.training.driver import finish
from ddpm_lab.training.estimate import expected_time
from ddpm_lab.training.finetune import Run, Setup, prepare, prepare_volumes, run_training
from ddpm_lab.training.plots import Curve, plot_curves
from ddpm_lab.training.summary import describe_run, error_table, sample_table, time_line
from ddpm_lab.training.train import History, Step, steps_of, train
from tnpeft.documents.paths import is_file
from tnpeft.errors import Problem

__all__ = ["demo"]

TARGET = "target (made from MNI152)"
CAVEAT = (
    "All subjects, source and target, are deformations of one average brain (the MNI152 template) at low resolution: "
    "the numbers compare methods, they say nothing about patients."
)


@alone_in_out("demo")
def demo(config: DemoConfig, out: Path, screen: Screen) -> dict[str, Any]:
    """Run the demonstration in `out`; what an earlier run made there from the same settings is used again."""
    started = time.perf_counter()
    if config.distributed.shard is not None:
        fix = "Leave it out; `finetune` takes it."
        found = config.distributed.shard
        raise fault("distributed.shard", "the demonstration", "nothing, for it runs whole", found, fix)
    _check_population(config)
    make_folder(out)
    screen.line(expected_time(config, _says(*_people(config, out)), _has_base(config, out)))
    _population(config, out, screen)
    pretraining = _pretrained(config, out, screen)
    target = _tuned(config, out, "target", config.method, config.training)
    setup = prepare(target, out, screen)
    run = run_training(setup, screen, "fine-tune on the target")
    published = _published(config, out, screen)
    baseline = _baseline(config, out, screen)
    control = _control(config, out, screen, setup)
    summary = finish(setup, run, screen, TARGET)
    runs = {run.trained.title: run, **published}
    runs |= {"biases and norms alone": baseline, "control: tuned on source": control}
    with screen.phase("pictures"):
        curves = [Curve(name, each.history, each.before, each.after) for name, each in runs.items()]
        plot_curves(out / "loss_curves.png", curves, pretraining, "MNI152 population: T1-like source, T2-like target")
    summary |= {"caveat": CAVEAT, "comparison": {name: describe_run(each) for name, each in runs.items()}}
    summary["checks"] = _checks(run, baseline, control)
    summary["pretraining"] = {"steps": len(pretraining.losses), "training_seconds": pretraining.seconds}
    summary["seconds"] = {name: round(value, 2) for name, value in screen.seconds.items()}
    summary["seconds_total"] = round(time.perf_counter() - started, 2)
    write_json(out / "summary.json", summary)
    _show(summary, out, screen)
    return summary


def _checks(run: Run, baseline: Run, control: Run) -> dict[str, bool]:
    """What the demonstration is meant to show, and whether this run showed it."""
    return {
        "the adapter lowers the target error by 25 % or more": run.change <= -25,
        "8 points or more beyond biases and norms alone": run.change <= baseline.change - 8,
        "the control gains 2 % at most": control.change >= -2,
        "the adapted model started exactly as the base": run.start_difference == 0,
    }


def _check_population(config: DemoConfig) -> None:
    """Enough subjects for a batch of each run: the last of them begins after minutes."""
    people = config.population
    published = []
    if config.published is not None:
        published = [("target", people.target, "published.training", config.published.training)]
    runs = (
        ("source", people.source, "pretraining", config.pretraining),
        ("target", people.target, "training", config.training),
        *published,
        ("target", people.target, "bias_norm", config.bias_norm),
        ("source", people.source, "training", config.training),  # the control
    )
    problems: dict[str, Problem] = {}
    for domain, subjects, section, training in runs:
        held_out = sum(held_out_counts(subjects, config.data))
        if subjects - held_out < training.batch_size:
            expected = f"at least {training.batch_size}, one batch"
            found = f"{subjects - held_out} of {subjects} after holding {held_out} out"
            where = f"population.{domain}"
            fix = f"Lower `{section}.batch_size` or raise `{where}`."
            problems.setdefault(where, Problem("files to train on", expected, found, fix, where))
    raise_all(problems.values(), "population")


def _population(config: DemoConfig, out: Path, screen: Screen) -> None:
    """Write the subjects as NIfTI files, unless they are there."""
    people = config.population
    done, wanted = _people(config, out)
    if _says(done, wanted):
        screen.line(f"Population: {people.source} source and {people.target} target subjects, from an earlier run")
        return
    with screen.bar("population from MNI152", people.source + people.target) as bar:
        tissues = (tissues_of("mni152", people.side),)
        write_population(out / "data" / "source", tissues, "t1", people.source, people.seed, bar)
        write_population(
            out / "data" / "target", tissues, "t2", people.target, people.seed, lambda done: bar(people.source + done)
        )
    write_json(done, wanted)


def _people(config: DemoConfig, out: Path) -> tuple[Path, dict[str, Any]]:
    """The record of the population, and what it says of this one."""
    return out / "data" / "population.json", config.population.model_dump(mode="json")


def _pretrained(config: DemoConfig, out: Path, screen: Screen) -> History:
    """Train the base on the source subjects, unless an earlier run did with the same settings."""
    source = _on_source(config, out)
    wanted = {"key": _key(source, config)}
    record, weights = out / "base.json", out / "base.safetensors"
    if _has_base(config, out):
        screen.line("Base: pretrained by an earlier run with the same settings")
        return History.from_data(json.loads(record.read_text(encoding="utf-8"))["history"])
    accelerator = make_accelerator(config.pretraining)
    volumes = prepare_volumes(source, out / "source", screen, accelerator)
    unet = build_unet(config.model, None, config.pretraining.seed)
    scheduler = noise_schedule(config.diffusion)
    with screen.bar("pretrain on the source", steps_of(config.pretraining, len(volumes.train))) as bar:

        def show(step: Step) -> None:
            bar(step.number, f"loss {step.loss:.4f}")

        named = Source(volumes.train, volumes.split.train, volumes.shape)
        history = train(unet, named, scheduler, config.pretraining, accelerator, on_step=show)
    save_weights(unet, weights)
    write_json(record, {**wanted, "history": history.as_data()})
    return history


def _on_source(config: DemoConfig, out: Path) -> Config:
    """Pretraining as a run of its own."""
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"root": out / "data" / "source"}),
            "training": config.pretraining,
            "method": Method(kind="full"),
        }
    )


def _has_base(config: DemoConfig, out: Path) -> bool:
    """Whether an earlier run pretrained the base with these settings."""
    wanted = {"key": _key(_on_source(config, out), config)}
    return is_file(out / "base.safetensors") and _says(out / "base.json", wanted)


def _key(source: Config, config: DemoConfig) -> str:
    """A name for everything that changes the pretrained base."""
    parts = source.model_dump(mode="json", include={"data", "model", "diffusion", "training"})
    parts["population"] = config.population.model_dump(mode="json")
    parts["data"].pop("root")
    for name in ("threads", "processes", "workers", "tensorboard"):  # how fast and how watched, not what comes out
        parts["training"].pop(name)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _says(path: Path, wanted: dict[str, Any]) -> bool:
    """Whether a JSON file of an earlier run holds these entries."""
    found = read_json(path)
    return found is not None and all(found.get(key) == value for key, value in wanted.items())


def _tuned(config: DemoConfig, out: Path, domain: str, method: Method, training: Training) -> Config:
    """A fine-tuning run of the demonstration's base on one domain."""
    return Config(
        data=config.data.model_copy(update={"root": out / "data" / domain}),
        model=config.model,
        base=Base(checkpoint=out / "base.safetensors"),
        diffusion=config.diffusion,
        method=method,
        training=training,
        validation=config.validation,
        sampling=config.sampling,
        metrics=config.metrics,
    )


def _published(config: DemoConfig, out: Path, screen: Screen) -> dict[str, Run]:
    """The adapter as its paper has it, on the target, by its title; empty where the settings name none."""
    if config.published is None:
        return {}
    method, training = config.published.method, config.published.training
    setup = prepare(_tuned(config, out, "target", method, training), out / "published", Screen(quiet=True))
    run = run_training(setup, screen, "as published")
    return {f"{run.trained.title}, as published": run}


def _baseline(config: DemoConfig, out: Path, screen: Screen) -> Run:
    """Biases and norms alone, on the target: they explain a part of every adapter's gain."""
    method = Method(kind="bias_norm")
    setup = prepare(_tuned(config, out, "target", method, config.bias_norm), out / "bias_norm", Screen(quiet=True))
    return run_training(setup, screen, "baseline: biases, norms")


def _control(config: DemoConfig, out: Path, screen: Screen, target: Setup) -> Run:
    """The same adapter tuned on the *source*, measured on the target: more training alone must not help."""
    setup = prepare(_tuned(config, out, "source", config.method, config.training), out / "control", Screen(quiet=True))
    return run_training(dataclasses.replace(setup, held_out=target.held_out), screen, "control: fine-tune on source")


def _show(summary: dict[str, Any], out: Path, screen: Screen) -> None:
    screen.line("")
    screen.console.print(error_table(summary["comparison"]))
    if "samples" in summary:
        screen.console.print(sample_table(summary["samples"]))
    for text, met in summary["checks"].items():
        screen.console.print(f"[green]yes[/]  {text}" if met else f"[red]no[/]   {text}", highlight=False)
    screen.line(CAVEAT)
    screen.line(time_line(summary["seconds"], summary["seconds_total"]))
    screen.line(f"Results in {out}: summary.json, adapter.safetensors, loss_curves.png, montage.png")
