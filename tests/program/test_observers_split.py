"""Models whose tensors are split over processes: what runs, and what is refused before anything changes."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import tnpeft
from tnpeft.errors import AdapterFileError, AttachError, ExecutionError

FOUND = "DTensors, of which each process holds a part (FSDP2, tensor parallelism)"
WAY_OUT = (
    "Call the model, or the part that `fully_shard` was given: the tensors are whole inside. In place of tensor "
    "parallelism use `fully_shard`, or split the model after `tnpeft.detach(model, merge=True)`."
)
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    """One process, which holds the whole of everything."""
    store = tmp_path_factory.mktemp("group") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def split(net: nn.Module, way: str, mesh: DeviceMesh) -> None:
    if way == "all":
        distribute_module(net, mesh)
    elif way == "layers":
        for layer in (net[0], net[2], net[4]):
            fully_shard(layer, mesh=mesh)
    elif way == "model":
        fully_shard(net, mesh=mesh)
    else:
        parallelize_module(net, mesh, {"0": ColwiseParallel()})


@pytest.mark.parametrize("way", ["all", "columns"])
def test_a_split_model_is_not_attached_to(mesh: DeviceMesh, way: str):
    net = model()
    split(net, way, mesh)
    before = {name: id(tensor) for name, tensor in net.named_parameters()}
    with pytest.raises(AttachError) as excinfo:
        tnpeft.attach(net, "lora", match="0", r=2)
    assert str(excinfo.value) == (
        "layer '0': `weight`: expected a tensor that is whole while its module runs, found a DTensor, of which each "
        "process holds a part (tensor parallelism). Use `fully_shard` in place of it, or split the model after "
        "`tnpeft.detach(model, merge=True)`."
    )
    assert {name: id(tensor) for name, tensor in net.named_parameters()} == before


@pytest.mark.parametrize("mode", ["auto", "dense", "factored", "hybrid"])
def test_a_layer_of_dtensors_does_not_run(mesh: DeviceMesh, mode: str):
    """As tensor parallelism leaves them, and FSDP2 outside of its units."""
    net = model()
    tnpeft.attach(net, "lora", match="0|2|4", r=2, mode=mode)
    net(X)
    distribute_module(net, mesh)
    with pytest.raises(ExecutionError) as excinfo:
        net(X)
    assert str(excinfo.value) == (
        f"layer '0': an adapted layer's input and weights: expected plain tensors, found {FOUND}. {WAY_OUT}"
    )
    whole = model()
    tnpeft.attach(whole, "lora", match="0|2|4", r=2, mode=mode)
    fully_shard(whole, mesh=mesh)
    with pytest.raises(ExecutionError, match=re.escape(WAY_OUT)):
        whole[0](X)


@pytest.mark.parametrize("mode", ["auto", "dense", "factored", "hybrid"])
@pytest.mark.parametrize("way", ["layers", "model"])
def test_a_model_that_was_sharded_after_attaching_runs(mesh: DeviceMesh, way: str, mode: str):
    net = model()
    tnpeft.attach(net, "lora", match="0|2|4", r=2, mode=mode)
    before = net(X)
    split(net, way, mesh)
    torch.testing.assert_close(net(X), before)


@pytest.mark.parametrize("way", ["layers", "model"])
def test_a_sharded_model_is_attached_to(mesh: DeviceMesh, way: str):
    net, whole = model(), model()
    split(net, way, mesh)
    for each in (net, whole):
        before = each(X)
        tnpeft.attach(each, "lora", match="0|2|4", r=2)
        torch.testing.assert_close(each(X), before, rtol=0, atol=0)
        each(X).square().sum().backward()
    found, wanted = (each[2].adapter("default").cores["up"].grad for each in (net, whole))
    torch.testing.assert_close(found.full_tensor(), wanted)


def test_a_core_that_is_a_dtensor_is_gathered(mesh: DeviceMesh):
    net, whole = model(), model()
    for each in (net, whole):
        tnpeft.attach(each, "lora", match="0|2|4", r=2)
    adapter = net[2].adapter("default")
    parts = nn.Parameter(distribute_tensor(adapter.cores["up"], mesh))
    adapter._parameters["core_up"] = parts
    for each in (net, whole):
        each(X).square().sum().backward()
    torch.testing.assert_close(parts.grad.full_tensor(), whole[2].adapter("default").cores["up"].grad)


def test_deepspeed_is_named(monkeypatch: pytest.MonkeyPatch):
    """ZeRO-3 leaves each parameter empty, with attributes of its own."""
    net = model()
    tnpeft.attach(net, "lora", match="0", r=2)
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    net(X)
    core = net[0].adapter("default").cores["up"]
    core.ds_id, core.data = 3, torch.empty(0)
    with pytest.raises(ExecutionError) as excinfo:
        net(X)
    assert str(excinfo.value) == (
        "the weights of the model: expected plain tensors, found pieces of one process (DeepSpeed, ZeRO stage 3). "
        "Shard the model with `torch.distributed.fsdp.fully_shard`, or use ZeRO stage 2, which splits no parameters."
    )


@pytest.mark.parametrize("way", ["all", "layers", "model"])
def test_a_split_model_is_saved_whole_and_not_merged(mesh: DeviceMesh, way: str, tmp_path: Path):
    net, file = model(), tmp_path / "a.safetensors"
    tnpeft.attach(net, "lora", match="0|2|4", r=2)
    tnpeft.save(net, file)
    written = file.read_bytes()
    file.unlink()
    split(net, way, mesh)
    tnpeft.save(net, file)
    assert file.read_bytes() == written
    with pytest.raises(AdapterFileError, match="Choose a folder that exists"):
        tnpeft.save(net, tmp_path / "missing" / "a.safetensors")
    tnpeft.save_foreign(net, tmp_path / "kohya.safetensors", "kohya")
    for act in (tnpeft.merge, lambda model: tnpeft.detach(model, merge=True)):
        with pytest.raises(AttachError) as excinfo:
            act(net)
        assert str(excinfo.value) == (
            f"module '0': the weights of the model: expected plain tensors, found {FOUND}. Write the adapter with "
            "`tnpeft.save`, load it onto the base in one process, and merge there."
        )
        assert tnpeft.scales_of(net) == {"default": 1.0}
        assert any(isinstance(tensor, DTensor) for tensor in net.parameters())
