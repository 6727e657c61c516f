"""The report of a search: what stands beside it, at how many parameters, and the picture."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from test_search import CP, QUICK, net, planted, searched
from torch import nn

import tnpeft
from tnpeft.errors import TnpeftError
from tnpeft.searching import search_report
from tnpeft.searching.compared import compared, from_zero
from tnpeft.searching.steps import predicted_steps


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
    assert rows["found"].tests == {"other layers": found.test_score}
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    assert data["seed"] == 6
    assert data["steps"] == "predicted"
    specs = {row["name"]: tnpeft.Spec.from_yaml(row["spec"]) for row in data["comparison"] if row["spec"] is not None}
    steps = predicted_steps([*found.task.layers.values()], specs)
    assert {row["name"]: row["step"] for row in data["comparison"] if row["spec"]} == pytest.approx(steps)
    assert [row["name"] for row in data["comparison"]] == [*rows]
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| | parameters | selection score | test score | other layers | step |\n|-|-|-|-|-|-|\n" in text
    scores = f"{found.score:.4f} (optimistic) | {found.test_score:.4f} | {found.test_score:.4f}"
    assert f"| found | {found.best.parameters} | {scores} | {rows['found'].step:.2f} |\n" in text
    assert text.endswith("![Networks by their parameters and by the time of a step](front.svg)\n")
    ElementTree.parse(tmp_path / "report" / "front.svg")


def test_scores_are_split_into_other_layers_and_each_pair(tmp_path: Path):
    tests = {"a domain": planted(CP, seed=2), "a seed": planted(CP, seed=3)}
    found = searched(evaluations=3, test_match="^2$", test_pairs=tests)
    rows = compared(found)
    for row in rows:
        if row.spec is None or row.test_score is None:
            continue
        assert [*row.tests] == ["other layers", "a domain", "a seed"]
        # One update of the layer that was held out, three of each pair.
        own = row.tests
        assert row.test_score == pytest.approx((own["other layers"] + 3 * own["a domain"] + 3 * own["a seed"]) / 7)


COMMANDS = """
import json, pathlib, sys
spec, rate, factor, log = pathlib.Path(sys.argv[1]).read_text(), float(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
with open(log, "a") as file:
    file.write(f"{rate} {factor}\\n")
if "name: lokr\\n" in spec:
    sys.exit(1)
size = len(spec)
print(json.dumps({"score": factor * size - abs(rate - 0.02)}))
"""


def test_rivals_are_fine_tuned_at_as_many_rates_and_tested_at_their_best(tmp_path: Path):
    log, program = tmp_path / "log", tmp_path / "train.py"
    program.write_text(COMMANDS)

    def command(factor: int) -> str:
        return shlex.join([sys.executable, str(program), "{spec}", "{rate}", str(factor), str(log)])

    how = {"command": command(1), "rates": (0.01, 0.02), "finalists": 1, "storage": tmp_path / "s.journal"}
    found = searched(evaluations=2, **how)
    tests = {"seed 1": command(2), "seed 2": command(3)}
    folder, kept = tmp_path / "report", {"storage": tmp_path / "s.journal", "test_commands": tests}
    rows = {row.name.partition(",")[0]: row for row in search_report(found, folder, **kept)}
    for name in ("found", "random search", "lora"):
        size = len(rows[name].spec.to_yaml())
        assert (rows[name].rate, rows[name].finetune_score) == (0.02, size)
        assert rows[name].finetune_tests == {"seed 1": 2 * size, "seed 2": 3 * size}
    assert (rows["lokr"].rate, rows["lokr"].finetune_tests) == (None, {})
    lines = log.read_text().splitlines()
    # The network that won, two rates; random search, LoRA and LoKr; then two tests of each but LoKr, which failed.
    assert len(lines) == 2 + 3 * 2 + 3 * 2
    text = (folder / "report.md").read_text()
    assert "| | best rate | score that chose it (optimistic) | seed 1 | seed 2 |\n|-|-|-|-|-|\n" in text
    size = rows["lora"].finetune_score
    assert f"| lora, r=1 | 0.02 | {size:g} | {2 * size:g} | {3 * size:g} |\n" in text
    assert "| lokr, r=3 |  |  |  |  |\n" in text
    again = {row.name.partition(",")[0]: row for row in search_report(found, folder, **kept)}
    assert log.read_text().splitlines() == lines
    assert again["lora"].finetune_tests == rows["lora"].finetune_tests


def test_a_report_goes_on_after_its_minutes(tmp_path: Path):
    found = searched(evaluations=3, storage=tmp_path / "s.journal")
    names = {"storage": tmp_path / "s.journal"}
    early = search_report(found, tmp_path / "report", **names, minutes=1e-9)
    assert early[1].missing == "expected a network that meets the budget, found none in 0 trials"
    assert search_report(found, tmp_path / "report", **names)[1].selection_score is not None


def test_what_a_report_cannot_be_asked_for(tmp_path: Path):
    found = searched(evaluations=1)
    with pytest.raises(TnpeftError) as caught:
        search_report(found, tmp_path, test_commands={"seed 1": "test"}, model=net())
    assert str(caught.value) == (
        "search, `model` and `example`: expected both or neither, found `model` alone. "
        "Pass the model and the arguments of a call, or neither to have steps predicted.\n"
        "search, `test_commands`: expected a search with fine-tunes, found one without. "
        "Search with a `command`, which finds the rates.\n"
        "search, test command 'seed 1': expected {spec} and {rate} in it, found 'test'. "
        "For example 'python test.py --spec {spec} --rate {rate}'."
    )


@pytest.mark.parametrize("name", ["cp", "tenvoo_l", "quanta", "lokr"])
def test_a_spec_from_zero_is_the_same_network_without_a_copy(name: str):
    spec = tnpeft.load_spec(name)
    own = from_zero(spec, {"r": 3})
    assert own.start == "zero"
    layer = nn.Linear(8, 8) if "Conv3d" not in spec.layers and spec.layers != "any" else nn.Conv3d(8, 8, 3)
    one, other = own.bind(layer), spec.bind(layer, r=3)
    assert [core.shape for core in one.cores] == [core.shape for core in other.cores]
    assert one.formula == other.formula
    model = nn.Sequential(layer)
    before = layer.weight.detach().clone()
    tnpeft.attach(model, own, match="all")
    tnpeft.detach(model, merge=True)
    assert torch.equal(model[0].weight, before)


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
