"""What is read at all: regular files, and volumes of a size that a run can hold; all else ends quickly, by name."""

from __future__ import annotations

import errno
import gzip
import math
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

__all__ = ["SLACK", "Announced", "announced", "not_a_file", "skip_rest"]

MOST_VOXELS = 2**30  # 1024 x 1024 x 1024, 4 GB in float32
MOST_BEFORE = 2**26  # bytes of header and extensions
SLACK = 2**20  # bytes that may follow the voxels, or as many as the voxels need
CHUNK = 2**20
KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def not_a_file(path: Path) -> str | None:
    """What stands where a file should, links followed: reading it may never end. Raises OSError for nothing there."""
    try:
        mode = path.stat().st_mode
    except ValueError as error:  # no file can have such a name
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
    return None if stat.S_ISREG(mode) else next((name for is_one, name in KINDS if is_one(mode)), "no regular file")


@dataclass(frozen=True)
class Announced:
    """What the header of a NIfTI file says is in it."""

    shape: tuple[int, ...]
    offset: int  # bytes before the voxels
    size: int  # bytes of the voxels

    @property
    def most(self) -> int:
        """How many bytes such a file may have, unzipped."""
        return self.offset + 2 * self.size + SLACK

    def fault(self, stored: int) -> tuple[str, str] | None:
        """What is expected and what is found where the file, of `stored` bytes unless it is zipped, is no volume."""
        if math.prod(self.shape) > MOST_VOXELS:
            return f"at most {MOST_VOXELS:,} voxels", f"shape {'x'.join(map(str, self.shape))} in the header"
        if self.offset > MOST_BEFORE:
            return f"voxels within the first {MOST_BEFORE:,} bytes", f"byte {self.offset:,} in the header"
        if stored > self.most:
            return f"{self.offset + self.size:,} bytes, as the header says", f"{stored:,}"
        return None


def announced(path: Path) -> Announced | None:
    """The sizes in a file's header, or None where it is none of a NIfTI file: nibabel then says what it is."""
    zipped = path.suffix == ".gz"
    with cast(IO[bytes], gzip.open(path) if zipped else path.open("rb")) as file:
        start = file.read(Nifti2Header.sizeof_hdr)
    for kind in (Nifti1Header, Nifti2Header):
        if len(start) >= kind.sizeof_hdr and kind.may_contain_header(start):
            header = kind(start[: kind.sizeof_hdr], check=False)
            try:
                shape = tuple(int(size) for size in header.get_data_shape())
                bytes_each, offset = header.get_data_dtype().itemsize, int(header["vox_offset"])
            except (HeaderDataError, ValueError, OverflowError, KeyError):
                return None
            if min((offset, *shape)) < 0:
                return None
            return Announced(shape, offset, math.prod(shape) * bytes_each)
    return None


def skip_rest(file: IO[bytes], most: int) -> None:
    """Read a zipped file to its end, so that its checksum is compared; raises ImageFileError after `most` bytes."""
    left = most
    while chunk := file.read(CHUNK):
        left -= len(chunk)
        if left < 0:
            raise ImageFileError(f"more than {most:,} bytes after its voxels")
