"""The MONAI Bundle in examples/bundle: trained, exported and sampled through `monai.bundle`, on tiny volumes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="MONAI is not installed")
pytest.importorskip("ignite", reason="MONAI's trainers need pytorch-ignite")

import fire
import nibabel
import yaml
from monai.bundle import ConfigParser, ConfigWorkflow, run
from monai.inferers import DiffusionInferer
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDIMScheduler
from monai.utils import set_determinism
from safetensors.torch import save_file
from torch import nn

import tnpeft

CONFIGS = Path(__file__).parents[2] / "examples" / "bundle" / "configs"
NAMES = ("train", "inference")
ALL_NAMES = (*NAMES, "evaluate")
SMALL = {"channels": [8, 8], "attention_levels": [False, True], "num_head_channels": [0, 8]}
SIZES = {"spatial_dims": 3, "in_channels": 1, "out_channels": 1, "num_res_blocks": 1, "norm_num_groups": 4}
MAISI = {
    "_target_": "monai.apps.generation.maisi.networks.diffusion_model_unet_maisi.DiffusionModelUNetMaisi",
    "num_channels": [8, 8],
    **{key: value for key, value in SMALL.items() if key != "channels"},
    **SIZES,
}
PLAIN = {"_target_": "monai.networks.nets.DiffusionModelUNet", **SMALL, **SIZES}
# MONAI warns at every run that a configuration can run any code: true of all bundles, and this one is ours.
pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")

# What MONAI's specification of bundles asks for; its JSON Schema is on the network only.
META_KEYS = {"version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version", "task"}
META_KEYS |= {"description", "authors", "copyright", "network_data_format"}
FIELD_KEYS = {"type", "format", "modality", "num_channels", "spatial_shape", "dtype", "value_range", "is_patch_data"}
FIELD_KEYS |= {"channel_def"}

QUICK = {"size": [8, 8, 8], "device": "$torch.device('cpu')", "logging_file": False}


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Bundles put their folder on the path and seed everything."""
    path = list(sys.path)
    yield
    sys.path[:] = path
    set_determinism(seed=None)


def base(network: dict[str, Any], seed: int = 0) -> nn.Module:
    """The pretrained network; its last convolution is not zero, as in a new one."""
    torch.manual_seed(seed)
    model: nn.Module = ConfigParser({"network": network}).get_parsed_content("network")
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def bundle(folder: Path, network: dict[str, Any]) -> dict[str, Any]:
    """A folder with volumes and a base; returns the overrides that name it."""
    (folder / "data" / "inner").mkdir(parents=True)
    (folder / "models").mkdir()
    for number in range(4):
        voxels = np.random.default_rng(number).uniform(0, 100, (9, 8, 7)).astype(np.float32)
        name = f"inner/{number}.nii" if number % 2 else f"{number}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), folder / "data" / name)
    save_file(base(network).state_dict(), folder / "models" / "base.safetensors")
    return {"bundle_root": str(folder), "network_def": network, **QUICK}


def train(given: dict[str, Any], **more: Any) -> None:
    fast = {"max_epochs": 2, "batch_size": 2, "num_workers": 0, "rank": 2, "learning_rate": 1e-3, "amp": False}
    run(config_file=str(CONFIGS / "train.yaml"), **given, **fast, **more)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "recipe"), [(PLAIN, "tenvoo_l_ddpm"), (MAISI, "lora_maisi")], ids=["plain", "maisi"]
)
def test_a_bundle_trains_exports_and_samples(tmp_path: Path, network: dict[str, Any], recipe: str) -> None:
    given = bundle(tmp_path, network)
    before = (tmp_path / "models" / "base.safetensors").read_bytes()
    train(given, recipe=recipe)
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["adapter.safetensors", "base.safetensors"]
    assert (tmp_path / "models" / "base.safetensors").read_bytes() == before
    model = base(network)
    handle = tnpeft.load(model, tmp_path / "models" / "adapter.safetensors")
    fresh = base(network)
    start = tnpeft.attach(fresh, recipe, r=2)
    assert [row.name for row in handle.report().layers] == [row.name for row in start.report().layers]
    pairs = list(zip(handle.parameters(), start.parameters(), strict=True))
    assert sum(not torch.equal(trained, untrained) for trained, untrained in pairs) == len(pairs)

    infer = {
        "config_file": str(CONFIGS / "inference.yaml"),
        **given,
        "count": 3,
        "steps": 3,
        "spacing": [1.0, 2.0, 3.0],
    }
    run(**infer, batch_size=2)
    images = [nibabel.load(tmp_path / "eval" / f"{number}_sample.nii.gz") for number in range(3)]
    assert len(list((tmp_path / "eval").rglob("*"))) == 3
    for image in images:
        assert image.shape == (8, 8, 8)
        assert np.array_equal(image.affine, np.diag([1.0, 2.0, 3.0, 1.0]))
    run(**infer, batch_size=1, output_dir=str(tmp_path / "one"), seed=1)
    again = nibabel.load(tmp_path / "one" / "0_sample.nii.gz").get_fdata()
    np.testing.assert_allclose(again, images[1].get_fdata(), atol=1e-4)  # a seed is a sample, whatever its batch
    np.testing.assert_allclose(by_hand(model, seed=1), images[1].get_fdata(), atol=1e-4)
    assert np.abs(by_hand(base(network), seed=1) - images[1].get_fdata()).max() > 1e-3


def by_hand(model: nn.Module, seed: int) -> np.ndarray:
    """The sample that the bundle draws, without the bundle."""
    betas = {"schedule": "scaled_linear_beta", "beta_start": 0.0005, "beta_end": 0.0195}
    scheduler = DDIMScheduler(1000, clip_sample=True, clip_sample_min=0.0, clip_sample_max=1.0, **betas)
    scheduler.set_timesteps(num_inference_steps=3)
    noise = torch.randn((1, 1, 8, 8, 8), generator=torch.Generator().manual_seed(seed))
    sample = DiffusionInferer(scheduler).sample(noise, model.eval(), scheduler, verbose=False)
    return torch.as_tensor(sample)[0, 0].numpy()


@pytest.mark.slow
def test_training_is_the_same_twice_and_knows_its_base(tmp_path: Path) -> None:
    given = bundle(tmp_path, PLAIN)
    first, second = tmp_path / "new" / "first.safetensors", tmp_path / "new" / "second.safetensors"
    for path, interval in ((first, 1), (second, 2)):  # nor does it matter how often it is validated
        train(given, adapter_file=str(path), recipe="lora_ddpm", val_interval=interval)
    assert first.read_bytes() == second.read_bytes()
    given["network_def"] = {**PLAIN, "channels": [8, 16]}
    save_file(base(given["network_def"]).state_dict(), tmp_path / "models" / "base.safetensors")
    with pytest.raises(RuntimeError) as excinfo:
        run(config_file=str(CONFIGS / "inference.yaml"), **given, adapter_file=str(first))
    assert isinstance(cause(excinfo.value), tnpeft.AdapterFileError)


def cause(error: BaseException) -> BaseException:
    """What MONAI's errors were made from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def metric(workflow: ConfigWorkflow) -> float:
    return float(workflow.evaluator.state.metrics["val_mse"])


def test_held_out_volumes_tell_how_well_noise_is_predicted(tmp_path: Path) -> None:
    given = bundle(tmp_path, PLAIN) | {"val_share": 0.5, "val_timesteps": [100, 900], "batch_size": 3, "num_workers": 0}
    settings = given | {"recipe": "lora_ddpm", "max_epochs": 1, "seed": 5, "learning_rate": 1e-2}
    trained = ConfigWorkflow(str(CONFIGS / "train.yaml"), workflow_type="train", **settings)
    trained.initialize()
    assert trained.check_properties() == []
    files = {str(path) for path in tmp_path.glob("data/**/*.nii*")}
    held_out = {item["image"] for item in trained.val_dataset_data}
    assert {item["image"] for item in trained.train_dataset_data} == files - held_out
    assert len(held_out) == 2
    trained.run()
    after = metric(trained)

    both = [str(CONFIGS / "train.yaml"), str(CONFIGS / "evaluate.yaml")]
    evaluated = ConfigWorkflow(both, workflow_type="train", **settings)
    evaluated.initialize()
    evaluated.run()
    assert metric(evaluated) == after
    model = base(PLAIN)
    volumes = [item["image"] for item in trained.val_dataset]
    before = noise_error(model, volumes)
    tnpeft.load(model, tmp_path / "models" / "adapter.safetensors")
    assert after == pytest.approx(noise_error(model, volumes), rel=1e-5)
    assert abs(after - before) > 1e-4


@torch.no_grad()
def noise_error(model: nn.Module, volumes: list[torch.Tensor]) -> float:
    """The mean error over both timesteps of the volumes; the noise of the first comes from the seed 5."""
    kept = (1 - torch.linspace(0.0005**0.5, 0.0195**0.5, 1000) ** 2).cumprod(0)
    errors = []
    for seed, volume in enumerate(volumes, start=5):
        noise = torch.randn((1, 1, 8, 8, 8), generator=torch.Generator().manual_seed(seed))
        for step in (100, 900):
            seen = kept[step].sqrt() * volume[None] + (1 - kept[step]).sqrt() * noise
            errors.append((model.eval()(seen, torch.tensor([step])) - noise).square().mean().item())
    return sum(errors) / len(errors)


def test_without_held_out_volumes_all_of_them_train(tmp_path: Path) -> None:
    given = bundle(tmp_path, PLAIN) | {"val_share": 0, "batch_size": 2, "num_workers": 0}
    workflow = ConfigWorkflow(str(CONFIGS / "train.yaml"), workflow_type="train", **given, recipe="lora_ddpm")
    workflow.initialize()
    assert len(workflow.train_dataset_data) == 4
    assert [type(handler).__name__ for handler in workflow.train_handlers if handler] == ["StatsHandler"]


def test_the_command_line_works_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = bundle(tmp_path / "bundle", {**PLAIN, "channels": [8, 16]})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    options = {
        "bundle_root": given["bundle_root"], "device": given["device"], "size": "[8,8,8]", "logging_file": "False",
        **{f"network_def#{key}": str(value) for key, value in {**PLAIN, "channels": [8, 16]}.items()},
        "recipe": "lora_ddpm", "rank": "3", "train#trainer#max_epochs": "1", "num_workers": "0", "val_share": "0",
    }  # fmt: skip
    given_options = [part for key, value in options.items() for part in (f"--{key}", value)]
    fire.Fire(run, command=["--config_file", str(CONFIGS / "train.yaml"), *given_options])
    assert list((tmp_path / "elsewhere").iterdir()) == []
    model = base({**PLAIN, "channels": [8, 16]})
    handle = tnpeft.load(model, tmp_path / "bundle" / "models" / "adapter.safetensors")
    assert {row.params["r"] for row in handle.report().layers} == {3}


def test_a_mistake_in_a_recipe_ends_before_training(tmp_path: Path) -> None:
    given = bundle(tmp_path, PLAIN)
    (tmp_path / "data" / "broken.nii").write_text("not read", encoding="utf-8")
    with pytest.raises(RuntimeError) as excinfo:
        train(given, recipe="tenvo_l_ddpm")
    assert str(cause(excinfo.value)).endswith("found neither. Did you mean `tenvoo_l_ddpm`?")
    assert not (tmp_path / "models" / "adapter.safetensors").exists()


@pytest.mark.parametrize("name", NAMES)
def test_each_workflow_has_the_properties_that_monai_asks_for(tmp_path: Path, name: str) -> None:
    given = bundle(tmp_path, PLAIN)
    model = base(PLAIN)
    tnpeft.attach(model, "lora_ddpm")
    tnpeft.save(model, tmp_path / "models" / "adapter.safetensors")
    kind = {"train": "train", "inference": "infer"}[name]
    workflow = ConfigWorkflow(str(CONFIGS / f"{name}.yaml"), workflow_type=kind, **given, batch_size=1)
    workflow.initialize()
    assert workflow.check_properties() == []
    assert isinstance(workflow.network_def, DiffusionModelUNet)


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))


def strings(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a configuration, with its key."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from strings(value, name)
    elif isinstance(node, list):
        for value in node:
            yield from strings(value, key)
    elif isinstance(node, str):
        yield key, node


def test_tnpeft_enters_by_targets_alone() -> None:
    found = {name: {(key, text) for key, text in strings(read(name)) if "tnpeft" in text} for name in ALL_NAMES}
    assert found == {
        "train": {("_target_", "tnpeft.attach"), ("_target_", "tnpeft.save")},
        "inference": {("_target_", "tnpeft.load"), ("_target_", "tnpeft.merge")},
        "evaluate": {("_target_", "tnpeft.load")},
    }


def test_both_configurations_describe_one_model() -> None:
    training, inference = (read(name) for name in NAMES)
    assert training["network_def"] == inference["network_def"]
    shared = set(training["noise_scheduler"]) - {"_target_"}
    assert {key: training["noise_scheduler"][key] for key in shared} == {
        key: inference["noise_scheduler"][key] for key in shared
    }
    assert training["size"] == inference["size"]


def test_the_metadata_name_the_versions_and_the_data() -> None:
    metadata = json.loads((CONFIGS / "metadata.json").read_text(encoding="utf-8"))
    assert metadata["required_packages_version"]["tnpeft"] == tnpeft.__version__
    assert metadata["version"] in metadata["changelog"]
    assert metadata.keys() >= META_KEYS
    for field in (
        metadata["network_data_format"]["inputs"]["image"],
        metadata["network_data_format"]["outputs"]["pred"],
    ):
        assert field.keys() == FIELD_KEYS
        assert field["num_channels"] == read("train")["network_def"]["in_channels"]
        assert field["spatial_shape"] == read("train")["size"]
