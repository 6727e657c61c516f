"""A report is a text wherever it is printed: rich would hand it to a notebook's display, and leave the text empty."""

from __future__ import annotations

import pytest
import rich.console
from torch import nn

import tnpeft


def test_a_report_is_a_text_in_a_notebook_too(monkeypatch: pytest.MonkeyPatch):
    report = tnpeft.attach(nn.Sequential(nn.Linear(4, 4)), "lora", match="0", r=2).report()
    outside = str(report)
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    assert str(report) == outside
    assert "16 of 20 parameters train" in outside
