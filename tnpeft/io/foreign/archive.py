"""Whether torch wrote a zip file, before torch reads it: members are uncompressed, do not overlap, and have true sizes.

torch never compresses. A compressed member of a few bytes can become gigabytes when it is read, as can many members
that share the same bytes.
"""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tnpeft.errors import clip
from tnpeft.io.foreign.pickles import MAX_PARTS, is_heavy

__all__ = ["COPY_AGAIN", "LOAD_ERRORS", "archive_problem", "load_archive"]

COPY_AGAIN = "Copy or download the file again."
# What `load_archive` raises for files that are damaged or hold more than tensors.
LOAD_ERRORS = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)

_MAX_MEMBERS = 100_000  # a tensor is one; the largest models have a few thousand
_MAX_DIRECTORY = 64 << 20  # bytes of their names and places
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_LOCAL_HEADER = 30  # bytes before a member's name
_SAVE_AGAIN = "Save it with `torch.save`, which stores its members as they are."


class Fault(NamedTuple):
    """What was expected of an archive, what was found, and how to fix it."""

    expected: str
    found: str
    fix: str


def load_archive(path: Path, mapped: bool = False) -> Any:
    """The content of a file of `torch.save`, tensors only, on the CPU; with `mapped` bytes are read when they are used.

    No warning of torch's is shown: they are about foreign pickles, which either fail here or hold only tensors.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if mapped and path.suffix != ".safetensors":
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with path.open("rb") as file:  # torch reads a path by its ending
            return torch.load(file, map_location="cpu", weights_only=True)


def archive_problem(path: Path) -> Fault | None:
    """Why torch should not read this zip file, or None. Time and memory are bounded by the size of its directory.

    Raises OSError for what cannot be read.
    """
    size = path.stat().st_size
    directory = _directory_size(path, size)
    if directory is None:
        return Fault("a whole archive of `torch.save`", "one that does not end as such archives do", COPY_AGAIN)
    if directory > _MAX_DIRECTORY:
        return Fault(f"at most {_MAX_MEMBERS:,} members", f"a directory of {directory:,} bytes", _SAVE_AGAIN)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if fault := next(_faults(members, size - directory), None):
                return fault
            pickles = [archive.read(member) for member in members if member.filename.endswith("/data.pkl")]
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, EOFError) as error:
        return Fault(
            "a whole archive of `torch.save`", " ".join(str(error).split())[:200] or "a damaged one", COPY_AGAIN
        )
    if any(map(is_heavy, pickles)):
        found = "larger ones in its pickle"
        return Fault(f"tuples of at most {MAX_PARTS:,} parts", found, "Save the state dict alone.")
    return None


def _directory_size(path: Path, size: int) -> int | None:
    """Bytes of the list of members, read at the file's end where torch writes it; None where that is something else."""
    if size < _END.size:
        return None
    with path.open("rb") as file:
        file.seek(-_END.size, 2)
        mark, *_, directory, _start, comment = _END.unpack(file.read(_END.size))
        if mark != b"PK\x05\x06" or comment:
            return None
        if size < _END.size + _LOCATOR.size + _END_64.size:
            return int(directory)
        file.seek(-_END.size - _LOCATOR.size, 2)
        mark, _disk, start, _disks = _LOCATOR.unpack(file.read(_LOCATOR.size))
        if mark != b"PK\x06\x07":
            return int(directory)
        if start > size - _END_64.size:
            return None
        file.seek(start)
        mark, *_, directory, _start = _END_64.unpack(file.read(_END_64.size))
        return int(directory) if mark == b"PK\x06\x06" else None


def _faults(members: list[zipfile.ZipInfo], room: int) -> Iterator[Fault]:
    if len(members) > _MAX_MEMBERS:
        yield Fault(f"at most {_MAX_MEMBERS:,} members", f"{len(members):,}", _SAVE_AGAIN)
    end, previous = 0, ""
    for member in sorted(members, key=lambda member: member.header_offset):
        name = clip(member.filename)
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            kind = "an encrypted" if member.flag_bits & 1 else "a compressed"
            yield Fault("members that are stored, as torch writes them", f"{kind} one, {name}", _SAVE_AGAIN)
        if member.file_size != member.compress_size:
            found = f"{name} of {member.file_size:,} bytes in {member.compress_size:,}"
            yield Fault("members as large as they are stored", found, _SAVE_AGAIN)
        if member.header_offset < end:
            yield Fault("members that stand apart", f"{name} on the bytes of {previous}", _SAVE_AGAIN)
        end, previous = member.header_offset + _LOCAL_HEADER + len(member.filename) + member.file_size, name
        if end > room:
            yield Fault("members within the file", f"{name}, which ends at byte {end:,} of {room:,}", COPY_AGAIN)
