"""Models with parts that only run another module: of `torch.compile`, of activation checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import tnpeft
from tnpeft.surgery import adapters_of, base_tensors, install, plain_modules, plain_name

# Of torch, where a graph begins in the middle of a model.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

DATA = Path(__file__).parents[1] / "data"
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
MATCH = r"^1\.1$|^2$"


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2)), nn.Linear(2, 2))


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def part(model: nn.Sequential) -> None:
    model[1] = compiled(model[1])


def layers(model: nn.Sequential) -> None:
    """An adapted layer compiled by itself: its wrapper holds the function of the layer that it was made of."""
    model[1][1], model[2] = compiled(model[1][1]), compiled(model[2])


def nested(model: nn.Sequential) -> None:
    layers(model)
    model[1] = checkpoint_wrapper(compiled(model[1]))


def in_place(model: nn.Sequential) -> None:
    model[1].compile(backend="eager")
    model[2].compile(backend="eager")


def whole_in_place(model: nn.Sequential) -> None:
    model.compile(backend="eager")


def checkpointed(model: nn.Sequential) -> None:
    model[1] = checkpoint_wrapper(model[1])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def attached(model: nn.Module) -> tnpeft.Handle:
    return tnpeft.attach(model, "lora", match=MATCH, r=2, train={"norm": True, "bias": "adapted"})


def moved(handle: tnpeft.Handle) -> None:
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1)


# `nested` holds what `part`, `layers` and `checkpointed` do one by one: it and `in_place` come before and after.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrap", "first"),
    [
        *((wrap, first) for wrap in (nested, in_place) for first in (True, False)),
        *((part, True), (layers, False), (whole_in_place, True), (checkpointed, False)),
    ],
)
def test_names_files_and_outputs_are_the_plain_model_s(wrap: Callable[[nn.Sequential], None], first: bool, tmp_path):
    plain, model = base(), base()
    expected, before = attached(plain), base()(X)
    if first:
        wrap(model)
        model(X)
    handle = attached(model)
    if not first:
        wrap(model)
    torch.testing.assert_close(model(X), before)
    names = [name for name, _ in handle.named_parameters()]
    assert names == [name for name, _ in expected.named_parameters()]
    assert list(base_tensors(model)) == list(base_tensors(plain))
    moved(handle)
    moved(expected)
    torch.testing.assert_close(model(X), plain(X))
    assert not torch.allclose(model(X), before)
    assert [row.name for row in handle.report().layers] == ["1.1", "2"]
    assert handle.report().trained == expected.report().trained
    for name, what in (("theirs", model), ("ours", plain)):
        tnpeft.save(what, tmp_path / name)
    tnpeft.merge(model)
    torch.testing.assert_close(model(X), plain(X))
    tnpeft.unmerge(model)
    with tnpeft.disabled(model):
        torch.testing.assert_close(model(X), before)
    tnpeft.detach(model)
    torch.testing.assert_close(model(X), before)
    tnpeft.load(model, tmp_path / "ours")
    torch.testing.assert_close(model(X), plain(X))
    tnpeft.detach(model, merge=True)
    torch.testing.assert_close(model(X), plain(X))
    again = base()
    tnpeft.load(again, tmp_path / "theirs")
    torch.testing.assert_close(again(X), plain(X))


def test_the_files_are_the_same_bytes(tmp_path):
    plain, model = base(), base()
    attached(plain)
    part(model)
    attached(model)
    tnpeft.save(plain, tmp_path / "plain")
    tnpeft.save(model, tmp_path / "compiled")
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "compiled").read_bytes()


def test_a_list_of_names_may_be_those_of_named_modules():
    model = base()
    part(model)
    for names in (["1._orig_mod.1"], ["1.1"], ["1._orig_mod.1", "1.1"]):
        tnpeft.attach(model, "lora", match=names, name="x")
        assert list(adapters_of(model, "x")) == ["1.1"]
        tnpeft.detach(model, name="x")


def test_a_module_that_is_called_so_keeps_its_name():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._orig_mod, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.other(self._orig_mod(x))

    model = nn.Sequential(Odd())
    assert list(plain_modules(model)) == ["", "0", "0._orig_mod", "0.other"]
    tnpeft.attach(model, "lora", match="_orig_mod", r=1)
    assert list(adapters_of(model, "default")) == ["0._orig_mod"]
    assert plain_name("a._orig_mod.b._checkpoint_wrapped_module") == "a.b"


def test_a_file_of_an_earlier_version_with_the_names_of_a_compiled_part(tmp_path):
    """Its cores are drawn under the name that they were drawn under; saved again it has plain names."""

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2)))

    expected = torch.tensor([[0.14725761115550995, 0.04432131350040436]])
    file = DATA / "adapter_compiled_part.safetensors"
    for wrapped in (False, True):
        loaded = model()
        if wrapped:
            part(loaded)
        handle = tnpeft.load(loaded, file)
        assert " ".join(name for name, _ in handle.named_parameters()) == "1.1.d 1.1.b 1.1.bias 1.0.weight 1.0.bias"
        torch.testing.assert_close(loaded(torch.ones(1, 4)), expected)
        tnpeft.save(loaded, tmp_path / "again")
        again = model()
        tnpeft.load(again, tmp_path / "again")
        torch.testing.assert_close(again(torch.ones(1, 4)), expected)


def test_cores_drawn_under_another_name_load_as_they_are(tmp_path):
    """`compile(name=...)` need not be the layer's: frozen cores are drawn under it, and not stored."""
    spec = tnpeft.Spec.from_yaml(
        "tnpeft: 1\nname: half\nlayers: [Linear]\nsizes: {o: out_channels, i: in_channels}\nparams: {r: 2}\nbond: r\n"
        "cores: {up: {legs: o a, init: zeros}, down: {legs: a i, frozen: true}}\nweight: o i\nstart: zero\n"
    )
    model = nn.Sequential(nn.Linear(3, 3))
    other = copy.deepcopy(model)
    install(model, "default", {"0": tnpeft.compile(spec, model[0], name="elsewhere")})
    moved(tnpeft.Handle(model, "default"))
    tnpeft.save(model, tmp_path / "x")
    tnpeft.load(other, tmp_path / "x")
    assert torch.equal(model(torch.ones(1, 3)), other(torch.ones(1, 3)))
