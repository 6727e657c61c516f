"""What the pages in `docs` and the README show is what happens. tests/wide runs those that need heavy libraries."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import HEAVY, LIGHT, PAGES, ROOT, blocks, check_command, commands, read_yaml, run

import tnpeft

TEXTS = [
    *PAGES,
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(ROOT / "examples").rglob("README.md"),
    *(ROOT / "benchmarks").glob("README.md"),
]
TYPED = [(path, line) for path in TEXTS for line in commands(path.read_text(encoding="utf-8"))]
SHOWN = re.findall(r"^\| `(tnpeft [^`]+)` \|", (ROOT / "docs" / "start.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("page", LIGHT, ids=lambda page: page.name)
def test_python_runs_and_yaml_is_read(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run(page)


@pytest.mark.parametrize(
    "text", [path for path in TEXTS if path not in PAGES], ids=lambda path: str(path.relative_to(ROOT))
)
def test_other_texts_show_python_in_the_readme_alone_and_yaml_that_is_read(text: Path):
    content = text.read_text(encoding="utf-8")
    assert text == ROOT / "README.md" or not blocks(content, "python")
    for block in blocks(content, "yaml"):
        read_yaml(block, text.name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_names(page: Path):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    for name in re.findall(r"`tnpeft\.(\w+)", text):
        assert hasattr(tnpeft, name) or name in ("testing", "integrations", "starts"), name
    for name in re.findall(r"handle\.(\w+)", text):
        assert hasattr(tnpeft.Handle, name), name


@pytest.mark.parametrize("page", HEAVY, ids=lambda page: page.name)
def test_recipes_that_are_named_are_shipped(page: Path):
    for recipe in re.findall(r"`((?:lora|tenvoo_[lq])_\w+)`", page.read_text(encoding="utf-8")):
        assert recipe in (*tnpeft.list_recipes(), *tnpeft.list_specs()), recipe


@pytest.mark.parametrize(("text", "line"), TYPED, ids=[f"{path.name}-{line[:40]}" for path, line in TYPED])
def test_commands_can_be_typed(text: Path, line: str):
    check_command(line)


@pytest.mark.parametrize("line", SHOWN)
def test_the_table_of_commands_can_be_typed(line: str):
    check_command(line.replace("...", "package.module:factory").replace(" N ", " 800 "))


def test_a_command_that_cannot_be_typed_is_noticed():
    for line in ("make nothing", "pip install '.[nothing]'", "python examples/nothing.py", "tnpeft nothing"):
        with pytest.raises(AssertionError):
            check_command(line)
    with pytest.raises(Exception, match="No such option"):
        check_command("tnpeft show lora --nothing")
