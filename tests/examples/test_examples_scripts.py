"""The scripts that a stranger reads first: each runs by itself and finds what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

import tnpeft

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = (
    "quickstart",
    "several_adapters",
    "your_own_adapter",
    "fit_a_checkpoint",
    "search_for_a_network",
    "with_transformers",
)
MAX_LINES = 120


def output_of(*command: str | Path, folder: Path) -> str:
    """What a script prints in a folder, without a network and without a warning."""
    nowhere = "http://127.0.0.1:9"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "http_proxy": nowhere, "https_proxy": nowhere}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder, env=environment, capture_output=True, encoding="utf-8", check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr  # matplotlib may say that it builds its font cache
    return done.stdout


def numbers(line_start: str, printed: str) -> list[float]:
    """The numbers in the one line that begins so."""
    (line,) = (line for line in printed.splitlines() if line.startswith(line_start))
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\.?\d*(?:e[+-]?\d+)?", line)]


def exact(printed: str) -> int:
    """How many comparisons were made bit for bit; none of them failed."""
    assert "exact: no" not in printed, printed
    return printed.count("exact: yes")


@pytest.mark.slow
def test_quickstart(tmp_path: Path):
    printed = output_of(EXAMPLES / "quickstart.py", folder=tmp_path)
    assert exact(printed) == 5
    assert "640 of 2,497 parameters train" in printed
    (before,) = numbers("The base model finds edges", printed)
    steps, after = numbers("After", printed)
    assert steps == 80
    assert after < before / 10
    assert numbers("It finds edges with", printed) == [after]
    assert numbers("Merged", printed)[0] < 1e-5
    assert "the model has torch's layers and the base's keys: yes" in printed
    file = tmp_path / "runs" / "quickstart" / "adapter.safetensors"
    assert numbers("The adapter is", printed) == [file.stat().st_size]
    assert tnpeft.inspect(file)


@pytest.mark.slow
def test_several_adapters(tmp_path: Path):
    printed = output_of(EXAMPLES / "several_adapters.py", folder=tmp_path)
    assert exact(printed) == 5
    assert "Attached: edges, inverted." in printed
    base, edges, inverted, half = (
        numbers(f"{name:<20}", printed) for name in ("the base alone", "edges", "inverted", "half of each")
    )
    # Each is good at its own task alone, and half of each is between them on both.
    assert edges[0] < base[0] / 10 < edges[1]
    assert inverted[1] < base[1] / 10 < inverted[0]
    assert edges[0] < half[0] < inverted[0]
    assert inverted[1] < half[1] < edges[1]
    assert all(numbers(line, printed)[-1] < 1e-6 for line in ("Half of each:", "Half of 'edges' merged:"))
    for name in ("edges", "inverted"):
        assert tnpeft.inspect(tmp_path / "runs" / "several_adapters" / f"{name}.safetensors")


@pytest.mark.slow
def test_your_own_adapter(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="the picture needs the `draw` extra")
    printed = output_of(EXAMPLES / "your_own_adapter.py", folder=tmp_path)
    assert exact(printed) == 1
    slip, sound = printed.split("Without it, the spec 'stencils' is sound.")
    assert slip.splitlines()[1:3] == [
        "  <spec>:11:16: core 'stencil', index 'v' dangles: expected a second core or a place in `weight`, "
        "found core 'stencil' alone. Add 'v' to another core, or to `weight`.",
        "  <spec>:12:15: `weight`, index 'w': expected a core that has it, found none. "
        "Add 'w' to a core, or remove it from `weight`.",
    ]
    assert "On Conv2d(8, 16, 3x3) it trains 66 parameters = (o + i + h w) r" in sound
    assert "It holds on random layers: reach, sizes, entries, start, " in sound
    assert "In 50 steps the loss falls: yes" in sound
    assert "The weight's change is the formula's, but for rounding: yes" in sound
    assert (tmp_path / "runs" / "your_own_adapter" / "stencils.svg").read_text(encoding="utf-8").startswith("<?xml")


@pytest.mark.slow
def test_your_own_adapter_goes_without_the_extras(tmp_path: Path):
    code = (
        "import runpy, sys; sys.modules.update(matplotlib=None, hypothesis=None); "
        f"runpy.run_path({str(EXAMPLES / 'your_own_adapter.py')!r}, run_name='__main__')"
    )
    printed = output_of("-c", code, folder=tmp_path)
    assert exact(printed) == 1
    assert "No picture: `pip install 'tnpeft[draw]'` brings matplotlib." in printed
    assert "No property tests: `pip install 'tnpeft[testing]'` brings hypothesis." in printed
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_fit_a_checkpoint(tmp_path: Path):
    printed = output_of(EXAMPLES / "fit_a_checkpoint.py", folder=tmp_path)
    assert exact(printed) == 2
    assert "As near as can be: yes" in printed
    base, tuned = numbers("Mean squared error", printed)
    assert tuned < base / 10
    rows = [line.split() for line in printed.splitlines() if re.match(r"(lora|locon_tucker|full) ", line)]
    rank_1, rank_4, tucker, full = ([float(cell.strip("%")) for cell in row[-2:]] for row in rows)
    # What captures more of the change comes nearer to the fine-tune, and the change itself is all of it.
    assert rank_1[0] < tucker[0] < rank_4[0] < full[0] == 100.0
    assert max(rank_4[1], tucker[1]) < rank_1[1] < base
    assert full[1] == pytest.approx(tuned, abs=1e-3)
    assert [row[0] for row in rows] == ["lora", "lora", "locon_tucker", "full"]
    with safe_open(tmp_path / "runs" / "fit_a_checkpoint" / "adapter.safetensors", "pt") as file:
        assert len([*file.keys()]) == 9  # two cores and a bias for each of three layers


@pytest.mark.slow
def test_search_for_a_network(tmp_path: Path):
    printed = output_of(EXAMPLES / "search_for_a_network.py", "--evaluations", "3", folder=tmp_path)
    parameters, selection, test = numbers("found", printed)
    assert parameters <= 800
    lora = numbers("lora, r=", printed)
    assert selection > lora[2] > 0
    assert test > lora[3] > 0
    assert "Attached from" in printed
    folder = tmp_path / "runs" / "search_for_a_network"
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.md", "front.svg", "found.yaml"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_short_and_stand_alone(name: str):
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    assert f"python examples/{name}.py" in text
    assert re.search(r"manual_seed\(0\)|set_seed\(0\)", text)
    assert "assert " not in text
    # Public names alone: of tnpeft itself, and of the two modules that are imported by name.
    assert set(re.findall(r"tnpeft\.(\w+)[(.\[]", text)) - {"integrations"} <= set(tnpeft.__all__)
    imported = set(re.findall(r"from (tnpeft\S*) import", text))
    assert imported <= {"tnpeft.testing", "tnpeft.integrations.transformers"}
    others = {path.stem for path in EXAMPLES.glob("*.py")} | {"ddpm_lab"}
    assert not others & set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE))


def test_both_readmes_name_them():
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert tuple(re.findall(r"^\| \[`(\w+)\.py`\]\(\1\.py\) \|", table, re.MULTILINE)) == SCRIPTS
    assert "`examples/quickstart.py`" in (ROOT / "README.md").read_text(encoding="utf-8")
