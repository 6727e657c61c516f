"""Zips that torch did not write: refused before torch reads them, in bounded time and memory."""

from __future__ import annotations

import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from foreign import Net
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tnpeft
from tnpeft.errors import AdapterFileError
from tnpeft.io.foreign.archive import archive_problem

STORED = "Save it with `torch.save`, which stores its members as they are."
DAMAGED = "Copy or download the file again."


def refused(path: Path) -> str:
    with pytest.raises(AdapterFileError) as excinfo:
        tnpeft.load_foreign(Net(), path)
    return str(excinfo.value).replace(f"{path}: ", "FILE: ")


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.pth"
    torch.save({f"line.{key}": torch.ones(4, 4) for key in ("lora_up.weight", "lora_down.weight")}, path)
    return path


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_bomb_is_not_unpacked(good, tmp_path, method):
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(bomb, "w", method) as archive:
        for name, data in members(good).items():
            archive.writestr(name, bytes(40 << 20) if name.endswith("data/0") else data)
    assert bomb.stat().st_size < 1 << 20
    tracemalloc.start()
    start = time.perf_counter()
    text = refused(bomb)
    assert time.perf_counter() - start < 2
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
    assert text == (
        "FILE: adapter file: expected members that are stored, as torch writes them, "
        f"found a compressed one, '{next(iter(members(good)))}'. {STORED}"
    )


def test_members_on_the_same_bytes_and_larger_than_stored(good, tmp_path):
    with zipfile.ZipFile(good) as archive:
        name, offset = archive.infolist()[-1].filename, archive.infolist()[0].header_offset
    whole = good.read_bytes()
    place = whole.rindex(b"PK\x01\x02")
    assert whole[place + 46 :].startswith(name.encode())
    bad = tmp_path / "bad.pth"
    for at, value, found in (
        (24, 1 << 30, f"expected members as large as they are stored, found '{name}' of 1,073,741,824 bytes in "),
        (42, offset, "expected members that stand apart, found "),
        (8, 1, f"expected members that are stored, as torch writes them, found an encrypted one, '{name}'. {STORED}"),
    ):
        data = bytearray(whole)
        struct.pack_into("<H" if at == 8 else "<L", data, place + at, value)
        bad.write_bytes(data)
        assert refused(bad).startswith(f"FILE: adapter file: {found}")
    data = bytearray(whole)
    struct.pack_into("<2L", data, place + 20, 1 << 30, 1 << 30)
    bad.write_bytes(data)
    assert refused(bad).startswith(
        f"FILE: adapter file: expected members within the file, found '{name}', which ends at"
    )


def test_cut_and_lengthened_archives(good):
    whole = good.read_bytes()
    for data in (whole[:-1], whole[: len(whole) // 2], whole + b"more"):
        good.write_bytes(data)
        assert refused(good) == (
            "FILE: adapter file: expected a whole archive of `torch.save`, "
            f"found one that does not end as such archives do. {DAMAGED}"
        )


def test_too_many_members(tmp_path, monkeypatch):
    monkeypatch.setattr("tnpeft.io.foreign.archive._MAX_MEMBERS", 100)
    path = tmp_path / "many.pth"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(101):
            archive.writestr(f"a/data.pkl{number}", b"")
    assert refused(path) == f"FILE: adapter file: expected at most 100 members, found 101. {STORED}"


def test_a_few_bytes_that_stand_for_many(tmp_path):
    path = tmp_path / "wide.pth"
    torch.save({"line.lora_up.weight": torch.zeros(1).expand(1 << 20, 1 << 10)}, path)
    assert refused(path) == (
        "FILE: tensor 'line.lora_up.weight': expected its values, one by one, found (1048576, 1024) made of 4 bytes. "
        "Save the state dict of an ordinary model on the CPU."
    )
    torch.save({"line.lora_up.weight": torch.ones(3, 3).to_sparse()}, path)
    assert refused(path) == (
        "FILE: tensor 'line.lora_up.weight': expected its values, one by one, found a sparse_coo one. "
        "Save the state dict of an ordinary model on the CPU."
    )
    torch.save({"line.lora_up.weight": torch.ones(3, 3, device="meta")}, path)
    assert refused(path) == (
        "FILE: tensor 'line.lora_up.weight': expected its values, one by one, found one on the meta device. "
        "Save the state dict of an ordinary model on the CPU."
    )


def nested(levels: int) -> bytes:
    """A pickle of {tuple of tuples of tuples ...: 0}, whose hash takes 2 ** levels steps."""
    doubled = b"".join(b"h%c" % level * 2 + b"\x86q%c" % (level + 1) for level in range(levels))
    return b"\x80\x02}K\x00q\x00" + b"0" + doubled + b"K\x00s."


def test_a_key_that_takes_for_ever_to_hash(good, tmp_path):
    path = tmp_path / "deep.pth"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members(good).items():
            archive.writestr(name, nested(60) if name.endswith("data.pkl") else data)
    start = time.perf_counter()
    assert refused(path) == (
        "FILE: adapter file: expected tuples of at most 100,000 parts, found larger ones in its pickle. "
        "Save the state dict alone."
    )
    assert time.perf_counter() - start < 2


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=0, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
    tied=st.booleans(),
)
def test_what_torch_writes_is_never_refused(tmp_path, shapes, dtype, tied):
    path = tmp_path / "any name.pth"
    content = {f"a.{number}": torch.zeros(shape, dtype=dtype) for number, shape in enumerate(shapes)}
    content |= {"again": content["a.0"]} if tied and shapes else {}
    torch.save({"state_dict": content, "epoch": 3, "args": {"sizes": (1, (2, 3)), "lr": 1e-3}}, path)
    assert archive_problem(path) is None
