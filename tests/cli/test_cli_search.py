"""`tnpeft search`: checkpoints in, a spec out, and all that can be wrong with them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small import net
from terminal import data, mistakes, run

import tnpeft

FILES = ("base.safetensors", "tuned.safetensors")
QUICK = ("-m", "small:net", "--match", "head", "--params", "60", "-n", "3", "-o", "found.yaml")


@pytest.fixture(autouse=True)
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base and a tuned file in a working directory of their own."""
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1]), *sys.path])
    monkeypatch.chdir(tmp_path)
    state = net().state_dict()
    save_file(state, FILES[0])
    generator = torch.Generator().manual_seed(2)
    tuned = {name: value + torch.rand(value.shape, generator=generator) for name, value in state.items()
             if value.is_floating_point()}  # fmt: skip
    save_file(tuned, FILES[1])


def test_a_search_writes_its_winner():
    result = run("search", *FILES, *QUICK, "--test", "=".join(FILES), "--storage", "s.journal")
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("[1] lora: 2 cores, ")
    assert "evaluated    3 networks, 0 given up early" in result.stdout
    spec = tnpeft.load_spec("found.yaml")
    assert spec.layers == ("Linear",)
    budget = tnpeft.budget(spec, net(), 60, match="head", param=[*spec.params])
    assert sum(spec.bind(layer).num_parameters for layer in (net().head[0], net().head[2])) == budget.total <= 60
    again = data("search", *FILES, *QUICK, "--test", "=".join(FILES), "--storage", "s.journal", "-q")
    assert again["evaluations"] == 3
    assert again["file"] == "found.yaml"
    assert again["selection_score_optimistic"] == pytest.approx(again["test_score"])
    assert again["test_scores"].keys() == {"head.0, tuned.safetensors", "head.2, tuned.safetensors"}
    assert again["versions"]["tnpeft"] == tnpeft.__version__


@pytest.mark.slow
def test_fine_tunes_and_the_report():
    Path("train.py").write_text("import sys; print('{\"score\": ' + str(-float(sys.argv[2])) + '}')")
    how = ("--command", f"{sys.executable} train.py {{spec}} {{rate}}", "--rate", "0.5", "--rate", "0.25")
    result = run("search", *FILES, *QUICK, *how, "--finalists", "2", "--report", "report", "--test", "=".join(FILES))
    assert result.exit_code == 0, result.output
    assert result.stdout.count("fine-tuned   network ") == 4
    assert " at rate 0.25, selection score (optimistic) -0.25\n" in result.stdout
    assert "tenvoo_l" in result.stdout
    assert "Fine-tuned: the best of 2 networks at 2 rates each, at rate 0.25" in Path("found.yaml").read_text()
    assert {path.name for path in Path("report").iterdir()} == {"report.json", "report.md", "front.svg"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            [FILES[0]],
            "checkpoints: expected pairs: a base and its fine-tune each, found 1 files. "
            "For example base.safetensors tuned.safetensors.",
        ),
        (
            [*FILES, "--test", "tuned.safetensors"],
            "--test: expected BASE=TUNED, found 'tuned.safetensors'. "
            "For example --test base.safetensors=tuned.safetensors.",
        ),
        ([*FILES, "-o", "found"], "--output: expected a name in .yaml, found 'found'. For example -o found.yaml."),
        (
            [*FILES, "-o", "none/found.yaml"],
            "--output: expected a file name in a folder that exists, found no folder 'none'. "
            "For example -o found.yaml.",
        ),
        (
            [*FILES, "--match", "first|head"],
            "search: expected layers with equally many kernel axes, found Conv3d, Linear. "
            "Search for each kind by itself: match the layers of one.",
        ),
    ],
)
def test_what_cannot_be_searched(arguments: list[str], text: str):
    result = run("search", *QUICK, *arguments)
    assert result.stderr == f"error {text}\n"
    assert result.exit_code in (1, 2)


def test_without_optuna_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tnpeft.errors.find_spec", lambda name: None)
    text = "search: expected the package optuna, found none installed. Run `pip install 'tnpeft[search]'`."
    assert mistakes("search", *FILES, *QUICK) == [text]
