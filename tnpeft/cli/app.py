"""The commands: each parses its arguments, calls the library and prints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ParamSpec

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

P = ParamSpec("P")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
OneSpec = Annotated[str, typer.Argument(metavar="SPEC", help="A shipped name or a file.")]
What = Annotated[str, typer.Argument(metavar="RECIPE_OR_SPEC", help="A shipped name or a file.")]
Model = Annotated[
    str, typer.Option("--model", "-m", metavar="MODEL", help="monai:ddpm-paper, or package.module:factory.")
]
Match = Annotated[
    str | None, typer.Option("--match", help="With a spec: a regular expression on layers' names, or all.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="NAME=NUMBER", help="A param of the spec, e.g. r=8. Repeatable."),
]
Rates = Annotated[
    list[float] | None,
    typer.Option("--rate", help="With --command: a rate that each is fine-tuned at. Repeatable."),
]
Minutes = Annotated[
    float | None, typer.Option("--minutes", help="Begin nothing after so many; with --storage it goes on later.")
]
Tests = Annotated[
    list[str] | None,
    typer.Option("--test-command", metavar="NAME=COMMAND", help="With --report: tests each at its rate. Repeatable."),
]
Example = Annotated[
    str | None,
    typer.Option("--example", metavar="MODULE:FUNCTION", help="With --report: a call's arguments; steps are measured."),
]
Scopes = Annotated[
    list[str] | None,
    typer.Option("--scope", metavar="NAME=REGEX", help="A scope of shared cores, on layers' names. Repeatable."),
]


def _command(name: str | None = None) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """A command of that name, or its function's, whose mistakes are told as messages."""
    return lambda function: app.command(name)(reported(function))


def main() -> None:
    """The console script `tnpeft`."""
    app()


@_command("list")
def list_(
    as_json: Json = False,
    markdown: Annotated[
        str | None, typer.Option("--markdown", metavar="FILE", help="Put the specs in its table.", hidden=True)
    ] = None,
) -> None:
    """List the shipped specs and recipes."""
    if markdown is not None:
        from tnpeft.cli.catalogue import update_catalogue

        update_catalogue(Output(), markdown)
        return
    from tnpeft.cli.list_specs import print_list

    print_list(Output(), as_json)


@_command()
def check(
    files: Annotated[list[str], typer.Argument(metavar="SPEC_OR_RECIPE...", help="Files, folders or shipped names.")],
    as_json: Json = False,
) -> None:
    """Check specs and recipes; print every mistake of every file. Exit status 1 if there is any."""
    from tnpeft.cli.check import check_files

    if not check_files(Output(), files, as_json):
        raise typer.Exit(1)


@_command()
def show(
    spec: OneSpec,
    layer: Annotated[
        str | None,
        typer.Option("--layer", "-l", metavar="KIND:IN,OUT,K", help="e.g. Conv3d:64,128,3 or Conv2d:8,8,1x3,groups=2"),
    ] = None,
    input_: Annotated[
        str | None,
        typer.Option("--input", "-i", metavar="SIZES", help="What each execution mode takes for it: 1,64,24,24,24"),
    ] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Show a spec; with --layer its cores, network and contraction there, with --input also what the modes take."""
    from tnpeft.cli.show import show_spec

    show_spec(Output(), spec, layer, input_, settings or [], as_json)


@_command()
def draw(
    specs: Annotated[list[str], typer.Argument(metavar="SPEC...", help="Shipped names, files, or folders of specs.")],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="A .svg or .png; for several specs a folder.")
    ],
    layer: Annotated[
        str | None, typer.Option("--layer", "-l", metavar="KIND:IN,OUT,K", help="Draw it on this layer, with sizes.")
    ] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Draw the network of a spec as papers do: cores as circles, bonds as lines, open legs by their side."""
    from tnpeft.cli.draw import draw_specs

    draw_specs(Output(), specs, output, layer, settings or [], as_json)


@_command()
def count(
    what: What,
    model: Model,
    match: Match = None,
    settings: Settings = None,
    scopes: Scopes = None,
    as_json: Json = False,
) -> None:
    """Count what a recipe or spec trains on a model, layer by layer. Nothing is computed or allocated."""
    from tnpeft.cli.count import count_parameters

    count_parameters(Output(), what, model, match, settings or [], as_json, scopes or [])


@_command()
def schema(
    what: Annotated[str, typer.Argument(metavar="[spec|recipe]", help="Which files the schema is for.")] = "spec",
) -> None:
    """Print a JSON Schema, with which editors complete and check specs or recipes."""
    from tnpeft.cli.schema import print_schema

    print_schema(Output(), what)


@_command()
def verify(
    spec: OneSpec,
    layer: Annotated[
        str | None,
        typer.Option("--layer", "-l", metavar="KIND:IN,OUT,K", help="Try this layer alone, with any options."),
    ] = None,
    settings: Settings = None,
    examples: Annotated[int, typer.Option("--examples", "-n", min=1, help="How many layers to try.")] = 50,
    seed: Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")] = 0,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="Start no new example after this time.")] = 60.0,
    as_json: Json = False,
) -> None:
    """Verify an adapter on random layers: values, gradients, start, merge, files. Exit status 1 if a check fails."""
    from tnpeft.cli.verify import verify_spec

    if not verify_spec(Output(), spec, layer, settings or [], examples, seed, seconds, as_json):
        raise typer.Exit(1)


@_command()
def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The base model's weights: safetensors, or a folder.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="Those of the full fine-tune.")],
    model: Model,
    target: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="The adapter file to write.")],
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Which spec goes on which layers, and what else is taken over.")
    ] = None,
    spec: Annotated[str | None, typer.Option("--spec", help="Instead of a recipe: one spec, with --match.")] = None,
    match: Annotated[
        str | None, typer.Option("--match", help="With --spec: a regular expression on layers' names, or all.")
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
    from tnpeft.cli.fit import extract_adapter

    good = extract_adapter(
        Output(), base, tuned, model, recipe, spec, match, target, settings or [], scopes or [],
        name=name, method=method, iterations=iterations, largest_error=largest_error, quiet=quiet, as_json=as_json,
    )  # fmt: skip
    if not good:
        raise typer.Exit(1)


@_command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="PEFT's folder, a file of diffusers, LyCORIS, kohya or ComfyUI, a .pth of the TenVOO paper, or ours.",
        ),
    ],
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="The file (for PEFT and diffusers the folder) to write.")
    ],
    model: Model,
    read_as: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="FORMAT",
            help="peft, diffusers, lycoris, kohya, comfyui, tenvoo or tnpeft; its keys say which.",
        ),
    ] = None,
    write_as: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="tnpeft (for other libraries' files), peft, diffusers, lycoris, kohya or comfyui.",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="The adapter's name in a file of tnpeft.")] = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", help="For LoCon, LoHa and LoKr of the paper, whose files do not hold it.")
    ] = None,
    prefix: Annotated[
        str | None, typer.Option("--prefix", help="What the layers' names begin with, other than the format's own.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert an adapter file between libraries. The model says the layers' names and sizes (for DoRA also weights)."""
    from tnpeft.cli.convert import convert_file

    convert_file(
        Output(), source, target, model,
        read_as=read_as, write_as=write_as, name=name, alpha=alpha, prefix=prefix, as_json=as_json,
    )  # fmt: skip


@_command()
def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help="An adapter file of tnpeft, PEFT, LyCORIS or the paper.")],
    as_json: Json = False,
) -> None:
    """Show what an adapter file holds, and which model it would need to load."""
    from tnpeft.cli.inspect_file import inspect_file

    inspect_file(Output(), file, as_json)


@_command()
def budget(
    what: What,
    model: Model,
    params: Annotated[int, typer.Option("--params", "-p", metavar="NUMBER", help="How many parameters may train.")],
    match: Match = None,
    param: Annotated[str, typer.Option("--param", metavar="NAME", help="The param to solve for.")] = "r",
    fixed: Annotated[
        list[str] | None, typer.Option("--fixed", metavar="SPEC", help="A spec that keeps the recipe's. Repeatable.")
    ] = None,
    settings: Settings = None,
    scopes: Scopes = None,
    as_json: Json = False,
) -> None:
    """Find the largest rank that trains no more than so many parameters. Nothing is computed or allocated."""
    from tnpeft.cli.fit import find_budget

    find_budget(Output(), what, model, params, match, param, fixed or [], settings or [], scopes or [], as_json)


@_command()
def search(
    files: Annotated[
        list[str], typer.Argument(metavar="BASE TUNED...", help="Pairs of a base's weights and a full fine-tune's.")
    ],
    model: Model,
    match: Annotated[str, typer.Option("--match", help="The layers: a regular expression on their names, or all.")],
    params: Annotated[int, typer.Option("--params", "-p", metavar="NUMBER", help="How many parameters may train.")],
    target: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="The spec to write, a .yaml file.")],
    evaluations: Annotated[int, typer.Option("--evaluations", "-n", help="How many networks are tried.")] = 100,
    tests: Annotated[
        list[str] | None,
        typer.Option("--test", metavar="BASE=TUNED", help="A pair that the winner alone is tested on. Repeatable."),
    ] = None,
    test_match: Annotated[
        str | None, typer.Option("--test-match", help="Layers, of all pairs, that the winner alone is tested on.")
    ] = None,
    sampler: Annotated[str, typer.Option("--sampler", help="mixed, random, tpe, evolution or local.")] = "mixed",
    seed: Annotated[int, typer.Option("--seed", help="Of everything that is drawn.")] = 0,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Processes.")] = 1,
    storage: Annotated[
        str | None,
        typer.Option("--storage", help="A journal, a .db file or a URL: resumes, and is shared by processes."),
    ] = None,
    command: Annotated[
        str | None,
        typer.Option("--command", help='Fine-tunes {spec} at {rate}; its last line is JSON: {"score": NUMBER}.'),
    ] = None,
    rates: Rates = None,
    finalists: Annotated[int, typer.Option("--finalists", help="With --command: how many are fine-tuned.")] = 3,
    minutes: Minutes = None,
    test_commands: Tests = None,
    example: Example = None,
    report: Annotated[
        str | None,
        typer.Option("--report", metavar="FOLDER", help="Compare with random search and shipped specs; write it here."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
    as_json: Json = False,
) -> None:
    """Search for the network that captures most of full fine-tunes within a number of parameters."""
    from tnpeft.cli.search import search_networks

    search_networks(
        Output(), files, model, params, target, tests=tests or [], rates=rates, report=report, quiet=quiet,
        as_json=as_json, match=match, test_match=test_match, evaluations=evaluations, sampler=sampler, seed=seed,
        jobs=jobs, storage=storage, command=command, finalists=finalists, minutes=minutes,
        test_commands=test_commands or [], example=example,
    )  # fmt: skip


@_command()
def version(as_json: Json = False) -> None:
    """Print the version."""
    output = Output()
    if as_json:
        output.data({"version": tnpeft.__version__})
    else:
        output.say(f"tnpeft {tnpeft.__version__}")
