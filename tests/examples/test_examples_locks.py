"""Commands that work in one folder of results: the second is refused, and a killed one leaves nothing in the way."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("monai", reason="the example driver needs the `demo` extra")

from ddpm_lab.config.settings import Base, Config, Data, DemoConfig, Method, Sampling, Training
from ddpm_lab.data.prepare import prepare_data
from ddpm_lab.evaluation.evaluate import evaluate_samples
from ddpm_lab.sampling.sample import sample_volumes
from ddpm_lab.study.report import report
from ddpm_lab.study.study import study
from ddpm_lab.support.console import Screen
from ddpm_lab.support.faults import LabError
from ddpm_lab.support.folders import files_in
from ddpm_lab.support.locks import alone, at_work
from ddpm_lab.training.demo import demo
from ddpm_lab.training.driver import finetune, pretrain
from studies import tiny_study

ROOT = Path(__file__).parents[2]
HOLDER = """\
import os, sys, time
from pathlib import Path
from ddpm_lab.support.locks import at_work
with at_work("finetune", Path(sys.argv[1])):
    child = os.fork()  # as a process that loads volumes
    if child == 0:
        os.write(1, b"child;")
        time.sleep(60)
    os.write(1, f"{child};".encode())
    time.sleep(60)
"""


def folder_of_files(tmp_path: Path) -> Path:
    root = tmp_path / "scans"
    root.mkdir()
    for number in range(2):
        (root / f"{number}.nii").write_bytes(b"")
    return root


COMMANDS: dict[str, Callable[[Path, Path], object]] = {
    "finetune": lambda root, out: finetune(
        Config(data=Data(root=root), base=Base(checkpoint=root), method=Method(recipe="lora_ddpm")), out, SILENT
    ),
    "pretrain": lambda root, out: pretrain(Config(data=Data(root=root), training=Training(steps=1)), out, SILENT),
    "prepare": lambda root, out: prepare_data(Config(data=Data(root=root)), out, SILENT),
    "sample": lambda root, out: sample_volumes(Config(sampling=Sampling(count=1)), out, SILENT),
    "evaluate": lambda root, out: evaluate_samples(Config(data=Data(root=root)), out, SILENT),
    "demo": lambda root, out: demo(DemoConfig(), out, SILENT),
    "study": lambda root, out: study("table1", tiny_study(root.parent), out, SILENT),
    "report": lambda root, out: report(out, SILENT),
}
SILENT = Screen(quiet=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_second_command_in_one_folder_is_refused(tmp_path: Path, command: str) -> None:
    root, out = folder_of_files(tmp_path), tmp_path / "out"
    with at_work("finetune", out), pytest.raises(LabError) as excinfo:
        COMMANDS[command](root, out)
    assert str(excinfo.value) == (
        f"{out}: the folder of results: expected no other command at work in it, found `finetune` (process "
        f"{os.getpid()} on {socket.gethostname()}). Wait for its end, stop it, or choose another `--out`."
    )
    assert not out.exists()
    with pytest.raises(LabError) as excinfo:  # and not refused afterwards, but for reasons of its own
        COMMANDS[command](root, out) if command not in ("demo", "study") else prepare_data(
            Config(data=Data(root=root)), out, SILENT
        )
    assert "no other command" not in str(excinfo.value)


def test_studies_and_reports_share_a_folder_and_nobody_else(tmp_path: Path) -> None:
    with at_work("study", tmp_path, shared=True), at_work("report", tmp_path, shared=True):
        with pytest.raises(LabError) as excinfo, at_work("finetune", tmp_path):
            pass
        assert "expected no other command at work in it, found `report` (process " in str(excinfo.value)
    assert list(tmp_path.iterdir()) == []
    with at_work("finetune", tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_is_killed_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    """Not even while a process that it started still lives."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}"}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        said = ""
        while said.count(";") < 2:
            said += process.stdout.read(1)
            assert process.poll() is None
        (child,) = {*said.split(";")} - {"child", ""}
        try:
            with pytest.raises(LabError) as excinfo, at_work("sample", tmp_path):
                pass
            assert f"found `finetune` (process {process.pid} on " in str(excinfo.value)
            process.kill()
            process.wait(30)
            os.kill(int(child), 0)  # it lives
            with at_work("sample", tmp_path):
                assert (tmp_path / ".lock").is_file()
        finally:
            os.kill(int(child), signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


def test_new_folders_go_where_nothing_was_written(tmp_path: Path) -> None:
    with at_work("finetune", tmp_path / "a" / "b"):
        pass
    assert list(tmp_path.iterdir()) == []
    with at_work("finetune", tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "result").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["result"]


def test_a_lock_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "summary.json").touch()
    with at_work("finetune", tmp_path):
        assert [path.name for path in sorted(tmp_path.iterdir())] == [".lock", "summary.json"]
        assert files_in(tmp_path) == ["summary.json"]


def test_of_several_processes_the_first_holds_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with at_work("finetune", tmp_path):
        monkeypatch.setenv("RANK", "1")
        with at_work("finetune", tmp_path):
            pass


def test_many_take_turns(tmp_path: Path) -> None:
    """Locks are files that come and go: nobody may hold one that has no name any more."""
    code = (
        "import sys, os\nfrom pathlib import Path\nfrom ddpm_lab.support.locks import alone\n"
        "place = Path(sys.argv[1])\n"
        "for _ in range(100):\n"
        "    with alone(place / 'lock', wait=True) as mine:\n"
        "        assert mine\n"
        "        handle = os.open(place / 'busy', os.O_CREAT | os.O_EXCL)\n"
        "        os.close(handle)\n"
        "        os.unlink(place / 'busy')\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, env=environment) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == []


def test_waiting_ends_with_the_other(tmp_path: Path) -> None:
    place = tmp_path / "lock"
    code = "import sys, time\nfrom pathlib import Path\nfrom ddpm_lab.support.locks import alone\n"
    code += "with alone(Path(sys.argv[1])):\n    print(1, flush=True)\n    time.sleep(0.5)\n"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}"}
    command = [sys.executable, "-c", code, str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        process.stdout.readline()
        started = time.monotonic()
        with alone(place, wait=True) as mine:
            assert mine
            assert time.monotonic() - started > 0.1


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(LabError) as excinfo, alone(tmp_path / "lock"):
        pass
    assert str(excinfo.value) == (
        f"{tmp_path / 'lock'}: a lock: expected a file system that can lock files, found No locks available. "
        "Choose an `--out` on another disk."
    )
