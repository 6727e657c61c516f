"""A terminal of 40 columns: no line is longer, and none ends within a word that fits on one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from small import net
from terminal import run

import tnpeft
from tnpeft.cli.output import _fitted, table

ROOT = Path(__file__).parents[2]
WIDTH = 40


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands write to a terminal of 40 columns, in a folder with a model's checkpoints and an adapter's file."""
    monkeypatch.setattr("tnpeft.cli.output.columns_of", lambda stream: WIDTH)
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1]), *sys.path])
    monkeypatch.chdir(tmp_path)
    model = net()
    save_file(model.state_dict(), "base.safetensors")
    tuned = {name: value + 0.1 * torch.ones_like(value) for name, value in model.state_dict().items()}
    save_file(tuned, "tuned.safetensors")
    tnpeft.attach(model, "lora", match="wide|head.0", r=2)
    tnpeft.save(model, "adapter.safetensors")


COMMANDS = (
    "list",
    "list --layer Linear:24,32 --params 300",
    "show tenvoo_l",
    "show tenvoo_l --layer Conv3d:97,128,3 --input 1,97,8,8,8",
    "show hra --layer Linear:64,64",
    "check lora tenvoo_l_ddpm",
    "check no_such_file.yaml",
    "count lora -m small:net --match wide|head.0",
    "budget lora -m small:net --match wide|head.0 --params 0.4k",
    "budget lora -m small:net --match wide --params five",
    "fit base.safetensors tuned.safetensors --spec lora --match wide|head.0 -o a.safetensors",
    "inspect adapter.safetensors",
    "inspect base.safetensors",
    "convert adapter.safetensors peft_folder -m small:net --to peft",
    "verify lora --layer Linear:6,4 -n 2",
    "new mine.yaml --from tenvoo_l",
    "draw lora -o lora.svg",
    "version",
)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_keeps_to_the_width(command: str):
    lines = run(*command.split()).output.splitlines()
    assert lines
    assert [line for line in lines if len(line) > WIDTH] == []
    assert [line for line in lines if line != line.rstrip()] == []


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    "command", ["list", "check lora", "check no_such.yaml", "count lora -m small:net --match wide"]
)
def test_nothing_is_lost(command: str, monkeypatch: pytest.MonkeyPatch):
    printed = run(*command.split()).output.split()
    monkeypatch.setattr("tnpeft.cli.output.columns_of", lambda stream: None)
    whole = run(*command.split()).output.split()
    assert set(whole) - set(printed) <= {"spec", "recipe", "layer"}  # headings of what stands at the head of a row


def test_a_table_that_does_not_fit_is_a_list():
    rows = table("a title", {"layer": "left", "parameters": "right", "note": "left"}, [
        ("model.blocks.0", "1,024", "the first of several words that go on"), ("head", "8", ""),
    ])  # fmt: skip
    assert rows.as_list(30) == [
        "a title",
        "model.blocks.0",
        "  parameters  1,024",
        "  note        the first of",
        "              several words",
        "              that go on",
        "head",
        "  parameters  8",
    ]


WORDS = st.lists(st.text("abc.,/=", min_size=1, max_size=60), min_size=1, max_size=30)


@given(WORDS, st.integers(20, 90), st.sampled_from(["", "  ", "label       ", "  path  "]))
def test_lines_are_broken_between_words_and_nothing_else(words: list[str], width: int, label: str):
    text = label + " ".join(words)
    lines = _fitted(text, width).split("\n")
    assert all(len(line) <= width for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
    whole = {word for word in text.split() if len(word) <= width // 2 - 2}
    assert whole <= {word for line in lines for word in line.split()}
    assert _fitted(text, None) == text


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are POSIX's")
@pytest.mark.parametrize("command", ["list --source hadamard", "show lora --layer Linear:4,6", "show --help"])
def test_a_real_terminal(command: str):
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, WIDTH, 0, 0))
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    told = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    started = [sys.executable, "-m", "tnpeft", *command.split()]
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    with subprocess.Popen(started, **streams, env={**told, "PYTHONPATH": path}) as process:
        os.close(theirs)
        read = b""
        while True:
            try:
                part = os.read(ours, 65_536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            read += part
    os.close(ours)
    assert process.returncode == 0, read
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", read.decode()).replace("\r", "").split("\n")
    assert [line for line in lines if len(line) > WIDTH] == []
    assert len(lines) > 5
