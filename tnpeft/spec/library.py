"""Where specs come from: text, files, and the ones that ship with tnpeft."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from tnpeft.documents.nodes import read_file
from tnpeft.documents.paths import is_file
from tnpeft.documents.recognise import recognise
from tnpeft.errors import Problem, Problems, SpecError, clip, closest
from tnpeft.spec.factorize import Table
from tnpeft.spec.tables import parse_table

__all__ = ["find_shipped", "label_of", "list_specs", "not_yaml", "shipped_folder", "shipped_tables"]


def shipped_folder() -> Path:
    """The shipped specs: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "_specs"
    return inside if inside.is_dir() else package.parent / "specs"


@lru_cache(maxsize=1)
def shipped_tables() -> Mapping[str, Table]:
    """The shipped factor tables by name."""
    problems = Problems()
    tables = {
        path.stem: parse_table(read_file(path), problems) for path in sorted(shipped_folder().glob("factors/*.yaml"))
    }
    problems.raise_if_any()
    return tables


def list_specs() -> tuple[str, ...]:
    """The names of the shipped specs."""
    return tuple(sorted(path.stem for path in shipped_folder().glob("*.yaml")))


def find_shipped(name: str | Path, what: str, *folders: str, beside: Path = Path()) -> Path:
    """The file of a name shipped in one of the folders, or of a path from the folder `beside` (the current folder).

    Raises SpecError, with near misses, if there is no such file.
    """
    if not isinstance(name, str | Path):
        fix = f"Give the name of a shipped {what}, or the path of a file."
        raise SpecError(Problem(what, "a name or a path", clip(name), fix))
    path = Path(name)
    is_yaml = path.suffix in _ENDINGS
    if not is_yaml and (problem := not_yaml(path, what)):
        raise SpecError(problem)
    plain = isinstance(name, str) and not is_yaml and path.name == name
    for folder in folders if plain and name not in ("", ".", "..") else ():
        if is_file(file := shipped_folder() / folder / f"{name}.yaml"):
            return file
    for place in (beside / path, path):
        if not plain and is_file(place):
            return place
    fix = _meant(path, beside, [found.stem for folder in folders for found in _yaml_files(shipped_folder() / folder)])
    if is_yaml:
        if fix and not os.path.lexists(path):
            missing = os.strerror(errno.ENOENT)
            raise SpecError(Problem(f"cannot read this {what}", "a readable file", missing, fix, str(path)))
        return path  # reading it says what is wrong
    others = {folder: kind for folder, kind in (("", "a spec"), ("recipes", "a recipe")) if folder not in folders}
    shipped = (kind for folder, kind in others.items() if is_file(shipped_folder() / folder / f"{path.name}.yaml"))
    found = next(shipped, "neither")
    is_gone = found == "neither" and _is_path(name) and not os.path.lexists(path)
    found, names = ("no such file", "Check the path; ") if is_gone else (found, "")
    fix = fix if fix and found in ("neither", "no such file") else f"{names}`tnpeft list` prints the names."
    expected = f"a YAML file, or the name of a shipped {what}"
    raise SpecError(Problem(f"{what} {clip(str(name), 82)}", expected, found, fix))


_ENDINGS = (".yaml", ".yml")
_OTHER_ENDINGS = (".json", ".md", ".pt", ".pth", ".py", ".safetensors", ".toml", ".txt")
_MOST_FILES = 2_000  # looked at in a folder


def _is_path(name: str | Path) -> bool:
    """Whether it is meant as a file, not as a shipped name."""
    return isinstance(name, Path) or Path(name).name != name or Path(name).suffix in _OTHER_ENDINGS


def _meant(path: Path, beside: Path, shipped: Sequence[str]) -> str:
    """The sentence "Did you mean ...?" for a path without a file: files in its folder come before shipped names."""
    stem = path.stem if path.suffix in (*_ENDINGS, *_OTHER_ENDINGS) else path.name
    files = (
        {found.stem: str(path.with_name(found.name)) for found in _yaml_files((beside / path).parent)} if stem else {}
    )
    same = {name.casefold(): name for name in (*shipped, *files)}.get(stem.casefold())
    # Who writes an ending means a file.
    name = (
        same
        if same is not None
        else closest(stem, files if path.suffix in (*_ENDINGS, *_OTHER_ENDINGS) else (*files, *shipped))
    )
    return f"Did you mean `{files.get(name, name)}`?" if name is not None else ""


def _yaml_files(folder: Path) -> list[Path]:
    """The YAML files of a folder, in order of their names; none where it cannot be read."""
    try:
        entries = itertools.islice(folder.iterdir(), _MOST_FILES)
        return sorted(entry for entry in entries if entry.suffix in _ENDINGS)
    except (OSError, ValueError):
        return []


def label_of(path: Path) -> str:
    """A file's name in messages; a shipped file has its short name, wherever it is installed."""
    return path.name if shipped_folder() in path.parents else str(path)


def not_yaml(path: Path, what: str) -> Problem | None:
    """The problem of a path to another kind of file, such as an adapter file; None for text, or if nothing is there."""
    kind = recognise(path) if is_file(path) else None
    if kind is None or kind.name in ("text", "empty", "json"):
        return None
    fix = kind.fix if kind.name in ("adapter", "safetensors") else f"Give the name of a shipped {what}, or a YAML file."
    return Problem(f"{what} {clip(str(path), 82)}", "a YAML file", kind.text, fix)
