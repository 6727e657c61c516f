"""What the README shows is what happens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tnpeft
from tnpeft.spec.library import shipped_folder

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert "152 of 2,768 parameters train" in capsys.readouterr().out
    assert (tmp_path / "adapter.safetensors").is_file()


def test_the_picture_of_the_readme_is_what_show_prints():
    from typer.testing import CliRunner

    from tnpeft.cli.app import app

    printed = CliRunner().invoke(app, ["show", "tenvoo_l", "--layer", "Conv3d:64,128,3"], terminal_width=200).output
    (picture,) = re.findall(r"prints it:.*?```\n(.*?)```", README, re.DOTALL)
    for line in picture.splitlines():
        assert line.strip() in printed


def test_the_table_names_shipped_specs():
    """All of them are in the table of `specs/README.md`."""
    named = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)
    assert named
    assert set(named) <= set(tnpeft.list_specs())


def test_as_many_specs_ship_as_it_says():
    counts = re.findall(r"(\d+) adapters of the literature|Some of the (\d+)", README)
    assert [int(one or other) for one, other in counts] == [len(tnpeft.list_specs())] * 2


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_specs_lie_where_the_readme_says():
    assert (shipped_folder() / "README.md").is_file()


def test_the_table_has_each_spec_s_count_and_formula():
    for name, count, formula in re.findall(r"^\| `(\w+)` \|.*?\| ([\d,]+)[^|]*\| `([^`]*)` \|", README, re.MULTILINE):
        spec = tnpeft.load_spec(name)
        kind = next(kind for kind in ("Conv3d", "Conv2d", "Linear") if kind in spec.layers)
        kernel = (3,) * (0 if kind == "Linear" else int(kind[-2]))
        network = spec.bind(tnpeft.Layer(kind, 64, 128, kernel))  # rank 4 by default
        assert (f"{network.num_parameters:,}", network.formula) == (count, formula), name
