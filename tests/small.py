"""Small layers, models and specs for the tests of modules, surgery and files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume
from torch import Tensor, nn

import tnpeft
from tnpeft.adapters import Adapter
from tnpeft.errors import AttachError
from tnpeft.execution import compile
from tnpeft.network import Spec
from tnpeft.surgery import AdapterRecord, install, plain_modules

CHAIN = """
tnpeft: 1
name: chain
layers: any
params: {r: 3}
sizes: {o: out_channels, i: in_channels}
bond: r
cores:
  left:   o a
  middle: a b
  right:  b i k...
weight: o i k...
scale: 0.5
start: frozen_copy
"""


def chain(start: str = "frozen_copy", frozen: bool = False) -> Spec:
    """Three cores in a row for any layer; the middle one may be frozen."""
    text = CHAIN.replace("frozen_copy", start)
    if frozen:
        text = text.replace("middle: a b", "middle: {legs: a b, frozen: true}")
    if start == "zero":
        text = text.replace("left:   o a", "left: {legs: o a, init: zeros}")
    return Spec.from_yaml(text)


def move(adapter: Adapter, size: float = 0.1, seed: int = 0) -> None:
    """What training does: change every trainable core."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            step = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((size * step).to(parameter.device, parameter.dtype))


@st.composite
def layers(draw: st.DrawFn) -> nn.Module:
    """Any of the seven layers with any of their options, small."""
    axes = draw(st.integers(0, 3))
    bias = draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 99)))
    if axes == 0:
        return nn.Linear(draw(st.integers(1, 6)), draw(st.integers(1, 6)), bias=bias)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = [groups * draw(st.integers(1, 3)) for _ in range(2)]
    each = st.lists(st.integers(1, 3), min_size=axes, max_size=axes).map(tuple)
    kernel, stride, dilation = draw(each), draw(each), draw(st.lists(st.integers(1, 2), min_size=axes, max_size=axes))
    if draw(st.booleans()):
        padding = [draw(st.integers(0, size // 2)) for size in kernel]
        extra = [draw(st.integers(0, max(step, gap) - 1)) for step, gap in zip(stride, dilation, strict=True)]
        transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
        return transposed(*channels, kernel, stride, padding, extra, groups, bias, tuple(dilation))
    padding = "same" if draw(st.booleans()) else tuple(draw(st.integers(0, size // 2)) for size in kernel)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    stride = 1 if padding == "same" else stride
    return convolution(*channels, kernel, stride, padding, tuple(dilation), groups, bias, mode)


def sample_input(layer: nn.Module, side: int = 6, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A batch of two that `layer` accepts."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(layer, nn.Linear):
        shape: tuple[int, ...] = (2, 3, layer.in_features)
    else:
        shape = (2, layer.in_channels, *[side + axis for axis in range(len(layer.kernel_size))])
    return torch.randn(shape, generator=generator).to(dtype)


def runs(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's output, for Hypothesis: options that torch itself refuses are no case."""
    try:
        return layer(x)
    except (RuntimeError, NotImplementedError, ValueError):
        assume(False)
        raise


class Net(nn.Module):
    """One layer of each call convention, a group norm and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(2, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.batch_norm = nn.BatchNorm3d(4)
        self.wide = nn.Conv3d(4, 4, 3, padding="same", padding_mode="circular", bias=False)
        self.up = nn.ConvTranspose3d(4, 4, 2, stride=2, groups=2)
        self.head = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.batch_norm(self.norm(self.first(x)))
        x = self.up(self.wide(x).relu())
        return self.head(x.mean((2, 3, 4)))


TARGETS = ("first", "wide", "up", "head.0")
TRAINED = ("first.bias", "norm.weight", "norm.bias")


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def net_input(seed: int = 0) -> Tensor:
    return torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(seed))


def attach(
    model: nn.Module,
    spec: Spec | None = None,
    name: str = "default",
    targets: Iterable[str] = TARGETS,
    trained: Iterable[str] = TRAINED,
) -> AdapterRecord:
    """What `tnpeft.attach` comes to."""
    modules = plain_modules(model)
    spec = spec or chain()
    return install(model, name, {key: compile(spec, modules[key], name=key) for key in targets}, trained)


def train(model: nn.Module, x: Tensor, steps: int = 2, rate: float = 0.1) -> list[float]:
    """A few steps of plain gradient descent on whatever trains."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def copies(name: str, trained: Iterable[str] = TRAINED) -> list[str]:
    """The names under which adapter `name` trains some parameters of the plain model."""
    return [f"{owner}._tnpeft_of_{name}:{key}" for owner, _, key in (full.rpartition(".") for full in trained)]


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


def snapshot(model: nn.Module) -> tuple[object, ...]:
    return (
        {name: (type(module), list(module.__dict__)) for name, module in model.named_modules()},
        {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()},
    )


def refused(model: nn.Module, act: Callable[[], object]) -> str:
    """The text of the AttachError that `act` raises without changing the model."""
    before, values = snapshot(model), bits(model)
    with pytest.raises(AttachError) as excinfo:
        act()
    assert snapshot(model) == before
    assert same_bits(bits(model), values)
    return str(excinfo.value)


def quick_if(quick: bool, *values: Any) -> Any:
    """A case of `parametrize`: `make test` runs it where it is quick, `make test-wide` the others."""
    return pytest.param(*values, marks=[] if quick else [pytest.mark.slow])


def spec_cases(kinds: Iterable[str]) -> list[Any]:
    """Every shipped spec on each of these kinds of layer that it takes; what is slow is all but one for each spec."""
    cases = []
    for number, spec in enumerate(tnpeft.list_specs()):
        taken = [kind for kind in kinds if kind in tnpeft.load_spec(spec).layers]
        quick = taken[number % len(taken)]
        cases += [quick_if(kind == quick, spec, kind) for kind in taken]
    return cases


def spec_cases_in(modes: Iterable[str]) -> list[Any]:
    """Every shipped spec in each of these modes with kinds of layers that it takes: one of them, and what is slow.

    The quick kind of a spec is another one in the next mode, so that modes meet kinds.
    """
    cases = []
    for number, spec in enumerate(tnpeft.list_specs()):
        taken = tnpeft.load_spec(spec).layers
        for place, mode in enumerate(modes):
            quick = taken[(number + place) % len(taken)]
            others = tuple(kind for kind in taken if kind != quick)
            cases.append(pytest.param(spec, mode, (quick,), id=f"{spec}-{mode}-{quick}"))
            if others:
                cases.append(pytest.param(spec, mode, others, id=f"{spec}-{mode}-others", marks=pytest.mark.slow))
    return cases
