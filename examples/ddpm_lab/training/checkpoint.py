"""Checkpoints on disk: whole or not there, and nothing in them but tensors and JSON.

A folder `step-00000123` holds what trains, `optimizer.safetensors`, `average.safetensors` where there is one, and
`state.json` with all the rest, the SHA-256 of the other files and its own. It is written under another name, brought
to the disk file by file, and then renamed: after a crash at any moment it is complete or does not count.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ddpm_lab.support.durable import digest_of_file, write_tensors, write_whole, writing
from tnpeft.documents.files import sync_folder

__all__ = ["Checkpoint", "Checkpoints"]

VERSION = 1
STATE = "state.json"
PREFIX, UNFINISHED = "step-", ".part"


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint."""

    folder: Path
    state: Mapping[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What `Checkpoints.write` was given, by file; what trains is read from its own file."""
        return {name: load_file(self.folder / f"{name}.safetensors") for name in self.state["tensors"]}


class Checkpoints:
    """The checkpoints of the run in the folder `out`, of which the last `keep` stay."""

    def __init__(self, out: Path, keep: int) -> None:
        self.folder = out / "checkpoints"
        self.keep = keep

    def newest(self, note: Callable[[str], None] = lambda _: None) -> Checkpoint | None:
        """The newest complete one; `note` gets a line about each that is passed over."""
        for folder in sorted(self._complete(), reverse=True):
            try:
                return Checkpoint(folder, _read_state(folder))
            except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                note(f"Passed over {folder.parent.name}/{folder.name}, which is damaged: {reason}")
        return None

    def write(
        self,
        step: int,
        state: Mapping[str, Any],
        tensors: Mapping[str, Mapping[str, Tensor]],
        save: Callable[[Path], object],
    ) -> None:
        """Write one; `save` puts what trains into a folder. Raises LabError, leaving the older ones as they are."""
        with self.begun(step) as temporary:
            self.make(step)
            with self.writing(step):
                save(temporary)
                for name, values in tensors.items():
                    write_tensors(temporary / f"{name}.safetensors", values)
            self.complete(step, {**state, "tensors": list(tensors)})

    def unfinished(self, step: int) -> Path:
        """The folder of one that does not count yet."""
        return self.folder / f"{PREFIX}{step:08d}{UNFINISHED}"

    def _folder(self, step: int) -> Path:
        return self.folder / f"{PREFIX}{step:08d}"

    @contextmanager
    def begun(self, step: int) -> Iterator[Path]:
        """Where the files of one are put before it counts; nothing of it is left where it was not completed."""
        temporary = self.unfinished(step)
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def writing(self, step: int) -> AbstractContextManager[None]:
        """Inside, a full disk is a LabError that names the checkpoint."""
        return writing(self._folder(step), "a checkpoint")

    def make(self, step: int) -> None:
        """Make its folder, after removing what a process that was killed left half-written."""
        with self.writing(step):
            self._tidy()
            self.unfinished(step).mkdir(parents=True)

    def complete(self, step: int, state: Mapping[str, Any]) -> None:
        """Let the files that were put into its folder count, with `state`; older ones than the last few go."""
        folder, temporary = self._folder(step), self.unfinished(step)
        with self.writing(step):
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            digests = {path.relative_to(temporary).as_posix(): digest_of_file(path) for path in files}
            write_whole(temporary / STATE, _encoded({"version": VERSION, "step": step, **state, "files": digests}))
            _discard(folder)
            os.replace(temporary, folder)  # noqa: PTH105 - tests stop a run at every one of these
            sync_folder(self.folder)
            for old in sorted(self._complete())[: -self.keep]:
                _discard(old)

    def clear(self) -> None:
        """Remove all of them, when the run is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _tidy(self) -> None:
        """Remove what a process that was killed left half-written or half-removed."""
        for waste in self.folder.glob(f"*{UNFINISHED}"):
            shutil.rmtree(waste)

    def _complete(self) -> Iterator[Path]:
        if self.folder.is_dir():
            yield from (path for path in self.folder.glob(f"{PREFIX}*") if not path.name.endswith(UNFINISHED))


def _encoded(state: Mapping[str, Any]) -> bytes:
    return json.dumps({"sha256": _digest(state), **state}, allow_nan=False).encode()


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _read_state(folder: Path) -> dict[str, Any]:
    """The state of a complete checkpoint; raises ValueError and its like for any other."""
    state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if state.pop("sha256") != _digest(state):
        raise ValueError(f"{STATE} is not what was written")
    if state["version"] != VERSION:
        raise ValueError(f"version {state['version']} of the format, not {VERSION}")
    for name, digest in state["files"].items():
        if digest_of_file(folder / name) != digest:
            raise ValueError(f"{name} is not what was written")
    return state


def _discard(folder: Path) -> None:
    """Remove a checkpoint so that at no moment a part of it looks like one."""
    if folder.exists():
        waste = folder.with_name(f"old-{folder.name}{UNFINISHED}")
        os.replace(folder, waste)  # noqa: PTH105
        shutil.rmtree(waste)
