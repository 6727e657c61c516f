"""Adapter files on disk: whole or not there, and never trusted."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tnpeft.errors import AdapterFileError, Problem
from tnpeft.io.manifest import FORMAT, KEY, Manifest, digest, encode
from tnpeft.spec.document import clip

__all__ = ["FOREIGN", "file_path", "read", "refuse", "replace_files", "shown", "what_is_at", "write"]

FOREIGN = "Pass a file written by `tnpeft.save`."
_LONGEST_SHOWN = 200  # characters of a path in a message
_DAMAGED = "Copy or download the file again, or save the adapter once more."


def refuse(path: Path, what: str, expected: str, found: str, fix: str) -> AdapterFileError:
    return AdapterFileError(Problem(what, expected, found, fix, where=shown(path)))


def shown(path: Path) -> str:
    """A path for a message of one line."""
    text = str(path)
    return text if text.isprintable() and len(text) <= _LONGEST_SHOWN else clip(text, _LONGEST_SHOWN)


def file_path(path: object) -> Path:
    """What the caller passed as a path. Raises AdapterFileError for what no file can be called."""
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
    """Write each file beside its place, then move all of them there, the last one last.

    Raises AdapterFileError, leaving no temporary file.
    """
    waiting: dict[Path, Path] = {}
    path = next(iter(contents))
    try:
        try:
            for path, data in contents.items():
                target = Path(os.path.realpath(path))  # through a link, not over it
                temporary = target.with_name(f".{target.name[:40]}.{secrets.token_hex(4)}.tmp")
                waiting[temporary] = target
                with temporary.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            for temporary, target in waiting.items():
                temporary.replace(target)
            for folder in {target.parent for target in waiting.values()}:
                _sync_folder(folder)
        finally:
            for temporary in waiting:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        fix = "Choose a folder that exists, can be written to and has room."
        raise refuse(path, "adapter file", "to be written", error.strerror or str(error), fix) from error


def read(path: Path) -> tuple[Manifest, dict[str, Tensor]]:
    """The manifest and the tensors of a file that is complete and unchanged since it was saved.

    Raises AdapterFileError for anything else.
    """
    found = what_is_at(path)
    if found != "a file":
        raise refuse(path, "adapter file", "a file", found, FOREIGN)
    try:
        with safe_open(path, framework="pt") as file:
            fields = _fields(path, file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise refuse(path, "adapter file", "a complete safetensors file", str(error), _DAMAGED) from error
    except OSError as error:
        fix = "Check the file and its permissions."
        raise refuse(path, "adapter file", "to be read", error.strerror or str(error), fix) from error
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
    """The metadata of an adapter file whose format is known, without the format's number."""
    if KEY not in metadata:
        raise refuse(path, "adapter file", "one written by tnpeft", "a safetensors file without its metadata", FOREIGN)
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
    """What a path leads to, through links. Raises AdapterFileError where that cannot be known."""
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


def _sync_folder(folder: Path) -> None:
    """Make the new name itself durable, where folders can be synced."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
