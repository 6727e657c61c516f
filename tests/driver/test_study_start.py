"""Study `start`: methods from starts of several sizes, and what each start holds of a real update."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("monai", reason="the example driver needs the `demo` extra")

import ddpm_lab.study.plan as study_plan
import ddpm_lab.study.run as study_run
import ddpm_lab.study.shares as study_shares
import torch
from ddpm_lab.config.settings import Base, Config, Method, Model
from ddpm_lab.model.method import apply_method, check_parts
from ddpm_lab.model.starts import spec_from
from ddpm_lab.model.unet import build_unet
from ddpm_lab.study.report import report
from ddpm_lab.study.results import read_results
from ddpm_lab.study.settings import StudyConfig
from ddpm_lab.study.shares import measured, spaced
from ddpm_lab.study.starts import start_panels, start_table
from ddpm_lab.study.study import check_study, study
from ddpm_lab.support.console import Screen
from ddpm_lab.support.durable import write_json
from ddpm_lab.support.faults import LabError
from safetensors.torch import save_file
from studies import Told, tiny_study, written_study
from torch import nn

import tnpeft
import tnpeft.surgery
from tnpeft.errors import TnpeftError

SPECS = Path(__file__).parents[2] / "examples" / "specs"
TINY = Model(channels=(8, 8), attention_levels=(False, True), head_channels=(0, 8), res_blocks=1, norm_groups=4)


@pytest.mark.parametrize(("std", "file"), [(1.0, "tenvoo_l_std1"), (0.0, "tenvoo_l_zero")])
def test_a_start_is_the_spec_that_is_written_out(std: float, file: str) -> None:
    written = tnpeft.load_spec(SPECS / f"{file}.yaml")
    made = spec_from(tnpeft.load_spec("tenvoo_l"), std)
    assert made.canonical() == written.canonical()
    again = tnpeft.Spec.from_yaml(made.to_yaml())
    assert again.canonical() == written.canonical(), "it can be shipped"


@pytest.mark.parametrize("std", [50.0, 0.3])
@pytest.mark.parametrize("name", ["tenvoo_l", "tenvoo_q", "quanta", "lora", "cp"])
def test_a_start_has_its_size_and_the_parameters_of_its_spec(name: str, std: float) -> None:
    layer = nn.Linear(12, 8) if name == "quanta" else nn.Conv3d(8, 12, 3)
    spec = tnpeft.load_spec(name)
    adapter = tnpeft.compile(spec_from(spec, std), layer, seed=1, r=2)
    value, weight = (each.detach().double().numpy() for each in (adapter.network_weight(layer.weight), layer.weight))
    assert np.std(value) / np.std(weight) == pytest.approx(std, rel=1e-4)
    assert not bool(adapter.delta_weight().any()), "an update of nothing, with a copy"
    assert set(adapter.start) == set(adapter.cores)
    assert adapter.network.num_parameters == spec.bind(layer, r=2).num_parameters


@pytest.mark.parametrize("name", ["tenvoo_l", "tenvoo_q", "quanta", "lora", "cp"])
def test_from_zero_the_last_core_is_zero_and_nothing_is_copied(name: str) -> None:
    layer = nn.Linear(12, 8) if name == "quanta" else nn.Conv3d(8, 12, 3)
    adapter = tnpeft.compile(spec_from(tnpeft.load_spec(name), 0), layer, seed=1, r=2)
    assert [core for core, value in adapter.cores.items() if not bool(value.any())] == [[*adapter.cores][-1]]
    assert not adapter.start


def test_a_spec_that_starts_at_zero_is_its_own_start_from_zero() -> None:
    lora = tnpeft.load_spec("lora")
    assert spec_from(lora, 0) is lora


def test_starts_that_cannot_be_are_refused() -> None:
    with pytest.raises(LabError) as excinfo:
        check_parts(Method(kind="full", start_std=1))
    assert str(excinfo.value) == (
        "method.start_std: the method: expected an adapter, found `full`. Remove `method.start_std`."
    )
    with pytest.raises(TnpeftError) as refused:
        check_parts(Method(spec="lotr", match="all", start_std=1))
    assert str(refused.value) == (
        "lotr.yaml with start_std 1:15:12: `start_std`: expected cores with values of their own, found 'left', which "
        "layers share: it has one size for all of them. Remove `start_std`, or give the cores inits of that size."
    )


def test_every_start_is_a_method_of_its_own(tmp_path: Path) -> None:
    config = tiny_study(tmp_path).with_variants()
    assert config.members("start") == ("full", "tenvoo_l", "tenvoo_l-std1", "tenvoo_l-std0", "lora", "lora-std0_3")
    made = config.methods["lora-std0_3"]
    assert (made.method.start_std, made.method.recipe, made.title) == (0.3, "lora_ddpm", "LoRA, start 0.3")
    assert config.training_of("lora-std0_3", 0).learning_rate == 5e-3, "the rest is the method's"
    dataset = config.datasets["contrast"]
    assert config.run("lora-std0_3", dataset, 1, Base()).sampling.count == 0
    assert config.run("lora", dataset, 1, Base()).sampling.count == 2
    assert config.with_variants() == config
    settled = StudyConfig.model_validate_json(json.dumps(config.settled().model_dump(mode="json")))
    assert settled.run("lora-std0_3", dataset, 1, Base()).sampling.count == 0
    check_study("start", config)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["start.methods={lora: [{std: 1}, {std: 0}, {std: 1.0}]}"],
            "start.methods.lora: the sizes of a start: expected each once, found [1.0, 0.0, 1.0]. "
            "Remove one of the two.",
        ),
        (
            ["start.methods={tucker: [{std: 1}]}"],
            "start: a method: expected one of full, lora, tenvoo_l, tenvoo_q, found `tucker`. "
            "Add it to `methods`, or correct the name.",
        ),
        (
            ["start.methods={tenvoo_l: [{std: 1, rates: [1.0e-3, 2.0e-3]}]}"],
            "start: the number of rates: expected the same for every method, found full 0, tenvoo_l 0, "
            "tenvoo_l-std1 2. "
            "Try as many for each: more tries find a better rate.",
        ),
        (
            ["start.methods={}"],
            "start: the methods of this study: expected at least one, found none. List methods under `start`.",
        ),
    ],
)
def test_mistakes_in_starts_are_refused(tmp_path: Path, overrides: list[str], expected: str) -> None:
    with pytest.raises(LabError) as excinfo:
        check_study("start", tiny_study(tmp_path, *overrides))
    assert str(excinfo.value) == expected


@pytest.fixture
def updated(tmp_path: Path) -> tuple[Config, Path, dict[str, np.ndarray]]:
    """A run of LoRA on a tiny base, the weights of an update, and the update itself."""
    generator = torch.Generator().manual_seed(3)
    shapes = {name: value.shape for name, value in build_unet(TINY, Base()).state_dict().items()}
    before = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    after = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in before.items()}
    save_file(before, tmp_path / "base.safetensors")
    save_file(after, tmp_path / "model.safetensors")
    config = Config(model=TINY, base=Base(checkpoint=tmp_path / "base.safetensors"), method=Method(recipe="lora_ddpm"))
    return config, tmp_path / "model.safetensors", {name: (after[name] - before[name]).numpy() for name in before}


def test_shares_of_lora_are_those_of_its_matrices(updated: tuple[Config, Path, dict[str, np.ndarray]]) -> None:
    """From zero LoRA's first steps move what `down` spans; all that it reaches are the largest singular values."""
    config, path, updates = updated
    found = measured(config, path, 1, 10, Screen(quiet=True))
    assert found["std"] == 0
    unet = build_unet(TINY, Base())
    torch.manual_seed(0)
    apply_method(unet, config.method)
    adapters = tnpeft.surgery.adapters_of(unet, *tnpeft.surgery.names_of(unet))
    layers = found["layers"].split(", ")
    assert layers == spaced(adapters, 1)
    assert {adapters[layer].network.layer.kind for layer in layers} == {"Linear", "Conv3d"}
    energy = tangent = noise = reach = 0.0
    for layer in layers:
        delta = updates[f"{layer}.weight"].astype(np.float64)
        delta = delta.reshape(len(delta), -1)
        down = adapters[layer].cores["down"].detach().double().numpy().reshape(2, -1)
        own = (delta**2).sum()
        energy += own
        tangent += (np.linalg.norm(delta @ np.linalg.pinv(down) @ down)) ** 2
        noise += own * 2 / delta.shape[1]
        reach += (np.linalg.svd(delta, compute_uv=False)[:2] ** 2).sum()
    assert found["tangent"] == pytest.approx(tangent / energy, rel=1e-6)
    assert found["noise"] == pytest.approx(noise / energy, rel=1e-6)
    assert found["reach"] == found["free"] == pytest.approx(reach / energy, rel=1e-4)


def test_a_large_start_reaches_no_more_than_its_tangent_space(
    updated: tuple[Config, Path, dict[str, np.ndarray]],
) -> None:
    config, path, _ = updated

    def at(std: float) -> dict[str, Any]:
        method = config.method.model_copy(update={"start_std": std})
        return measured(config.model_copy(update={"method": method}), path, 1, 10, Screen(quiet=True))

    large, small = at(1000), at(1e-4)
    assert (large["std"], small["std"]) == pytest.approx((1000, 1e-4), rel=1e-4)
    assert large["tangent"] == pytest.approx(small["tangent"], rel=1e-6), "a gain changes no direction"
    assert large["reach"] == pytest.approx(large["tangent"], rel=0.05)
    assert small["reach"] == pytest.approx(small["free"], rel=0.01)
    assert small["reach"] > 1.15 * large["reach"]


def test_layers_are_spaced_evenly() -> None:
    assert study_shares._evenly("abcdefghi", 3) == ["b", "e", "h"]
    assert study_shares._evenly("ab", 3) == ["a", "b"]


Asked = list[tuple[str, float | None, int]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Runs that trained and shares that were measured (by the update's folder); nothing really does."""
    found: Asked = []

    def finetune(settings: Config, folder: Path, screen: Screen) -> dict[str, Any]:
        found.append((settings.method.kind, settings.method.start_std, settings.training.seed))
        errors = {name: {"before": [0.04], "after": [0.03]} for name in ("validation", "test")}
        run = {"by_volume": errors, "trainable_parameters": 7, "base_parameters": 70, "test_change_percent": -25.0}
        run |= {"steps": 2, "held_out_error_before": 0.04, "held_out_error_after": 0.03}
        history = {"losses": [1.0, 2.0], "validation": [[1, 0.035, [0.1]]]}
        write_json(folder / "split.json", {name: ["a.nii"] for name in errors})
        config = {"training": {"learning_rate": settings.training.learning_rate}}
        summary = {"run": run, "config": config, "result": "model.safetensors", "history": history}
        write_json(folder / "summary.json", summary)
        (folder / "model.safetensors").touch()
        return summary

    def shares(config: Config, updated: Path, layers: int, sweeps: int, screen: Screen) -> dict[str, Any]:
        assert updated.is_file()
        found.append((updated.parent.parent.name, config.method.start_std, config.training.seed))
        return {"tangent": 0.1, "noise": 0.05, "reach": 0.3, "free": 0.4, "std": 7.0, "layers": f"{layers} layers"}

    monkeypatch.setattr(study_run, "finetune", finetune)
    monkeypatch.setattr(study_shares, "finetune", finetune)
    monkeypatch.setattr(study_shares, "measured", shares)
    monkeypatch.setattr(study_run, "sample_volumes", lambda *_: None)
    monkeypatch.setattr(study_run, "evaluate_samples", lambda *_: None)
    monkeypatch.setattr(study_plan, "base_of", lambda *_: (Base(checkpoint=Path("base.safetensors")), "key"))
    return found


SHORT = (
    "seeds=[0, 1]",
    "start.methods={lora: [{std: 0.3}]}",
    "rows=rows.jsonl",
    "datasets={contrast: {title: T2-like, made: {domain: t2, count: 4, side: 8}}}",
)


def test_shares_are_measured_after_the_runs_and_kept_as_rows(tmp_path: Path, asked: Asked) -> None:
    config, told = tiny_study(tmp_path, *SHORT), Told()
    study("start", config, tmp_path / "one", told.screen)
    trained = [("full", None), ("adapter", None), ("adapter", 0.3)]
    assert asked == [
        *[(*each, 0) for each in trained],
        *[(*each, 1) for each in trained],
        ("contrast", None, 0),
        ("contrast", 0.3, 0),
    ]
    assert "run 2 of 2: shares of lora-std0_3 on contrast: done in 0 s" in told.text
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [row for row in rows if "shares.layers" in row["settings"]]
    assert [(row["method"], row["summary"]["run"]["reach"]) for row in kept] == [("lora", 0.3), ("lora-std0_3", 0.3)]
    assert all(row["machine"]["processor"] for row in kept)
    assert len({row["key"] for row in rows}) == len(rows)

    again = Told()
    before = len(asked)
    study("start", config, tmp_path / "two", again.screen)
    assert len(asked) == before
    assert "2 shares of an update, 2 of them done before, 2 of those by the rows" in again.text
    tables = [start_table(read_results(tmp_path / name)) for name in ("one", "two")]
    assert [row.cells for row in tables[0].rows] == [row.cells for row in tables[1].rows]
    (row,) = [row for row in tables[0].rows if row.title == "LoRA, start 0.3"]
    assert row.cells[2:] == ("5.0e-03", "-25.0", "+0.00 (+0.00 to +0.00)", "7", "10.0%", "5.0%", "30.0%", "40.0%")

    report(tmp_path / "two", Screen(quiet=True))
    names = {path.name for path in (tmp_path / "two" / "report").iterdir()}
    assert {"start.csv", "start-sizes.png", "start-curves-contrast.png"} <= names, "curves of committed rows"


def test_an_update_that_rows_stand_for_trains_again(tmp_path: Path, asked: Asked) -> None:
    study("start", tiny_study(tmp_path, *SHORT, "start.methods={lora: []}"), tmp_path / "one", Screen(quiet=True))
    before = len(asked)
    study("start", tiny_study(tmp_path, *SHORT), tmp_path / "two", Screen(quiet=True))
    assert asked[before:] == [
        ("adapter", 0.3, 0),
        ("adapter", 0.3, 1),
        ("full", None, 0),
        ("shares", 0.3, 0),
    ]


def test_other_layers_are_another_measurement(tmp_path: Path, asked: Asked) -> None:
    def keys(*overrides: str) -> list[str]:
        config = tiny_study(tmp_path, *SHORT, *overrides).with_variants()
        plan = study_plan.Plan.of("start", config, tmp_path / "out", Screen(quiet=True))
        return [run.key for run in plan.measures(plan.finals({})[0])]

    assert keys() == keys()
    assert len({*keys(), *keys("start.layers=5"), *keys("start.sweeps=7"), *keys("seeds=[1]")}) == 8
    config = tiny_study(tmp_path, *SHORT).with_variants()
    other = study_plan.Plan.of("table1", config, tmp_path / "out", Screen(quiet=True))
    assert other.measures(other.finals({})[0]) == []


def test_the_report_has_the_starts(tmp_path: Path) -> None:
    written_study(tmp_path, tiny_study(tmp_path))
    results = read_results(tmp_path)
    table = start_table(results)
    assert [row.title for row in table.rows] == [
        "Full fine-tuning",
        "TenVOO-L, its own",
        "TenVOO-L, start 1",
        "TenVOO-L, start 0",
        "LoRA, its own",
        "LoRA, start 0.3",
    ]
    assert table.rows[0].reference
    own, one = table.rows[1], table.rows[2]
    own_change, change = (float(row.cells[3].split(" ")[0]) for row in (own, one))
    assert own.cells[4] == "-"
    assert one.cells[4].startswith(f"{change - own_change:+.2f} (")
    assert one.cells[5:10] == ("30", "11.0%", "5.0%", "30.0%", "40.0%")
    panels = start_panels(results)
    assert [line.name for line in panels[0].lines] == ["TenVOO-L", "LoRA"]
    assert [list(line.x) for line in panels[0].lines] == [[20, 30, 40], [0, 10]]
    assert all(math.isfinite(y) for line in panels[1].lines for y in line.y)
