"""The report of a search: what stands beside it, at how many parameters, and the picture."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from test_search import CP, QUICK, net, planted, searched
from torch import nn

import tnpeft
from tnpeft.searching import search_report
from tnpeft.searching.compared import compared


def test_the_report_compares_at_equal_parameters(tmp_path: Path):
    found = searched(evaluations=4, test_match="^2$", seed=6)
    rows = {row.name: row for row in search_report(found, tmp_path / "report")}
    assert [*rows] == ["found", "random search", "cp", "tucker5", "lora, r=1", "lokr, r=3", "tenvoo_l"]
    assert all(row.parameters <= 90 for row in rows.values() if row.parameters is not None)
    base, tuned = planted(CP)
    layers = dict(net().named_children())

    def captured(name: str) -> float:
        delta = tuned[f"{name}.weight"] - base[f"{name}.weight"]
        return tnpeft.fit("lora", delta, layers[name], r=1).captured

    lora = rows["lora, r=1"]
    assert lora.selection_score == pytest.approx((captured("0") + captured("1")) / 2, abs=1e-6)
    assert lora.test_score == pytest.approx(captured("2"), abs=1e-6)
    assert rows["cp"].missing.startswith("expected ")
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    assert data["seed"] == 6
    assert [row["name"] for row in data["comparison"]] == [*rows]
    text = (tmp_path / "report" / "report.md").read_text()
    assert f"| found | {found.best.parameters} | {found.score:.4f} (optimistic) | {found.test_score:.4f} |\n" in text
    assert text.endswith("![Networks by their parameters](front.svg)\n")
    ElementTree.parse(tmp_path / "report" / "front.svg")


def test_tenvoo_is_compared_from_zero(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tnpeft.searching.compared.PEERS", ("tenvoo_l",))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(4, 4, 2))
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = {name: tensor + torch.randn(tensor.shape) for name, tensor in base.items()}
    found = tnpeft.search(model, [(base, tuned)], 120, **{**QUICK, "match": "0", "evaluations": 1})
    row = next(row for row in compared(found) if row.name.startswith("tenvoo_l"))
    drawn = tnpeft.fit("tenvoo_l", tuned["0.weight"] - base["0.weight"], model[0], r=1, frozen_copy="drawn")
    assert row.selection_score is not None
    assert row.parameters <= 120
    assert row.test_score is None
    assert row.selection_score > drawn.captured
