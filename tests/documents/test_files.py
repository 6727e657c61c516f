"""Files written whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tnpeft.documents.files import replace_files


class WriteError(Exception):
    """A path and a reason."""


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [0, 1])
def test_of_several_files_all_or_none_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
):
    """Full at one of two files: nothing is moved before all are on the disk, and no temporary file stays."""
    first, last = tmp_path / "first", tmp_path / "last"
    for path in (first, last):
        path.write_bytes(b"old")
    monkeypatch.setattr(os, call, failing_at(number, getattr(os, call)))
    with pytest.raises(WriteError) as excinfo:
        replace_files({first: b"new", last: b"new"}, WriteError)
    where = last if call == "replace" else (first, last)[number]
    assert excinfo.value.args == (where, "No space left on device")
    assert isinstance(excinfo.value.__cause__, OSError)
    moved = call == "replace" and number == 1
    assert (first.read_bytes(), last.read_bytes()) == (b"new" if moved else b"old", b"old")
    assert sorted(tmp_path.iterdir()) == [first, last]


def failing_at(number: int, inner: Callable[..., object]) -> Callable[..., object]:
    """The call, of which the one of this number (from 0) finds the disk full."""
    calls = 0

    def call(*arguments: object, **named: object) -> object:
        nonlocal calls
        calls += 1
        if calls == number + 1:
            raise OSError(28, "No space left on device")
        return inner(*arguments, **named)

    return call


def test_a_link_is_written_through(tmp_path: Path):
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_bytes(b"old")
    link.symlink_to(path)
    replace_files({link: b"new"}, WriteError)
    assert link.is_symlink()
    assert path.read_bytes() == b"new"


def test_owner_and_group_stay_or_others_see_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where the group cannot be given, ours may do what everybody may."""
    path = tmp_path / "x"
    given: list[tuple[int, int]] = []
    path.write_text("old")
    path.chmod(0o660)
    before = path.stat()
    other = os.stat_result((*before[:4], before.st_uid + 1, before.st_gid + 1, *before[6:]))
    monkeypatch.setattr(Path, "stat", lambda self, **options: other if self == path else before)
    monkeypatch.setattr(os, "fchown", lambda handle, user, group: given.append((user, group)))
    replace_files({path: b"new"}, lambda path, reason: AssertionError(reason))
    assert given == [(before.st_uid + 1, -1), (-1, before.st_gid + 1)]
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o660  # noqa: PTH116 - `Path.stat` is replaced

    def refused(handle: int, user: int, group: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", refused)
    replace_files({path: b"new"}, lambda path, reason: AssertionError(reason))
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600  # noqa: PTH116
    assert path.read_bytes() == b"new"
