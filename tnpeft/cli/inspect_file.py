"""`tnpeft inspect`: what an adapter file holds and needs."""

from __future__ import annotations

from tnpeft.cli.output import Output, table

__all__ = ["inspect_file"]


def inspect_file(output: Output, name: str, as_json: bool) -> None:
    """Print what is in a file: a row for each adapted layer, then the rest line by line."""
    from tnpeft.io.inspecting import inspect

    found = inspect(name)
    if as_json:
        output.data(found.as_dict())
        return
    output.say(found.title)
    if found.layers:
        output.say()
        output.show(table("", found.columns, found.rows))
    output.say()
    for line in (*found.lines, *found.problems):
        output.say(line)
