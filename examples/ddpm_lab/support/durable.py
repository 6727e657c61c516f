"""Files that are whole or not there, and what a full disk says."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from ddpm_lab.support.faults import fault
from tnpeft import TnpeftError

__all__ = ["digest_of_file", "sync_folder", "write_file", "write_tensors", "writing"]

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


def write_file(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as safetensors, whole or not at all."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    temporary = path.with_name(path.name + ".part")
    write_file(temporary, safetensors.torch.save(whole))
    os.replace(temporary, path)  # noqa: PTH105 - tests stop a run at every one of these
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where folders can be synced."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
