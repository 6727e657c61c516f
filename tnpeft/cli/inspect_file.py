"""`tnpeft inspect`: what an adapter file holds and needs."""

from __future__ import annotations

from tnpeft.cli.output import Output, table

__all__ = ["inspect_file"]


def inspect_file(output: Output, name: str, as_json: bool) -> None:
    """Print what is in a file: a row for each adapted layer, then the rest line by line."""
    from tnpeft.io.inspecting import COLUMNS, inspect

    found = inspect(name)
    if as_json:
        output.data(found.as_dict())
        return
    output.say(found.title)
    if found.layers:
        output.say()
        output.show(table("", COLUMNS, (layer.row for layer in found.layers)))
    output.say()
    for fact, text in found.facts.items():
        output.say(f"{fact:<18}{text}")
    for problem in found.problems:
        output.say(problem)
