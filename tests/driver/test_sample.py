"""`sample`: what volumes depend on, where they lie, which models they come from, and how a run goes on."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="the example driver needs the `demo` extra")

import nibabel
from accelerate.state import AcceleratorState
from ddpm_lab.config.settings import Base, Config, Data, Diffusion, Method, Metrics, Model, Sampling, Training
from ddpm_lab.data.grid import Grid, grid_of, read_volume, write_volume
from ddpm_lab.model.method import apply_method
from ddpm_lab.model.unet import build_unet, load_base, save_weights
from ddpm_lab.sampling.draw import draw_samples
from ddpm_lab.sampling.sample import sample_volumes
from ddpm_lab.sampling.variants import Variant, find_variants
from ddpm_lab.support.console import Screen
from ddpm_lab.support.faults import LabError
from nibabel.orientations import aff2axcodes
from rich.console import Console
from safetensors.torch import load_file, save_file

import tnpeft
from tnpeft import TnpeftError
from tnpeft.documents import files as file_writer

ROOT = Path(__file__).parents[2]
MODEL = Model(channels=(8, 8), attention_levels=(False, True), head_channels=(0, 8), res_blocks=1, norm_groups=4)
WIDER = MODEL.model_copy(update={"channels": (8, 16), "head_channels": (0, 16)})
QUIET = Screen(quiet=True)


@pytest.fixture(autouse=True)
def clean_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def network(seed: int = 0, model: Model = MODEL) -> Any:
    """A U-Net whose output is not zero, as a trained one's."""
    unet = build_unet(model, seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in unet.out.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return unet


def moved(unet: torch.nn.Module, seed: int) -> None:
    """As if what trains had trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


METHODS = {
    "adapter": Method(recipe="tenvoo_l_ddpm", params={"r": 2}),
    "other": Method(recipe="lora_ddpm"),
    "full": Method(kind="full"),
    "bias_norm": Method(kind="bias_norm"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, and what each method would leave in a run folder of its own."""
    folder = tmp_path_factory.mktemp("runs")
    paths = {"base": folder / "base.safetensors", "wider": folder / "wider.safetensors"}
    save_weights(network(), paths["base"])
    save_weights(network(model=WIDER), paths["wider"])
    for number, (name, method) in enumerate(METHODS.items()):
        unet = network()
        trained = apply_method(unet, method)
        moved(unet, number)
        (folder / name).mkdir()
        paths[name] = trained.save(folder / name)
    return paths


def config(files: dict[str, Path], **sampling: Any) -> Config:
    return Config(
        data=Data(resize=(8, 8, 8)),
        model=MODEL,
        base=Base(checkpoint=files["base"]),
        diffusion=Diffusion(prediction="v_prediction", timesteps=10),
        training=Training(precision="fp32", device="cpu", threads=1),
        sampling=Sampling(**{"steps": 4, "count": 4, "batch_size": 2, **sampling}),
        metrics=Metrics(pairs=2),
    )


def changed(settings: Config, section: str, **values: Any) -> Config:
    return settings.model_copy(update={section: getattr(settings, section).model_copy(update=values)})


def volumes(folder: Path) -> torch.Tensor:
    """The samples of a folder, (count, 1, D, H, W)."""
    return torch.stack([read_volume(path) for path in sorted(folder.glob("sample-*.nii.gz"))])


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and float((one - other).abs().max()) <= 1e-4


# What a volume depends on


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_a_sample_depends_on_its_seed_and_number_alone(scheduler: str) -> None:
    unet, data, diffusion = network(), Data(), Diffusion(prediction="v_prediction", timesteps=10)

    def draw(count: int, batch_size: int, seed: int = 5) -> torch.Tensor:
        sampling = Sampling(scheduler=scheduler, steps=10, count=count, batch_size=batch_size, seed=seed)  # type: ignore[arg-type]
        return draw_samples(unet, (8, 8, 8), diffusion, sampling, data)

    whole = draw(4, 4)
    assert close(draw(4, 1), whole)
    assert close(draw(4, 3), whole)
    assert close(draw(2, 2), whole[:2])
    assert not close(whole[:1], whole[1:2])
    assert not close(draw(4, 4, seed=6), whole)


def test_ddpm_adds_noise_and_ddim_does_not() -> None:
    """From one first noise ddpm's volumes differ by seed alone where the network says nothing."""
    unet = build_unet(MODEL)  # predicts zero
    diffusion = Diffusion(prediction="v_prediction", timesteps=10, beta_start=1e-4, beta_end=2e-4)
    drawn = {
        kind: draw_samples(unet, (8, 8, 8), diffusion, Sampling(scheduler=kind, steps=10, count=1), Data())  # type: ignore[arg-type]
        for kind in ("ddim", "ddpm")
    }
    assert not close(drawn["ddim"], drawn["ddpm"])


def test_the_bar_counts_each_step_of_each_volume(files: dict[str, Path]) -> None:
    seen: list[int] = []
    sampling = Sampling(steps=3, count=5, batch_size=2)
    draw_samples(network(), (8, 8, 8), Diffusion(timesteps=10), sampling, Data(), "cpu", seen.append)
    assert seen == [2, 4, 6, 8, 10, 12, 13, 14, 15]


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_batches_do_not_change_what_is_written(files: dict[str, Path], tmp_path: Path, scheduler: str) -> None:
    steps = 10 if scheduler == "ddpm" else 4
    drawn = []
    for size in (1, 3, 4):
        settings = config(files, scheduler=scheduler, steps=steps, batch_size=size, adapters=(files["adapter"],))
        folders = sample_volumes(settings, tmp_path / str(size), QUIET)
        drawn.append({name: volumes(folder) for name, folder in folders.items()})
    for name in ("base", "adapter"):
        assert len(drawn[0][name]) == 4
        assert all(close(drawn[0][name], other[name]) for other in drawn[1:])
    assert not close(drawn[0]["base"], drawn[0]["adapter"])


@pytest.mark.slow
def test_two_processes_share_the_volumes(files: dict[str, Path], tmp_path: Path) -> None:
    settings = config(files, scheduler="ddpm", steps=10, count=3, adapters=(files["adapter"],))
    alone = sample_volumes(settings, tmp_path / "one", QUIET)
    written = tmp_path / "config.yaml"
    written.write_text(settings.model_dump_json(exclude_none=True), encoding="utf-8")
    script = str(ROOT / "examples" / "ddpm.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, "sample"]
    command += ["--config", str(written), "--out", str(tmp_path / "two"), "--set", "training.processes=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two" / "record-sample.json").read_text(encoding="utf-8"))["processes"] == 2
    for name, folder in alone.items():
        together = tmp_path / "two" / "samples" / name
        assert close(volumes(folder), volumes(together))
        assert sorted(path.name for path in together.iterdir()) == sorted(path.name for path in folder.iterdir())


# Which models


@pytest.mark.slow
def test_each_file_is_sampled_over_one_base(files: dict[str, Path], tmp_path: Path) -> None:
    names = ("adapter", "full", "bias_norm", "other")
    settings = config(files, adapters=tuple(files[name] for name in names))
    folders = sample_volumes(settings, tmp_path, QUIET)
    assert list(folders) == ["base", *names]
    drawn = {name: volumes(folder) for name, folder in folders.items()}

    def expected(unet: torch.nn.Module) -> torch.Tensor:
        return draw_samples(unet, (8, 8, 8), settings.diffusion, settings.sampling, settings.data)

    assert close(drawn["base"], expected(network()))
    for name in ("adapter", "other"):
        unet = network()
        tnpeft.load(unet, files[name])
        assert close(drawn[name], expected(unet))
    full = network(9)
    load_base(full, Base(checkpoint=files["full"]))
    assert close(drawn["full"], expected(full))
    unet = network()
    unet.load_state_dict(load_file(files["bias_norm"]), strict=False)
    assert close(drawn["bias_norm"], expected(unet))
    assert all(not close(drawn[one], drawn[other]) for one in drawn for other in drawn if one < other)


@pytest.mark.parametrize("name", ["adapter", "full", "bias_norm"])
@pytest.mark.parametrize("merge", [False, True])
def test_a_variant_leaves_the_base_to_the_bit(files: dict[str, Path], name: str, merge: bool) -> None:
    unet = network()
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    variant = Variant(name, files[name], () if name == "adapter" else tuple(load_file(files[name])))
    x, steps = torch.randn((1, 1, 8, 8, 8), generator=torch.Generator().manual_seed(0)), torch.tensor([5])
    with torch.no_grad():
        plain = unet(x, timesteps=steps)
        with variant.on(unet, merge):
            assert not close(unet(x, timesteps=steps), plain)
        with pytest.raises(KeyError), variant.on(unet, merge):
            raise KeyError("inside")
        assert torch.equal(unet(x, timesteps=steps), plain)
    assert list(unet.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())


@pytest.mark.slow
def test_merged_weights_give_the_same_volumes(files: dict[str, Path], tmp_path: Path) -> None:
    drawn = []
    for merge in (False, True):
        settings = config(files, adapters=(files["adapter"],), base=False, merge=merge)
        folders = sample_volumes(settings, tmp_path / str(merge), QUIET)
        assert list(folders) == ["adapter"]
        drawn.append(volumes(folders["adapter"]))
    assert close(*drawn)


@pytest.mark.parametrize("name", ["adapter", "full", "bias_norm"])
def test_a_run_samples_its_own_result(files: dict[str, Path], tmp_path: Path, name: str) -> None:
    out = tmp_path / "mine.v2"
    out.mkdir()
    (out / files[name].name).write_bytes(files[name].read_bytes())
    assert list(sample_volumes(config(files, count=1, steps=1), out, QUIET)) == ["base", "mine.v2"]


def test_of_several_results_the_summary_names_the_last(files: dict[str, Path], tmp_path: Path) -> None:
    for name in ("adapter", "full"):
        (tmp_path / files[name].name).write_bytes(files[name].read_bytes())
    settings = config(files, count=1, steps=1)
    assert find_variants(settings, tmp_path)[1].path == tmp_path / "adapter.safetensors"
    (tmp_path / "summary.json").write_text('{"result": "model.safetensors"}', encoding="utf-8")
    assert find_variants(settings, tmp_path)[1].path == tmp_path / "model.safetensors"


def test_a_whole_model_needs_no_base(files: dict[str, Path], tmp_path: Path) -> None:
    settings = config(files, count=1, steps=1, adapters=(files["full"],)).model_copy(update={"base": Base()})
    assert list(sample_volumes(settings, tmp_path, QUIET)) == ["full"]


def test_bf16_is_what_the_training_section_asks_for(files: dict[str, Path], tmp_path: Path) -> None:
    settings = changed(config(files, count=1, steps=2, merge=True), "training", precision="bf16")
    half = volumes(sample_volumes(settings, tmp_path / "half", QUIET)["base"])
    AcceleratorState._reset_state(reset_partial_state=True)
    full = volumes(sample_volumes(config(files, count=1, steps=2), tmp_path / "full", QUIET)["base"])
    assert 0 < float((half - full).abs().max()) < 0.2


# Where voxels lie


def scan(path: Path, shape: tuple[int, int, int] = (20, 10, 16)) -> Path:
    """A volume stored along the axes A, S, L: 1.5 mm to A, 3 mm to S, 2 mm to L."""
    affine = np.array([[0, 0, -2.0, 5], [1.5, 0, 0, 3], [0, 3.0, 0, 1], [0, 0, 0, 1]])
    voxels = np.random.default_rng(0).uniform(size=shape).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return path


@pytest.mark.parametrize(
    ("data", "shape", "spacing"),
    [
        ({}, (16, 20, 10), (2, 1.5, 3)),
        ({"resize": (8, 8, 8)}, (8, 8, 8), (4, 3.75, 3.75)),
        ({"spacing": (2, 2, 2), "crop": (12, 14, 12)}, (12, 14, 12), (2, 2, 2)),
        ({"spacing": (2, 2, 2), "crop": (12, 12, 12), "resize": (8, 6, 8)}, (8, 6, 8), (3, 4, 3)),
        ({"spacing": (3, 3, 3), "crop": (12, 8, 12), "paper_order": True}, (8, 6, 8), (3, 3, 3)),
    ],
)
def test_the_grid_is_that_of_a_transformed_volume(
    tmp_path: Path, data: dict[str, Any], shape: tuple[int, ...], spacing: tuple[float, ...]
) -> None:
    scan(tmp_path / "a.nii.gz")
    scan(tmp_path / "b.nii.gz")
    grid = grid_of(Data(root=tmp_path, **data), 2)
    assert (grid.shape, grid.source) == (shape, "a volume of the data, a.nii.gz")
    assert grid.spacing == pytest.approx(spacing, abs=1e-4)


@pytest.mark.parametrize(
    ("data", "shape", "spacing", "source"),
    [
        ({"spacing": (2.0, 2.0, 2.0), "crop": (8, 6, 4)}, (8, 6, 4), (2, 2, 2), "the settings"),
        ({"spacing": (2.0, 2.0, 2.0), "crop": (8, 6, 4), "resize": (4, 4, 4)}, (4, 4, 4), (4, 3, 2), "the settings"),
        ({"spacing": (2.0, 2.0, 2.0), "resize": (4, 4, 4)}, (4, 4, 4), (1, 1, 1), "assumed"),
        ({"crop": (4, 4, 4)}, (4, 4, 4), (1, 1, 1), "assumed"),
    ],
)
def test_without_data_the_settings_tell_the_grid(
    data: dict[str, Any], shape: tuple[int, ...], spacing: tuple[float, ...], source: str
) -> None:
    grid = grid_of(Data(**data), 2)
    assert (grid.shape, grid.spacing) == (shape, spacing)
    assert grid.source.startswith(source)


def test_without_data_and_settings_the_size_is_asked_for() -> None:
    for data in (Data(), Data(spacing=(2.0, 2.0, 2.0), crop=(8, 8, 8), paper_order=True)):
        with pytest.raises(LabError) as excinfo:
            grid_of(data, 2)
        assert str(excinfo.value) == (
            "data: the size of volumes: expected `data.root`, `data.resize` or `data.crop`, found none of them. "
            "Pass `--set data.root=FOLDER` or `--set data.resize=[...]`."
        )
    with pytest.raises(LabError) as excinfo:
        grid_of(Data(crop=(8, 6, 7)), 2)
    assert str(excinfo.value) == (
        "data.crop: the volume's size: expected multiples of 2, for the network, found 8x6x7. "
        "Set `data.crop` or `data.resize`."
    )


def test_files_say_where_their_voxels_are_and_that_they_are_synthetic(files: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "scans"
    root.mkdir()
    scan(root / "a.nii.gz")
    scan(root / "b.nii.gz")
    settings = changed(config(files, count=1), "data", root=root)
    folder = sample_volumes(settings, tmp_path / "out", QUIET)["base"]
    image = nibabel.load(folder / "sample-0000.nii.gz")
    header = image.header
    assert aff2axcodes(image.affine) == ("R", "A", "S")
    assert header.get_zooms() == pytest.approx((4, 3.75, 3.75))
    np.testing.assert_allclose(image.affine @ [3.5, 3.5, 3.5, 1], [0, 0, 0, 1], atol=1e-5)
    np.testing.assert_allclose(header.get_qform(), header.get_sform(), atol=1e-5)
    assert (int(header["qform_code"]), int(header["sform_code"])) == (2, 2)
    assert header.get_xyzt_units()[0] == "mm"
    assert header.get_data_dtype() == np.float32
    assert header["descrip"].item().decode() == "synthetic: ddim 4, seed 4321, 0, base"
    voxels = image.get_fdata()
    assert voxels.shape == (8, 8, 8)
    assert 0 <= voxels.min() < voxels.max() <= 1
    record = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    assert record["seeds"] == [[4321, 0]]
    assert record["spacing_from"] == "a volume of the data, a.nii.gz"
    assert (record["settings"]["sampling.scheduler"], record["settings"]["sampling.steps"]) == ("ddim", 4)
    assert len(record["settings"]["base.sha256"]) == 64
    assert record["settings"]["adapter.sha256"] is None


# A run goes on


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("sample-*.nii.gz")}


def test_a_run_draws_what_is_missing_and_nothing_else(files: dict[str, Path], tmp_path: Path) -> None:
    settings = config(files, count=3)
    folder = sample_volumes(settings, tmp_path, QUIET)["base"]
    first = snapshot(folder)
    assert sorted(first) == [f"sample-000{number}.nii.gz" for number in range(3)]
    assert json.loads((folder / "samples.json").read_text(encoding="utf-8"))["count"] == 3
    (folder / "sample-0001.nii.gz").unlink()
    (folder / ".sample-0001.nii.gz.0f0f0f0f.tmp").write_bytes(b"cut short")
    sample_volumes(changed(settings, "sampling", batch_size=4, count=4), tmp_path, QUIET)
    second = snapshot(folder)
    assert len(second) == 4
    assert second["sample-0000.nii.gz"] == first["sample-0000.nii.gz"]
    assert second["sample-0002.nii.gz"] == first["sample-0002.nii.gz"]
    assert not list(folder.glob(".*.tmp"))
    drawn = volumes(folder)
    expected = draw_samples(network(), (8, 8, 8), settings.diffusion, Sampling(steps=4, count=4), settings.data)
    assert close(drawn, expected)
    assert json.loads((folder / "samples.json").read_text(encoding="utf-8"))["count"] == 4
    screen = Screen(Console(width=120, record=True, file=io.StringIO()))
    sample_volumes(changed(settings, "sampling", count=4), tmp_path, screen)
    assert snapshot(folder) == second
    assert "base: 4 of 4 volumes are there from an earlier run" in screen.console.export_text()


def test_an_interrupted_run_keeps_whole_files(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(files, count=3, batch_size=1)

    opened = file_writer._opened

    def full_disk(temporary: Path, target: Path) -> BinaryIO:
        if target.name.startswith("sample-0001"):
            raise OSError(28, "No space left on device")
        return opened(temporary, target)

    monkeypatch.setattr(file_writer, "_opened", full_disk)
    with pytest.raises(LabError) as excinfo:
        sample_volumes(settings, tmp_path, QUIET)
    folder = tmp_path / "samples" / "base"
    assert str(excinfo.value) == (
        f"{folder / 'sample-0001.nii.gz'}: a sample: expected a place to write it, found No space left on device. "
        "Free space, or choose another `--out`; then the same command goes on."
    )
    assert [path.name for path in folder.glob("*.nii.gz")] == ["sample-0000.nii.gz"]
    monkeypatch.undo()
    sample_volumes(settings, tmp_path, QUIET)
    assert len(volumes(folder)) == 3


OTHERS = {
    "steps": (lambda c, _: changed(c, "sampling", steps=5), "sampling.steps 5, found 4"),
    "seed": (lambda c, _: changed(c, "sampling", seed=1), "sampling.seed 1, found 4321"),
    "scheduler": (
        lambda c, _: changed(c, "sampling", scheduler="ddpm", steps=10),
        'sampling.scheduler "ddpm", found "ddim"',
    ),
    "size": (lambda c, _: changed(c, "data", resize=(8, 8, 16)), "shape [8, 8, 16], found [8, 8, 8]"),
    "prediction": (
        lambda c, _: changed(c, "diffusion", prediction="epsilon"),
        'diffusion.prediction "epsilon", found "v_prediction"',
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_samples_of_other_settings_are_not_mixed(files: dict[str, Path], tmp_path: Path, name: str) -> None:
    settings = config(files, count=1)
    folder = sample_volumes(settings, tmp_path, QUIET)["base"]
    before = snapshot(folder)
    change, text = OTHERS[name]
    with pytest.raises(LabError) as excinfo:
        sample_volumes(change(settings, files), tmp_path, QUIET)
    fix = "Remove the folder, or choose another `--out`."
    assert str(excinfo.value) == f"{folder}: samples of an earlier run: expected {text}. {fix}"
    assert snapshot(folder) == before
    (folder / "samples.json").write_text("{", encoding="utf-8")
    with pytest.raises(LabError) as excinfo:
        sample_volumes(settings, tmp_path, QUIET)
    assert str(excinfo.value) == (
        f"{folder}: samples of an earlier run: expected a samples.json beside them, found none to read. {fix}"
    )
    for path in folder.glob("sample-*"):
        path.unlink()
    sample_volumes(change(settings, files), tmp_path, QUIET)


def test_samples_of_another_adapter_are_not_mixed(files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    adapter = tmp_path / "mine.safetensors"
    adapter.write_bytes(files["adapter"].read_bytes())
    settings = config(files, count=1, base=False, adapters=(adapter,))
    sample_volumes(settings, out, QUIET)
    adapter.write_bytes(files["other"].read_bytes())
    with pytest.raises(LabError) as excinfo:
        sample_volumes(settings, out, QUIET)
    assert ": samples of an earlier run: expected adapter.sha256 " in str(excinfo.value)


# Mistakes


def said(settings: Config, out: Path) -> str:
    with pytest.raises(TnpeftError) as excinfo:
        sample_volumes(settings, out, QUIET)
    assert not (out / "samples").exists(), "nothing is written before everything is checked"
    return str(excinfo.value)


def test_what_cannot_be_sampled_is_said(files: dict[str, Path], tmp_path: Path) -> None:
    out, gone = tmp_path / "out", tmp_path / "gone.safetensors"
    assert said(config(files).model_copy(update={"base": Base()}), out) == (
        f"{out}: a model to sample: expected `base.checkpoint`, `sampling.adapters` or a result of `finetune` in "
        "`--out`, found none of them. Pass `--set base.checkpoint=FILE`, or the `--out` of a finished run."
    )
    assert said(config(files, count=0), out) == (
        "sampling.count: the number of samples: expected at least 1, found 0. Pass `--set sampling.count=8`."
    )
    assert said(config(files, adapters=(gone,)), out) == (
        f"{gone}: `sampling.adapters`: expected a file, found nothing there. Check the path."
    )
    assert said(config(files, steps=11), out) == (
        "sampling.steps: the number of steps: expected at most 10, `diffusion.timesteps`, found 11. Take fewer."
    )
    for name in ("adapter", "bias_norm"):
        alone = config(files, adapters=(files[name],)).model_copy(update={"base": Base()})
        assert said(alone, out) == (
            f"base.checkpoint: the base of {files[name]}: expected a pretrained model's checkpoint, found nothing. "
            "Pass `--set base.checkpoint=FILE`, the one that it was trained on."
        )


def test_samples_never_lie_among_the_data(files: dict[str, Path], tmp_path: Path) -> None:
    """The next run of layout `plain` would take them for real."""
    for name in ("a", "b"):
        scan(tmp_path / f"{name}.nii.gz")
    out = tmp_path / "runs" / "mine"
    settings = changed(config(files, count=1, steps=1), "data", root=tmp_path)
    assert said(settings, out) == (
        f"{out}: the folder of samples: expected one outside of `data.root`, found one inside of {tmp_path}. "
        "Choose another `--out`, or list the data with `prepare`."
    )


def test_the_grid_is_that_of_a_sound_volume_when_damaged_ones_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(b"")
    scan(tmp_path / "b.nii.gz")
    assert grid_of(Data(root=tmp_path, skip_damaged=True), 2).source == "a volume of the data, b.nii.gz"
    with pytest.raises(LabError) as excinfo:
        grid_of(Data(root=tmp_path), 2)
    assert str(excinfo.value) == (
        f"{tmp_path / 'a.nii.gz'}: an unreadable volume: expected a NIfTI file, found Empty file: "
        f"'{tmp_path / 'a.nii.gz'}'. Replace or remove the file."
    )


def test_files_that_are_no_result_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    out, path = tmp_path / "out", tmp_path / "file.safetensors"
    path.write_bytes(files["adapter"].read_bytes()[:-100])
    assert said(config(files, adapters=(path,)), out).startswith(
        f"{path}: `sampling.adapters`: expected a complete safetensors file, found "
    )
    save_file({}, path)
    assert said(config(files, adapters=(path,)), out) == (
        f"{path}: `sampling.adapters`: expected tensors, found none. Give a result of `finetune`."
    )
    save_file({"weight": torch.zeros(2), "out.2.conv.bias": torch.zeros(3)}, path)
    assert said(config(files, adapters=(path,)), out).splitlines() == [
        f"{path}: tensor `out.2.conv.bias`: expected 1, found 3. Give a result of `finetune` for this `model`.",
        f"{path}: tensor `weight`: expected no such tensor, found 2. Give a result of `finetune` for this `model`.",
    ]


def test_an_adapter_of_another_base_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    settings = config(files, adapters=(files["adapter"],)).model_copy(
        update={"model": WIDER, "base": Base(checkpoint=files["wider"])}
    )
    assert said(settings, tmp_path / "out") == (
        f"{files['adapter']}: base model: expected the one the adapter was saved from, found "
        "'down_blocks.1.resnets.0.skip_connection.conv.weight' is float32(16, 8, 1, 1, 1) here and missing there; "
        "'down_blocks.1.resnets.0.skip_connection.conv.bias' is float32(16) here and missing there; "
        "'down_blocks.1.attentions.0.norm.weight' is float32(8) there and float32(16) here; and 97 more. "
        "Build the base model as it was when the adapter was saved."
    )


def test_two_sets_of_one_name_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    copies = []
    for name in ("one", "two"):
        (tmp_path / name / "seed-0").mkdir(parents=True)
        copies.append(tmp_path / name / "seed-0" / "adapter.safetensors")
        copies[-1].write_bytes(files["adapter"].read_bytes())
    assert said(config(files, adapters=tuple(copies)), tmp_path / "out") == (
        f"{copies[1]}: the name of samples: expected a name for each, the file's or its folder's, found `seed-0`, "
        f"which is {copies[0]}, too. Rename the file or its folder."
    )
    assert said(config(files, adapters=(files["base"],)), tmp_path / "out") == (
        f"{files['base']}: the name of samples: expected a name for each, the file's or its folder's, found `base`, "
        "which is the base, too. Rename the file or its folder."
    )
    nameless = tmp_path / ".safetensors"
    nameless.write_bytes(files["adapter"].read_bytes())
    assert said(config(files, adapters=(nameless,)), tmp_path / "out") == (
        f"{nameless}: the name of samples: expected a file name with letters or digits, found ``. Rename the file."
    )


def test_volumes_survive_their_files(tmp_path: Path) -> None:
    grid = Grid((4, 6, 8), (1.0, 2.0, 3.0), "")
    volume = torch.rand((1, 4, 6, 8), generator=torch.Generator().manual_seed(0))
    path = tmp_path / "sample-0000.nii.gz"
    write_volume(path, volume, grid, (0.0, 1.0), "synthetic " * 20)
    assert torch.equal(read_volume(path), volume)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-8]))
    with pytest.raises(LabError) as excinfo:
        read_volume(path)
    assert str(excinfo.value).startswith(f"{path}: a damaged sample: expected a NIfTI file, found ")
    write_volume(path, torch.full((1, 4, 6, 8), float("nan")), grid, (0.0, 1.0), "")
    with pytest.raises(LabError) as excinfo:
        read_volume(path)
    assert str(excinfo.value) == (
        f"{path}: a damaged sample: expected one 3D volume of finite numbers, found voxels that are infinite or not "
        "a number. Remove it and run `sample` again."
    )
