"""Models whose tensors are split over processes are refused before anything changes or is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

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
    "Train the whole model in each process, in DistributedDataParallel, or split it after "
    "`tnpeft.detach(model, merge=True)`."
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


@pytest.mark.parametrize("way", ["all", "layers", "model", "columns"])
def test_a_split_model_is_not_attached_to(mesh: DeviceMesh, way: str):
    net = model()
    split(net, way, mesh)
    before = {name: id(tensor) for name, tensor in net.named_parameters()}
    with pytest.raises(AttachError) as excinfo:
        tnpeft.attach(net, "lora", match="0", r=2)
    assert str(excinfo.value) == (
        "layer '0': layer: expected `weight` and `bias` as plain parameters, found a Linear of DTensors, of which each "
        "process holds a part (FSDP2, tensor parallelism). Attach to the whole model, and train it in "
        "DistributedDataParallel."
    )
    assert {name: id(tensor) for name, tensor in net.named_parameters()} == before


@pytest.mark.parametrize("mode", ["auto", "dense", "factored", "hybrid"])
@pytest.mark.parametrize("way", ["all", "layers", "model"])
def test_a_model_that_was_split_after_attaching_does_not_run(mesh: DeviceMesh, way: str, mode: str):
    net = model()
    tnpeft.attach(net, "lora", match="0|2|4", r=2, mode=mode)
    net(X)
    split(net, way, mesh)
    with pytest.raises(ExecutionError) as excinfo:
        net(X)
    (problem,) = excinfo.value.problems
    assert (problem.expected, problem.found, problem.fix) == ("plain tensors", FOUND, WAY_OUT)


def test_the_layer_is_named_where_one_is_split(mesh: DeviceMesh):
    net = model()
    tnpeft.attach(net, "lora", match="0|2|4", r=2)
    net[2].adapter("default")._parameters["core_up"] = nn.Parameter(
        distribute_tensor(net[2].adapter("default").cores["up"], mesh)
    )
    with pytest.raises(ExecutionError) as excinfo:
        net(X)
    assert str(excinfo.value) == (
        f"layer '2': an adapted layer's input and weights: expected plain tensors, found {FOUND}. {WAY_OUT}"
    )


@pytest.mark.parametrize("way", ["all", "layers", "model"])
def test_a_split_model_is_neither_saved_nor_merged(mesh: DeviceMesh, way: str, tmp_path: Path):
    net, file = model(), tmp_path / "a.safetensors"
    tnpeft.attach(net, "lora", match="0|2|4", r=2)
    tnpeft.save(net, file)
    written = file.read_bytes()
    split(net, way, mesh)
    module = {"all": "'0'", "layers": "'0'", "model": "'0'"}[way]
    with pytest.raises(AdapterFileError) as excinfo:
        tnpeft.save(net, file)
    assert "found one of class DTensor. Save while the weights are whole: " in str(excinfo.value)
    assert file.read_bytes() == written
    for act in (tnpeft.merge, lambda model: tnpeft.detach(model, merge=True)):
        with pytest.raises(AttachError) as excinfo:
            act(net)
        assert str(excinfo.value) == (
            f"module {module}: the weights of the model: expected plain tensors, found {FOUND}. Gather the model's "
            "weights in one process, and merge there."
        )
        assert tnpeft.scales_of(net) == {"default": 1.0}
        assert any(isinstance(tensor, DTensor) for tensor in net.parameters())
