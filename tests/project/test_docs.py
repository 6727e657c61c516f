"""What the pages in `docs` show is what happens. tests/wide runs those that need heavy libraries."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import HEAVY, LIGHT, PAGES, run

import tnpeft


@pytest.mark.parametrize("page", LIGHT, ids=lambda page: page.name)
def test_python_runs_and_recipes_are_read(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_names(page: Path):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    for name in re.findall(r"`tnpeft\.(\w+)", text):
        assert hasattr(tnpeft, name), name
    for name in re.findall(r"handle\.(\w+)", text):
        assert hasattr(tnpeft.Handle, name), name


@pytest.mark.parametrize("page", HEAVY, ids=lambda page: page.name)
def test_recipes_that_are_named_are_shipped(page: Path):
    for recipe in re.findall(r"`((?:lora|tenvoo_[lq])_\w+)`", page.read_text(encoding="utf-8")):
        assert recipe in (*tnpeft.list_recipes(), *tnpeft.list_specs()), recipe
