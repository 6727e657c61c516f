"""`--watch`: what is told of files that change while one looks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tnpeft.editing.document import NEW
from tnpeft.editing.watching import changes

ROOT = Path(__file__).parents[2]


def told(paths: list[Path], steps: list[Callable[[], object]]) -> list[set[str]]:
    """What is told when one step is taken between any two looks, with a look after the last that finds nothing new."""
    left: Iterator[Callable[[], object]] = iter([*steps, lambda: None, lambda: None])

    class EndedError(Exception):
        pass

    def pause() -> None:
        step = next(left, None)
        if step is None:
            raise EndedError
        step()

    found: list[set[str]] = []
    try:
        for changed in changes(map(str, paths), pause):
            found.append({Path(path).name for path in changed})
    except EndedError:
        return found
    raise AssertionError


def test_a_file_is_told_of_first_and_when_it_changed(tmp_path: Path):
    path = tmp_path / "a.yaml"
    path.write_text("1")
    assert told([path], [lambda: path.write_text("22")]) == [{"a.yaml"}, {"a.yaml"}]


def test_a_file_that_is_being_written_is_told_of_once(tmp_path: Path):
    path = tmp_path / "a.yaml"
    path.write_text("1")
    writes = [lambda text="x" * size: path.write_text(text) for size in (10, 20, 30)]
    assert told([path], writes) == [{"a.yaml"}, {"a.yaml"}]


def test_files_that_come_and_go(tmp_path: Path):
    path = tmp_path / "a.yaml"
    nothing = lambda: None  # noqa: E731
    steps = [lambda: path.write_text("1"), nothing, path.unlink]
    assert told([path], steps) == [{"a.yaml"}, {"a.yaml"}, {"a.yaml"}]


def test_in_a_folder_only_what_changed_is_told(tmp_path: Path):
    for name in ("a.yaml", "b.yml", "c.txt"):
        (tmp_path / name).write_text("1")
    (first, *rest) = told([tmp_path], [lambda: (tmp_path / "b.yml").write_text("22")])
    assert {"a.yaml", "b.yml"} <= first
    assert rest == [{"b.yml"}]


def test_a_file_that_is_replaced_is_a_change(tmp_path: Path):
    path, other = tmp_path / "a.yaml", tmp_path / "other"
    path.write_text("1")
    times = path.stat()

    def replace() -> None:
        other.write_text("2")
        os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
        other.replace(path)

    assert told([path], [replace]) == [{"a.yaml"}, {"a.yaml"}]


@pytest.mark.slow
def test_check_and_draw_go_on_until_ctrl_c(tmp_path: Path):
    """One process each; mistakes are printed, and the watch goes on."""
    path, picture = tmp_path / "a.yaml", tmp_path / "a.svg"
    path.write_text(NEW)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    check, draw = (
        subprocess.Popen(
            [sys.executable, "-m", "tnpeft", *arguments, "--watch"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for arguments in (("check", str(path)), ("draw", str(path), "-o", str(picture)))
    )  # fmt: skip
    assert check.stdout is not None
    assert draw.stdout is not None
    try:
        assert check.stdout.readline() == f"ok     {path} (spec)\n"
        assert draw.stdout.readline() == f"drew {picture}\n"
        first = picture.read_bytes()
        check.stdout.readline()
        path.write_text(NEW.replace("zeros", "zeos"))
        assert check.stdout.readline().startswith(f"error {path}:8:27: unknown init 'zeos'")
        assert draw.stdout.readline().startswith(f"error {path}:8:27: unknown init 'zeos'")
        assert picture.read_bytes() == first
        path.write_text(NEW.replace("{r: 4}", "{r: 4, s: r}").replace("o r", "o s").replace("down: r", "down: s"))
        assert draw.stdout.readline() == f"drew {picture}\n"
        assert picture.read_bytes() != first
    finally:
        for process in (check, draw):
            process.send_signal(signal.SIGINT)
            rest, _ = process.communicate(timeout=60)
            assert "Traceback" not in rest
            assert process.returncode == 0
