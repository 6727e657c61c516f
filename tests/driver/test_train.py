"""The driver's training: order and noise from seeds, processes, averages, methods, and what can go wrong in a step."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="the example driver needs the `demo` extra")

import nibabel
from accelerate.state import AcceleratorState
from ddpm_lab.config.settings import Base, Config, Data, Diffusion, Method, Model, Sampling, Training, Validation
from ddpm_lab.data.order import Batches, Key, Noised, Source, collate, epoch_order, stream
from ddpm_lab.model.accelerator import make_accelerator
from ddpm_lab.model.diffusion import HeldOut, HeldOutError, noise_schedule, predict
from ddpm_lab.model.method import PAPER_JOINT, Trained, apply_method, check_method
from ddpm_lab.model.unet import build_unet, save_weights
from ddpm_lab.support.console import Screen
from ddpm_lab.support.faults import LabError
from ddpm_lab.training.average import Average
from ddpm_lab.training.checkpoint import Checkpoints
from ddpm_lab.training.driver import finetune, pretrain
from ddpm_lab.training.progress import Loop
from ddpm_lab.training.train import Step, train
from rich.console import Console
from safetensors.torch import load_file, save_file

import tnpeft

ROOT = Path(__file__).parents[2]
TINY = Model(channels=(8, 8), attention_levels=(False, True), head_channels=(0, 8), res_blocks=1, norm_groups=4)
ONE = Training(steps=3, batch_size=2, accumulation=1, learning_rate=1e-3, precision="fp32", device="cpu", threads=1)


@pytest.fixture(autouse=True)
def clean_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def tiny(seed: int = 0) -> torch.nn.Module:
    """A U-Net of two levels whose output is not zero, as a trained one's."""
    unet = build_unet(TINY, seed=seed)
    with torch.no_grad():
        for name, parameter in unet.out.named_parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=stream(name, seed)))
    return unet


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with seven scans and a base."""
    folder = tmp_path_factory.mktemp("lab")
    scans = folder / "scans"
    scans.mkdir()
    for number in range(7):
        volume = np.random.default_rng(number).uniform(size=(8, 8, 8)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), scans / f"{number}.nii.gz")
    save_weights(tiny(), folder / "base.safetensors")
    return folder


def config_of(lab: Path, **changes: Any) -> Config:
    sections: dict[str, Any] = {
        "data": Data(root=lab / "scans"),
        "model": TINY,
        "base": Base(checkpoint=lab / "base.safetensors"),
        "diffusion": Diffusion(prediction="v_prediction"),
        "method": Method(recipe="tenvoo_l_ddpm", params={"r": 2}),
        "training": ONE,
        "validation": Validation(buckets=2),
        "sampling": Sampling(count=0),
    }
    return Config(**{**sections, **changes})


def quiet() -> Screen:
    return Screen(quiet=True)


def said(screen: Screen) -> str:
    return screen.console.export_text()


def recording() -> Screen:
    return Screen(Console(record=True, width=200, file=io.StringIO()))


# Order and noise


def test_a_stream_depends_on_its_purpose_and_numbers_alone() -> None:
    before = torch.get_rng_state()
    first = torch.rand(3, generator=stream("noise", 1, 2, 3))
    assert torch.equal(first, torch.rand(3, generator=stream("noise", 1, 2, 3)))
    for other in (("order", 1, 2, 3), ("noise", 1, 2, 4), ("noise", 12, 3), ("noise", 2, 1, 3)):
        assert not torch.equal(first, torch.rand(3, generator=stream(other[0], *other[1:])))
    assert torch.equal(before, torch.get_rng_state())


def test_every_epoch_is_another_permutation() -> None:
    orders = [epoch_order(seed, epoch, 50) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(orders)) == 4


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "processes"), [(4, 1, 1), (1, 4, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2)]
)
def test_processes_and_micro_batches_only_share_a_global_batch_out(
    batch_size: int, accumulation: int, processes: int
) -> None:
    training = Training(batch_size=batch_size, accumulation=accumulation, seed=5)
    shares = [list(Batches(7, training, 0, 5, process, processes)) for process in range(processes)]
    assert all(len(share) == len(Batches(7, training, 0, 5)) == 5 * accumulation for share in shares)
    assert all(len(batch) == batch_size for share in shares for batch in share)
    steps = [
        [key for share in shares for batch in share[step * accumulation : (step + 1) * accumulation] for key in batch]
        for step in range(5)
    ]
    row = [Key(epoch, volume) for epoch in range(3) for volume in epoch_order(5, epoch, 7)]
    assert [sorted(step) for step in steps] == [sorted(row[4 * number : 4 * number + 4]) for number in range(5)]


def test_a_run_goes_on_in_the_same_row() -> None:
    training = Training(batch_size=2, accumulation=3)
    assert list(Batches(7, training, 2, 5)) == list(Batches(7, training, 0, 5))[6:]


def test_a_samples_noise_is_its_own() -> None:
    source = Source(list(torch.rand(4, 1, 2, 2, 2)))
    samples = Noised(source, 1000, seed=3)
    one, again, later = samples[Key(0, 2)], samples[Key(0, 2)], samples[Key(1, 2)]
    batch = collate([samples[Key(0, 1)], one])
    assert torch.equal(one.noise, again.noise)
    assert torch.equal(one.noise, batch.noise[1])
    assert (one.timestep, batch.volumes, batch.reasons) == (batch.timesteps[1], (1, 2), ("", ""))
    assert not torch.equal(one.noise, later.noise)
    assert torch.equal(one.clean, later.clean)


def test_held_out_noise_does_not_depend_on_the_batch_size() -> None:
    volumes = list(torch.rand((3, 1, 8, 8, 8), generator=torch.Generator().manual_seed(0)))
    kinds = [HeldOut(volumes, noise_schedule(Diffusion()), Validation(buckets=3, draws=2), size) for size in (1, 3)]
    one, three = (held_out.error_of(held_out.errors(tiny())) for held_out in kinds)
    assert one.buckets == pytest.approx(three.buckets, rel=1e-5)
    shares = [kinds[1].errors(tiny(), process=process, processes=4) for process in range(4)]
    assert [int(share.count_nonzero()) for share in shares] == [6, 6, 3, 3]
    assert kinds[1].error_of(sum(shares, torch.zeros(3, 6))) == three, "to the bit, however many share the batches"


def test_the_error_of_each_volume_is_that_of_the_volume_alone() -> None:
    volumes = list(torch.rand((3, 1, 8, 8, 8), generator=torch.Generator().manual_seed(0)))
    validation = Validation(buckets=2, draws=2)
    unet, scheduler = tiny(), noise_schedule(Diffusion())
    held_out = HeldOut(volumes, scheduler, validation, 4)
    error = held_out.error_of(held_out.errors(unet))
    assert error.mean == pytest.approx(sum(error.volumes) / 3, rel=1e-12)
    assert HeldOutError.from_data(json.loads(json.dumps(error.as_data()))) == error
    assert HeldOutError.from_data([error.mean, error.buckets]).volumes == ()  # of a checkpoint that had none
    unet.eval()
    for index, volume in enumerate(volumes):  # one at a time, the noise drawn here
        found = []
        for bucket in range(2):
            for draw in range(2):
                generator = stream("held-out", validation.seed, bucket, draw, index)
                timestep = torch.randint(500 * bucket, 500 * (bucket + 1), (), generator=generator)
                noise = torch.randn(volume.shape, generator=generator)
                with torch.no_grad():
                    given, target = predict(unet, scheduler, volume[None], noise[None], timestep[None])
                found.append(float((given - target).double().square().mean()))
        assert error.volumes[index] == pytest.approx(sum(found) / 4, rel=1e-5)
    other = HeldOut(volumes, scheduler, validation, 4, "test")
    assert other.error_of(other.errors(unet)).volumes != error.volumes, "noise of its own"


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_and_workers_do_not_change_the_losses(workers: int) -> None:
    volumes = list(torch.rand((5, 1, 8, 8, 8), generator=torch.Generator().manual_seed(0)))

    def losses(batch_size: int, accumulation: int, workers: int = 0) -> list[float]:
        training = ONE.model_copy(
            update={"batch_size": batch_size, "accumulation": accumulation, "workers": workers, "schedule": "one_cycle"}
        )
        unet = tiny()
        apply_method(unet, Method(kind="full"))
        return train(unet, Source(volumes), noise_schedule(Diffusion()), training, make_accelerator(training)).losses

    assert losses(2, 3, workers) == pytest.approx(losses(6, 1), abs=1e-5)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.slow
def test_two_processes_train_like_one_at_the_same_global_batch(lab: Path, tmp_path: Path) -> None:
    training = ONE.model_copy(
        update={"steps": 4, "accumulation": 4, "schedule": "one_cycle", "clip_norm": 1.0, "ema": 0.9, "workers": 1}
    )
    config = config_of(lab, training=training, validation=Validation(buckets=2, every=2))
    one = finetune(config, tmp_path / "one", quiet())
    assert one is not None
    shared = {"accumulation": 2, "processes": 2, "checkpoint_every": 2}
    (tmp_path / "two.yaml").write_text(
        json.dumps(config.model_copy(update={"training": training.model_copy(update=shared)}).model_dump(mode="json")),
        encoding="utf-8",
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    script = [str(ROOT / "examples" / "ddpm.py"), "finetune", "--config", str(tmp_path / "two.yaml")]
    command = [sys.executable, *launcher, "--master_port", str(free_port()), *script, "--out", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two" / "summary.json").read_text(encoding="utf-8"))
    assert two["machine"]["processes"] == 2
    assert two["history"]["losses"] == pytest.approx(one["history"]["losses"], abs=1e-4)
    assert two["run"]["held_out_error_before"] == one["run"]["held_out_error_before"], "shared, and the same bits"
    assert two["run"]["held_out_error_after"] == pytest.approx(one["run"]["held_out_error_after"], abs=1e-4)
    assert len(set(one["history"]["losses"])) == 4
    weights, others = (load_file(tmp_path / name / "adapter.safetensors") for name in ("one", "two"))
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-4, atol=1e-4)


# The average


def test_the_average_follows_and_steps_aside() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    average = Average({"p": parameter}, decay=0.25)
    expected = 0.0
    for step, value in enumerate((1.0, 2.0, 3.0), 1):
        with torch.no_grad():
            parameter.fill_(value)
        average.update(step)
        decay = min(0.25, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    with average.shown():
        torch.testing.assert_close(parameter.data, torch.full((2,), expected))
    assert torch.equal(parameter.data, torch.full((2,), 3.0))
    average.keep()
    torch.testing.assert_close(parameter.data, torch.full((2,), expected))


def test_the_average_is_the_result(lab: Path, tmp_path: Path) -> None:
    config = config_of(lab, training=ONE.model_copy(update={"ema": 0.5}))
    averaged = finetune(config, tmp_path / "ema", quiet())
    last = finetune(config_of(lab), tmp_path / "last", quiet())
    assert averaged is not None
    assert last is not None
    assert averaged["history"]["losses"] == last["history"]["losses"]
    assert averaged["run"]["held_out_error_after"] != last["run"]["held_out_error_after"]
    assert averaged["run"]["reload_difference"] == 0.0
    one, other = (load_file(tmp_path / name / "adapter.safetensors") for name in ("ema", "last"))
    assert any(not torch.equal(tensor, other[name]) for name, tensor in one.items())


# The scaler of fp16


class Cut(Exception):  # noqa: N818 - not an error
    """The end of a process."""


class Keeping:
    """Keeps a loop with the checkpoints' own functions, and ends the process after step `cut`."""

    def __init__(self, out: Path, trained: Trained, cut: int | None = None) -> None:
        self.checkpoints, self.trained, self.cut = Checkpoints(out, 2), trained, cut

    def restore(self, loop: Loop) -> None:
        found = self.checkpoints.newest()
        if found is not None:
            loop.restore(found.state["loop"], found.tensors())

    def after_step(self, loop: Loop, total: int) -> None:
        self.checkpoints.write(loop.step, {"loop": loop.data()}, loop.tensors(), self.trained.save)
        if loop.step == self.cut:
            raise Cut


def scaled(out: Path, cut: int | None = None, saved: Path | None = None) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Train with a scaler whose scale soon overflows: each step's loss, rate and scale, and all weights.

    On a CPU: accelerate makes a scaler on GPUs alone, but takes one anywhere.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    training = ONE.model_copy(update={"steps": 8, "ema": 0.5, "schedule": "one_cycle"})
    accelerator = make_accelerator(training)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**124, growth_interval=2)
    volumes = list(100 * torch.rand((6, 1, 8, 8, 8), generator=torch.Generator().manual_seed(0)))
    unet, steps = tiny(), list[Any]()

    def note(step: Step) -> None:
        steps.append((step.loss, step.learning_rate, accelerator.scaler.get_scale()))

    trained = apply_method(unet, Method(kind="bias_norm", match="."), saved)
    schedule = noise_schedule(Diffusion(prediction="v_prediction"))
    keeper = Keeping(out, trained, cut)
    with contextlib.suppress(Cut):
        train(unet, Source(volumes), schedule, training, accelerator, on_step=note, keeper=keeper)
    return steps, {name: tensor.detach() for name, tensor in unet.named_parameters()}


def test_a_scaler_goes_on_where_it_was(tmp_path: Path) -> None:
    """Steps that overflow are skipped and move neither rate nor average; scale and growth go on as if undisturbed."""
    steps, weights = scaled(tmp_path / "whole")
    scales = [math.log2(scale) for _, _, scale in steps]
    assert scales == [123, 122, 122, 121, 121, 122, 121, 121]
    rates = [rate for _, rate, _ in steps]
    assert rates[0] == rates[1] == rates[2] < rates[3] == rates[4] < rates[5]
    first, _ = scaled(tmp_path / "cut", cut=5)
    found = Checkpoints(tmp_path / "cut", 2).newest()
    assert found is not None
    assert found.state["loop"]["scaler"] == {
        "scale": 2.0**121,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2,
        "_growth_tracker": 1,
    }
    second, others = scaled(tmp_path / "cut", saved=found.folder)
    assert first + second == [*steps[:4], *steps[5:]], "the process ended before step 5 was noted"
    for name, tensor in weights.items():
        assert torch.equal(tensor, others[name]), name


# Methods


def test_joint_fine_tuning_trains_the_papers_layers_whole() -> None:
    unet = tiny()
    trained = apply_method(unet, Method(recipe="lora_ddpm", also=PAPER_JOINT))
    assert trained.title == "lora_ddpm + joint layers"
    names = {re.sub(r"_tnpeft_of_\w+:", "", name) for name, tensor in unet.named_parameters() if tensor.requires_grad}
    whole = {name for name in names if name.endswith(".weight") and "norm" not in name}
    assert whole == {
        *(
            f"{level}.attentions.0.attn.{layer}.weight"
            for level in ("down_blocks.1",)
            for layer in ("to_k", "out_proj")
        ),
        *(f"up_blocks.0.attentions.{n}.attn.{layer}.weight" for n in (0, 1) for layer in ("to_k", "out_proj")),
        *(f"up_blocks.{level}.resnets.{n}.skip_connection.conv.weight" for level in (0, 1) for n in (0, 1)),
        "down_blocks.0.downsampler.op.conv.weight",
        "up_blocks.0.upsampler.postconv.conv.weight",
    }
    alone = apply_method(tiny(), Method(spec="lora", match=r"conv1\.conv$", train="cores", also=(r"^conv_in\.",)))
    assert alone.title == "lora + joint layers"


@pytest.mark.parametrize("recipe", ["lora_ddpm", "loha_ddpm", "tenvoo_l_ddpm"])
def test_a_scale_of_zero_trains_biases_and_norms_alone(lab: Path, tmp_path: Path, recipe: str) -> None:
    config = config_of(lab, method=Method(recipe=recipe, zero_scale=True))
    summary = finetune(config, tmp_path / "run", quiet())
    assert summary is not None
    assert summary["run"]["method"] == f"{recipe}, update scaled by 0: biases and norms alone learn"
    honest = apply_method(tiny(), Method(recipe=recipe))
    assert summary["run"]["trainable_parameters"] == honest.parameters, "counted as the paper counts"
    unet = tiny()
    tnpeft.load(unet, tmp_path / "run" / "adapter.safetensors")
    base, changed = dict(tiny().named_modules()), 0
    for name, module in unet.named_modules():
        if isinstance(module, tnpeft.execution.AdaptedLayer):
            assert torch.equal(module.weight, base[name].get_parameter("weight"))
            changed += not torch.equal(module.bias, base[name].get_parameter("bias"))
    assert changed


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (
            Method(kind="full", also=("x",)),
            "method.also: the method: expected an adapter, found `full`. Remove `method.also`.",
        ),
        (
            Method(kind="bias_norm", zero_scale=True),
            "method.zero_scale: the method: expected an adapter, found `bias_norm`. Remove `method.zero_scale`.",
        ),
        (
            Method(spec="lora", match="x", train="cores", zero_scale=True),
            "method.zero_scale: what trains: expected something beside the cores, found the cores alone. "
            "Set `method.train=bias_norm`.",
        ),
    ],
)
def test_options_of_adapters_are_for_adapters(method: Method, expected: str) -> None:
    with pytest.raises(LabError) as excinfo:
        check_method(method, Base(checkpoint=Path("base")))
    assert str(excinfo.value) == expected


def test_pretraining_starts_from_nothing_and_makes_a_base(lab: Path, tmp_path: Path) -> None:
    config = config_of(lab, base=Base(), sampling=Sampling(count=1, steps=2))
    summary = pretrain(config, tmp_path / "base", quiet())
    assert summary is not None
    assert (summary["command"], summary["run"]["method"]) == ("pretrain", "pretraining")
    assert list(summary["samples"]["sets"]) == ["fine-tuned samples", "real, held out"]
    record = json.loads((tmp_path / "base" / "record-pretrain.json").read_text(encoding="utf-8"))
    assert record["config"]["method"]["kind"] == "full"
    used = finetune(
        config_of(lab, base=Base(checkpoint=tmp_path / "base" / "model.safetensors")), tmp_path / "a", quiet()
    )
    assert used is not None
    assert used["run"]["held_out_error_before"] == pytest.approx(summary["run"]["held_out_error_after"], rel=1e-5)
    with pytest.raises(LabError) as excinfo:
        pretrain(config_of(lab), tmp_path / "other", quiet())
    assert str(excinfo.value) == (
        f"base.checkpoint: the base of `pretrain`: expected nothing, for weights start anew, found "
        f"{lab}/base.safetensors. Remove it; or go on from it: `finetune` with `method.kind=full`."
    )


# What can go wrong in a step


class Volumes:
    """Six volumes of which some cannot be read any more; it counts how often one is asked for."""

    def __init__(self, broken: dict[int, Any]) -> None:
        self.volumes = list(torch.rand((6, 1, 8, 8, 8), generator=torch.Generator().manual_seed(0)))
        self.broken = broken

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        if index not in self.broken:
            return self.volumes[index]
        if isinstance(self.broken[index], Exception):
            raise self.broken[index]
        return torch.as_tensor(self.broken[index])


def trained(broken: dict[int, Any], skip: bool = False, **changes: Any) -> tuple[torch.nn.Module, Any, list[Any]]:
    training = ONE.model_copy(update=changes)
    unet, steps = tiny(), list[Any]()
    apply_method(unet, Method(kind="full"))
    history = train(
        unet,
        Source(Volumes(broken), shape=(8, 8, 8)),
        noise_schedule(Diffusion()),
        training,
        make_accelerator(training),
        on_step=steps.append,
        skip_damaged=skip,
    )
    return unet, history, steps


def test_a_loss_that_is_not_finite_names_its_samples() -> None:
    poison = epoch_order(0, 0, 6)[3]
    timestep = int(Noised(Source(Volumes({})), 1000, 0)[Key(0, poison)].timestep)
    with pytest.raises(LabError) as excinfo:
        trained({poison: torch.full((1, 8, 8, 8), math.nan)})
    assert str(excinfo.value) == (
        f"step 2: the loss: expected a finite number, found nan from volume {poison} at timestep {timestep}. "
        "Lower `training.learning_rate` (0.001) or set `training.clip_norm`."
    )
    with pytest.raises(LabError) as excinfo:
        trained({number: torch.full((1, 8, 8, 8), math.inf) for number in range(6)}, accumulation=3)
    assert " and 2 more. Lower" in str(excinfo.value)


def test_a_held_out_error_that_is_not_finite_stops_a_run(lab: Path, tmp_path: Path) -> None:
    """After a step, at the end, and of a base that holds what is not a number."""
    far = ONE.model_copy(update={"learning_rate": 1e30, "steps": 2, "checkpoint_every": 1})
    broken = load_file(lab / "base.safetensors")
    broken["out.2.conv.bias"][:] = math.nan
    save_file(broken, tmp_path / "broken.safetensors")
    slower = "Lower `training.learning_rate` (1e+30) or set `training.clip_norm`."
    for name, changes, fix in (
        ("step 1", {"training": far, "validation": Validation(buckets=2, every=1)}, slower),
        ("fine-tune, after", {"training": far.model_copy(update={"steps": 1})}, slower),
        (
            "fine-tune, before",
            {"base": Base(checkpoint=tmp_path / "broken.safetensors")},
            "Mend `base.checkpoint`, or set `training.precision=fp32`.",
        ),
    ):
        with pytest.raises(LabError) as excinfo:
            finetune(config_of(lab, **changes), tmp_path / name, quiet())
        assert str(excinfo.value) == (
            f"{name}: the error on held-out volumes: expected a finite number, found nan. {fix}"
        )
    assert not (tmp_path / "step 1" / "checkpoints").exists(), "nothing of a step that went wrong is kept"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_volume_is_named(workers: int) -> None:
    broken = epoch_order(0, 0, 6)[2]
    with pytest.raises(LabError) as excinfo:
        trained({broken: OSError("it melted")}, workers=workers)
    assert str(excinfo.value) == (
        f"volume {broken}: a volume while training: expected one that can be read, as at the start, found it melted. "
        "Mend the file, or leave it out with `--set data.skip_damaged=true`; the same command then goes on."
    )
    with pytest.raises(LabError) as excinfo:
        trained({broken: torch.zeros(1, 8, 8, 9)})
    assert "found a volume of 1x8x8x9, not 1x8x8x8. Mend" in str(excinfo.value)


def test_a_damaged_volume_is_left_out_of_the_mean_when_asked() -> None:
    first, second, broken = epoch_order(0, 0, 6)[:3]
    unet, history, steps = trained({broken: OSError("it melted")}, skip=True, steps=1, batch_size=3)
    expected, _, _ = trained({}, steps=1, batch_size=2)
    assert history.damaged == {f"volume {broken}": "it melted"}
    assert steps[0].damaged == [(f"volume {broken}", "it melted")]
    for (name, one), other in zip(unet.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert history.losses == pytest.approx(trained({}, steps=1, batch_size=2)[1].losses, rel=1e-5)
    with pytest.raises(LabError) as excinfo:
        trained({first: OSError("gone"), second: OSError("gone")}, skip=True)
    names = f"volume {first} (gone), volume {second} (gone)"
    assert str(excinfo.value) == (
        f"step 1: the volumes: expected at least one that can be read, found none: {names}. Mend them."
    )


@pytest.mark.parametrize("cache", ["none", "disk"])
@pytest.mark.parametrize("damage", ["deleted", "cut short"])
def test_a_file_that_is_damaged_after_the_check_is_named(
    lab: Path, tmp_path: Path, cache: str, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    for path in (lab / "scans").iterdir():
        (scans / path.name).write_bytes(path.read_bytes())
    made: list[Path] = []

    def damaged(*arguments: Any) -> Any:
        split = json.loads((tmp_path / "run" / "split.json").read_text(encoding="utf-8"))
        made.append(scans / split["train"][epoch_order(0, 0, 6)[2]])
        if damage == "deleted":
            made[0].unlink()
        else:
            made[0].write_bytes(made[0].read_bytes()[:200])
        return apply_method(*arguments)

    monkeypatch.setattr("ddpm_lab.training.finetune.apply_method", damaged)
    config = config_of(lab, data=Data(root=scans, cache=cache))  # type: ignore[arg-type]
    with pytest.raises(LabError) as excinfo:
        finetune(config, tmp_path / "run", quiet())
    assert str(excinfo.value).startswith(
        f"{made[0]}: a volume while training: expected one that can be read, as at the start, found "
    )
    assert "transform" not in str(excinfo.value)


def test_a_damaged_held_out_volume_is_never_left_out(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*arguments: Any) -> Any:
        split = json.loads((tmp_path / "run" / "split.json").read_text(encoding="utf-8"))
        Path(split["root"], split["validation"][0]).unlink()
        return apply_method(*arguments)

    scans = tmp_path / "scans"
    scans.mkdir()
    for path in (lab / "scans").iterdir():
        (scans / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr("ddpm_lab.training.finetune.apply_method", damaged)
    with pytest.raises(LabError) as excinfo:
        finetune(config_of(lab, data=Data(root=scans, cache="none", skip_damaged=True)), tmp_path / "run", quiet())
    assert str(excinfo.value).endswith(
        "Mend the file: held-out volumes are never left out, for errors before and after would not compare."
    )
