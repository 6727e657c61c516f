"""The pages in `docs` and other texts: their blocks of code, and which need libraries that `make test` does without."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import yaml

import tnpeft
from tnpeft.cli.app import app

__all__ = ["HEAVY", "LIGHT", "PAGES", "ROOT", "blocks", "check_command", "commands", "read_yaml", "run"]

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
_HEAVY = {"diffusers", "lightning", "maps", "monai", "monai_ddpm", "nnunet", "opacus", "timm", "transformers"}
HEAVY = [page for page in PAGES if page.stem in _HEAVY]
"""tests/wide runs these."""
LIGHT = [page for page in PAGES if page not in HEAVY]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMANDS = ("make ", "pip ", "python ", "tnpeft ")


def run(page: Path) -> dict[str, object]:
    """Run a page's blocks of Python in their order, and read its blocks of YAML; the names that are known then."""
    text = page.read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": page.stem}
    for block in blocks(text, "python"):
        exec(compile(block, page.name, "exec"), names)
    for block in blocks(text, "yaml"):
        read_yaml(block, page.name)
    return names


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return [block for name, block in _BLOCK.findall(text) if name == language]


def read_yaml(block: str, name: str) -> None:
    """A recipe, a spec, or a part of a MONAI Bundle, whose targets are tnpeft's own functions."""
    content = yaml.safe_load(block)
    if "adapters" in content:
        assert tnpeft.Recipe.from_yaml(block, name).entries
    elif "cores" in content:
        assert tnpeft.Spec.from_yaml(block, name).cores
    else:
        targets = [part["_target_"] for part in content.values()]
        assert targets
        for target in targets:
            assert target.partition(".")[2] in tnpeft.__all__, target


def commands(text: str) -> Iterator[str]:
    """Every command line in a text's blocks for a shell, and in those that name no language."""
    for block in (*blocks(text, "sh"), *blocks(text, "")):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith(_COMMANDS):
                yield line.partition(" #")[0].rstrip()


def check_command(line: str) -> None:
    """Whether a command line can be typed: its targets, files, extras and options exist."""
    program, *arguments = shlex.split(line)
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert arguments[0] in targets, line
    elif program == "pip":
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        for extra in re.findall(r"[\w-]+", "".join(re.findall(r"\[(.*?)\]", line))):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), line
    elif program == "python" and arguments[0] != "-m":
        files = [word for word in arguments if word.startswith("examples/")]
        assert files, line
        assert all((ROOT / file).exists() for file in files), line
    elif program == "tnpeft":
        _parse(arguments)


def _parse(arguments: list[str]) -> None:
    """Raises where the command, or one of its options, is none."""
    import typer.main

    commands = typer.main.get_group(app).commands
    assert arguments[0] in commands, arguments
    commands[arguments[0]].make_context(arguments[0], arguments[1:])
