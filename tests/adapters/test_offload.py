"""Models whose weights accelerate brings and takes away, adapted before it does so and after."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module, remove_hook_from_submodules
from small import quick_if
from torch import Tensor, nn

import tnpeft

X = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
Offload = Callable[[nn.Module, Path], None]
TRAIN = {"bias": "adapted", "norm": True}


def net(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(3, 8, 3, padding=1, bias=bias), nn.GroupNorm(2, 8), nn.GELU(), nn.Linear(6, 6, bias=bias),
        nn.BatchNorm1d(8), nn.ConvTranspose1d(8, 4, 2, stride=2, bias=bias),
    )  # fmt: skip


def cpu(model: nn.Module, _folder: Path) -> None:
    accelerate.cpu_offload(model, execution_device="cpu")


def cpu_and_buffers(model: nn.Module, _folder: Path) -> None:
    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)


def disk(model: nn.Module, folder: Path) -> None:
    accelerate.disk_offload(model, folder, execution_device="cpu")


def dispatched(model: nn.Module, folder: Path) -> None:
    places = {"0": "disk", "1": "disk", "2": "cpu", "3": "cpu", "4": "disk", "5": "disk"}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


def on_its_device(model: nn.Module, _folder: Path) -> None:
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def as_a_whole(model: nn.Module, _folder: Path) -> None:
    add_hook_to_module(model, CpuOffload("cpu"), append=True)


OFFLOADS: list[Offload] = [cpu, cpu_and_buffers, disk, dispatched, on_its_device, as_a_whole]


def attach(
    model: nn.Module, spec: str = "lora", mode: str = "auto", train: dict[str, Any] | None = None
) -> tnpeft.Handle:
    match = "^(0|3|5)$" if spec in ("lora", "dora", "hira", "lora_xs") else ["3"]
    params = {} if spec == "hira" else {"r": 2}
    return tnpeft.attach(model, spec, match=match, mode=mode, train=train, **params)


def losses(model: nn.Module, handle: tnpeft.Handle) -> list[float]:
    optimizer = torch.optim.Adam(handle.parameters(), 0.05)
    found = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (model(X) - 1).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


COMPUTED = [
    ("lora", "dense", None, True),
    ("lora", "factored", TRAIN, True),
    ("lora", "hybrid", None, False),
    ("lora", "auto", {"also": ["^1[.]"]}, False),
    ("dora", "auto", TRAIN, True),
    ("hira", "auto", None, False),
    ("lora_xs", "auto", None, True),
    ("quanta", "factored", TRAIN, True),
]


# Every adapter meets every way to offload; by turns it is there before, or comes after.
@pytest.mark.parametrize(
    ("spec", "mode", "train", "bias", "offload", "first"),
    [
        quick_if((number + place + turn) % 2 == 0, *adapter, offload, first)
        for number, adapter in enumerate(COMPUTED)
        for place, offload in enumerate(OFFLOADS)
        for turn, first in enumerate(("attach", "offload"))
    ],
)
def test_it_computes_and_trains_as_it_does_without(
    offload: Offload, first: str, spec: str, mode: str, train: dict[str, Any] | None, bias: bool, tmp_path: Path
):
    base = net(bias).eval()(X)
    reference = net(bias)
    expected = losses(reference, attach(reference, spec, mode, train))
    trained = reference.eval()(X)
    model = net(bias)
    if first == "attach":
        handle = attach(model, spec, mode, train)
        offload(model, tmp_path)
    else:
        offload(model, tmp_path)
        handle = attach(model, spec, mode, train)
    assert torch.equal(model.eval()(X), base)
    assert losses(model.train(), handle) == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(model.eval()(X), trained, rtol=0, atol=1e-5)
    with tnpeft.disabled(model), torch.no_grad():
        plain = reference
        with tnpeft.disabled(plain):
            torch.testing.assert_close(model(X), plain(X), rtol=0, atol=1e-6)


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("train", [None, TRAIN])
def test_an_offloaded_model_merges_unmerges_and_comes_back(
    offload: Offload, train: dict[str, Any] | None, tmp_path: Path
):
    reference, model = net(), net()
    losses(reference, attach(reference, train=train))
    offload(model, tmp_path)
    losses(model, attach(model, train=train))
    trained, base = reference.eval()(X), net().eval()(X)
    with tnpeft.disabled(reference):
        plain = reference(X)
    unmerged = model.eval()(X)

    def close(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    for _ in range(2):
        tnpeft.merge(model)
        close(model(X), trained)
        with tnpeft.disabled(model):
            close(model(X), plain)
        tnpeft.unmerge(model)
        assert torch.equal(model(X), unmerged)
    tnpeft.merge(model)
    remove_hook_from_submodules(model)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    close(model(X), trained)
    tnpeft.unmerge(model)
    assert torch.equal(model(X), unmerged)
    tnpeft.detach(model)
    assert {type(module) for module in model.modules()} == {type(module) for module in net().modules()}
    if train is None:
        close(model.train()(X), net().train()(X))
    assert base.shape == plain.shape


@pytest.mark.parametrize("offload", OFFLOADS)
def test_what_is_detached_keeps_its_hooks_and_the_update(offload: Offload, tmp_path: Path):
    model = net()
    offload(model, tmp_path)
    losses(model, attach(model, train=TRAIN))
    trained = model.eval()(X)
    tnpeft.detach(model, merge=True)
    torch.testing.assert_close(model(X), trained, rtol=0, atol=1e-5)
    remove_hook_from_submodules(model)
    torch.testing.assert_close(model(X), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_a_merged_model_is_offloaded(offload: Offload, tmp_path: Path):
    model = net()
    losses(model, attach(model, train=TRAIN))
    tnpeft.merge(model)
    merged = model.eval()(X)
    offload(model, tmp_path)
    torch.testing.assert_close(model(X), merged, rtol=0, atol=1e-6)
    tnpeft.unmerge(model)
    torch.testing.assert_close(model(X), merged, rtol=0, atol=1e-5)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_hooks_that_were_removed_leave_nothing_that_is_refused(offload: Offload, tmp_path: Path):
    model = net()
    offload(model, tmp_path)
    remove_hook_from_submodules(model)
    handle = attach(model)
    assert torch.equal(model.eval()(X), net().eval()(X))
    assert len(losses(model, handle)) == 3


@pytest.mark.parametrize("offload", [cpu, disk])
def test_files_and_several_adapters_on_an_offloaded_model(offload: Offload, tmp_path: Path):
    model = net()
    losses(model, attach(model, train=TRAIN))
    tnpeft.save(model, tmp_path / "a.safetensors")
    other = net()
    offload(other, tmp_path / "folder")
    tnpeft.load(other, tmp_path / "a.safetensors", name="a")
    torch.testing.assert_close(other.eval()(X), model.eval()(X), rtol=0, atol=1e-6)
    tnpeft.attach(other, "loha", match=["3"], r=2, name="b", train={"norm": True})
    tnpeft.activate(other, {"a": 0.5, "b": 1.0})
    assert torch.isfinite(other(X)).all()
    tnpeft.activate(other, "a")
    tnpeft.save(other, tmp_path / "b.safetensors", name="a")
    again = net()
    tnpeft.load(again, tmp_path / "b.safetensors")
    torch.testing.assert_close(again.eval()(X), model(X), rtol=0, atol=1e-6)
    tnpeft.detach(other, merge=True, name="a")
    tnpeft.activate(other, {})
    torch.testing.assert_close(other(X), model(X), rtol=0, atol=1e-5)


def test_the_optimiser_keeps_its_parameters_when_the_model_is_offloaded_afterwards(tmp_path: Path):
    model = net()
    handle = attach(model, train=TRAIN)
    before = dict(handle.named_parameters())
    cpu(model, tmp_path)
    assert dict(handle.named_parameters()).keys() == before.keys()
    assert all(parameter is before[name] for name, parameter in handle.named_parameters())
    model(X)
    assert all(parameter is before[name] and not parameter.is_meta for name, parameter in handle.named_parameters())
    copied = copy.deepcopy(model)
    assert torch.equal(copied.eval()(X), model.eval()(X))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x, self.norm, self.y = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return self.y(self.norm(self.x(input)).relu())


def blocks() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.Linear(6, 6), Block())


def preload_cpu(model: nn.Module, _folder: Path, classes: list[str]) -> None:
    accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=classes)


def preload_disk(model: nn.Module, folder: Path, classes: list[str]) -> None:
    accelerate.disk_offload(model, folder, execution_device="cpu", preload_module_classes=classes)


def preload_dispatched(model: nn.Module, folder: Path, classes: list[str]) -> None:
    places = {"0": "cpu", "1": "disk", "2": "disk"}
    accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=folder, force_hooks=True, preload_module_classes=classes
    )


def on_blocks(model: nn.Module, spec: str, train: dict[str, Any] | None, name: str = "default") -> tnpeft.Handle:
    return tnpeft.attach(model, spec, match=r"^(0[.][xy]|1|2[.]x)$", train=train, name=name, r=2)


PRELOADS = [preload_cpu, preload_disk, preload_dispatched]
CLASSES = [["Block"], ["Linear"], ["Sequential"]]
ADAPTERS = [("lora", None), ("dora", TRAIN), ("lora", {"also": ["norm", "2[.]y"]})]


# A Latin square of them is quick: every two meet.
@pytest.mark.parametrize("first", ["attach", "offload"])
@pytest.mark.parametrize(
    ("offload", "classes", "spec", "train"),
    [
        quick_if((number + place) % 3 == turn, offload, classes, *adapter)
        for number, offload in enumerate(PRELOADS)
        for place, classes in enumerate(CLASSES)
        for turn, adapter in enumerate(ADAPTERS)
    ],
)
def test_a_preloaded_ancestor_reaches_no_core_and_no_copy(
    offload: Callable[..., None], first: str, classes: list[str], spec: str, train: dict[str, Any] | None,
    tmp_path: Path,
):  # fmt: skip
    reference, model = blocks(), blocks()
    plain = reference(X)
    expected = losses(reference, on_blocks(reference, spec, train))
    if first == "attach":
        handle = on_blocks(model, spec, train)
        offload(model, tmp_path, classes)
    else:
        offload(model, tmp_path, classes)
        handle = on_blocks(model, spec, train)
    before = dict(handle.named_parameters())
    assert not any(parameter.is_meta for parameter in before.values())
    torch.testing.assert_close(model(X), plain, rtol=0, atol=1e-6)
    assert losses(model, handle) == pytest.approx(expected, abs=1e-6)
    assert all(parameter is before[name] for name, parameter in handle.named_parameters())

    def close(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    trained = reference(X)
    close(model(X), trained)
    for _ in range(2):
        tnpeft.merge(model)
        close(model(X), trained)
        with tnpeft.disabled(model):
            close(model(X), plain)
        tnpeft.unmerge(model)
        close(model(X), trained)
    on_blocks(model, "lora", {"norm": True}, name="other")  # the copies of the first stand by
    close(model(X), plain)
    tnpeft.activate(model, "default")
    close(model(X), trained)
    tnpeft.save(model, tmp_path / "a.safetensors", name="default")
    tnpeft.detach(model, name="other")
    again = blocks()
    tnpeft.load(again, tmp_path / "a.safetensors")
    close(again(X), trained)
    tnpeft.detach(model, merge=True)
    assert not any("_tnpeft_below" in module.__dict__ for module in model.modules())
    close(model(X), trained)
    remove_hook_from_submodules(model)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    close(model(X), trained)


def test_a_forward_of_ones_own_runs_within_a_hook(tmp_path: Path):
    class Twice(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
            return 2 * super().forward(input)

    model = nn.Sequential(Twice(3, 3))
    x = torch.randn(2, 3)
    expected = model(x)
    cpu(model, tmp_path)
    handle = tnpeft.attach(model, "lora", match="0", r=2)
    assert torch.equal(model(x), expected)
    for parameter in handle.parameters():
        nn.init.ones_(parameter.data)
    torch.testing.assert_close(model(x), expected + 2 * x.sum(1, keepdim=True))
