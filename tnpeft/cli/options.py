"""Arguments and options that several commands have, with their completion in shells."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from tnpeft.spec import list_specs
from tnpeft.spec.pattern import KINDS

__all__ = [
    "Json",
    "LayerText",
    "Match",
    "Model",
    "Number",
    "OneSpec",
    "Quiet",
    "Scopes",
    "Seed",
    "Settings",
    "Watch",
    "What",
    "complete_kind",
    "complete_model",
    "complete_source",
    "complete_spec",
    "complete_target",
    "complete_what",
]

_SUFFIXES = (".yaml", ".yml")


def complete_spec(incomplete: str) -> list[str]:
    """Shipped specs, then YAML files and folders."""
    return [*_beginning(list_specs(), incomplete), *_files(incomplete)]


def complete_what(incomplete: str) -> list[str]:
    """Shipped recipes and specs, then YAML files and folders."""
    from tnpeft.recipe import list_recipes

    return [*_beginning((*list_recipes(), *list_specs()), incomplete), *_files(incomplete)]


def complete_model(incomplete: str) -> list[str]:
    from tnpeft.cli.models import KNOWN

    return _beginning(KNOWN, incomplete)


def complete_kind(incomplete: str) -> list[str]:
    """Kinds of layers; the numbers after the colon are the user's."""
    return [f"{kind}:" for kind in _beginning(KINDS, incomplete)]


def complete_source(incomplete: str) -> list[str]:
    from tnpeft.cli.convert import SOURCES

    return _beginning(SOURCES, incomplete)


def complete_target(incomplete: str) -> list[str]:
    from tnpeft.cli.convert import TARGETS

    return _beginning(TARGETS, incomplete)


def _beginning(words: Iterable[str], incomplete: str) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]


def _files(incomplete: str) -> list[str]:
    """What may complete a path: YAML files, and folders with a slash."""
    folder, sign, name = incomplete.rpartition("/")
    try:
        there = sorted(Path(folder + sign or ".").iterdir())
    except (OSError, ValueError):
        return []
    shown = [path for path in there if path.name.startswith(name) and (name or path.name[0] != ".")]
    found = [path.name + "/" * path.is_dir() for path in shown if path.is_dir() or path.suffix in _SUFFIXES]
    return [folder + sign + each for each in found]


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Run again for each file that changes, until Ctrl-C.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress on stderr.")]
Seed = Annotated[int, typer.Option("--seed", metavar="NUMBER", help="The seed of all that is drawn at random.")]
Number = Annotated[
    str, typer.Option("--params", "-p", metavar="NUMBER", help="How many parameters may train: 600000, 5k or 1.2M.")
]
OneSpec = Annotated[str, typer.Argument(metavar="SPEC", help="A shipped name or a file.", autocompletion=complete_spec)]
What = Annotated[
    str, typer.Argument(metavar="RECIPE_OR_SPEC", help="A shipped name or a file.", autocompletion=complete_what)
]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="A model: monai:ddpm-paper, or package.module:factory.",
        autocompletion=complete_model,
    ),
]
Match = Annotated[
    str | None, typer.Option("--match", help="With a spec: a regular expression on layers' names, or all.")
]
LayerText = Annotated[
    str | None,
    typer.Option(
        "--layer",
        "-l",
        metavar="KIND:IN,OUT,K",
        help="A layer, e.g. Conv3d:64,128,3 or Conv2d:8,8,1x3,groups=2",
        autocompletion=complete_kind,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="NAME=NUMBER", help="A param of the spec, e.g. r=8. Repeatable."),
]
Scopes = Annotated[
    list[str] | None,
    typer.Option(
        "--scope",
        metavar="NAME=REGEX",
        help="A scope of shared cores: layers whose names give equal captures share. Repeatable.",
    ),
]
