"""`tnpeft new`: a shipped spec or recipe as a file of your own."""

from __future__ import annotations

import re
from pathlib import Path

from tnpeft.cli.check import SUFFIXES, kind_of
from tnpeft.cli.output import Output, UsageError
from tnpeft.documents.paths import is_folder
from tnpeft.errors import Problem, clip, shown_path
from tnpeft.spec import find_shipped

__all__ = ["new_file"]

_NAME_LINE = re.compile(r"^name:.*$", re.MULTILINE)
_SCHEMA_LINE = re.compile(r"^# yaml-language-server:.*\n", re.MULTILINE)  # its path is that of the shipped file


def new_file(output: Output, target: str, source: str, as_json: bool) -> None:
    """Copy a spec or recipe to a new file, and name it like the file. No file is ever overwritten."""
    path = Path(target)
    if path.suffix not in SUFFIXES:
        found = clip(path.suffix) if path.suffix else "no suffix"
        raise UsageError(Problem("FILE", f"a name in {' or '.join(SUFFIXES)}", found, "For example my.yaml.", target))
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", path.stem)
    file = find_shipped(source, "recipe or spec", "recipes", "")
    kind = kind_of(source)
    if kind not in ("spec", "recipe"):
        raise UsageError(Problem("--from", "a spec or recipe", "neither", "`tnpeft list` prints the names.", source))
    text = _NAME_LINE.sub(f"name: {_word(name)}", _SCHEMA_LINE.sub("", file.read_text(encoding="utf-8")), count=1)
    _write(path, text)
    if as_json:
        output.data({"file": target, "from": source, "kind": kind, "name": name})
        return
    output.say(f"wrote {target}: a {kind} named '{name}', from {source}")
    if kind == "spec":
        output.say(f"Edit it, then `tnpeft check {target}` and `tnpeft show {target}`.")
    else:
        output.say(f"Edit it, then `tnpeft check {target}` and `tnpeft count {target} --model ...`.")


def _word(name: str) -> str:
    """A name, quoted if YAML would read it as a number, a truth value or null."""
    plain = name[:1].isalpha() and name.lower() not in ("true", "false", "null")
    return name if plain else f'"{name}"'


def _write(path: Path, text: str) -> None:
    """Write a new file. Raises UsageError if there is one already, or none can be written."""
    if not is_folder(path.parent):
        found, fix = f"no folder '{shown_path(path.parent)}'", "Make the folder first, or choose another."
        raise UsageError(Problem("FILE", "a name in a folder that exists", found, fix, shown_path(path)))
    try:
        with path.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except FileExistsError:
        fix = "Choose another name: nothing is written over."
        raise UsageError(Problem("FILE", "a name that is free", "one that is taken", fix, shown_path(path))) from None
    except (OSError, ValueError) as error:
        found = getattr(error, "strerror", None) or str(error)
        fix = "Choose a folder that can be written to."
        raise UsageError(Problem("FILE", "to be written", found, fix, shown_path(path))) from error
