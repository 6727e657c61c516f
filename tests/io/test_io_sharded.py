"""Models whose tensors are not what their network says, such as the pieces of FSDP: nothing is written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from saved import trained
from small import attach
from torch import Tensor, nn

import tnpeft
from tnpeft.errors import AdapterFileError
from tnpeft.io import load, save, save_foreign
from tnpeft.network import load_spec
from tnpeft.surgery import adapters_of, trained_of

SUMMON = "On every rank enter `with FullyShardedDataParallel.summon_full_params(model):`, and save there."
RESHAPED = "Give it back its shape, or attach the adapter anew."


def refused(model: nn.Module, path: Path, act=save) -> list[str]:
    with pytest.raises(AdapterFileError) as excinfo:
        act(model, path)
    assert not path.exists()
    return str(excinfo.value).replace(f"{path}: ", "FILE: ").splitlines()


def put(owner: nn.Module, key: str, tensor: Tensor) -> None:
    owner._parameters[key] = nn.Parameter(tensor, requires_grad=False)


def test_flat_pieces(tmp_path):
    """What FSDP1 leaves of a parameter on a rank: a piece of one axis, or nothing."""
    path = tmp_path / "x"
    model = trained()
    adapter = adapters_of(model, "adni")["up"]
    put(adapter, "core_left", torch.ones(64))
    put(adapter, "core_right", torch.ones(0))
    piece = ", a piece as FullyShardedDataParallel holds it"
    assert refused(model, path) == [
        f"FILE: layer 'up': tensor 'core_left': expected the shape (4, 3), found (64,){piece}. {SUMMON}",
        f"FILE: layer 'up': tensor 'core_right': expected the shape (3, 2, 2, 2, 2), found (0,){piece}. {SUMMON}",
    ]
    model = trained()
    norm = model.norm
    (copied,) = (key for key, tensor in norm._parameters.items() if tensor is trained_of(model, "adni")["norm.weight"])
    put(norm, copied, torch.ones(0))
    put(model.wide.base, "weight", torch.ones(3))
    assert refused(model, path) == [
        f"FILE: layer 'wide': base weight: expected the shape (4, 4, 3, 3, 3), found (3,){piece}. {SUMMON}",
        f"FILE: 'norm.weight': trained tensor: expected the shape (4,), found (0,){piece}. {SUMMON}",
    ]


def test_other_libraries_files_are_not_written_either(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3))
    attach(model, load_spec("lora"), targets=("0",), trained=())
    put(adapters_of(model, "default")["0"], "core_up", torch.ones(7))
    for format_ in ("peft", "lycoris"):
        assert refused(model, tmp_path / "x", lambda model, path, f=format_: save_foreign(model, path, f)) == [
            "FILE: layer '0': tensor 'core_up': expected the shape (3, 4), found (7,), a piece as "
            f"FullyShardedDataParallel holds it. {SUMMON}"
        ]


def test_other_kinds_of_tensors(tmp_path):
    class Odd(Tensor):
        pass

    def with_core(tensor: Tensor) -> nn.Module:
        model = trained()
        adapters_of(model, "adni")["up"]._parameters["core_left"] = tensor
        return model

    expected = "FILE: layer 'up': tensor 'core_left': expected floating-point numbers of shape (4, 3), found"
    for tensor, found, fix in (
        (torch.ones(4, 3, dtype=torch.int64), "int64(4, 3)", RESHAPED),
        (torch.ones(4, 3).as_subclass(Odd), "one of class Odd", RESHAPED),
        (
            torch.ones(4, 3, device="meta"),
            "none (it is on the meta device)",
            "Bring the model's values back first: load them, or remove the hooks that offload them.",
        ),
        (torch.ones(4, 3).to_sparse(), "one of layout sparse_coo", RESHAPED),
    ):
        assert refused(with_core(tensor), tmp_path / "x") == [f"{expected} {found}. {fix}"]
    model = trained()
    del adapters_of(model, "adni")["up"]._parameters["core_left"]
    assert refused(model, tmp_path / "x") == [f"{expected} no such tensor. {RESHAPED}"]


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_other_shape_is_ever_written(data, tmp_path):
    """Of any spec's tensors: whatever shape one is given, it is its own, or the file is not written."""
    spec = data.draw(st.sampled_from(["lora", "dora", "lokr", "vera", "tt_lora", "hira", "quanta", "pissa"]))
    model = nn.Sequential(nn.Linear(8, 8))
    tnpeft.attach(model, spec, match="0")
    adapter = adapters_of(model, "default")["0"]
    key = data.draw(st.sampled_from(sorted({**adapter._parameters, **adapter._buffers})))
    table = adapter._parameters if key in adapter._parameters else adapter._buffers
    shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=4)))
    like, path = table[key], tmp_path / "x"
    path.unlink(missing_ok=True)
    table[key] = nn.Parameter(torch.zeros(shape)) if table is adapter._parameters else torch.zeros(shape)
    if shape == tuple(like.shape):
        save(model, path)

    else:
        assert f"tensor '{key}': expected the shape {tuple(like.shape)}, found {shape}" in refused(model, path)[0]


SHARDED = """
import sys, torch, torch.distributed as dist
from pathlib import Path
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
sys.path.insert(0, sys.argv[1])
from torch import nn
import tnpeft
rank, folder = int(sys.argv[2]), Path(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
for number, policy in enumerate((None, ModuleWrapPolicy([nn.Sequential]))):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4)))
    tnpeft.attach(model, "lora", match=r"^0$|1\\.1$", r=2, train={"norm": True})
    model = FSDP(model, use_orig_params=True, device_id=torch.device("cpu"), auto_wrap_policy=policy)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
    path = folder / f"{number}-{rank}.safetensors"
    tnpeft.save(model, path)
    assert path.exists() == (rank == 0)
    with FSDP.summon_full_params(model):
        tnpeft.save(model, folder / f"{number}-{rank}-summoned.safetensors")
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_ranks_of_fsdp_write_one_file(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(tnpeft.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", SHARDED, str(Path(__file__).parents[1])]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    for number in range(2):
        files = [tmp_path / f"{number}-{rank}.safetensors" for rank in ("0", "0-summoned", "1-summoned")]
        assert len({file.read_bytes() for file in files}) == 1
        torch.manual_seed(0)
        fresh = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4)))
        handle = load(fresh, files[0])
        assert any(parameter.abs().max() > 0 for name, parameter in handle.named_parameters() if name.endswith("up"))
