"""The one file that a page edits: written whole, and never over a change that the page has not seen."""

from __future__ import annotations

import hashlib
from copy import copy
from pathlib import Path

from tnpeft.documents.files import replace_files
from tnpeft.documents.nodes import MAX_BYTES, read_bytes
from tnpeft.documents.paths import is_file, is_folder, is_there
from tnpeft.errors import Problem, SpecError, TnpeftError, shown_path
from tnpeft.spec import list_specs
from tnpeft.spec.library import find_shipped, label_of, not_yaml

__all__ = ["NEW", "Document", "shipped_text"]

# What a new file begins with.
NEW = """\
tnpeft: 1
name: my_adapter
layers: any
params: {r: 4}
sizes: {o: out_channels, i: in_channels}
cores:
  down: r i k...
  up:   {legs: o r, init: zeros}
weight: o i k...
start: zero
"""
_SCHEMA_LINE = "# yaml-language-server:"


class Document:
    """A file, or a text without a file, which cannot be saved. `path` never changes: no page can name another."""

    def __init__(self, path: Path | None, text: str, on_disk: bytes | None) -> None:
        self.path = path
        self.text = text
        self._seen = _digest(on_disk)

    @classmethod
    def open(cls, name: str | None, start: str | None = None) -> Document:
        """The document of a path, which may not exist yet; a shipped name opens a copy without a file.

        `start` is the shipped spec that a new file begins as. Raises SpecError.
        """
        text = NEW if start is None else shipped_text(start)
        if name is None:
            return cls(None, text, None)
        path = Path(name)
        if path.suffix not in (".yaml", ".yml") and not is_file(path):
            return cls(None, shipped_text(name), None)
        if is_folder(path):
            raise SpecError(Problem("edit", "a YAML file", "a folder", "Name a file in it.", shown_path(path)))
        if problem := not_yaml(path, "spec"):
            raise SpecError(problem)
        if not is_there(path):
            if not is_folder(path.parent):
                fix = "Make the folder first, or name another."
                raise SpecError(Problem("edit", "a folder that exists", "none", fix, shown_path(path.parent)))
            return cls(path, text, None)
        if start is not None:
            fix = "Name a file that is not there yet, or leave `--from` out."
            raise SpecError(Problem("--from", "a new file", "one that is there", fix, shown_path(path)))
        data = read_bytes(path)
        return cls(path, _decoded(data, path), data)

    @property
    def label(self) -> str:
        """The document's name in messages."""
        return "<spec>" if self.path is None else str(self.path)

    def unsaved(self, text: str) -> Document | None:
        """The document of a reloaded page that goes on with `text`; None if that text is saved.

        It remembers what was read and written here: a later change on the disk has not been seen.
        """
        return None if text == self.text else copy(self)

    def changed_on_disk(self) -> bool:
        """Whether the file differs from what was last read or written here."""
        return self.path is not None and _digest(self._on_disk()) != self._seen

    def save(self, text: str, over_changes: bool = False) -> bool:
        """Write the file, whole or not at all; returns false, without writing, if it changed on the disk meanwhile.

        Raises TnpeftError if it cannot be written, or if the text is longer than a spec may be.
        """
        if self.path is None:
            fix = "Start again with `tnpeft edit FILE.yaml`, or download the text."
            raise TnpeftError(Problem("save", "a file", "a text without one", fix))
        data = text.encode("utf-8", "surrogatepass")
        if len(data) > MAX_BYTES:
            raise TnpeftError(Problem("save", f"at most {MAX_BYTES} bytes", "more", "Split it.", str(self.path)))
        if not over_changes and self.changed_on_disk():
            return False
        replace_files({self.path: data}, _unwritten)
        self.text, self._seen = text, _digest(data)
        return True

    def reload(self) -> str:
        """The text on the disk. Raises SpecError."""
        if self.path is not None:
            data = read_bytes(self.path)
            self.text, self._seen = _decoded(data, self.path), _digest(data)
        return self.text

    def _on_disk(self) -> bytes | None:
        assert self.path is not None
        return read_bytes(self.path) if is_file(self.path) else None


def shipped_text(name: str) -> str:
    """The text of a shipped spec, to edit: without the line that names its schema. Raises SpecError."""
    if name not in list_specs():
        find_shipped(name, "spec", "")  # raises, with near misses
    data = read_bytes(find_shipped(name, "spec", ""))
    return "".join(line for line in data.decode().splitlines(True) if not line.startswith(_SCHEMA_LINE))


def _decoded(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError:
        problem = Problem("not a text file", "UTF-8", "other bytes", "Save it as UTF-8.", label_of(path))
        raise SpecError(problem) from None


def _digest(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()


def _unwritten(path: Path, reason: str) -> TnpeftError:
    fix = "Choose a folder that exists and can be written to."
    return TnpeftError(Problem("save", "a file that can be written", reason, fix, shown_path(path)))
