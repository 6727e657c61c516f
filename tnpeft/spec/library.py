"""Where specs come from: text, files, and the ones that ship with tnpeft."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tnpeft.errors import Problem, SpecError, near_miss
from tnpeft.spec.checks import check
from tnpeft.spec.document import Problems, clip, read_bytes, read_file
from tnpeft.spec.factorize import Table
from tnpeft.spec.inits import registered_inits
from tnpeft.spec.model import Core, SizeRule, Spec, Term, provide
from tnpeft.spec.paths import is_file
from tnpeft.spec.reader import parse_draft, parse_table
from tnpeft.spec.recognise import recognise

__all__ = ["find_shipped", "list_specs", "load_spec", "not_yaml", "shipped_folder", "shipped_tables"]


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


def find_shipped(name: str | Path, what: str, *folders: str) -> Path:
    """The file of a name shipped in one of the folders, or of a path; raises SpecError, with near misses, for none."""
    if not isinstance(name, str | Path):
        fix = f"Give the name of a shipped {what}, or the path of a file."
        raise SpecError(Problem(what, "a name or a path", clip(name), fix))
    path = Path(name)
    if path.suffix not in (".yaml", ".yml") and (problem := not_yaml(path, what)):
        raise SpecError(problem)
    plain = isinstance(name, str) and path.suffix not in (".yaml", ".yml") and path.name == name
    for folder in folders if plain and name not in ("", ".", "..") else ():
        shipped = shipped_folder() / folder / f"{name}.yaml"
        if is_file(shipped):
            return shipped
    if path.suffix in (".yaml", ".yml") or (not plain and is_file(path)):
        return path
    known = [found.stem for folder in folders for found in sorted((shipped_folder() / folder).glob("*.yaml"))]
    fix = near_miss(str(name), known) or "Give a path that ends in .yaml, or one of these names."
    raise SpecError(Problem(f"{what} {clip(str(name), 82)}", f"a file, or one of {', '.join(known)}", "neither", fix))


def not_yaml(path: Path, what: str) -> Problem | None:
    """What is said of a path to something else, such as an adapter file; None for text and for what is not there."""
    kind = recognise(path) if path.is_file() else None
    if kind is None or kind.name in ("text", "empty", "json"):
        return None
    fix = kind.fix if kind.name in ("adapter", "safetensors") else f"Give the name of a shipped {what}, or a YAML file."
    return Problem(f"{what} {clip(str(path), 82)}", "a YAML file", kind.text, fix)


def load_spec(name: str | Path) -> Spec:
    """A shipped spec by name (`tenvoo_l`) or a spec file by path.

    Raises SpecError with every mistake in the file, each with file, line and column.
    """
    path = find_shipped(name, "spec", "")
    return _parsed(read_bytes(path), str(path), registered_inits())


@lru_cache(maxsize=64)
def _parsed(text: bytes, file: str, _inits: object) -> Spec:
    """A recipe names one spec several times, a program attaches it to several models: the text is parsed once."""
    return Spec.from_yaml(text, file)


def read_spec(text: str | bytes, file: str, tables: Mapping[str, Table] | None, known_inits: bool) -> Spec:
    """The body of `Spec.from_yaml`."""
    if not isinstance(text, str | bytes):
        fix = "Pass the YAML itself, or use `load_spec` for a file."
        raise SpecError(Problem("spec", "YAML text", clip(text), fix))
    problems = Problems()
    draft = parse_draft(text, file, {**shipped_tables(), **(tables or {})}, problems, known_inits)
    check(draft, problems, saved=not known_inits)
    problems.raise_if_any()
    # pydantic checks once more that no part is missing.
    parts = {
        "cores": [_fields(core, Core) for core in draft.cores],
        "sizes": [_fields(rule, SizeRule) for rule in draft.sizes],
        "terms": [_fields(term, Term) for term in draft.terms],
    }
    copied = (
        *("name", "title", "source", "layers", "params", "bond", "factors", "compose"),
        *("scale", "start", "seed", "text", "file", "places", "tables"),
    )
    return Spec.model_validate({**{key: getattr(draft, key) for key in copied}, **parts})


def _fields(part: object, model: type[BaseModel]) -> dict[str, Any]:
    """What a part of a draft has in common with the part of a spec that it becomes."""
    return {name: getattr(part, name) for name in model.model_fields}


provide("read", read_spec)
