"""Fine-tune MONAI's 3D diffusion U-Net with an adapter that exists only as a YAML file.

    python examples/ddpm.py demo
    python examples/ddpm.py prepare  --config C.yaml --out runs/data --set data.root=/data/ADNI
    python examples/ddpm.py finetune --config C.yaml --out runs/adni --set data.manifest=runs/data/manifest.json
    python examples/ddpm.py sample   --config C.yaml --out runs/adni
    python examples/ddpm.py evaluate --config C.yaml --out runs/adni
    python examples/ddpm.py study table1 --config examples/configs/study_cpu.yaml --out runs/study
    python examples/ddpm.py report --out runs/study
    python examples/ddpm.py search   --config examples/configs/search_cpu.yaml --study runs/study --out runs/search
    python examples/ddpm.py claim    --config examples/configs/claim.yaml --study runs/study --out runs/claim

Every setting is in `ddpm_lab/config/settings.py`; `--set key=value` overrides one.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

CONFIGS = Path(__file__).resolve().parent / "configs"

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

Settings = Annotated[Path, typer.Option("--config", help="The settings, a YAML file.")]
Folder = Annotated[Path, typer.Option("--out", help="The folder of results.")]
Override = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, for instance method.params.r=8.")
]


Dry = Annotated[
    int,
    typer.Option(
        "--dry-run", min=0, metavar="N", help="Print what each of N processes would hold; nothing is trained."
    ),
]


@app.command("demo")
def demo(config: Settings = CONFIGS / "demo.yaml", out: Folder = Path("runs/demo"), overrides: Override = []) -> None:  # noqa: B006
    """Make a population from the MNI152 template, pretrain on its source, fine-tune on its target."""
    _run("training.demo:demo", "config.settings:DemoConfig", config, overrides, out)


@app.command("prepare")
def prepare(config: Settings, out: Folder, overrides: Override = []) -> None:  # noqa: B006
    """Index a data set: find, read and split its volumes; writes manifest.json and a list of rejected files."""
    _run("data.prepare:prepare_data", "config.settings:Config", config, overrides, out)


@app.command("pretrain")
def pretrain(config: Settings, out: Folder, overrides: Override = [], processes: Dry = 0) -> None:  # noqa: B006
    """Train every weight of a model from scratch; model.safetensors is the base of later runs."""
    _train("pretrain", config, overrides, out, processes)


@app.command("finetune")
def finetune(config: Settings, out: Folder, overrides: Override = [], processes: Dry = 0) -> None:  # noqa: B006
    """Fine-tune a base checkpoint; the same command resumes an interrupted run."""
    _train("finetune", config, overrides, out, processes)


@app.command("sample")
def sample(config: Settings, out: Folder, overrides: Override = []) -> None:  # noqa: B006
    """Draw volumes from a base and any number of adapters as NIfTI files, in OUT/samples; resumable."""
    _run("sampling.sample:sample_volumes", "config.settings:Config", config, overrides, out)


@app.command("evaluate")
def evaluate(config: Settings, out: Folder, overrides: Override = []) -> None:  # noqa: B006
    """Measure the samples in OUT/samples against real volumes: FID, MMD, MS-SSIM with intervals."""
    _run("evaluation.evaluate:evaluate_samples", "config.settings:Config", config, overrides, out)


@app.command("study")
def study(
    name: Annotated[str, typer.Argument(help="table1 to table4, figure4, start, screen or screen_linear.")],
    config: Settings,
    out: Folder,
    overrides: Override = [],  # noqa: B006
    minutes: Annotated[
        float, typer.Option(min=0, help="Start no run that would not end within this time; 0 runs all.")
    ] = 0,
) -> None:
    """Run the methods, data sets and seeds of one of the paper's tables or figures; resumable."""
    limit = [f"minutes={minutes:g}"] if minutes else []
    _run("study.study:study", "study.settings:StudyConfig", config, [*overrides, *limit], out, name)


@app.command("report")
def report(out: Folder) -> None:
    """Make tables, pictures and one HTML page of all results of `study` in OUT."""

    def run() -> None:
        from ddpm_lab.study.report import check_filled, report

        check_filled(report(out, _screen()))

    _guarded(run)


Study = Annotated[Path, typer.Option("--study", help="The folder of the study: its base and full fine-tunes.")]


@app.command("search")
def search(
    config: Settings,
    study: Study,
    out: Folder,
    overrides: Override = [],  # noqa: B006
    minutes: Annotated[
        float | None, typer.Option(help="Begin nothing new after this time; the same command goes on.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="How many processes evaluate networks.")] = 1,
) -> None:
    """Search for a network on a study's model, fine-tune the best ones, and compare; resumable."""
    kind = "searching.settings:SearchConfig"
    _run("searching.search:search_study", kind, config, overrides, out, config, study, minutes, jobs)


@app.command("score")
def score(
    config: Settings,
    study: Study,
    spec: Annotated[Path, typer.Option("--spec", help="The network, a YAML file.")],
    rate: Annotated[float, typer.Option("--rate", help="The learning rate.")],
    datasets: Annotated[list[str], typer.Option("--dataset", help="A data set of the study. Repeatable.")],
    overrides: Override = [],  # noqa: B006
    seed: Annotated[int | None, typer.Option(help="Train with this seed, and measure on the test volumes.")] = None,
) -> None:
    """Fine-tune a network briefly and print by how many percent the error falls, as JSON: `search` runs this."""

    def run() -> None:
        from ddpm_lab.config.reader import read_config
        from ddpm_lab.support.console import Screen

        settings = read_config(config, overrides, _of_lab("searching.settings:SearchConfig"))
        found = _of_lab("searching.score:score")
        found(settings, study, Screen(quiet=True), spec=spec, rate=rate, datasets=datasets, seed=seed)

    _guarded(run)


@app.command("claim")
def claim(
    config: Settings,
    study: Study,
    out: Folder,
    overrides: Override = [],  # noqa: B006
    minutes: Annotated[float | None, typer.Option(help="Start no run that would not end within this time.")] = None,
) -> None:
    """Run the study that a claim needs, and print whether the claim holds; resumable."""
    _run("searching.claim:claim", "searching.settings:ClaimConfig", config, overrides, out, study, minutes)


def _train(command: str, config: Path, overrides: list[str], out: Path, processes: int) -> None:
    """Train, or say what each of so many processes would hold."""
    if processes:
        _run("training.dry_run:dry_run", "config.settings:Config", config, overrides, out, command, processes)
    else:
        _run(f"training.driver:{command}", "config.settings:Config", config, overrides, out)


def _run(function: str, kind: str, config: Path, overrides: list[str], out: Path, *more: Any) -> None:
    """Read the settings, then run `wing.module:function` of ddpm_lab on them."""

    def run() -> None:
        from ddpm_lab.config.reader import read_config

        settings = read_config(config, overrides, _of_lab(kind))
        _of_lab(function)(*more, settings, out, _screen())

    _guarded(run)


def _of_lab(name: str) -> Any:
    """Imported only when it runs, so that `--help` and mistakes in a file need no torch."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(f"ddpm_lab.{module}"), attribute)


def _screen() -> Any:
    """Progress for people, from the first process of several only."""
    from ddpm_lab.support.console import Screen

    return Screen(quiet=os.environ.get("RANK", "0") != "0")


def _guarded(run: Callable[[], None]) -> None:
    """A user's mistake becomes one line for each problem and exit status 1, never a traceback."""
    from tnpeft import TnpeftError

    try:
        run()
    except TnpeftError as error:
        for line in str(error).splitlines():
            typer.echo(f"error: {line}", err=True)
        sys.exit(1)
    except ModuleNotFoundError as error:
        typer.echo(f"error: the driver needs {error.name}: pip install 'tnpeft[demo]'", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        sys.exit(130)


if __name__ == "__main__":
    app()
