"""`tnpeft schema`: JSON Schemas for editors."""

from __future__ import annotations

from tnpeft.cli.output import Output, UsageError
from tnpeft.errors import Problem, near_miss

__all__ = ["print_schema"]

KINDS = ("spec", "recipe")


def print_schema(output: Output, what: str) -> None:
    """Print the JSON Schema of specs or of recipes."""
    if what not in KINDS:
        fix = near_miss(what, KINDS) or "Write `tnpeft schema spec`."
        raise UsageError(Problem("the schema", f"one of {', '.join(KINDS)}", f"{what[:40]!a}", fix))
    if what == "recipe":
        from tnpeft.recipe.json_schema import recipe_schema

        output.data(recipe_schema())
    else:
        from tnpeft.spec.json_schema import spec_schema

        output.data(spec_schema())
