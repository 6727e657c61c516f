"""Files that are whole or not there, and what a full disk says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from ddpm_lab.support.faults import fault
from tnpeft import TnpeftError
from tnpeft.documents.files import replace_files

__all__ = ["digest_of_file", "read_json", "write_json", "write_tensors", "write_whole", "writing"]

CHUNK = 1 << 22


@contextmanager
def writing(path: Path, what: str) -> Iterator[None]:
    """Say as LabError that a disk is full or a folder cannot be written to; `what` is written to `path`."""
    try:
        yield
    except TnpeftError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise _unwritable(path, what, error.__cause__) from None
    except (OSError, SafetensorError) as error:
        raise _unwritable(path, what, error) from None


def _unwritable(path: Path, what: str, error: Exception) -> Exception:
    found = " ".join((getattr(error, "strerror", None) or str(error)).split())
    fix = "Make room or mend the folder; the same command then goes on from the last checkpoint."
    return fault(path, what, "to be written", found, fix)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; raises LabError where the disk is full or the place cannot be written."""
    replace_files({path: data}, _unwritten)


def _unwritten(path: Path, reason: str) -> Exception:
    return fault(path, "a file of results", "a place to write it", reason, "Free space, or choose another `--out`.")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as safetensors, whole or not at all."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, safetensors.torch.save(whole))


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write data as JSON, whole or not at all."""
    write_whole(path, (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """A mapping that an earlier run wrote, or None where there is no whole one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
