"""`examples/with_transformers.py` beside transformers itself; tests/examples has those that need no framework."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from transformers import LlamaForCausalLM

import tnpeft

ROOT = Path(__file__).parents[2]


def test_with_transformers(tmp_path: Path):
    offline = {"HF_HUB_OFFLINE": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "with_transformers.py")],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), **offline},
        capture_output=True, encoding="utf-8", check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    assert "4,608 numbers train beside a base of 22,688, in 15 layers." in printed
    assert printed.count("exact: yes") == 3
    assert "exact: no" not in printed
    before, after, merged = map(int, re.findall(r"(\d+)%", printed))
    assert before < 20
    assert merged == after > 90
    assert float(re.findall(r"but for rounding: (\S+)", printed)[0]) < 1e-4
    folder = tmp_path / "runs" / "with_transformers"
    model = LlamaForCausalLM.from_pretrained(folder / "base")
    assert tnpeft.load(model, folder / "checkpoint-60" / "adapter.safetensors").report().trained == 4608
