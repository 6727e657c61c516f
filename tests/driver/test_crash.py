"""Runs that are killed, cut off from their disk or started again: the same command ends with the same bits.

`TNPEFT_KILLS=100 pytest tests/driver/test_crash.py` kills more often.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="the example driver needs the `demo` extra")

import ddpm
import matplotlib.pyplot as plt
import nibabel
from accelerate.state import AcceleratorState
from ddpm_lab.config.settings import Model, Training
from ddpm_lab.model.accelerator import micro_batches
from ddpm_lab.model.unet import build_unet, save_weights
from ddpm_lab.support.durable import write_tensors
from ddpm_lab.support.faults import LabError
from ddpm_lab.training import checkpoint
from ddpm_lab.training.checkpoint import Checkpoints
from ddpm_lab.training.resume import check_identity
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}",
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "160",
    "GLOO_SOCKET_IFNAME": "lo",
}
KILLS = int(os.environ.get("TNPEFT_KILLS", "8"))
CONFIG = """\
data: {{root: {folder}/scans}}
model: {{channels: [8, 8], attention_levels: [false, true], head_channels: [0, 8], res_blocks: 1, norm_groups: 4}}
base: {{checkpoint: {folder}/base.safetensors}}
diffusion: {{prediction: v_prediction}}
method: {{recipe: tenvoo_l_ddpm, params: {{r: 2}}}}
training:
  {{steps: 7, batch_size: 2, accumulation: 2, learning_rate: 1.0e-3, schedule: one_cycle, clip_norm: 1.0, ema: 0.9,
   precision: fp32, device: cpu, threads: 1, checkpoint_every: 1}}
validation: {{every: 3, buckets: 2}}
sampling: {{count: 0}}
"""


@pytest.fixture(autouse=True)
def clean_accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nor is anything drawn, as in the server's runs: that takes a fifth of so short a run."""
    monkeypatch.setattr("ddpm_lab.training.driver.plot_curves", lambda path, *_: path.touch())
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with seven scans, a base and a configuration."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "scans").mkdir()
    for number in range(7):
        volume = np.random.default_rng(number).uniform(size=(8, 8, 8)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), folder / "scans" / f"{number}.nii.gz")
    unet = build_unet(
        Model(channels=(8, 8), attention_levels=(False, True), head_channels=(0, 8), res_blocks=1, norm_groups=4)
    )
    with torch.no_grad():
        for parameter in unet.out.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    save_weights(unet, folder / "base.safetensors")
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder), encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Server:
    """Runs the command in copies of a process that has imported everything."""

    process: subprocess.Popen[str]
    lab: Path

    def __call__(self, out: Path, *more: str, **job: Any) -> int:
        """The exit status, or minus the signal that ended it."""
        arguments = ["finetune", "--config", str(self.lab / "run.yaml"), "--out", str(out), *more]
        return self.ask({"arguments": arguments, "log": f"{out}.log", **job})

    def ask(self, job: dict[str, Any]) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.answer()["status"])

    def answer(self) -> dict[str, int]:
        assert self.process.stdout is not None
        found: dict[str, int] = json.loads(self.process.stdout.readline())
        return found


@pytest.fixture(scope="module")
def server(lab: Path) -> Iterator[Server]:
    command = [sys.executable, str(ROOT / "tests" / "fork_server.py")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=ROOT
    ) as process:
        started = Server(process, lab)
        assert started.answer()["ready"] == process.pid
        yield started
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == 0


@pytest.fixture(scope="module")
def timed(server: Server, lab: Path) -> tuple[Path, float]:
    """The folder of a run that nobody disturbed, and its seconds on this machine, which may be busy."""
    started = time.monotonic()
    assert server(lab / "whole") == 0, (lab / "whole.log").read_text(encoding="utf-8")
    return lab / "whole", time.monotonic() - started


@pytest.fixture(scope="module")
def whole(timed: tuple[Path, float]) -> Path:
    return timed[0]


def same_results(out: Path, whole: Path) -> None:
    """The adapter's file to the byte, and all that was measured; nothing half-written lies about."""
    assert (out / "adapter.safetensors").read_bytes() == (whole / "adapter.safetensors").read_bytes()
    found, expected = (json.loads((folder / "summary.json").read_text(encoding="utf-8")) for folder in (out, whole))
    for name in ("losses", "validation"):
        assert found["history"][name] == expected["history"][name]
    for name in ("held_out_error_before", "held_out_error_after", "start_difference", "reload_difference", "steps"):
        assert found["run"][name] == expected["run"][name]
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.slow
def test_runs_killed_at_any_moment_end_with_the_same_bits(
    server: Server, timed: tuple[Path, float], tmp_path: Path
) -> None:
    whole, length = timed
    chance = random.Random(int(time.time()))
    kills = runs = went_on = 0
    while (kills < KILLS or went_on < KILLS // 4) and kills < 4 * KILLS:
        out, runs = tmp_path / f"run{runs}", runs + 1
        for left in range(4, -1, -1):
            status = server(out, seconds=chance.uniform(0.2, 1.0) * length if left else None)
            if status == 0:
                break
            assert status == -9, Path(f"{out}.log").read_text(encoding="utf-8")
            kills += 1
        same_results(out, whole)
        went_on += Path(f"{out}.log").read_text(encoding="utf-8").count("Going on after step")
    assert went_on >= KILLS // 4, "most kills must hit a run that has a checkpoint"


@pytest.mark.slow
def test_cold_starts_that_are_killed_go_on_too(server: Server, whole: Path, lab: Path, tmp_path: Path) -> None:
    """The command as a user types it, killed once it has a checkpoint."""
    command = [sys.executable, str(ROOT / "examples" / "ddpm.py"), "finetune", "--config", str(lab / "run.yaml")]
    out, log = tmp_path / "run", tmp_path / "run.log"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen([*command, "--out", str(out)], stdout=file, stderr=file, env=ENVIRONMENT)
        end = time.monotonic() + 60
        while not [*out.glob("checkpoints/step-????????")]:
            assert time.monotonic() < end, "no checkpoint in a minute"
            time.sleep(0.01)
        time.sleep(random.Random(int(time.time())).uniform(0, 0.1))
        process.kill()
        assert process.wait(30) == -9
    assert server(out) == 0, log.read_text(encoding="utf-8")
    assert "Going on after step" in log.read_text(encoding="utf-8")
    same_results(out, whole)


@pytest.mark.slow
def test_runs_stopped_inside_their_writes_end_with_the_same_bits(server: Server, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    counted = tmp_path / "counted"
    for number in (8, 19, 30):
        assert server(out, stop_at=number, counted=str(counted)) == 77, Path(f"{out}.log").read_text(encoding="utf-8")
    assert server(out) == 0
    same_results(out, whole)


# Several processes


def processes(count: int) -> list[dict[str, str]]:
    """What torchrun puts into the environments of so many processes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def words(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


@pytest.mark.slow
def test_two_processes_that_are_killed_go_on_and_end_with_the_same_bits(
    server: Server, lab: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    settings = ("training.accumulation=1", "training.steps=4", "validation.every=2", "method={recipe: lora_ddpm}")
    more = words(*settings)
    log = Path(f"{out}.log")
    assert server(whole, *more, environments=processes(2)) == 0, Path(f"{whole}.log").read_text(encoding="utf-8")
    until = str(out / "checkpoints" / "step-00000002")
    assert server(out, *more, environments=processes(2), until=until) == -9, log.read_text(encoding="utf-8")
    alone = command(lab, out, *settings)
    assert alone.exit_code == 1
    assert alone.stderr == (
        f"error: {out}: processes of the run in this folder: expected 2, found 1. "
        f"Start as many with `torchrun --nproc_per_node`, choose another `--out`, or remove the folder to start anew.\n"
    )
    assert server(out, *more, environments=processes(2)) == 0, log.read_text(encoding="utf-8")
    assert "Going on after step" in log.read_text(encoding="utf-8")
    same_results(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), ("distributed.shard=block",)], ids=["whole", "sharded"])
def test_a_disk_that_fails_the_first_process_stops_both_in_order(
    server: Server, lab: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "checkpoints").write_text("not a folder", encoding="utf-8")
    assert server(out, *words(*settings), environments=processes(2)) == 1
    said = Path(f"{out}.log").read_text(encoding="utf-8")
    folder = out / "checkpoints" / "step-00000001"
    assert said.count(f"error: {folder}: a checkpoint: expected to be written, found Not a directory. {FIX}") == 2
    assert "Traceback" not in said


SHARDED = (
    "training.batch_size=1",
    "training.accumulation=6",
    "training.steps=4",
    "validation={every: 2, buckets: 3}",
    "sampling={count: 3, steps: 2}",
)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["{recipe: tenvoo_l_ddpm, params: {r: 2}}", "{kind: full}"], ids=["adapter", "full"])
def test_a_sharded_run_goes_on_with_any_number_of_processes(
    server: Server, lab: Path, tmp_path: Path, method: str
) -> None:
    """Two processes are killed, then three; one ends the run as one that was never sharded ends."""
    one, out = tmp_path / "one", tmp_path / "run"
    settings = words(*SHARDED, f"method={method}")
    assert server(one, *settings) == 0, Path(f"{one}.log").read_text(encoding="utf-8")
    settings += words("distributed.shard=block")
    log = Path(f"{out}.log")
    for count, until in ((2, 1), (3, 2)):
        step = out / "checkpoints" / f"step-{until:08d}"
        status = server(out, *settings, environments=processes(count), until=str(step))
        assert status == -9, log.read_text(encoding="utf-8")
        assert {path.suffix for path in step.rglob("*") if path.is_file()} == {".safetensors", ".json"}
    assert server(out, *settings) == 0, log.read_text(encoding="utf-8")
    assert log.read_text(encoding="utf-8").count("Going on after step") == 2
    same_within(out, one, 1e-4)


@pytest.mark.slow
def test_a_sharded_run_ends_as_one_that_is_whole(server: Server, lab: Path, tmp_path: Path) -> None:
    """Errors before and after, the adapter, samples of the base and of the result, with activations recomputed.

    Three batches are measured and three volumes drawn by two processes, of which the second has one too few of each.
    """
    one, out = tmp_path / "one", tmp_path / "run"
    settings = words(*SHARDED)
    assert server(one, *settings) == 0, Path(f"{one}.log").read_text(encoding="utf-8")
    settings += words("distributed.shard=block", "model.checkpointing=true")
    assert server(out, *settings, environments=processes(2)) == 0, Path(f"{out}.log").read_text(encoding="utf-8")
    same_within(out, one, 1e-4)
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["machine"]["processes"] == 2
    assert summary["run"]["start_difference"] == 0.0
    assert summary["run"]["reload_difference"] == 0.0
    assert not (out / "checkpoints").exists()


def same_within(out: Path, one: Path, tolerance: float) -> None:
    """Two runs that add up in other orders."""
    found, expected = (json.loads((folder / "summary.json").read_text(encoding="utf-8")) for folder in (out, one))
    assert found["history"]["losses"] == pytest.approx(expected["history"]["losses"], abs=tolerance)
    assert len(set(expected["history"]["losses"])) == 4
    for here, there in zip(found["history"]["validation"], expected["history"]["validation"], strict=True):
        assert here[1] == pytest.approx(there[1], abs=tolerance)
    for name in ("held_out_error_before", "held_out_error_after"):
        assert found["run"][name] == pytest.approx(expected["run"][name], abs=tolerance)
    assert found["run"]["trainable_parameters"] == expected["run"]["trainable_parameters"]
    assert found["samples"]["sets"].keys() == expected["samples"]["sets"].keys()
    pictures = [plt.imread(folder / "montage.png") for folder in (out, one)]
    np.testing.assert_allclose(*pictures, atol=0.05)
    weights, others = (load_file(folder / expected["result"]) for folder in (one, out))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_process_that_fails_while_others_wait_ends_all(server: Server, lab: Path, tmp_path: Path) -> None:
    """A held-out volume that cannot be read is found by one process, while the other wants its parts."""
    out = tmp_path / "run"
    environments = processes(2)
    environments[1]["BROKEN"] = "1"
    settings = words(*SHARDED, "distributed.shard=block")
    assert server(out, *settings, environments=environments) == 1
    said = Path(f"{out}.log").read_text(encoding="utf-8")
    assert said.count("error: a volume: held out: expected one that can be read, found none. Mend it.") == 1
    gone = (
        "error: the processes: another process: expected at work, found gone. Its own message says why. "
        "The same command goes on from the last checkpoint."
    )
    assert said.count(gone) == 1
    assert "Traceback" not in said


def test_micro_batches_must_be_shared_out_evenly() -> None:
    with pytest.raises(LabError) as excinfo:
        micro_batches(Training(accumulation=4), 3)
    assert str(excinfo.value) == (
        "training.accumulation: micro-batches: expected as many for each process, found 4 for 3 processes. "
        "Start 1, 2, 4 with `torchrun --nproc_per_node`, or start anew with another accumulation."
    )
    assert micro_batches(Training(accumulation=4), 2) == 2


def saved(step: int) -> Callable[[Path], None]:
    return lambda folder: write_tensors(folder / "model.safetensors", {"w": torch.full((4,), float(step))})


def put(checkpoints: Checkpoints, step: int) -> None:
    tensors = {"optimizer": {"m": torch.full((4,), float(step))}}
    checkpoints.write(step, {"note": f"step {step}"}, tensors, saved(step))


def test_a_checkpoint_is_complete_or_does_not_count(server: Server, tmp_path: Path) -> None:
    """Stopped before every fsync and rename in turn, the newest is the one before or the new one, whole."""
    stopped, number = 0, 0
    while True:
        out = tmp_path / str(number)
        for step in (1, 2):
            put(Checkpoints(out, 2), step)
        job = {"checkpoints": str(out), "step": 3, "log": str(tmp_path / "log"), "stop_at": number}
        status = server.ask({**job, "counted": str(tmp_path / "counted")})
        notes: list[str] = []
        found = Checkpoints(out, 2).newest(notes.append)
        assert found is not None
        assert notes == []
        assert found.state["note"] == f"step {found.step}"
        assert load_file(found.folder / "model.safetensors")["w"].tolist() == [found.step] * 4
        assert found.tensors()["optimizer"]["m"].tolist() == [found.step] * 4
        put(Checkpoints(out, 2), 3)
        assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
        number += 1
        if status == 0:
            assert found.step == 3
            break
        assert status == 77
        stopped += found.step == 2
    assert number > stopped > 6


# Damage, other settings, and runs that are done


def command(lab: Path, out: Path, *settings: str) -> Result:
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = ["finetune", "--config", str(lab / "run.yaml"), "--out", str(out), *words(*settings)]
    return CliRunner(env={"COLUMNS": "200"}).invoke(ddpm.app, arguments, catch_exceptions=False)


@pytest.fixture(scope="module")
def cut(server: Server, whole: Path, lab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that ended hard with checkpoints of the steps 2 and 3."""
    out = tmp_path_factory.mktemp("cut") / "run"
    assert server(out, stop_at=4 * 12, counted=str(out.parent / "counted")) == 77
    kept = sorted(path.name for path in out.glob("checkpoints/step-????????"))
    assert kept == ["step-00000002", "step-00000003"]
    return out


@pytest.fixture
def copied(cut: Path, tmp_path: Path) -> Path:
    shutil.copytree(cut, tmp_path / "run")
    return tmp_path / "run"


def test_a_checkpoint_holds_everything_and_no_pickle(cut: Path) -> None:
    folder = cut / "checkpoints" / "step-00000003"
    names = ["adapter.safetensors", "average.safetensors", "optimizer.safetensors", "state.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    assert (state["step"], state["threads"], state["position"]) == (3, 1, {"epoch": 2, "sample": 0})
    assert state["config"]["training"]["steps"] == 7
    assert state["identity"] | {"base": "", "volumes": ""} == {
        "base": "",
        "volumes": "",
        "precision": "no",
        "processes": 1,
    }
    assert sorted(state["random"][0]) == ["numpy", "python", "torch"]
    loop = state["loop"]
    assert (len(loop["history"]["losses"]), len(loop["history"]["validation"]), loop["scaler"]) == (3, 1, None)
    assert loop["rates"]["last_epoch"] == 3
    optimizer, average, adapter = (load_file(folder / name) for name in ("optimizer.safetensors", *names[1::-1]))
    assert {name.partition("/")[0] for name in optimizer} == {"exp_avg", "exp_avg_sq", "step"}
    assert sorted(average) == sorted(name.partition("/")[2] for name in optimizer if name.startswith("step/"))
    assert any(name.startswith("trained.") for name in adapter)


@pytest.mark.parametrize("damage", ["cut short", "changed", "deleted", "no state", "changed state"])
def test_damaged_checkpoints_are_passed_over(copied: Path, damage: str) -> None:
    newest = copied / "checkpoints" / "step-00000003"
    path = newest / ("state.json" if damage.endswith("state") else "optimizer.safetensors")
    content = path.read_bytes()
    if damage == "cut short":
        path.write_bytes(content[:-1])
    elif damage == "changed":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "changed state":
        path.write_bytes(content.replace(b'"sample": 0', b'"sample": 1'))
        assert path.read_bytes() != content
    else:
        path.unlink()
    notes: list[str] = []
    found = Checkpoints(copied, 2).newest(notes.append)
    assert found is not None
    assert found.step == 2
    (note,) = notes
    assert note.startswith("Passed over checkpoints/step-00000003, which is damaged: ")


def test_a_run_goes_on_from_the_last_whole_checkpoint(copied: Path, lab: Path, whole: Path) -> None:
    (copied / "checkpoints" / "step-00000003" / "adapter.safetensors").write_bytes(b"")
    done = command(lab, copied)
    assert done.exit_code == 0, done.stderr
    assert "Passed over checkpoints/step-00000003, which is damaged: adapter.safetensors is not what" in done.stdout
    assert "Going on after step 2, from checkpoints/step-00000002" in done.stdout
    same_results(copied, whole)


def test_without_a_whole_checkpoint_a_run_starts_anew(copied: Path, lab: Path, whole: Path) -> None:
    for path in copied.glob("checkpoints/*/state.json"):
        path.write_text("{}", encoding="utf-8")
    done = command(lab, copied)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count("Passed over") == 2
    assert "Going on" not in done.stdout
    same_results(copied, whole)


def test_other_settings_are_refused_by_name(copied: Path, lab: Path) -> None:
    fix = "Choose another `--out`, put the setting back, or remove the folder to start anew."
    done = command(lab, copied, "training.learning_rate=2.0e-3", "method.params.r=3", "training.ema=null")
    assert done.exit_code == 1
    assert done.stderr.splitlines() == [
        f"error: {copied}: `{name}` of the run in this folder: expected {one}, as when it started, found {other}. {fix}"
        for name, one, other in (
            ("method.params.r", "2", "3"),
            ("training.ema", "0.9", "nothing"),
            ("training.learning_rate", "0.001", "0.002"),
        )
    ]
    done = command(lab, copied, "training.threads=2")
    assert done.stderr == (
        f"error: {copied}: `training.threads` of the run in this folder: expected 1, as when it started, found 2. "
        "Pass `--set training.threads=1`: other threads sum in another order.\n"
    )
    done = command(lab, copied, "training.precision=bf16")
    assert "`training.precision` of the run in this folder" in done.stderr


def test_other_files_or_another_base_are_refused(server: Server, lab: Path, tmp_path: Path) -> None:
    own, out = tmp_path / "lab", tmp_path / "run"
    shutil.copytree(lab / "scans", own / "scans")
    shutil.copy(lab / "base.safetensors", own)
    (own / "run.yaml").write_text(CONFIG.format(folder=own), encoding="utf-8")
    assert Server(server.process, own)(out, stop_at=40, counted=str(tmp_path / "counted")) == 77
    shutil.copy(own / "scans" / "0.nii.gz", own / "scans" / "another.nii.gz")
    content = (own / "base.safetensors").read_bytes()
    (own / "base.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    done = command(own, out)
    assert done.exit_code == 1
    fix = "Choose another `--out`, put this back, or remove the folder to start anew."
    assert done.stderr.splitlines() == [
        f"error: {out}: {what} of the run in this folder: expected {expected}, found {found}. {fix}"
        for what, expected, found in (
            ("files to train on and to hold out", "those it started with", "others"),
            ("content of `base.checkpoint`", "that it started from", "another"),
        )
    ]


def test_another_machine_is_refused_where_it_changes_the_result(
    copied: Path, lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("ddpm_lab.training.resume.gather_object", lambda steps: [*steps, 0])
        done = command(lab, copied)
    assert done.stderr == (
        f"error: {copied}: the last checkpoint: expected the same for every process, found those of the steps 3, 0. "
        "Make `--out` a folder that all machines share.\n"
    )
    with pytest.raises(LabError) as excinfo:
        check_identity(copied, {"precision": "bf16"}, {"precision": "no"})
    assert str(excinfo.value) == (
        f"{copied}: precision of the run in this folder: expected fp32, found bf16. "
        "Choose another `--out`, put this back, or remove the folder to start anew."
    )


def test_settings_that_change_no_result_may_differ(copied: Path, lab: Path, whole: Path) -> None:
    free = (
        "training.workers=1",
        "training.checkpoint_every=5",
        "training.keep_checkpoints=1",
        "data.skip_damaged=true",
    )
    done = command(lab, copied, *free, "training.tensorboard=true", "training.threads=null", "data.cache=none")
    assert done.exit_code == 0, done.stderr
    assert "Going on after step 3" in done.stdout
    shutil.rmtree(copied / "tensorboard")
    same_results(copied, whole)


def test_the_threads_are_set_back(copied: Path, lab: Path, whole: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        done = command(lab, copied, "training.threads=null")
    finally:
        torch.set_num_threads(before)
    assert done.exit_code == 0, done.stderr
    assert "Threads set to 1, as when the run started" in done.stdout
    same_results(copied, whole)


def test_a_run_that_is_done_does_not_train_again(whole: Path, lab: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    done = command(lab, out)
    assert done.exit_code == 0
    assert done.stdout == f"Nothing to do: the run in {out} is done, with these settings\n"
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    done = command(lab, out, "sampling.count=2")
    assert done.exit_code == 1
    assert "`sampling.count` of the run in this folder: expected 0, as when it started, found 2." in done.stderr
    (out / "summary.json").write_text('{"result": "adapter.safetensors"}', encoding="utf-8")
    assert "Nothing to do" not in command(lab, out, "training.steps=1").stdout, "not a summary of ours"
    (out / "adapter.safetensors").unlink()
    assert "Nothing to do" not in command(lab, out, "training.steps=1").stdout


# The disk


def full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def intact(out: Path) -> None:
    """The last checkpoint is whole, and nothing says that the run is done."""
    assert sorted(path.name for path in out.glob("checkpoints/step-????????")) == ["step-00000002", "step-00000003"]
    notes: list[str] = []
    found = Checkpoints(out, 2).newest(notes.append)
    assert found is not None
    assert (found.step, notes) == (3, [])
    assert not (out / "summary.json").exists()


FIX = "Make room or mend the folder; the same command then goes on from the last checkpoint."


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_last_checkpoint(
    copied: Path, lab: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        inner = getattr(os, call)

        def failing(*arguments: Any) -> Any:
            callers = {frame.f_code.co_filename for frame, _ in traceback.walk_stack(None)}
            return full() if checkpoint.__file__ in callers else inner(*arguments)

        patch.setattr(os, call, failing)
        done = command(lab, copied)
    assert done.exit_code == 1
    folder = copied / "checkpoints" / "step-00000004"
    assert (
        done.stderr == f"error: {folder}: a checkpoint: expected to be written, found No space left on device. {FIX}\n"
    )
    intact(copied)


def test_files_that_may_not_grow_stop_a_run_in_order(copied: Path, lab: Path) -> None:
    """The kernel itself refuses: no file may be larger than 4 kB, of which every adapter is more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        done = command(lab, copied)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.exit_code == 1
    folder = copied / "checkpoints" / "step-00000004"
    assert done.stderr == f"error: {folder}: a checkpoint: expected to be written, found File too large. {FIX}\n"
    intact(copied)


def test_a_folder_that_cannot_be_written_to_stops_a_run_in_order(copied: Path, lab: Path) -> None:
    """A file where the next checkpoint's folder would be: root may write anywhere else."""
    blocked = copied / "checkpoints"
    kept = blocked.with_name("kept")
    blocked.rename(kept)
    blocked.write_text("not a folder", encoding="utf-8")
    done = command(lab, copied)
    assert done.exit_code == 1
    assert (
        done.stderr
        == f"error: {blocked}/step-00000001: a checkpoint: expected to be written, found Not a directory. {FIX}\n"
    )
    blocked.unlink()
    kept.rename(blocked)
    intact(copied)


def test_tensorboard_that_cannot_write_stops_a_run_in_order(
    copied: Path, lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied / "tensorboard"
    folder.write_text("not a folder", encoding="utf-8")
    expected = f"error: {folder}: TensorBoard's events: expected to be written, found {{}}. {FIX}\n"
    assert command(lab, copied, "training.tensorboard=true").stderr == expected.format("File exists")
    folder.unlink()
    with monkeypatch.context() as patch:
        patch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
        done = command(lab, copied, "training.tensorboard=true")
    assert done.stderr == expected.format("No space left on device")
    assert not (copied / "summary.json").exists()


def test_a_full_disk_at_the_end_of_a_run_is_said_too(copied: Path, lab: Path, whole: Path, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("ddpm_lab.training.driver.write_json", full)
        done = command(lab, copied)
    assert done.exit_code == 1
    assert (
        done.stderr == f"error: {copied}: the results: expected to be written, found No space left on device. {FIX}\n"
    )
    assert (copied / "checkpoints" / "step-00000007").is_dir()
    assert command(lab, copied).exit_code == 0
    same_results(copied, whole)


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    assert checkpoints.newest() is None
    for step in (5, 10, 15, 20):
        put(checkpoints, step)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == [f"step-000000{n}" for n in (10, 15, 20)]
    checkpoints.clear()
    assert not checkpoints.folder.exists()
    (tmp_path / "checkpoints").write_text("", encoding="utf-8")
    with pytest.raises(LabError):
        put(checkpoints, 1)
