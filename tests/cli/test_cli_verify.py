"""`tnpeft verify`: what it prints, as text and as data, and its exit status."""

from __future__ import annotations

import builtins
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from terminal import data, mistakes, run, text

import tnpeft
from tnpeft.execution import AdaptedLayer
from tnpeft.verify import verify

ROOT = Path(__file__).parents[2]
SMALL = ("--examples", "2")


def write(tmp_path: Path, body: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(f"tnpeft: 1\nname: mine\n{body}\n")
    return path


_ELSEWHERE = ("origin", "shared", "maps", "difference")  # checks of what LoRA has not


def test_text_names_every_check_and_what_was_tried():
    shown = text("verify", "lora", "--layer", "Conv2d:4,6,3x1,groups=2", "--set", "r=2", *SMALL)
    lines = shown.splitlines()
    assert lines[0] == "lora: Low-rank adaptation, for every kind of layer"
    assert lines[1].startswith("2 examples in ")
    assert lines[1].endswith(" s, seed 0; 0 layers refused")
    checks = {line.split()[0]: line.split()[1:] for line in lines[4:20]}
    assert list(checks) == [
        *("reach", "sizes", "entries", "start", "parameters", "origin", "shared", "maps", "difference"),
        *("values", "gradients", "modes", "merge", "save", "detach", "alive"),
    ]
    assert all(words[:2] == ["ok", "2"] for name, words in checks.items() if name not in _ELSEWHERE)
    assert checks["shared"][:3] == ["-", "0", "2"]
    assert "kinds       Conv2d (2)" in lines
    assert "channels    composite (4)" in lines
    assert "groups      2 (2)" in lines
    assert "redundancy  20 of 24 parameters move the update independently on Conv2d(4, 6, 3x1, groups=2); " in shown


def test_json_is_the_report():
    report = data("verify", "tenvoo_q", *SMALL, "--set", "r=2", "--seed", "3")
    assert (report["spec"], report["ok"], report["seed"], report["examples"]) == ("tenvoo_q", True, 3, 2)
    assert report["seen"]["kinds"] == {"Conv3d": 2}
    assert {check["check"] for check in report["checks"] if check["examples"] == 2} >= {"entries", "gradients", "save"}
    assert report["gauge"]["redundant"] == 0
    assert report["gauge"]["rank"] + report["gauge"]["gauge"] == report["gauge"]["parameters"]
    (row,) = report["conditioning"]
    assert row["layer"] == "Conv3d(32, 32, 3x3x3)"
    assert row["network_ratio"] > 1


@pytest.mark.slow
def test_nothing_is_left_where_the_command_ran(tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(Path(tnpeft.__file__).parents[1])}
    command = [sys.executable, "-m", "tnpeft", "verify", "lora", "--layer", "Linear:4,6", "--examples", "2"]
    assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True).returncode == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_equal_seeds_give_equal_reports():
    one, other = (data("verify", "krona", *SMALL) for _ in range(2))
    assert one.pop("seconds") > 0
    assert other.pop("seconds") > 0
    assert one == other


def test_a_failure_is_printed_to_be_pasted(monkeypatch: pytest.MonkeyPatch):
    original = AdaptedLayer.unmerge

    def unmerge(self: AdaptedLayer) -> None:
        original(self)
        self.base.weight.data.add_(1.0)

    monkeypatch.setattr(AdaptedLayer, "unmerge", unmerge)
    result = run("verify", "lora", "--layer", "Linear:3,2", "--set", "r=1", *SMALL)
    assert result.exit_code == 1
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert [line for line in lines if " FAILS " in line] == [
        "merge       FAILS         2           merge and unmerge are exact"
    ]
    place = next(number for number, line in enumerate(lines) if line.startswith("merge: "))
    assert lines[place : place + 5] == [
        "merge: the base weight after 1 cycles of merge and unmerge differs in 6 of 6 numbers, by up to 1; "
        "expected equal bits",
        "  layer   torch.nn.Linear(3, 2)",
        "  params  {'r': 1}",
        "  show    tnpeft show lora --layer Linear:3,2 --set r=1",
        "  again   from tnpeft.testing import Case, run_check; "
        "run_check('merge', 'lora', Case('Linear', 3, 2, params={'r': 1}))",
    ]
    code = lines[place + 4].partition("again")[2].strip()
    with pytest.raises(AssertionError) as excinfo:
        exec(code, {})
    assert str(excinfo.value) == lines[place]


WIDE = """layers: Linear
sizes: {o: out_channels // 32, p: 32 if out_channels % 32 == 0 else 7, i: in_channels}
cores: {a: o r, b: r p i}
bond: 2
weight: (o p) i
start: frozen_copy
"""


def test_a_spec_of_wide_layers_alone_is_tried_on_those(tmp_path: Path):
    report = data("verify", write(tmp_path, WIDE), *SMALL)
    assert report["examples"] == 2
    assert report["seen"]["channels"].get("composite", 0) >= 2


def test_a_spec_that_refuses_everything_fails(tmp_path: Path):
    result = run("verify", write(tmp_path, WIDE), *SMALL, "--layer", "Linear:3,70", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert (report["ok"], report["examples"]) == (False, 0)
    (reason,) = report["refused"]
    assert reason == "`weight`, axis n (o p): expected a product of n (out_channels)"
    failure = next(check["failure"] for check in report["checks"] if check["check"] == "reach")
    assert failure["layer"].startswith("torch.nn.Linear(3, 70")
    number = report["refused"][reason]
    assert failure["message"].startswith(f"the spec refuses all {number} layers tried, e.g. ")
    assert "expected a product of 70 (out_channels), found 2 x 7 = 14" in failure["message"]


def test_usage():
    assert mistakes("verify", "lora", "--set", "rr=2", status=2) == [
        "--set rr: expected one of r, alpha, found `rr`. Did you mean `r`?"
    ]
    assert mistakes("verify", "tenvoo_l", "--layer", "Linear:3,2", status=2) == [
        "--layer: expected one of Conv3d, found Linear. Choose another layer, or add the kind to the spec's `layers`."
    ]
    assert run("verify", "lora", "--examples", "0").exit_code == 2
    assert run("verify").exit_code == 2


def test_a_broken_spec_is_status_1(tmp_path: Path):
    path = write(tmp_path, "layers: Linear")
    assert run("verify", path).exit_code == 1


def test_without_hypothesis_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "hypothesis":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    for name in [*sys.modules]:
        if name.startswith("tnpeft.verify") or name == "tnpeft.testing":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    assert mistakes("verify", "lora") == [
        "verify: expected the package hypothesis, found none installed. Run `pip install 'tnpeft[testing]'`."
    ]


# Ctrl-C


class Interrupted:
    """Stands for a check that Ctrl-C meets on its third example."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, number: int, examples: int) -> None:
        self.calls += 1
        if number == self.at:
            raise KeyboardInterrupt


def test_ctrl_c_tells_what_held_and_what_was_not_run(monkeypatch: pytest.MonkeyPatch):
    for at in (3, 1):
        monkeypatch.setattr("tnpeft.cli.verify._Progress", lambda output, at=at: Interrupted(at))
        result = run("verify", "lora", "-n", "20", "--layer", "Linear:4,6")
        assert result.exit_code == 130
        lines = result.stdout.splitlines()
        assert lines[1].startswith(f"{at} examples of 20 (interrupted) in ")
        rows = {line.split()[0]: line.split()[1:3] for line in lines[3:] if line}
        assert rows["start"] == ["ok", f"{at}"]
        assert rows["not"] == ["run", f"{20 - at}"]
        assert any("redundancy, the size of the first step and its directions" in line for line in lines)
    report = json.loads(run("verify", "lora", "-n", "20", "--json").stdout)
    assert (report["interrupted"], report["ok"], report["planned"], report["examples"]) == (True, False, 20, 1)
    assert report["gauge"] is None


def test_what_failed_before_ctrl_c_is_told(monkeypatch: pytest.MonkeyPatch):
    original = AdaptedLayer.unmerge

    def unmerge(self: AdaptedLayer) -> None:
        original(self)
        self.base.weight.data.add_(1.0)

    monkeypatch.setattr(AdaptedLayer, "unmerge", unmerge)
    monkeypatch.setattr("tnpeft.cli.verify._Progress", lambda output: Interrupted(2))
    result = run("verify", "lora", "--layer", "Linear:3,2", "-n", "20")
    assert result.exit_code == 130
    (row,) = (line.split() for line in result.stdout.splitlines() if line.startswith("merge "))
    assert row[1] == "FAILS"
    assert "\nmerge: " in result.stdout


@pytest.mark.slow
def test_ctrl_c_in_a_process(tmp_path: Path):
    code = "import tnpeft.cli.verify as v; v.PAUSE = 0; from tnpeft.cli import main; main()"
    command = [sys.executable, "-c", code, "verify", "lora", "-n", "5000", "--seconds", "120"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    with subprocess.Popen(command, **streams, env={**os.environ, "PYTHONPATH": path}) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "[1/5000] examples\n"
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert " of 5000 (interrupted) in " in said


@pytest.mark.skipif(os.name != "posix", reason="how a process ends")
@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_at_the_very_end_is_no_traceback(ignored: bool):
    """As where torch is taken down meanwhile. A caller that has interrupts ignored (`nohup`, `&`) has them so here."""
    late = "import atexit, os, signal; atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))"
    given = "signal.signal(signal.SIGINT, signal.SIG_IGN)" if ignored else "pass"
    command = [sys.executable, "-c", f"{late}; {given}; from tnpeft.cli import main; main()", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.stdout, done.stderr) == (f"tnpeft {tnpeft.__version__}\n", "")
    assert done.returncode == (0 if ignored else -signal.SIGINT)


def test_a_program_that_verifies_keeps_its_ctrl_c():
    with pytest.raises(KeyboardInterrupt):
        verify("lora", examples=3, layer=tnpeft.Layer("Linear", 4, 6), advice=False, progress=Interrupted(1))


def test_progress_where_it_takes_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tnpeft.cli.verify.PAUSE", 0.0)
    arguments = ("verify", "lora", "-n", "2", "--layer", "Linear:4,6")
    assert run(*arguments).stderr == "[1/2] examples\n[2/2] examples\n"
    assert run(*arguments, "--quiet").stderr == ""
