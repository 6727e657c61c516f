"""The fine-tunes of the best networks: every one at every rate, by a command that says how it ended."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from test_search import error_of, searched

TRAIN = """
import json, math, pathlib, sys
spec, rate = pathlib.Path(sys.argv[1]).read_text(), float(sys.argv[2])
with open(sys.argv[3], "a") as log:
    log.write(f"{len(spec)} {rate}\\n")
if rate > 1:
    sys.exit("diverged")
for step in range(3):
    print("not JSON")
    print(json.dumps({"step": step, "score": -abs(math.log10(rate) + 2) * (step + 1)}), flush=True)
print(json.dumps({"score": -abs(math.log10(rate) + 2) - len(spec) / 1e4}))
"""


def command(tmp_path: Path, text: str = TRAIN) -> str:
    (tmp_path / "train.py").write_text(text)
    return shlex.join([sys.executable, str(tmp_path / "train.py"), "{spec}", "{rate}", str(tmp_path / "log")])


def test_every_finalist_runs_at_every_rate_and_the_best_wins(tmp_path: Path):
    known = {"evaluations": 4, "command": command(tmp_path), "rates": (1e-3, 1e-2, 10.0), "finalists": 2}
    found = searched(storage=tmp_path / "s.journal", **known)
    finalists = [candidate.number for candidate in found.candidates[:2]]
    assert {(run.number, run.rate) for run in found.finetunes} == {(n, r) for n in finalists for r in known["rates"]}
    assert all(run.score is None for run in found.finetunes if run.rate == 10)
    scores = {run.number: run.score for run in found.finetunes if run.rate == 1e-2}
    shortest = min(
        finalists, key=lambda number: len(next(c for c in found.candidates if c.number == number).spec().to_yaml())
    )
    assert found.best.number == max(scores, key=lambda number: scores[number]) == shortest
    assert found.best_finetune.rate == 1e-2
    assert "# Fine-tuned: the best of 2 networks at 3 rates each, at rate 0.01, selection" in found.to_yaml()
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 6
    again = searched(storage=tmp_path / "s.journal", **known)  # nothing is run twice
    assert again.finetunes == found.finetunes
    assert (tmp_path / "log").read_text().splitlines() == lines


def test_runs_that_are_behind_are_stopped(tmp_path: Path):
    text = TRAIN.replace('"not JSON"', '"[1]"').replace("for step in range(3)", "for step in range(500)")
    found = searched(evaluations=2, command=command(tmp_path, text), rates=[10**-n for n in range(9)], finalists=1)
    assert None in {run.score for run in found.finetunes}
    assert found.best_finetune.rate == 1e-2


def test_an_interrupt_keeps_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr("tnpeft.searching.finetunes._score", interrupt)
    found = searched(evaluations=2, command=command(tmp_path))
    assert found.interrupted
    assert found.finetunes == ()
    assert found.best == found.candidates[0]


def test_commands_that_say_nothing(tmp_path: Path):
    bad = command(tmp_path, "print(1)")
    said = error_of(evaluations=2, command=bad, rates=(0.5,), finalists=1)
    assert said.startswith("--command: expected a score from at least one run, found no score in the last line of `")
    assert said.endswith('`. Let its last line be {"score": NUMBER}, the higher the better.')
    said = error_of(evaluations=2, command=command(tmp_path, "import sys; sys.exit(3)"), rates=(0.5,), finalists=1)
    assert "found exit status 3 of `" in said
    assert error_of(evaluations=2, command="./none {spec} {rate}") == (
        "--command: expected a program that can be run, found No such file or directory. "
        "For example --command 'python train.py --spec {spec} --rate {rate}'."
    )
    assert error_of(command="train {spec}", rates=(1, 1), finalists=0) == (
        "search, `finalists`: expected a whole number from 1 on, found 0. For example `finalists=2`.\n"
        "search, `command`: expected {spec} and {rate} in it, found 'train {spec}'. "
        "For example 'python train.py --spec {spec} --rate {rate}'.\n"
        "search, `rates`: expected different positive numbers, found [1, 1]. For example `rates=(1e-4, 1e-3)`."
    )
