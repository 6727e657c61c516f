"""The commands: each parses its arguments, calls the library and prints."""

from __future__ import annotations

from typing import Annotated

import typer

import tnpeft
from tnpeft.cli.output import Output, reported

__all__ = ["app", "main"]

app = typer.Typer(
    name="tnpeft",
    help="A compiler for fine-tuning adapters: YAML tensor networks in, PyTorch modules out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="NAME=NUMBER", help="A param of the spec, e.g. r=8. Repeatable."),
]
Scopes = Annotated[
    list[str] | None,
    typer.Option("--scope", metavar="NAME=REGEX", help="A scope of shared cores, on layers' names. Repeatable."),
]


def main() -> None:
    """The console script `tnpeft`."""
    app()


@app.command("list")
@reported
def list_(as_json: Json = False) -> None:
    """List the shipped specs and recipes."""
    from tnpeft.cli.listing import print_list

    print_list(Output(), as_json)


@app.command()
@reported
def check(
    files: Annotated[list[str], typer.Argument(metavar="SPEC_OR_RECIPE...", help="Files, folders or shipped names.")],
    as_json: Json = False,
) -> None:
    """Check specs and recipes; print every mistake of every file. Exit status 1 if there is any."""
    from tnpeft.cli.checking import check_files

    if not check_files(Output(), files, as_json):
        raise typer.Exit(1)


@app.command()
@reported
def show(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="A shipped name or a file.")],
    layer: Annotated[
        str | None,
        typer.Option("--layer", "-l", metavar="KIND:IN,OUT,K", help="e.g. Conv3d:64,128,3 or Conv2d:8,8,1x3,groups=2"),
    ] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Show a spec; with --layer its cores, network, parameters and contraction on that layer."""
    from tnpeft.cli.showing import show_spec

    show_spec(Output(), spec, layer, settings or [], as_json)


@app.command()
@reported
def count(
    what: Annotated[str, typer.Argument(metavar="RECIPE_OR_SPEC", help="A shipped name or a file.")],
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="MODEL", help="monai:ddpm-paper, or package.module:factory.")
    ],
    match: Annotated[
        str | None, typer.Option("--match", help="With a spec: a regular expression searched in the layers' names.")
    ] = None,
    settings: Settings = None,
    scopes: Scopes = None,
    as_json: Json = False,
) -> None:
    """Count what a recipe or spec trains on a model, layer by layer. Nothing is computed or allocated."""
    from tnpeft.cli.counting import count_parameters

    count_parameters(Output(), what, model, match, settings or [], as_json, scopes or [])


@app.command()
@reported
def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The base model's weights: safetensors, or a folder.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="Those of the full fine-tune.")],
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="MODEL", help="monai:ddpm-paper, or package.module:factory.")
    ],
    target: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="The adapter file to write.")],
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Which spec goes on which layers, and what else is taken over.")
    ] = None,
    spec: Annotated[str | None, typer.Option("--spec", help="Instead of a recipe: one spec, with --match.")] = None,
    match: Annotated[
        str | None, typer.Option("--match", help="With --spec: a regular expression searched in the layers' names.")
    ] = None,
    settings: Settings = None,
    scopes: Scopes = None,
    name: Annotated[str, typer.Option("--name", help="The adapter's name in the file.")] = "default",
    method: Annotated[str, typer.Option("--method", help="auto, als or adam.")] = "auto",
    iterations: Annotated[
        int | None, typer.Option("--iterations", help="Sweeps (100) or Adam's steps (2000) per layer, at most.")
    ] = None,
    largest_error: Annotated[
        float | None, typer.Option("--max-error", help="Exit with status 1 if a layer's relative error is above it.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
    as_json: Json = False,
) -> None:
    """Turn a full fine-tune into an adapter file: fit every layer of a recipe to the change of its weight."""
    from tnpeft.cli.fitting import extract_adapter

    good = extract_adapter(
        Output(), base, tuned, model, recipe, spec, match, target, settings or [], scopes or [],
        name=name, method=method, iterations=iterations, largest_error=largest_error, quiet=quiet, as_json=as_json,
    )  # fmt: skip
    if not good:
        raise typer.Exit(1)


@app.command()
@reported
def budget(
    what: Annotated[str, typer.Argument(metavar="RECIPE_OR_SPEC", help="A shipped name or a file.")],
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="MODEL", help="monai:ddpm-paper, or package.module:factory.")
    ],
    params: Annotated[int, typer.Option("--params", "-p", metavar="NUMBER", help="How many parameters may train.")],
    match: Annotated[
        str | None, typer.Option("--match", help="With a spec: a regular expression searched in the layers' names.")
    ] = None,
    param: Annotated[str, typer.Option("--param", metavar="NAME", help="The param to solve for.")] = "r",
    fixed: Annotated[
        list[str] | None, typer.Option("--fixed", metavar="SPEC", help="A spec that keeps the recipe's. Repeatable.")
    ] = None,
    settings: Settings = None,
    scopes: Scopes = None,
    as_json: Json = False,
) -> None:
    """Find the largest rank that trains no more than so many parameters. Nothing is computed or allocated."""
    from tnpeft.cli.fitting import find_budget

    find_budget(Output(), what, model, params, match, param, fixed or [], settings or [], scopes or [], as_json)


@app.command()
@reported
def version(as_json: Json = False) -> None:
    """Print the version."""
    output = Output()
    if as_json:
        output.data({"version": tnpeft.__version__})
    else:
        output.say(f"tnpeft {tnpeft.__version__}")
