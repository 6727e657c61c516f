"""Fine-tune MONAI's 3D diffusion U-Net with an adapter that exists only as a YAML file.

    python examples/ddpm.py demo
    python examples/ddpm.py finetune --config examples/configs/paper_adni.yaml --out runs/adni \\
        --set data.root=/data/ADNI --set base.checkpoint=/models/ukb.pt
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

CONFIGS = Path(__file__).resolve().parent / "configs"

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

Override = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, for instance method.params.r=8.")
]


@app.command("demo")
def demo_command(
    config: Annotated[Path, typer.Option(help="The settings.")] = CONFIGS / "demo.yaml",
    out: Annotated[Path, typer.Option(help="The folder of results.")] = Path("runs/demo"),
    overrides: Override = [],  # noqa: B006  typer reads the default, nothing changes it
) -> None:
    """Make a population from the MNI152 template, pretrain on its source, fine-tune on its target."""

    def run() -> None:
        from ddpm_lab.config import DemoConfig
        from ddpm_lab.config_file import read_config

        settings = read_config(config, overrides, DemoConfig)
        from ddpm_lab.demo import demo

        demo(settings, out, _screen())

    _guarded(run)


@app.command("finetune")
def finetune_command(
    config: Annotated[Path, typer.Option(help="The settings.")],
    out: Annotated[Path, typer.Option(help="The folder of results.")],
    overrides: Override = [],  # noqa: B006
) -> None:
    """Fine-tune a base checkpoint on a folder of NIfTI files."""

    def run() -> None:
        from ddpm_lab.config import Config
        from ddpm_lab.config_file import read_config

        settings = read_config(config, overrides, Config)
        from ddpm_lab.driver import finetune

        finetune(settings, out, _screen())

    _guarded(run)


def _screen() -> Any:
    """Progress for people, from the first process of several only."""
    from ddpm_lab.console import Screen

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
