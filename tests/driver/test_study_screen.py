"""The screens: every shipped spec at several budgets, on the U-Net and on a small transformer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("monai", reason="the example driver needs the `demo` extra")

import torch
from ddpm_lab.config.reader import read_config
from ddpm_lab.model.method import apply_method
from ddpm_lab.model.unet import build_unet
from ddpm_lab.study.report import check_filled, report
from ddpm_lab.study.screen_linear import attached, errors_of, trainable
from ddpm_lab.study.screen_page import Point, front, points_of, screen_csv, screen_panels, screen_tables
from ddpm_lab.study.screen_settings import Screened, Text
from ddpm_lab.study.screen_text import Transformer, made_text
from ddpm_lab.study.settings import StudyConfig
from ddpm_lab.study.study import check_study, study
from ddpm_lab.support.faults import LabError
from hypothesis import given
from hypothesis import strategies as st
from studies import TINY_STUDY, Told, read, tiny_study
from torch import nn

from tnpeft.spec import list_specs

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
FAMILIES = """\
  families:
    low_rank: {title: Low rank, rates: [1.0e-3, 1.0e-2], specs: {lora: r, quanta: r, dora: r}}
    others: {title: Others, rates: [1.0e-3, 1.0e-2], specs: {ia3: null, c3a: {b: [2, 4, 8]}, cp: r}}
"""
TINY_SCREEN = (
    TINY_STUDY
    + r"""
screen:
  dataset: contrast
  budgets: [4000, 9000]
  match: ['resnets\.\d+\.conv[12]\.conv$', 'attn\.to_[qv]$']
  rounds: 1
"""
    + FAMILIES
)
TINY_LINEAR = (
    r"""
methods: {}
training: {schedule: one_cycle, clip_norm: 1.0, threads: 1}
screen_linear:
  budgets: [400, 1000]
  match: ['^blocks\.\d+\.(q|v|up)$']
  width: 16
  layers: 1
  text: {words: 8, length: 6, sequences: 32, held_out: 16}
  pretraining: {steps: 4, batch_size: 8, learning_rate: 1.0e-2}
  training: {steps: 4, batch_size: 8}
  rounds: 1
"""
    + FAMILIES
)


def tiny_linear(folder: Path, *overrides: str) -> StudyConfig:
    return tiny_study(folder, *overrides, text=TINY_LINEAR)


@pytest.mark.parametrize(("file", "screen"), [("study_cpu", "screen"), ("screen_linear", "screen_linear")])
def test_every_shipped_spec_is_in_one_family(file: str, screen: str) -> None:
    families = getattr(read_config(CONFIGS / f"{file}.yaml", (), StudyConfig), screen).families
    assert sorted(name for family in families.values() for name in family.specs) == sorted(list_specs())
    assert len({len(family.rates) for family in families.values()}) == 1


def test_each_spec_has_a_method_for_each_budget_that_allows_more(tmp_path: Path) -> None:
    config = tiny_study(tmp_path, text=TINY_SCREEN).with_variants("screen")
    budgets = {name: config.methods[name].screened.budget for name in config.members("screen")}  # type: ignore[union-attr]
    assert {name: budget for name, budget in budgets.items() if "ia3" in name or "lora" in name} == {
        "screen-lora-9k": 9000,
        "screen-ia3-4k": 4000,
    }
    assert config.screen.left_out == {"quanta": "expected one of Linear, found Conv3d"}
    for name, budget in budgets.items():
        method = config.methods[name].method
        counts = [
            apply_method(build_unet(config.model, config.base), method.model_copy(update={"params": params})).parameters
            for params in (method.params, {param: value + 1 for param, value in method.params.items()})
        ]
        assert budget is not None
        assert counts[0] <= budget
        assert counts[1] > budget or "c3a" in name or not method.params, "the largest that fits"
    assert config.methods["screen-cp-9k"].method.match == r"resnets\.\d+\.conv[12]\.conv$", "no linear layers"
    assert config.with_variants("screen") == config


def test_one_method_of_each_family_searches_for_the_rate(tmp_path: Path) -> None:
    config = tiny_study(tmp_path, text=TINY_SCREEN).with_variants("screen")
    members = config.members("screen")
    assert [name for name in members if config.methods[name].rates] == ["screen-lora-9k", "screen-c3a-9k"]
    assert {config.searcher(name) for name in members} == {"screen-lora-9k", "screen-c3a-9k"}
    assert config.training_of("screen-dora-9k", 0, 1e-3).learning_rate == 1e-3
    check_study("screen", config)


def test_a_screen_of_the_unet_runs_and_is_reported(tmp_path: Path, told: Told) -> None:
    rows = tmp_path / "rows.jsonl"
    overrides = [f"rows={rows}", "screen.families.others.specs={ia3: null}", "screen.families.low_rank.specs={lora: r}"]
    config = tiny_study(tmp_path, *overrides, text=TINY_SCREEN)
    study("screen", config, tmp_path / "out", told.screen)
    lines = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 2 * 2 + 2 + 2, "two searches of two rates, two methods, their costs"
    assert {line["dataset"] for line in lines} == {"contrast"}
    results = report(tmp_path / "out", told.screen)
    check_filled(results)
    points = points_of(results, "screen")
    assert all(point.seconds and point.of_full and point.memory and point.change is not None for point in points)
    page = (tmp_path / "out" / "report" / "report.md").read_text(encoding="utf-8")
    assert "A screen, no comparison: one seed (0), 2 steps, no intervals, nothing bold." in page
    assert "**" not in page.partition("## Every shipped spec")[2].partition("## Setup")[0]


def test_a_screen_of_a_transformer_runs_is_reported_and_not_run_again(tmp_path: Path, told: Told) -> None:
    rows = tmp_path / "rows.jsonl"
    config = tiny_linear(tmp_path, f"rows={rows}")
    study("screen_linear", config, tmp_path / "out", told.screen)
    count = len(rows.read_text(encoding="utf-8").splitlines())
    members = config.with_variants("screen_linear").members("screen_linear")
    assert count == 2 * 2 + len(members)
    again = Told()
    study("screen_linear", config, tmp_path / "other", again.screen)
    assert f"{len(members)} runs, {len(members)} of them done before, {len(members)} of those by the rows" in again.text
    assert len(rows.read_text(encoding="utf-8").splitlines()) == count
    results = report(tmp_path / "other", told.screen)
    check_filled(results)
    tables = screen_tables(results, "screen_linear")
    assert [table.title for table in tables] == ["At most 400 parameters", "At most 1,000 parameters"]
    for table in tables:
        changes = [float(row.cells[3]) for row in table.rows]
        assert changes == sorted(changes)
    assert "Not here: cp: expected one of Conv3d, ConvTranspose3d, found Linear." in tables[0].notes
    assert [panel.xlabel for panel in screen_panels(results, "screen_linear")] == [
        "parameters that train",
        "seconds a step, % of full fine-tuning",
    ]
    assert len(screen_csv(results, "screen_linear").splitlines()) == 1 + len(members)
    assert (tmp_path / "other" / "report" / "screen_linear-front.png").is_file()


def test_a_dry_run_says_how_many_runs_and_how_long(tmp_path: Path, told: Told) -> None:
    rows = tmp_path / "rows.jsonl"
    config = tiny_linear(tmp_path, f"rows={rows}", "dry_run=true")
    study("screen_linear", config, tmp_path / "out", told.screen)
    members = config.with_variants("screen_linear").members("screen_linear")
    runs = 4 + len(members)
    assert f"{runs} of {runs} runs are left: no row says how long" in told.text
    assert "not here: cp: expected one of Conv3d, ConvTranspose3d, found Linear" in told.text
    assert read(tmp_path / "out" / "dry-run-screen_linear.json")["runs"] == runs


@pytest.mark.parametrize("spec", ["lora", "rslora", "dora", "vera", "ia3", "oft", "hra", "hira"])
def test_pefts_tuner_trains_as_many_numbers_and_starts_as_the_base(spec: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    sizes = {"ia3": "null", "oft": "{b: [2, 4, 8]}", "hra": "{rank: [2]}"}
    families = f"{{own: {{title: Own, rates: [1.0e-3], specs: {{{spec}: {sizes.get(spec, 'r')}}}}}}}"
    overrides = [f"screen_linear.families={families}", f"screen_linear.anchors=[{spec}]"]
    config = tiny_linear(tmp_path, *overrides, "screen_linear.budgets=[1000]").with_variants("screen_linear")
    own, peft = config.members("screen_linear")
    assert peft == f"{own}-peft"
    assert config.searcher(peft) == own
    text = made_text(config.screen_linear.text, target=True)["test"]
    counts = []
    for name in (own, peft):
        torch.manual_seed(0)
        base = Transformer(8, 6, 16, 1)
        before = errors_of(base, text)
        model = attached(base, config.methods[name].method, config.screen_linear, peft=name == peft)
        assert errors_of(model, text) == pytest.approx(before, rel=1e-5)
        counts.append(trainable(model))
    assert counts[0] == counts[1] > 0


def test_made_text_follows_its_grammar() -> None:
    about = Text(words=16, length=20, choices=2, sequences=64, held_out=8)
    source, target = (made_text(about, each) for each in (False, True))
    assert {name: tuple(part.shape) for name, part in source.items()} == {
        "train": (64, 21),
        "validation": (8, 21),
        "test": (8, 21),
    }
    assert all(source[name].equal(made_text(about, False)[name]) for name in source)

    def followers(text: torch.Tensor) -> dict[tuple[int, int], set[int]]:
        known: dict[tuple[int, int], set[int]] = {}
        for row in text.tolist():
            for one, two, three in zip(row, row[1:], row[2:], strict=False):
                known.setdefault((two, one % 4), set()).add(three)
        return known

    one, other = (followers(torch.cat(list(each.values()))) for each in (source, target))
    assert all(len(words) <= 2 for known in (one, other) for words in known.values())
    both = [context for context in one if context in other]
    moved = sum(not one[context] & other[context] for context in both) / len(both)
    assert 0.2 < moved < 0.8, "half of the contexts have other words"


def test_the_transformer_sees_no_later_word() -> None:
    torch.manual_seed(0)
    model: nn.Module = Transformer(8, 6, 16, 2)
    text = torch.randint(8, (3, 6))
    changed = text.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 8
    torch.testing.assert_close(model(text)[:, :4], model(changed)[:, :4])
    assert not torch.allclose(model(text)[:, 4:], model(changed)[:, 4:])


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(-5, 0)), max_size=12))
def test_the_front_has_what_no_other_point_beats(values: list[tuple[int, int]]) -> None:
    about = Screened(study="screen", spec="lora", family="low_rank", budget=None)
    points = [
        Point(str(n), str(n), about, parameters=cost, change=float(error)) for n, (cost, error) in enumerate(values)
    ]
    found = {(point.parameters, point.change) for point in front(points, lambda point: point.parameters)}
    best = {
        (cost, float(error))
        for cost, error in values
        if not any((a <= cost and b <= error) and (a, b) != (cost, error) for a, b in values)
    }
    assert found == best


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["screen.dataset=atrophy"],
            "screen.dataset: a data set: expected one of contrast, lesion, found `atrophy`. Correct the name.",
        ),
        (
            ["screen.budgets=[]"],
            "screen: budgets and layers: expected at least one of each, found none. "
            "For example `budgets: [30000, 60000]` and `match: [conv]`.",
        ),
        (
            ["cost={}"],
            "cost.shapes: the volume of the steps that are timed: expected one size, found none. "
            "Write `shapes: {small: [16, 16, 16]}`.",
        ),
    ],
)
def test_screens_that_cannot_be_are_refused(overrides: list[str], expected: str, tmp_path: Path) -> None:
    with pytest.raises(LabError) as excinfo:
        check_study("screen", tiny_study(tmp_path, *overrides, text=TINY_SCREEN))
    assert str(excinfo.value) == expected


def test_an_anchor_that_is_no_tuner_of_pefts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LabError) as excinfo:
        check_study("screen_linear", tiny_linear(tmp_path, "screen_linear.anchors=[cp]"))
    assert str(excinfo.value) == (
        "screen_linear.anchors: PEFT's tuners: expected some of lora, rslora, dora, vera, ia3, oft, hra, hira, "
        "found `cp`. Remove it."
    )


@pytest.fixture
def told() -> Told:
    return Told()
