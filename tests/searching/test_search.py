"""`tnpeft.search`: what it finds, what it keeps, and what it says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tnpeft
from tnpeft.errors import TnpeftError
from tnpeft.searching import Search

MODULE = sys.modules["tnpeft.searching.search"]  # whose name is that of the function
QUICK = {"match": "^[01]$", "evaluations": 8, "iterations": 1, "cores": 5}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 6, 2), nn.Conv2d(6, 4, 2), nn.Conv2d(4, 4, 2))


def planted(spec: str = "moslora", seed: int = 1, **params: int) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """A base, and what it is after an adapter of random cores was merged into it."""
    model = net()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    handle = tnpeft.attach(model, spec, match="all", **params)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    tnpeft.detach(model, merge=True)
    return base, model.state_dict()


CP = tnpeft.Spec.build(
    name="planted", layers=["Conv2d"], params={"r": 2}, bond="r",
    sizes={"o": "out_channels", "i": "in_channels", "kh kw": "kernel_size"},
    cores={"a": "o c", "b": "i c", "d": "kh c", "e": {"legs": "kw c", "init": "zeros"}},
    weight="o i kh kw", start="zero",
)  # fmt: skip


def searched(**changed) -> Search:
    return tnpeft.search(net(), [planted(CP)], 90, **{**QUICK, **changed})


def drawn(found: Search) -> list[tuple[int, str, float | None]]:
    rows = sorted(found.candidates, key=lambda candidate: candidate.number)
    return [(row.number, row.topology.key, row.score) for row in rows]


def test_a_planted_network_is_found_and_lora_is_not_ahead():
    found = searched(test_match="^2$", test_pairs=[planted(CP, seed=2)], iterations=10)
    lora = tnpeft.budget("lora", net(), 90, match="^[01]$")
    base, tuned = planted(CP)
    layers = dict(net().named_children())
    shares = [
        tnpeft.fit("lora", tuned[f"{name}.weight"] - base[f"{name}.weight"], layers[name], **lora.settings).captured
        for name in "01"
    ]
    assert sum(shares) / 2 < 0.9
    assert found.score > 0.999 >= sum(shares) / 2
    assert found.test_score > 0.99
    assert [*found.test_scores] == ["2, pair 0", "0, pair 1", "1, pair 1", "2, pair 1"]
    assert found.best.parameters <= 90
    bound = [found.spec.bind(layers[name]) for name in "01"]
    assert sum(network.num_parameters for network in bound) == found.best.parameters
    assert len(found.candidates) == 8


def test_what_is_held_out_is_not_searched():
    found = searched(match="all", test_match="[12]", evaluations=2)
    assert [*found.task.layers] == ["0"]
    assert {update.name for update in found.task.updates} == {"0"}
    assert {update.name for update in found.tests} == {"1", "2"}
    assert error_of(match="1", test_match="all") == (
        "search: expected layers that `match` has and `test_match` has not, found none. "
        "Let `test_match` match fewer layers."
    )


def test_layers_of_another_kind_may_be_held_out():
    model = nn.Sequential(nn.Conv1d(4, 6, 2), nn.ConvTranspose1d(6, 4, 2))
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = {name: torch.ones_like(tensor) for name, tensor in base.items()}
    found = tnpeft.search(model, [(base, tuned)], 40, match="0", test_match="1", evaluations=1)
    assert found.spec.layers == ("Conv1d", "ConvTranspose1d")
    assert found.test_scores.keys() == {"1, pair 0"}


@pytest.mark.parametrize("sampler", ["random", "tpe", "evolution", "local"])
def test_equal_arguments_give_equal_searches(sampler: str):
    runs = [searched(sampler=sampler, from_known=False, seed=3, evaluations=5) for _ in range(2)]
    assert drawn(runs[0]) == drawn(runs[1])
    assert drawn(runs[0]) != drawn(searched(sampler=sampler, from_known=False, seed=4, evaluations=5))
    assert len({row.spec().canonical().hash for row in runs[0].candidates}) == 5
    assert runs[0].test_score is None


def test_local_moves_change_one_choice_of_the_best():
    found = searched(sampler="local", evaluations=9)
    known = [row for row in found.candidates if row.origin != "local"]
    moved = [row for row in found.candidates if row.origin == "local"]
    assert len(moved) >= 3
    assert not {row.topology.key for row in known} & {row.topology.key for row in moved}


def test_equal_networks_are_evaluated_once():
    found = tnpeft.search(
        net(), [planted(CP)], 90, match="^0$", evaluations=12, iterations=2, cores=2, sampler="random"
    )  # few networks of two cores
    hashes = [row.spec().canonical().hash for row in found.candidates]
    assert len(hashes) == len(set(hashes)) == 12


KILLED = """
import os, sys
import tnpeft.searching.task as task
from test_search import searched
budget, counts = task.budget, []
def counted(*args, **kwargs):
    counts.append(1)
    if len(counts) == int(sys.argv[2]):
        os._exit(9)  # a trial is on its way
    return budget(*args, **kwargs)
task.budget = counted
searched(storage=sys.argv[1])
"""


def test_a_search_goes_on_where_it_ended(tmp_path: Path):
    storage = tmp_path / "search.journal"
    first = searched(storage=storage, evaluations=6)
    assert drawn(searched(storage=storage)) == drawn(searched())
    assert drawn(searched(storage=storage))[:6] == drawn(first)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "at"), [("search.journal", "7"), ("search.db", "3")])
def test_a_killed_search_goes_on_as_if_nothing_had_been(name: str, at: str, tmp_path: Path):
    storage = str(tmp_path / name)
    run = subprocess.run([sys.executable, "-c", KILLED, storage, at], cwd=Path(__file__).parent, check=False)
    assert run.returncode == 9
    resumed, whole = drawn(searched(storage=storage)), drawn(searched())
    assert len({key for _, key, _ in resumed}) == 8
    if at == "7":  # one that was drawn: the next draw is the same
        assert [row[1:] for row in resumed] == [row[1:] for row in whole]
    else:  # a known one, which comes after the others
        assert {row[1:] for row in resumed[:5]} == {row[1:] for row in whole[:5]}
    assert resumed[-1][0] >= whole[-1][0] + 1  # the trial that died has kept its number
    assert drawn(searched(storage=storage)) == resumed  # nothing is left to do


@pytest.mark.slow
def test_processes_share_a_search(tmp_path: Path):
    found = searched(storage=str(tmp_path / "search.journal"), jobs=2, evaluations=12)
    keys = [row.spec().canonical().hash for row in found.candidates]
    assert 12 <= len(keys) <= 13
    assert len(set(keys)) >= len(keys) - 1
    assert found.score > 0.999


def test_an_interrupt_keeps_what_was_found(tmp_path: Path):
    def interrupt(candidate: object, count: int) -> None:
        if count == 4:
            raise KeyboardInterrupt

    found = searched(progress=interrupt)
    assert found.interrupted
    assert len(found.candidates) == 4


def test_an_interrupt_before_anything_was_found_is_one():
    def interrupt(candidate: object, count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tnpeft.search(net(), [planted(CP)], 1, match="^0$", progress=interrupt)


def test_the_file_carries_its_history(tmp_path: Path):
    found = searched(test_match="^2$", seed=5)
    found.save(tmp_path / "My best.yaml")
    text = (tmp_path / "My best.yaml").read_text()
    assert "# Evaluations: 8 networks, sampler mixed, seed 5.\n" in text
    assert f"# Selection score, optimistic: {found.score:.4f} of the energy of 2 updates.\n" in text
    assert f"# Test score: {found.test_score:.4f} of the energy of 1 updates that the search never saw.\n" in text
    spec = tnpeft.load_spec(tmp_path / "My best.yaml")
    assert spec.name == "my_best"
    assert spec.canonical() == found.spec.canonical()
    assert dict(spec.bind(nn.Conv2d(4, 6, 2)).params) == dict(found.best.ranks)
    assert "# Test score: none, no update was held out.\n" in searched(evaluations=3).to_yaml()


def error_of(**changed) -> str:
    with pytest.raises(TnpeftError) as caught:
        searched(**changed)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        (
            {"evaluations": 0},
            "search, `evaluations`: expected a whole number from 1 on, found 0. For example `evaluations=100`.",
        ),
        ({"cores": 1}, "search, `cores`: expected a whole number from 2 on, found 1. For example `cores=8`."),
        ({"jobs": True}, "search, `jobs`: expected a whole number from 1 on, found True. For example `jobs=2`."),
        (
            {"sampler": "best"},
            "search, `sampler`: expected one of mixed, random, tpe, evolution, local, found 'best'. "
            "Leave it out, or choose one of them.",
        ),
    ],
)  # fmt: skip
def test_settings_that_make_no_search(changed: dict, text: str):
    assert error_of(**changed) == text


def test_a_storage_holds_one_search(tmp_path: Path):
    storage = str(tmp_path / "search.journal")
    searched(storage=storage, evaluations=2)
    assert error_of(storage=storage, iterations=4) == (
        f"{storage}: storage: expected this search, found one with other updates or settings. "
        "Name another storage, or search with the files and settings that it was begun with."
    )


def test_files_that_are_no_storage(tmp_path: Path):
    (tmp_path / "a.journal").write_text("hello\n")
    assert error_of(storage=str(tmp_path / "a.journal")) == (
        f"{tmp_path / 'a.journal'}: storage: expected a search to go on with, or none yet, "
        "found Expecting value: line 1 column 1 (char 0). Name another file, or leave it out."
    )
    for name in ("none/a.journal", "none/a.db", "."):
        text = error_of(storage=str(tmp_path / name))
        assert text.startswith(f"{tmp_path / name}: storage: expected a search to go on with, or none yet, found ")
    assert "storage: expected a search" in error_of(storage="foo://x")


def test_nothing_to_capture_and_nothing_that_fits():
    base, tuned = planted(CP)
    with pytest.raises(TnpeftError) as caught:
        tnpeft.search(net(), [(base, base)], 90, match="^0$")
    assert str(caught.value) == (
        "search: expected a layer whose weight the fine-tune changed, found none. "
        "Pass a fine-tune that trained these layers."
    )
    with pytest.raises(TnpeftError) as caught:
        tnpeft.search(net(), [(base, tuned)], 3, match="^0$", evaluations=1)
    assert str(caught.value) == (
        "search: expected a network that meets the budget, found none in 40 trials. "
        "Allow more parameters (`params`), or match fewer layers."
    )
    with pytest.raises(TnpeftError) as caught:
        tnpeft.search(net(), [(base, {})], 90, match="^0$")
    assert str(caught.value) == (
        "tuned checkpoint of pair 0: expected a tensor '0.weight', found None. Pass checkpoints of this model."
    )


def test_a_search_ends_by_the_clock_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = searched(seed=2)
    monkeypatch.setattr(MODULE, "time_after", lambda minutes: None if minutes is None else 0.0)
    with pytest.raises(TnpeftError) as caught:
        searched(seed=2, minutes=1)
    assert str(caught.value) == (
        "search: expected a network that meets the budget, found none in 0 trials. "
        "Allow more `minutes`, or match fewer layers."
    )
    monkeypatch.undo()
    path = tmp_path / "s.journal"
    part = searched(seed=2, storage=path, evaluations=3)
    assert not part.interrupted
    monkeypatch.setattr(MODULE, "time_after", lambda minutes: None if minutes is None else 0.0)
    part = searched(seed=2, storage=path, minutes=1)
    assert part.interrupted
    assert len(part.candidates) == 3
    monkeypatch.undo()
    assert drawn(searched(seed=2, storage=path, minutes=60)) == drawn(whole)
    assert error_of(minutes=0) == "search, `minutes`: expected a positive number, found 0. For example `minutes=60`."
