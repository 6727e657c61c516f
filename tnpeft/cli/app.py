"""The command line and its commands on specs: each parses its arguments, calls the library and prints."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Annotated, ParamSpec

import typer

import tnpeft
from tnpeft.cli.options import (
    Json,
    LayerText,
    OneSpec,
    Quiet,
    Seed,
    Settings,
    Watch,
    complete_kind,
    complete_spec,
    complete_what,
)
from tnpeft.cli.output import Output, columns_of, reported

__all__ = ["app", "command", "main"]

app = typer.Typer(
    name="tnpeft",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

NARROW = 72  # columns of a terminal in which help is plain text

P = ParamSpec("P")


def command(name: str | None = None, hidden: bool = False) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """A command of that name, or of its function's; mistakes become messages."""
    return lambda function: app.command(name, hidden=hidden)(reported(function))


def main() -> None:
    """The console script `tnpeft`."""
    columns = columns_of(sys.stdout)
    if columns is not None and columns < NARROW:
        app.rich_markup_mode = None  # frames and columns beside each other take room
    try:
        app(terminal_width=columns)
    finally:  # another Ctrl-C ends the process, and is not told by a traceback of what torch does at its end
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _print_version(asked: bool) -> None:
    if asked:
        Output().say(f"tnpeft {tnpeft.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """A compiler for fine-tuning adapters: YAML tensor networks in, PyTorch modules out."""


@command("list")
def list_(
    layer: Annotated[
        str | None,
        typer.Option(
            "--layer",
            "-l",
            metavar="KIND[:IN,OUT,K]",
            help="Only specs for this kind of layer, or for one layer, with the parameters they train on it.",
            autocompletion=complete_kind,
        ),
    ] = None,
    params: Annotated[
        str | None,
        typer.Option(
            "--params", "-p", metavar="NUMBER", help="Only specs that train at most this many on the layer: 5000 or 5k."
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank",
            metavar="NUMBER",
            help="Only specs whose first steps move the layer's weight in at least this many directions.",
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Option("--source", metavar="TEXT", help="Only specs with this text in their source or title.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
    markdown: Annotated[
        str | None,
        typer.Option("--markdown", metavar="FILE", help="Write the table of specs into this file.", hidden=True),
    ] = None,
) -> None:
    """List the shipped specs and recipes, or the specs that pass a filter."""
    if markdown is not None:
        from tnpeft.cli.catalogue import update_catalogue

        update_catalogue(Output(), markdown)
        return
    from tnpeft.cli.list_specs import Filter, print_list

    print_list(Output(), Filter.of(layer, params, rank, source), quiet, as_json)


@command()
def new(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The .yaml to write; its name becomes the adapter's.")],
    source: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="RECIPE_OR_SPEC",
            help="What to copy: a shipped name or a file.",
            autocompletion=complete_what,
        ),
    ] = "lora",
    as_json: Json = False,
) -> None:
    """Start an adapter of your own: copy a spec or recipe to a new file to edit. Nothing is written over."""
    from tnpeft.cli.new import new_file

    new_file(Output(), file, source, as_json)


@command()
def check(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="SPEC_OR_RECIPE...", help="Files, folders or shipped names.", autocompletion=complete_what
        ),
    ],
    watch: Watch = False,
    as_json: Json = False,
) -> None:
    """Check specs and recipes; print every mistake of every file. Exit status 1 if there is any."""
    from tnpeft.cli.check import check_files

    if watch:
        from tnpeft.cli.watch import watch as run_again

        run_again(Output(), files, lambda changed: check_files(Output(), changed, as_json))
        return
    if not check_files(Output(), files, as_json):
        raise typer.Exit(1)


@command()
def show(
    spec: OneSpec,
    layer: LayerText = None,
    input_: Annotated[
        str | None,
        typer.Option(
            "--input",
            "-i",
            metavar="SIZES",
            help="The sizes of an input, e.g. 1,64,24,24,24: what each execution mode takes for it.",
        ),
    ] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Show a spec; with --layer also its cores and contraction on it, with --input each mode's time and memory."""
    from tnpeft.cli.show import show_spec

    show_spec(Output(), spec, layer, input_, settings or [], as_json)


@command()
def draw(
    specs: Annotated[
        list[str],
        typer.Argument(
            metavar="SPEC...", help="Shipped names, files, or folders of specs.", autocompletion=complete_spec
        ),
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="A .svg, .png or .pdf; for several specs a folder.")
    ],
    layer: LayerText = None,
    settings: Settings = None,
    watch: Watch = False,
    as_json: Json = False,
) -> None:
    """Draw the network of a spec as papers do: cores as circles, bonds as lines, open legs on their side."""
    from tnpeft.cli.draw import draw_again, draw_specs

    if watch:
        from tnpeft.cli.watch import watch as run_again

        again = draw_again(Output(), specs, output, layer, settings or [], as_json)
        run_again(Output(), specs, again)
        return
    draw_specs(Output(), specs, output, layer, settings or [], as_json)


@command()
def edit(
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="[FILE]",
            help="A YAML file, new or not, or a shipped name to try. A new file is written when you save.",
            autocompletion=complete_spec,
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="SPEC", help="The spec that a new file begins as.", autocompletion=complete_spec
        ),
    ] = None,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="The port of the page; 0 finds a free one.")
    ] = 0,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
) -> None:
    """Edit a spec in the browser, on this machine: mistakes, picture, sizes and costs follow each keystroke."""
    from tnpeft.cli.edit import edit_spec

    edit_spec(Output(), file, start, port, browser)


@command()
def lsp(
    layer: Annotated[
        str | None,
        typer.Option(
            "--layer",
            "-l",
            metavar="KIND:IN,OUT,K",
            help="The layer on which hover shows sizes.",
            autocompletion=complete_kind,
        ),
    ] = None,
) -> None:
    """Serve an editor over the Language Server Protocol, on stdin and stdout: mistakes, hover, completion."""
    from tnpeft.cli.lsp import serve_editors

    serve_editors(layer)


@command()
def schema(
    what: Annotated[str, typer.Argument(metavar="[spec|recipe]", help="Which files the schema is for.")] = "spec",
) -> None:
    """Print a JSON Schema for editors, which then complete and check specs or recipes."""
    from tnpeft.cli.schema import print_schema

    print_schema(Output(), what)


@command()
def verify(
    spec: OneSpec,
    layer: LayerText = None,
    settings: Settings = None,
    examples: Annotated[
        int, typer.Option("--examples", "-n", metavar="NUMBER", min=1, help="How many layers to try.")
    ] = 50,
    seed: Seed = 0,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="NUMBER", min=0.1, help="Start no new example after this time.")
    ] = 60.0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Verify an adapter on random layers, or on that of --layer: values, gradients, start, merge, files.

    Exit status 1 if a check fails. Ctrl-C ends the checks: what was found so far is printed, and the exit status is
    130.
    """
    from tnpeft.cli.verify import verify_spec

    report = verify_spec(Output(), spec, layer, settings or [], examples, seed, seconds, quiet, as_json)
    if not report.ok:
        raise typer.Exit(130 if report.interrupted else 1)


@command(hidden=True)  # scripts ask it for JSON
def version(as_json: Json = False) -> None:
    """Print the version."""
    output = Output()
    if as_json:
        output.data({"version": tnpeft.__version__})
    else:
        output.say(f"tnpeft {tnpeft.__version__}")
