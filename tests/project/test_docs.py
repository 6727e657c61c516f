"""What the pages in `docs` show is what happens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tnpeft

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_runs_and_recipes_are_read(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": page.stem}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, page.name, "exec"), names)
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        assert tnpeft.Recipe.from_yaml(block, page.name).entries


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_names(page: Path):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    for name in re.findall(r"`tnpeft\.(\w+)", text):
        assert hasattr(tnpeft, name), name
    for name in re.findall(r"handle\.(\w+)", text):
        assert hasattr(tnpeft.Handle, name), name
