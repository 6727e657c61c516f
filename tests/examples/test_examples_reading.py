"""Devices, pipes, bombs and files without end among the volumes: each is passed by quickly, by name."""

from __future__ import annotations

import gzip
import os
import socket
import struct
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("monai", reason="the example driver needs the `demo` extra")

import nibabel
from ddpm_lab.config.settings import Config, Data
from ddpm_lab.data.files import check_volumes, find_volumes, inspect
from ddpm_lab.data.manifest import read_manifest
from ddpm_lab.data.prepare import prepare_data
from ddpm_lab.support.console import Screen
from ddpm_lab.support.faults import LabError

SECONDS = 20.0  # on a busy machine; what was read before took minutes or never ended


def header(shape: tuple[int, ...], offset: int = 352) -> bytes:
    """A NIfTI header of int16 voxels."""
    made = nibabel.Nifti1Header()
    made.set_data_dtype(np.int16)
    made["dim"][: 1 + len(shape)] = (len(shape), *shape)
    made["vox_offset"] = offset
    made["magic"] = b"n+1"
    return bytes(made.binaryblock) + bytes(4)


def odd_file(kind: str, folder: Path) -> tuple[Path, str]:
    """A file that must not be read to its end, and what is said about it."""
    path = folder / "odd.nii"
    if kind == "a link to a device":
        path.symlink_to("/dev/zero")
        return path, "expected a NIfTI file, found a device"
    if kind == "a pipe":
        os.mkfifo(path)
        return path, "expected a NIfTI file, found a pipe"
    if kind == "a socket":
        with socket.socket(socket.AF_UNIX) as made:
            before = Path.cwd()
            os.chdir(folder)  # names of sockets are short
            try:
                made.bind("odd.nii")
            finally:
                os.chdir(before)
        return path, "expected a NIfTI file, found a socket"
    if kind == "a link to itself":
        path.symlink_to(path)
        return path, "expected a NIfTI file, found Too many levels of symbolic links"
    if kind in ("a hole", "more than its header says", "too many voxels", "a far offset"):
        size, start, expected = {
            "a hole": (2**42, b"", 'expected a NIfTI file, found Cannot work out file type of "odd.nii"'),
            "more than its header says": (
                2**42,
                header((8, 8, 8)),
                "expected 1,376 bytes, as the header says, found 4,398,046,511,104",
            ),
            "too many voxels": (
                2**42,
                header((12000, 12000, 12000)),
                "expected at most 1,073,741,824 voxels, found shape 12000x12000x12000 in the header",
            ),
            "a far offset": (
                2**42,
                header((8, 8, 8), 2**40),
                "expected voxels within the first 67,108,864 bytes, found byte 1,099,511,627,776 in the header",
            ),
        }[kind]
        with path.open("wb") as file:
            file.write(start)
            file.truncate(size)
        return path, expected
    path = folder / "odd.nii.gz"
    if kind == "a bomb":
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.write(header((8, 8, 8)) + np.arange(512, dtype=np.int16).tobytes())
            for _ in range(64):
                file.write(bytes(2**22))
        return path, "expected a NIfTI file, found more than 1,050,976 bytes after its voxels"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header((20000, 20000, 20000)) + bytes(2**24))
    return path, "expected at most 1,073,741,824 voxels, found shape 20000x20000x20000 in the header"


KINDS = ["a link to a device", "a pipe", "a socket", "a link to itself", "a hole", "more than its header says"]
KINDS += ["too many voxels", "a far offset", "a bomb", "a large zipped one"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        voxels = np.random.default_rng(number).uniform(size=(4, 4, 4)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / f"{number}.nii")
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_volume_is_passed_by_quickly(folder: Path, kind: str) -> None:
    path, expected = odd_file(kind, folder)
    started = time.monotonic()
    manifest = prepare_data(Config(data=Data(root=folder)), folder / "out", Screen(quiet=True))
    (rejected,) = read_manifest(Data(manifest=manifest)).rejected
    assert (rejected.path, rejected.reason) == (path.name, expected)
    with pytest.raises(LabError) as excinfo:
        check_volumes(find_volumes(Data(root=folder)))
    expected = expected.replace('"odd.nii"', f'"{path}"')
    assert str(excinfo.value) == f"{path}: an unreadable volume: {expected}. Replace or remove the file."
    assert time.monotonic() - started < SECONDS


def test_folders_and_files_of_other_names_are_no_volumes(folder: Path) -> None:
    """Archives unpack `scan.nii/scan.nii`: the folder is passed by, the file in it is one."""
    (folder / "scan.nii").mkdir()
    (folder / "0.nii").rename(folder / "scan.nii" / "scan.nii")
    os.mkfifo(folder / "pipe.txt")
    paths = [path.relative_to(folder).as_posix() for path in find_volumes(Data(root=folder))]
    assert paths == ["1.nii", "2.nii", "scan.nii/scan.nii"]


def test_a_little_after_the_voxels_does_no_harm(folder: Path) -> None:
    content = (folder / "0.nii").read_bytes()
    (folder / "padded.nii").write_bytes(content + bytes(1000))
    (folder / "padded.nii.gz").write_bytes(gzip.compress(content + bytes(1000)))
    assert check_volumes([folder / "padded.nii", folder / "padded.nii.gz"]) == {}
    big_endian = bytearray(content)
    assert struct.unpack("<i", big_endian[:4]) == (348,)
    image = nibabel.Nifti2Image(np.arange(64, dtype=">f4").reshape(4, 4, 4), np.eye(4))
    image.header.set_data_dtype(">f4")
    nibabel.save(image, folder / "second.nii")
    assert inspect(folder / "second.nii").shape == (4, 4, 4)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            {"manifest": Path("/dev/zero")},
            "/dev/zero: `data.manifest`: expected a readable manifest, found a device. "
            "Check the path, or run `prepare`.",
        ),
        (
            {"layout": "brats", "keep": Path("/dev/zero")},
            "/dev/zero: `data.keep`: expected a readable text file, found a device. Check the path.",
        ),
    ],
)
def test_lists_are_no_devices(folder: Path, data: dict[str, object], expected: str) -> None:
    with pytest.raises(LabError) as excinfo:
        find_volumes(Data(root=folder).model_copy(update=data))
    assert str(excinfo.value) == expected
