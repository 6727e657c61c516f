"""Adapter files on disk: written whole or not at all, and never trusted."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tnpeft.documents import files
from tnpeft.documents.recognise import recognise
from tnpeft.errors import AdapterFileError, Problem, TnpeftError, clip
from tnpeft.errors import shown_path as shown
from tnpeft.io.manifest import FORMAT, KEY, Manifest, digest, encode
from tnpeft.network import Spec

__all__ = [
    "FOREIGN",
    "file_path",
    "in_file",
    "not_safetensors",
    "of_file",
    "read",
    "refuse",
    "replace_files",
    "safetensors_of",
    "shown",
    "specs_of",
    "what_is_at",
    "write",
]

FOREIGN = "Pass a file written by `tnpeft.save`."
_LONGEST_SHOWN = 200  # characters of a library's message
_OTHERS = f"{FOREIGN[:-1]}; `tnpeft.load_foreign` reads those of other libraries."
_OF_TENSORS = ("", ".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_OTHER = "Pass the file with the tensors, for example `adapter.safetensors`."
_BESIDE = "Pass the folder that it stands in."
_DAMAGED = "Copy or download the file again, or save the adapter once more."


def refuse(path: Path, what: str, expected: str, found: str, fix: str) -> AdapterFileError:
    return AdapterFileError(Problem(what, expected, found, fix, where=shown(path)))


def in_file(path: Path, problems: Iterable[Problem], where: str | None = None) -> list[Problem]:
    """The problems, each with the file, and the layer in it, that it is about."""
    problems = list(problems)
    places = [(shown(path), where, problem.where) for problem in problems]
    texts = [": ".join(str(part) for part in parts if part is not None) for parts in places]
    return [replace(problem, where=text) for problem, text in zip(problems, texts, strict=True)]


@contextmanager
def of_file(path: Path, where: str | None = None) -> Iterator[None]:
    """Inside, mistakes in specs, layers and tensors are reported as mistakes of the file."""
    try:
        yield
    except TnpeftError as error:
        raise AdapterFileError(*in_file(path, error.problems, where)) from error


def specs_of(path: Path, manifest: Manifest) -> list[Spec]:
    """The specs that a file carries. Their inits need not be registered here: the file has the cores' values."""
    with of_file(path):
        return [Spec.from_yaml(entry.text, entry.file, entry.tables, known_inits=False) for entry in manifest.specs]


@contextmanager
def safetensors_of(path: Path, **advice: Any) -> Iterator[Any]:
    """An open safetensors file. Raises AdapterFileError, with the advice of `not_safetensors`, for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except OSError as error:
        fix = "Check the file and its permissions."
        raise refuse(path, "adapter file", "to be read", error.strerror or str(error), fix) from error
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, AdapterFileError):
            raise
        raise not_safetensors(path, "adapter file", error, **advice) from error


def file_path(path: object) -> Path:
    """The caller's path. Raises AdapterFileError for what cannot be the name of a file."""
    fix = "For example `adapter.safetensors`."
    name = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(name, str):
        raise AdapterFileError(Problem("path", "a text or a `pathlib.Path`", clip(path), fix))
    try:
        usable = b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise AdapterFileError(Problem("path", "characters that a file's name can have", clip(name), fix))
    return Path(name)


def write(path: Path, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """Write one file atomically: after a crash at any moment `path` is what it was, or complete.

    Raises AdapterFileError, leaving no temporary file.
    """
    found = what_is_at(path)
    if found == "a folder":
        raise refuse(path, "adapter file", "a file name", found, "Add a name, for example `adapter.safetensors`.")
    if found not in ("a file", "no such file"):
        raise refuse(path, "adapter file", "a new or an ordinary file", found, "Choose another path.")
    replace_files({path: safetensors.torch.save(dict(tensors), {KEY: encode(manifest, tensors)})})


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """Write all of the files or, but for a crash between two moves, none. Raises AdapterFileError."""
    files.replace_files(contents, _unwritten)


def _unwritten(path: Path, reason: str) -> AdapterFileError:
    fix = "Choose a folder that exists, can be written to and has room."
    return refuse(path, "adapter file", "to be written", reason, fix)


def not_safetensors(
    path: Path, what: str, error: Exception, damaged: str, pickled: str | None = None, or_torch: bool = False
) -> AdapterFileError:
    """The error for a file that the safetensors library does not read: what it is, if its first bytes tell.

    `damaged` is the advice for a broken file, `pickled` that for one of torch's own files, if it differs. With
    `or_torch` a torch file would have been accepted too.
    """
    kind = recognise(path)
    if kind is None or kind.name in ("safetensors", "adapter", "cut"):
        found, fix = " ".join(str(error).split())[:_LONGEST_SHOWN], damaged
    else:
        found, fix = kind.text, kind.fix or damaged
        fix = pickled if pickled and kind.name in ("torch", "pickle") else fix
        if kind.name in ("text", "json") and path.suffix not in _OF_TENSORS:  # no download that went wrong
            fix = _BESIDE if path.name == "adapter_config.json" else _OTHER
    expected = "a complete safetensors or torch file" if or_torch else "a complete safetensors file"
    return refuse(path, what, expected, found, fix)


def read(path: Path) -> tuple[Manifest, dict[str, Tensor]]:
    """The manifest and the tensors of a file that is complete and unchanged since it was saved.

    Raises AdapterFileError for anything else.
    """
    found = what_is_at(path)
    if found != "a file":
        kind = recognise(path) if found == "a folder" else None
        text, fix = (kind.text, kind.fix or FOREIGN) if kind else (found, FOREIGN)
        raise refuse(path, "adapter file", "a file", text, fix)
    with safetensors_of(path, damaged=_DAMAGED, pickled=_OTHERS) as file:
        fields = _fields(path, file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    try:
        unchanged = fields.pop("sha256", None) == digest(fields, tensors)
    except (ValueError, RecursionError):  # what `json` reads but does not write: 1e999
        unchanged = False
    if not unchanged:
        raise refuse(path, "checksum", "the one it was saved with", "another: the file was changed", _DAMAGED)
    try:
        return Manifest.model_validate(fields), tensors
    except ValidationError as error:
        first = error.errors()[0]
        found = f"`{'.'.join(map(str, first['loc']))}`: {first['msg']}"
        raise refuse(path, "metadata", "that of an adapter", found, FOREIGN) from error


def _fields(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The metadata of an adapter file of a known format, without the format's number."""
    if KEY not in metadata:
        raise refuse(path, "adapter file", "one written by tnpeft", "a safetensors file without its metadata", _OTHERS)
    try:
        fields = json.loads(metadata[KEY])
        number = fields.pop("format")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise refuse(path, "metadata", "that of an adapter", "text that is none", _DAMAGED) from error
    if type(number) is not int or not 1 <= number <= FORMAT:
        fix = "Update tnpeft." if isinstance(number, int) and number > FORMAT else FOREIGN
        raise refuse(path, "file format", f"at most {FORMAT}", f"{number}", fix)
    return fields  # type: ignore[no-any-return]


def what_is_at(path: Path) -> str:
    """What is at a path, with links followed. Raises AdapterFileError if that cannot be known."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "no such file"
    except OSError as error:
        fix = "Choose another path."
        raise refuse(path, "adapter file", "a path that can be used", error.strerror or str(error), fix) from error
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a file" if stat.S_ISREG(mode) else "a device, pipe or socket"
