"""The driver's configuration: every mistake has its place and its whole text."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("monai", reason="the example driver needs the `demo` extra")

from ddpm_lab.config.reader import read_config
from ddpm_lab.config.settings import Config, DemoConfig, Distributed
from ddpm_lab.searching.settings import ClaimConfig, SearchConfig
from ddpm_lab.study.screen_settings import Families
from ddpm_lab.study.settings import StudyConfig
from ddpm_lab.support.faults import LabError

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


def message(tmp_path: Path, text: str, *overrides: str) -> str:
    """What `read_config` says about a file, with the file's path taken out."""
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(LabError) as excinfo:
        read_config(path, overrides, Config)
    return str(excinfo.value).replace(str(path), "c.yaml")


KINDS = {
    "demo": DemoConfig,
    "study": StudyConfig,
    "screen": StudyConfig,
    "families": Families,
    "search": SearchConfig,
    "claim": ClaimConfig,
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path: Path) -> None:
    kind = KINDS.get(path.stem.partition("_")[0], Config)
    assert isinstance(read_config(path, [], kind), kind)
    head = path.read_text(encoding="utf-8").splitlines()[:4]
    assert any("examples/ddpm.py" in line for line in head), "each file is headed by its launch command"


def test_recipes_and_specs_may_lie_beside_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are from the working directory or, failing that, from the file's folder; shipped names stay names."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "mine.yaml").write_text("", encoding="utf-8")
    path = tmp_path / "configs" / "c.yaml"
    for key in ("recipe", "spec"):
        path.write_text(f"method: {{{key}: ../mine.yaml}}\n", encoding="utf-8")
        assert getattr(read_config(path, [], Config).method, key) == str(tmp_path / "mine.yaml")
        assert getattr(read_config(path, [f"method.{key}=lora_ddpm"], Config).method, key) == "lora_ddpm"
        assert getattr(read_config(path, [f"method.{key}=../none.yaml"], Config).method, key) == "../none.yaml"
    monkeypatch.chdir(tmp_path)
    assert read_config(path, ["method.recipe=mine.yaml"], Config).method.recipe == "mine.yaml"
    assert read_config(Path("configs/c.yaml"), ["method.recipe=../mine.yaml"], Config).method.recipe == "mine.yaml"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "traning: {steps: 3}\n",
            "c.yaml:1:1: an unknown key: expected a key of this section, found `traning`. Did you mean `training`?",
        ),
        (
            "training:\n  stepz: 3\n",
            "c.yaml:2:3: an unknown key: expected a key of this section, found `stepz`. Did you mean `steps`?",
        ),
        (
            "base:\n  zzz: 3\n",
            "c.yaml:2:3: an unknown key: expected a key of this section, found `zzz`. "
            "The keys are `checkpoint`, `old_generative`.",
        ),
        (
            "training:\n  batch_size: '2'\n",
            "c.yaml:2:15: `training.batch_size`: expected a whole number, found '2'. Change the value.",
        ),
        (
            "training: {steps: 2.5}\n",
            "c.yaml:1:19: `training.steps`: expected a whole number, found 2.5. Change the value.",
        ),
        (
            "training: {steps: 0}\n",
            "c.yaml:1:19: `training.steps`: expected a number above 0, found 0. Change the value.",
        ),
        (
            "training: {seed: true}\n",
            "c.yaml:1:18: `training.seed`: expected a whole number, found True. Change the value.",
        ),
        (
            "model:\n  channels: [8, x]\n",
            "c.yaml:2:17: `model.channels.1`: expected a whole number, found 'x'. Change the value.",
        ),
        ("model:\n  channels: 8\n", "c.yaml:2:13: `model.channels`: expected a list, found 8. Change the value."),
        ("method: full\n", "c.yaml:1:9: `method`: expected a mapping, found 'full'. Change the value."),
        ("data: {crop: [8, 8]}\n", "c.yaml:1:14: `data.crop.2`: expected a value, found nothing. Change the value."),
        (
            "data: {layout: brat}\n",
            "c.yaml:1:16: `data.layout`: expected one of 'plain', 'ukb', 'adni', 'ppmi' or 'brats', found 'brat'. "
            "Did you mean `brats`?",
        ),
        (
            "training: {learning_rate: .inf}\n",
            "c.yaml:1:27: training.learning_rate: expected a finite number, found inf. Write a number.",
        ),
        (
            "data: {intensity: [1, 0]}\n",
            "c.yaml:1:19: `data.intensity`: expected two numbers, the first below the second, found a list of 2. "
            "Change the value.",
        ),
        (
            "sampling: {seed: 4294967296}\n",
            "c.yaml:1:18: `sampling.seed`: expected a number below 4294967296, found 4294967296. Change the value.",
        ),
        ("- 1\n", "c.yaml:1:1: the configuration: expected a mapping, found a list. Start with `data:`."),
        ("", "c.yaml:1:1: the file is empty: expected a mapping, found nothing. Start with `data:`."),
        (
            "data: {}\ndata: {}\n",
            "c.yaml:2:1: key 'data': expected each key once, found it again, first on line 1. Remove one of the two.",
        ),
    ],
)
def test_a_mistake_in_a_file_is_located(tmp_path: Path, text: str, expected: str) -> None:
    assert message(tmp_path, text) == expected


def test_mistakes_are_collected_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = "training:\n  steps: x\nmodel: {norm_groups: -1}\nfoo: 1\n"
    assert [line.split(": ")[0] for line in message(tmp_path, text).splitlines()] == [
        "c.yaml:2:10",
        "c.yaml:3:22",
        "c.yaml:4:1",
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "training.steps=abc",
            "--set training.steps=abc: `training.steps`: expected a whole number, found 'abc'. Change the value.",
        ),
        (
            "training.stepz=1",
            "--set training.stepz=1: an unknown key: expected a key of this section, found `stepz`. "
            "Did you mean `steps`?",
        ),
        (
            "training.steps",
            "--set training.steps: an override: expected key.key=value, found 'training.steps'. "
            "Write `--set training.steps=100`.",
        ),
        (
            "trainin.steps=3",
            "--set trainin.steps=3: an unknown key: expected a key of this section, found `trainin`. "
            "Did you mean `training`?",
        ),
    ],
)
def test_a_mistake_in_an_override_names_the_override(tmp_path: Path, override: str, expected: str) -> None:
    assert message(tmp_path, "data: {resize: [8, 8, 8]}\n", override) == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.resize.0=4", "`data.resize`: expected a list, found a mapping. Change the value."),
        ("training.steps.more=4", "`training.steps`: expected a whole number, found a mapping. Change the value."),
    ],
)
def test_an_override_below_a_value_of_the_file_is_what_is_wrong(tmp_path: Path, override: str, expected: str) -> None:
    text = "data: {resize: [8, 8, 8]}\ntraining: {steps: 3}\n"
    assert message(tmp_path, text, override) == f"--set {override}: {expected}"


def test_overrides_are_yaml(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("training: {steps: 5, learning_rate: 1}\n", encoding="utf-8")
    overrides = ["training.learning_rate=2e-4", "data.crop=[8, 8, 16]", "method.params.r=2", "training.steps=null"]
    config = read_config(path, overrides, Config)
    assert config.training.learning_rate == 2e-4
    assert config.data.crop == (8, 8, 16)
    assert config.method.params == {"r": 2}
    assert config.training.steps is None


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    with pytest.raises(LabError) as excinfo:
        read_config(path, [], Config)
    assert str(excinfo.value) == (
        f"{path}: cannot read this configuration: expected a readable file, found No such file or directory. "
        "Check the path."
    )


def test_a_run_that_is_not_sharded_has_the_settings_that_it_always_had() -> None:
    """Or folders of earlier runs would be refused, and studies would not know theirs."""
    assert "distributed" not in Config().model_dump(mode="json")
    sharded = Config(distributed=Distributed(shard="block"))
    assert sharded.model_dump(mode="json")["distributed"] == {"shard": "block"}
    assert Config.model_validate(sharded.model_dump()) == sharded
