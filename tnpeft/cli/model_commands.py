"""The commands on models, checkpoints and adapter files."""

from __future__ import annotations

from typing import Annotated

import typer

from tnpeft.cli.app import command
from tnpeft.cli.options import (
    Json,
    Match,
    Model,
    Number,
    Quiet,
    Scopes,
    Seed,
    Settings,
    What,
    complete_model,
    complete_source,
    complete_spec,
    complete_target,
    complete_what,
)
from tnpeft.cli.output import Output

__all__ = ["budget", "convert", "count", "fit", "inspect", "search"]

_Spec = Annotated[
    str | None,
    typer.Option(
        "--spec", metavar="SPEC", help="A shipped name or a file; needs --match.", autocompletion=complete_spec
    ),
]
_Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        metavar="RECIPE",
        help="Instead of --spec: which spec goes on which layers, and what else is copied from the fine-tune.",
        autocompletion=complete_what,
    ),
]
_ModelIfAny = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="Without it layers are guessed from weights: with two axes Linear, with more a convolution.",
        autocompletion=complete_model,
    ),
]

# What `search` does after its search.
_Rates = Annotated[
    list[float] | None,
    typer.Option("--rate", help="With --command: a learning rate to fine-tune at. Repeatable."),
]
_Minutes = Annotated[
    float | None,
    typer.Option("--minutes", help="Begin nothing new after this time; with --storage a later call goes on."),
]
_Tests = Annotated[
    list[str] | None,
    typer.Option(
        "--test-command", metavar="NAME=COMMAND", help="With --report: tests each row at its best rate. Repeatable."
    ),
]
_Example = Annotated[
    str | None,
    typer.Option(
        "--example",
        metavar="MODULE:FUNCTION",
        help="With --report: returns the arguments of a call, for measuring steps.",
    ),
]
_TuneCommand = Annotated[
    str | None,
    typer.Option("--command", help='Fine-tunes {spec} at {rate} and prints {"score": NUMBER} as its last line.'),
]


@command()
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


@command()
def budget(
    what: What,
    model: Model,
    params: Number,
    match: Match = None,
    param: Annotated[str, typer.Option("--param", metavar="NAME", help="The param to solve for.")] = "r",
    fixed: Annotated[
        list[str] | None,
        typer.Option("--fixed", metavar="SPEC", help="A spec that keeps the recipe's value. Repeatable."),
    ] = None,
    settings: Settings = None,
    scopes: Scopes = None,
    as_json: Json = False,
) -> None:
    """Find the largest rank that trains at most this many parameters. Nothing is computed or allocated."""
    from tnpeft.cli.budget import find_budget

    find_budget(Output(), what, model, params, match, param, fixed or [], settings or [], scopes or [], as_json)


@command("extract", hidden=True)  # as it was called
@command()
def fit(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The base model's weights: safetensors, a folder, or a state dict.")
    ],
    target: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="The adapter file to write.")],
    tuned: Annotated[str | None, typer.Argument(metavar="TUNED", help="The full fine-tune's weights.")] = None,
    delta: Annotated[
        str | None, typer.Option("--delta", metavar="FILE", help="Instead of TUNED: the differences, tuned minus base.")
    ] = None,
    spec: _Spec = None,
    match: Match = None,
    recipe: _Recipe = None,
    model: _ModelIfAny = None,
    settings: Settings = None,
    scopes: Scopes = None,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="The adapter's name in the file.")] = "default",
    method: Annotated[str, typer.Option("--method", metavar="METHOD", help="auto, als or adam.")] = "auto",
    iterations: Annotated[
        int | None,
        typer.Option("--iterations", metavar="NUMBER", help="Sweeps (100) or Adam's steps (2000) per layer, at most."),
    ] = None,
    largest_error: Annotated[
        float | None,
        typer.Option(
            "--max-error", metavar="NUMBER", help="Exit with status 1 if a layer's relative error is above it."
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fit an adapter to a full fine-tune, layer by layer, and say what share of the change it captures."""
    from tnpeft.cli.fit import fit_adapter_file

    good = fit_adapter_file(
        Output(), base, tuned, delta, model, recipe, spec, match, target, settings or [], scopes or [],
        name=name, method=method, iterations=iterations, largest_error=largest_error, quiet=quiet, as_json=as_json,
    )  # fmt: skip
    if not good:
        raise typer.Exit(1)


@command()
def search(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="BASE TUNED...", help="Pairs of files: a base's weights, and those of its full fine-tune."
        ),
    ],
    model: Model,
    match: Annotated[str, typer.Option("--match", help="The layers: a regular expression on their names, or all.")],
    params: Number,
    target: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="The spec to write, a .yaml file.")],
    evaluations: Annotated[int, typer.Option("--evaluations", "-n", help="How many networks are tried.")] = 100,
    tests: Annotated[
        list[str] | None,
        typer.Option("--test", metavar="BASE=TUNED", help="A pair that only the winner is tested on. Repeatable."),
    ] = None,
    test_match: Annotated[
        str | None, typer.Option("--test-match", help="Layers of all pairs that only the winner is tested on.")
    ] = None,
    sampler: Annotated[str, typer.Option("--sampler", help="mixed, random, tpe, evolution or local.")] = "mixed",
    seed: Seed = 0,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="How many processes work.")] = 1,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage", help="A journal, a .db file or a database URL, to resume from and to share between processes."
        ),
    ] = None,
    command: _TuneCommand = None,
    rates: _Rates = None,
    finalists: Annotated[
        int, typer.Option("--finalists", help="With --command: how many of the best are fine-tuned.")
    ] = 3,
    minutes: _Minutes = None,
    test_commands: _Tests = None,
    example: _Example = None,
    report: Annotated[
        str | None,
        typer.Option(
            "--report", metavar="FOLDER", help="Compare with random search and shipped specs; write a report here."
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Search for the network that captures most of some full fine-tunes within a number of parameters."""
    from tnpeft.cli.search import search_networks

    search_networks(
        Output(), files, model, params, target, tests=tests or [], rates=rates, report=report, quiet=quiet,
        as_json=as_json, match=match, test_match=test_match, evaluations=evaluations, sampler=sampler, seed=seed,
        jobs=jobs, storage=storage, command=command, finalists=finalists, minutes=minutes,
        test_commands=test_commands or [], example=example,
    )  # fmt: skip


@command()
def inspect(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="An adapter file of tnpeft, PEFT, LyCORIS or the TenVOO paper.")
    ],
    as_json: Json = False,
) -> None:
    """Show what an adapter file holds, and what model it needs to load."""
    from tnpeft.cli.inspect_file import inspect_file

    inspect_file(Output(), file, as_json)


@command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="PEFT's folder, a file of diffusers, LyCORIS, kohya, ComfyUI or tnpeft, or the TenVOO paper's .pth.",
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
            help="peft, diffusers, lycoris, kohya, comfyui, tenvoo or tnpeft; if left out, the keys in it tell.",
            autocompletion=complete_source,
        ),
    ] = None,
    write_as: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="tnpeft (for other libraries' files), peft, diffusers, lycoris, kohya or comfyui.",
            autocompletion=complete_target,
        ),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="The adapter's name in a file of tnpeft.")] = None,
    alpha: Annotated[
        float | None,
        typer.Option("--alpha", help="Alpha of the paper's LoCon, LoHa and LoKr, whose files do not hold it."),
    ] = None,
    prefix: Annotated[
        str | None, typer.Option("--prefix", help="What the layers' names begin with, other than the format's own.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert an adapter file between libraries. The model gives layers' names and sizes (for DoRA also weights)."""
    from tnpeft.cli.convert import convert_file

    convert_file(
        Output(), source, target, model,
        read_as=read_as, write_as=write_as, name=name, alpha=alpha, prefix=prefix, as_json=as_json,
    )  # fmt: skip
