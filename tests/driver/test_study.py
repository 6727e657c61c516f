"""A study in miniature: its settings, its runs, what happens when one fails or is cut short, its costs."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("monai", reason="the example driver needs the `demo` extra")

import ddpm
from accelerate.state import AcceleratorState
from ddpm_lab.config.reader import read_config
from ddpm_lab.config.settings import Config, Data, Method
from ddpm_lab.model.unet import build_unet
from ddpm_lab.study import run as study_run
from ddpm_lab.study.cost import Allocations
from ddpm_lab.study.run import Outcome, alone
from ddpm_lab.study.settings import StudyConfig
from ddpm_lab.study.study import check_study, clock, study
from ddpm_lab.support.console import Screen
from ddpm_lab.support.faults import LabError, fault
from studies import TINY_STUDY, Told, read, tiny_study
from typer.testing import CliRunner

import tnpeft

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "configs"
PROFILES = ("study_cpu", "study_gpu", "study_paper")


@pytest.fixture(autouse=True)
def clean_accelerator() -> Iterator[None]:
    """Accelerate lets a process choose its precision only once, unless it is reset."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def message(folder: Path, text: str, *overrides: str) -> str:
    """What reading a study says, with the file's path taken out."""
    with pytest.raises(LabError) as excinfo:
        tiny_study(folder, *overrides, text=text)
    return str(excinfo.value).replace(str(folder / "study.yaml"), "study.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "methods:\n  a/b: {}\n",
            "study.yaml:2:3: a name in `methods`: expected at most 60 letters, digits, `_` and `-`, the first a letter "
            "or a digit, found `a/b`. Choose another name.",
        ),
        (
            "methods:\n  lora: {training: {stepz: 3}}\n",
            "study.yaml:2:21: an unknown key: expected a key of this section, found `stepz`. Did you mean `steps`?",
        ),
        (
            "methods: {}\npretraining: {stepz: 3}\n",
            "study.yaml:2:15: an unknown key: expected a key of this section, found `stepz`. Did you mean `steps`?",
        ),
        (
            "methods: {}\ndatasets: {x: {made: {domain: t3}}}\n",
            "study.yaml:2:31: `datasets.x.made.domain`: expected one of 't1', 't2', 'atrophy' or 'lesion', found 't3'. "
            "Choose one of these.",
        ),
        (
            "methods: {}\ntable1: [a, 5]\n",
            "study.yaml:2:13: `table1.1`: expected a text, found 5. Change the value.",
        ),
        (
            "methods: {}\ncost: {shapes: {small: [16, 16]}}\n",
            "study.yaml:2:24: `cost.shapes.small.2`: expected a value, found nothing. Change the value.",
        ),
        ("title: none\n", "study.yaml:1:1: `methods`: expected a value, found nothing. Change the value."),
    ],
)
def test_a_mistake_in_a_study_is_located(tmp_path: Path, text: str, expected: str) -> None:
    assert message(tmp_path, text) == expected


def test_an_override_reaches_into_methods_and_data_sets(tmp_path: Path) -> None:
    overrides = ["methods.lora.training.steps=7", "datasets.lesion.data.root=/scans", "table1=[lora]"]
    config = tiny_study(tmp_path, *overrides)
    assert config.training_of("lora", 3).steps == 7
    assert config.data_of(config.datasets["lesion"]).root == Path("/scans")
    assert config.table1 == ("lora",)
    assert message(tmp_path, TINY_STUDY, "methods.lora.trainin.steps=7") == (
        "--set methods.lora.trainin.steps=7: an unknown key: expected a key of this section, found `trainin`. "
        "Did you mean `training`?"
    )


def test_what_a_method_gives_replaces_the_common_setting_and_no_other(tmp_path: Path) -> None:
    config = tiny_study(tmp_path)
    lora, full = config.training_of("lora", 5), config.training_of("full", 5)
    assert (lora.learning_rate, full.learning_rate) == (5e-3, 1e-3)
    assert (lora.steps, lora.batch_size, lora.clip_norm, lora.seed) == (2, 2, 1.0, 5)
    settled = config.settled()
    again = StudyConfig.model_validate_json(json.dumps(settled.model_dump(mode="json")))
    assert again.training_of("lora", 5) == lora
    assert again.settled() == settled


def test_ranks_of_figure_4_share_the_run_of_their_own_rank(tmp_path: Path) -> None:
    config = tiny_study(tmp_path).with_variants()
    assert config.members("figure4") == ("tenvoo_l-r1", "tenvoo_l", "tenvoo_q-r1", "tenvoo_q")
    assert config.methods["tenvoo_l-r1"].method.params == {"r": 1}
    assert config.methods["tenvoo_l-r1"].title == "TenVOO-L, rank 1"
    assert config.with_variants() == config


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        (
            "tabel1",
            [],
            "study: a study: expected one of table1, table2, table3, table4, figure4, start, screen, screen_linear, "
            "found `tabel1`. Did you mean `table1`?",
        ),
        (
            "table1",
            ["table1=[lora, lor]"],
            "table1: a method: expected one of full, lora, tenvoo_l, tenvoo_q, found `lor`. "
            "Add it to `methods`, or correct the name.",
        ),
        (
            "table1",
            ["table1=[]"],
            "table1: the methods of this study: expected at least one, found none. List methods under `table1`.",
        ),
        (
            "table1",
            ["methods.lora.method.spec=lora"],
            "methods.lora.method: the adapter: expected `recipe` or `spec`, found both. Give one of the two.",
        ),
        (
            "table1",
            ["methods.lora.training.epochs=2"],
            "methods.lora.training: its length: expected `steps` or `epochs`, found both. Give one of the two.",
        ),
        (
            "table1",
            ["datasets={}"],
            "datasets: the data sets: expected at least one, found none. Describe one under `datasets`.",
        ),
        (
            "table4",
            ["cost.shapes={}"],
            "cost.shapes: the volumes: expected at least one size, found none. Write `shapes: {small: [16, 16, 16]}`.",
        ),
        ("table1", ["seeds=[1, 1]"], "seeds: the seeds: expected each once, found [1, 1]. Remove one of the two."),
        (
            "table1",
            ["sampling.steps=2000"],
            "sampling.steps: the number of steps: expected at most 1000, `diffusion.timesteps`, found 2000. "
            "Take fewer.",
        ),
    ],
)
def test_mistakes_end_before_anything_runs(tmp_path: Path, name: str, overrides: list[str], expected: str) -> None:
    config = tiny_study(tmp_path, *overrides)
    with pytest.raises(tnpeft.TnpeftError) as excinfo:
        study(name, config, tmp_path / "out", Screen(quiet=True))
    assert str(excinfo.value) == expected
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LabError) as excinfo:
        study("table1", tiny_study(tmp_path), tmp_path / "out", Screen(quiet=True))
    assert str(excinfo.value) == (
        "study: its processes: expected one, found 2. "
        "Start `study` without torchrun, once for each device: the commands share the runs."
    )


@pytest.mark.parametrize("name", PROFILES)
def test_shipped_profiles_describe_every_study(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # from any folder
    config = read_config(CONFIGS / f"{name}.yaml", [], StudyConfig)
    for each in ("table1", "table2", "table3", "table4", "figure4"):
        check_study(each, config)
    assert {"full", "lora", "lokr", "loha", "tenvoo_l", "tenvoo_q"} <= set(config.table1)
    assert len(config.datasets) == (3 if name == "study_paper" else 4)
    assert len(config.table2) == 5
    assert all(config.methods[each].method.also for each in config.table2)


def test_the_profile_for_two_cores_searches_every_start_equally(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each start has a grid of as many rates, by one factor."""
    monkeypatch.chdir(tmp_path)
    config = read_config(CONFIGS / "study_cpu.yaml", [], StudyConfig)
    check_study("start", config)
    assert set(config.start.methods) == {"tenvoo_l", "tenvoo_q", "quanta", "lora", "cp"}
    for starts in config.start.methods.values():
        for start in starts:
            assert len(start.rates) == 4
            steps = [after / before for before, after in itertools.pairwise(start.rates)]
            assert steps == pytest.approx([4.0] * 3, rel=0.01)


def test_the_papers_profile_has_the_papers_hyperparameters() -> None:
    config = read_config(CONFIGS / "study_paper.yaml", [], StudyConfig)
    for name in config.methods:
        training = config.training_of(name, 0)
        assert (training.learning_rate, training.batch_size, training.accumulation) == (1e-5, 1, 4)
        assert (training.loss, training.schedule, training.clip_norm) == ("mse", "constant", None)
    assert config.data.validation_share == 0.1
    assert config.data.crop == (160, 224, 160)
    brats = config.data_of(config.datasets["brats"])
    assert (brats.crop, brats.resize, brats.spacing) == ((192, 192, 144), (128, 128, 96), None)
    assert [config.methods[name].method.params for name in ("tenvoo_l", "tenvoo_q")] == [{"r": 4}] * 2
    assert config.figure4.ranks == (1, 2, 4, 6)
    with torch.device("meta"):
        unet = build_unet(config.model)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 166_669_313


@pytest.mark.parametrize(("name", "start"), [("tenvoo_l_zero", "zero"), ("tenvoo_l_std1", "frozen_copy")])
def test_other_starts_have_the_layers_and_sizes_of_tenvoo_l(name: str, start: str) -> None:
    other = tnpeft.load_recipe(ROOT / "examples" / "recipes" / f"{name}_ddpm.yaml")
    shipped = tnpeft.load_recipe("tenvoo_l_ddpm")
    assert [entry.match for entry in other.entries] == [entry.match for entry in shipped.entries]
    assert other.train == shipped.train
    ours, theirs = other.entries[0].spec, shipped.entries[0].spec
    assert (ours.start, theirs.start) == (start, "frozen_copy")
    size = getattr(ours.start_std, "text", None)
    assert size == ("1" if name == "tenvoo_l_std1" else None)
    assert [(core.name, core.legs) for core in ours.cores] == [(core.name, core.legs) for core in theirs.cores]
    layer = {"in_channels": 64, "out_channels": 128, "kernel_size": 3}
    networks = [spec.bind("Conv3d", **layer) for spec in (ours, theirs)]
    assert networks[0].num_parameters == networks[1].num_parameters


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyConfig, str]:
    """Table 1 with two methods, two data sets and one seed, really run."""
    folder = tmp_path_factory.mktemp("study")
    config = tiny_study(folder, "seeds=[3]", "table1=[full, tenvoo_l]", "figure4.methods=[tenvoo_l]")
    told = Told()
    study("table1", config, folder / "out", told.screen)
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder / "out", config, told.text


@pytest.mark.slow
def test_every_run_has_its_folder_and_the_base_is_pretrained_once(finished: tuple[Path, StudyConfig, str]) -> None:
    out, _, text = finished
    for method in ("base", "full", "tenvoo_l"):
        for dataset in ("contrast", "lesion"):
            folder = out / "runs" / method / dataset / "seed-3"
            assert Outcome.read(folder).status == "done"  # type: ignore[union-attr]
            samples = list(folder.glob("samples/*/sample-*.nii.gz"))
            assert len(samples) == 2
            sets = read(folder / "evaluation.json")["sets"]
            assert "real, held out" in sets
            assert len(sets) == 2
            assert (folder / "cache").resolve() == out / "cache" / dataset
            if method != "base":
                summary = read(folder / "summary.json")
                manifest = read(out / "data" / dataset / "manifest.json")
                errors = Outcome.read(folder).errors  # type: ignore[union-attr]
                assert list(errors) == ["validation", "test"]
                for name, by_volume in errors.items():
                    assert list(by_volume) == [entry["path"] for entry in manifest[name]]
                    before, after = (sum(part) / len(part) for part in zip(*by_volume.values(), strict=True))
                    kind = "test" if name == "test" else "held_out"
                    assert before == pytest.approx(summary["run"][f"{kind}_error_before"])
                    assert after == pytest.approx(summary["run"][f"{kind}_error_after"])
                assert summary["run"]["steps"] == 2
                assert len(summary["history"]["losses"]) == 2
    assert (out / "base" / "model.safetensors").is_file()
    assert text.count("Pretraining the base") == 1
    assert "6 runs, 0 of them done before" in text
    assert "run 6 of 6: tenvoo_l on lesion, seed 3: done in " in text
    assert "6 of 6 runs are done." in text
    known = read(out / "study.json")
    assert known["studies"] == ["table1"]
    assert known["config"]["methods"]["full"]["training"]["steps"] == 2
    assert read(out / "record-study-table1.json")["seeds"]["sampling.seed"] == 4321


@pytest.mark.slow
def test_finished_runs_are_not_repeated_and_tables_share_them(finished: tuple[Path, StudyConfig, str]) -> None:
    out, config, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/*/run.json")}
    told = Told()
    study("figure4", config, out, told.screen)
    after = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/*/*/run.json")}
    assert {path: after[path] for path in before} == before
    new = sorted({path.parts[-4] for path in after} - {path.parts[-4] for path in before})
    assert new == ["tenvoo_l-r1"]
    assert "6 runs, 4 of them done before" in told.text
    assert read(out / "study.json")["studies"] == ["table1", "figure4"]


@pytest.mark.slow
def test_a_run_that_was_cut_short_goes_on_where_it_was(
    finished: tuple[Path, StudyConfig, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after training: only what is missing is made again."""
    out = tmp_path / "out"
    shutil.copytree(finished[0], out, symlinks=True)
    folder = out / "runs" / "tenvoo_l" / "lesion" / "seed-3"
    outcome = Outcome.read(folder)
    assert outcome is not None
    Outcome("running", outcome.key).write(folder)
    expected = read(folder / "evaluation.json")["sets"]
    (folder / "evaluation.json").unlink()
    next(folder.glob("samples/*/sample-0001.nii.gz")).unlink()

    def never(*_: Any) -> None:
        raise AssertionError("it has trained already")

    monkeypatch.setattr(study_run, "finetune", never)
    study("table1", finished[1], out, Screen(quiet=True))
    assert Outcome.read(folder).status == "done"  # type: ignore[union-attr]
    assert _close(read(folder / "evaluation.json")["sets"], expected)


def _close(one: Any, other: Any) -> bool:
    """Whether nested numbers agree."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_close(one[key], other[key]) for key in one)
    return one == other or abs(one - other) < 1e-4 * max(1, abs(one))


@pytest.mark.slow
def test_a_failed_run_is_recorded_the_rest_goes_on_and_it_is_tried_again(
    finished: tuple[Path, StudyConfig, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, config = tmp_path / "out", finished[1]
    shutil.copytree(finished[0], out, symlinks=True)
    for method in ("full", "tenvoo_l"):
        shutil.rmtree(out / "runs" / method / "contrast")
    real = study_run.finetune

    def diverging(settings: Config, folder: Path, screen: Screen) -> Any:
        if settings.method.kind == "full":
            raise fault("step 7", "the loss", "a finite number", "nan", "Lower it.")
        return real(settings, folder, screen)

    monkeypatch.setattr(study_run, "finetune", diverging)
    told = Told()
    with pytest.raises(LabError) as excinfo:
        study("table1", config, out, told.screen)
    assert str(excinfo.value) == (
        f"{out}: runs of the study: expected all done, found 1 failed. "
        "Mend what the list above says; the same command tries them again."
    )
    reason = "step 7: the loss: expected a finite number, found nan. Lower it."
    assert f"failed: full on contrast, seed 3: {reason}" in told.text
    assert "5 of 6 runs are done." in told.text
    assert Outcome.read(out / "runs" / "full" / "contrast" / "seed-3").reason == reason  # type: ignore[union-attr]
    monkeypatch.setattr(study_run, "finetune", real)
    study("table1", config, out, Screen(quiet=True))
    assert Outcome.read(out / "runs" / "full" / "contrast" / "seed-3").status == "done"  # type: ignore[union-attr]


@pytest.mark.slow
def test_results_of_other_settings_are_refused_and_not_thrown_away(
    finished: tuple[Path, StudyConfig, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out, symlinks=True)
    config = tiny_study(tmp_path, "seeds=[3]", "table1=[full, tenvoo_l]", "methods.full.training.steps=3")
    with pytest.raises(LabError) as excinfo:
        study("table1", config, out, Screen(quiet=True))
    folder = out / "runs" / "full" / "contrast" / "seed-3"
    assert str(excinfo.value) == (
        f"{folder}: `training.steps` of the finished run: expected 2, as when it ran, found 3. "
        "Put it back, remove the folder, or choose another `--out`."
    )
    config = tiny_study(tmp_path, "seeds=[3]", "table1=[full, tenvoo_l]", "pretraining.steps=3")
    with pytest.raises(LabError) as excinfo:
        study("table1", config, out, Screen(quiet=True))
    assert str(excinfo.value) == (
        f"{out / 'base'}: `training.steps` of the pretrained base: expected 2, as when it ran, found 3. "
        "Put it back, remove the folder, or choose another `--out`."
    )
    config = tiny_study(tmp_path, "seeds=[3]", "table1=[full, tenvoo_l]", "sampling.steps=3")
    with pytest.raises(LabError) as excinfo:
        study("table1", config, out, Screen(quiet=True))
    problem = excinfo.value.problems[0]
    assert (problem.what, problem.expected, problem.found) == (
        "`sampling.steps` of the finished run",
        "2, as when it ran",
        "3",
    )  # the base, which it does not change, is not in the way


def test_a_failed_run_begun_with_other_settings_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "runs" / "full" / "x" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text("{}", encoding="utf-8")
    Outcome("failed", "old", 1.0, "nan").write(folder)
    asked: list[Path] = []

    def trained(config: Config, place: Path, screen: Screen) -> dict[str, Any]:
        asked.append(place)
        return {"result": "model.safetensors"}

    monkeypatch.setattr(study_run, "finetune", trained)
    config = Config(method=Method(kind="full"), data=Data(), sampling={"count": 0})  # type: ignore[arg-type]
    run = study_run.Run("full", "x", 0, config, folder, tmp_path / "cache", {"x": "new"})
    assert run.execute(Screen(quiet=True)).status == "done"
    assert asked == [folder]
    assert not (folder / "summary.json").exists()
    assert run.done
    Outcome("done", "old").write(folder)  # by a version that did not say what its key stands for
    with pytest.raises(LabError) as excinfo:
        run.check()
    assert str(excinfo.value) == (
        f"{folder}: the finished run: expected these settings, found others. "
        "Put it back, remove the folder, or choose another `--out`."
    )


def test_two_commands_do_not_do_the_same_run(tmp_path: Path) -> None:
    with alone(tmp_path / "lock") as mine:
        assert mine
        with alone(tmp_path / "lock") as other:
            assert not other
    with alone(tmp_path / "lock") as mine:
        assert mine


@pytest.mark.slow
def test_a_run_in_the_hands_of_another_command_is_left(finished: tuple[Path, StudyConfig, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out, symlinks=True)
    shutil.rmtree(out / "runs" / "full" / "contrast")
    told = Told()
    with alone(out / "locks" / "full--contrast--3"):
        study("table1", finished[1], out, told.screen)
    assert "1 were in the hands of another command: full on contrast, seed 3" in told.text
    assert "5 of 6 runs are done." in told.text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (61, "1 min 1 s"), (3600, "1 h 0 min"), (7500, "2 h 5 min")]
)
def test_times_for_people(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.slow
def test_costs_are_measured_and_not_copied(tmp_path: Path) -> None:
    config = tiny_study(tmp_path)
    study("table4", config, tmp_path / "out", Screen(quiet=True))
    costs = read(tmp_path / "out" / "costs.json")
    assert costs["sizes"]["small"]["shape"] == [8, 8, 8]
    found = costs["sizes"]["small"]["methods"]
    assert list(found) == ["full fine-tuning", "lora", "tenvoo_l"]
    full = found["full fine-tuning"]
    assert (full["training"]["value"], full["inference"]["value"], full["memory"]) == (1, 1, 1)
    assert full["trainable_parameters"] == full["base_parameters"]
    # Weights, gradients and Adam's two moments are alive in the second step, at 4 bytes a number.
    assert full["memory_bytes"] > 4 * 4 * full["base_parameters"]
    for each in found.values():
        assert each["training_seconds"] > each["inference_seconds"] > 0
        assert each["training"]["low"] <= each["training"]["value"] <= each["training"]["high"]
        assert each["memory_bytes"] > 4 * each["base_parameters"]
    assert costs["machine"]["processor"]


def test_allocations_are_counted_storage_by_storage() -> None:
    counts = Allocations()
    with counts:
        one = torch.zeros(1000)
        view = one[10:]
        two = one + 1
        assert counts.alive == 8000
        del two
        assert counts.alive == 4000
        del one
        assert counts.alive == 4000  # the view holds the storage
        del view
    assert (counts.alive, counts.peak) == (0, 8000)


@pytest.mark.slow
def test_a_dry_run_builds_counts_and_steps(tmp_path: Path) -> None:
    config_file, out = tmp_path / "study.yaml", tmp_path / "out"
    config_file.write_text(TINY_STUDY, encoding="utf-8")
    command = ["study", "table1", "--config", str(config_file), "--out", str(out), "--set", "dry_run=true"]
    done = CliRunner(env={"COLUMNS": "160"}).invoke(ddpm.app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    found = read(out / "dry-run-table1.json")
    assert found["shape"] == [2, 2, 2]
    assert (found["runs"], found["left"], found["seconds_left"]) == (16, 16, None)  # four are the base's
    full, lora = found["methods"]["full"], found["methods"]["lora"]
    assert full["trainable_parameters"] == full["base_parameters"] == lora["base_parameters"]
    assert lora["trainable_parameters"] < full["base_parameters"]
    for about in found["methods"].values():
        assert about["tensors_moved"] > about["tensors"] // 3
    assert "Dry run of table1: 16 runs" in done.stdout
    assert "16 of 16 runs are left: no row says how long" in done.stdout
    assert not (out / "runs").exists()
    assert not (out / "base").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table1", "table2", "table3"])
def test_the_profile_for_two_cores_dry_runs(tmp_path: Path, name: str) -> None:
    """Patterns of joint training and the recipe of the zero start fit the model; every joint method trains more."""
    config = read_config(CONFIGS / "study_cpu.yaml", ["dry_run=true"], StudyConfig)
    study(name, config, tmp_path, Screen(quiet=True))
    methods = read(tmp_path / f"dry-run-{name}.json")["methods"]
    assert list(methods) == list(config.members(name))
    sizes = {each: about["trainable_parameters"] for each, about in methods.items()}
    if name == "table3":
        assert sizes["tenvoo_l_zero"] == sizes["tenvoo_l_std1"] == sizes["tenvoo_l"] == 58_192
    elif name == "table1":
        adapters = {each: size for each, size in sizes.items() if each not in ("full", "bias_norm")}
        assert all(53_000 < size < 59_300 for size in adapters.values()), adapters
    else:
        assert all(300_000 < size < 1_802_481 for size in sizes.values())
