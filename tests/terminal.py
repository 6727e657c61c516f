"""Running the command line in a test: text, data and mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from tnpeft.cli import app


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def text(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return "\n".join(line.rstrip() for line in result.stdout.splitlines())


def data(*arguments: str | Path) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def mistakes(*arguments: str | Path, status: int = 1) -> list[str]:
    result = run(*arguments)
    assert result.exit_code == status, result.output
    return [line.removeprefix("error ") for line in result.stderr.splitlines()]
