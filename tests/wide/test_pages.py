"""The pages in `docs` on other people's libraries: every block of code runs, and holds what it asserts."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm_alone  # noqa: F401 - timm's page imports it beside no torchvision
import torch
from pages import HEAVY, run

# Of the libraries, on their own behalf.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("page", HEAVY, ids=lambda page: page.name)
def test_a_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run(page)
