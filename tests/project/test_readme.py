"""What the README and the page on the start show is what happens."""

from __future__ import annotations

import html
import re
import runpy
import sys
import types
from pathlib import Path

import pytest

import tnpeft
from tnpeft.spec.library import shipped_folder

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
START = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
MAX_BYTES = 8_000


def test_the_readme_is_one_page():
    assert len(README.encode()) <= MAX_BYTES


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    assert "152 of 2,768 parameters train" in capsys.readouterr().out
    assert (tmp_path / "adapter.safetensors").is_file()


def test_the_picture_shows_the_spec_of_the_ten_lines():
    (text,) = re.findall(r'from_yaml\("""\n(.*?)"""', README, re.DOTALL)
    drawn = html.unescape((ROOT / "docs" / "overview.svg").read_text(encoding="utf-8"))
    shown = "\n".join(re.findall(r'<text class="code"[^>]*space="preserve">(.*?)</text>', drawn))
    assert tnpeft.Spec.from_yaml(text) == tnpeft.Spec.from_yaml(shown)
    (points,) = re.findall(r'<polyline class="curve" points="([^"]*)"', drawn)
    heights = [int(point.partition(",")[2]) for point in points.split()]
    assert heights[0] == min(heights)
    assert heights[-1] == max(heights)


def test_the_picture_of_the_start_is_what_show_prints():
    from typer.testing import CliRunner

    from tnpeft.cli.app import app

    printed = CliRunner().invoke(app, ["show", "tenvoo_l", "--layer", "Conv3d:64,128,3"], terminal_width=200).output
    (picture,) = re.findall(r"prints it:.*?```\n(.*?)```", START, re.DOTALL)
    for line in picture.splitlines():
        assert line.strip() in printed


def test_the_table_names_shipped_specs():
    """All of them are in the table of `specs/README.md`."""
    named = re.findall(r"^\| `(\w+)` \|", START, re.MULTILINE)
    assert named
    assert set(named) <= set(tnpeft.list_specs())


def test_as_many_specs_ship_as_it_says():
    counts = re.findall(r"(\d+) adapters from the literature|Some of the (\d+)", README + START)
    assert [int(one or other) for one, other in counts] == [len(tnpeft.list_specs())] * 2


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_specs_lie_where_the_readme_says():
    assert (shipped_folder() / "README.md").is_file()


def test_the_table_has_each_spec_s_count_and_formula():
    for name, count, formula in re.findall(r"^\| `(\w+)` \|.*?\| ([\d,]+)[^|]*\| `([^`]*)` \|", START, re.MULTILINE):
        spec = tnpeft.load_spec(name)
        kind = next(kind for kind in ("Conv3d", "Conv2d", "Linear") if kind in spec.layers)
        kernel = (3,) * (0 if kind == "Linear" else int(kind[-2]))
        network = spec.bind(tnpeft.Layer(kind, 64, 128, kernel))  # rank 4 by default
        assert (f"{network.num_parameters:,}", network.formula) == (count, formula), name


@pytest.fixture
def hook(monkeypatch):
    """The build's hook, with hatchling's base class as it calls it: a folder and the table of pyproject.toml."""

    class Interface:
        def __init__(self, root, config):
            self.root, self.config = root, config

    interface = types.ModuleType("hatchling.metadata.plugin.interface")
    interface.MetadataHookInterface = Interface
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    return runpy.run_path(str(ROOT / "hatch_build.py"))["ProjectLinks"]


def test_without_an_address_the_package_has_the_readme_as_it_stands(hook):
    metadata: dict[str, object] = {}
    hook(str(ROOT), {"url": ""}).update(metadata)
    assert metadata == {"readme": {"content-type": "text/markdown", "text": README}, "urls": {}}


def test_with_an_address_every_link_of_the_package_s_readme_is_whole(hook):
    metadata: dict[str, object] = {}
    hook(str(ROOT), {"url": "https://host.test/owner/name/"}).update(metadata)
    text = metadata["readme"]["text"]
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", text)
    assert len(links) == len(re.findall(r"\]\(", README))
    for picture, link in links:
        assert link.startswith(f"https://host.test/owner/name/{'raw' if picture else 'blob'}/main/"), link
    assert metadata["urls"]["Source"] == "https://host.test/owner/name"
