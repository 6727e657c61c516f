"""Models of layers that are alike, adapted, and what a training step leaves."""

from __future__ import annotations

import torch
from modes import relative
from small import chain, move
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tnpeft
from tnpeft.adapters import Adapter
from tnpeft.network import Spec
from tnpeft.surgery import adapters_of
from tnpeft.surgery.passes import remove_pass

SHARED = Spec.from_yaml(
    """
tnpeft: 1
name: shared
layers: any
params: {r: 3}
sizes: {o: out_channels, i: in_channels}
bond: r
cores:
  left:   {legs: o a, init: zeros}
  middle: {legs: a b, shared: model, init: normal(1)}
  right:  {legs: b i k..., frozen: true, init: normal(1)}
weight: o i k...
start: zero
"""
)


class Tower(nn.Module):
    """Four convolutions of one signature, the last ones on fewer voxels, and three linear layers, two of them alike.

    `skips` names layers that a pass leaves out, `twice` one that it calls again; `checkpointed` are recomputed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.linears = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)])
        self.skips: set[int] = set()
        self.twice: int | None = None
        self.checkpointed: dict[int, bool] = {}
        self.fails: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        for number, conv in enumerate(self.convs):
            if number == 2:
                x = x[..., ::2, ::2]
            if number in self.skips:
                continue
            if number in self.checkpointed:
                x = checkpoint(conv, x, use_reentrant=self.checkpointed[number]).tanh()
            else:
                x = conv(x).tanh()
            if number == self.twice:
                x = conv(x).tanh()
            if number == 1 and self.fails is not None:
                raise self.fails
        x = x.mean((-1, -2))
        for linear in self.linears:
            x = linear(x)
        return x


def tower(mode: str, spec: Spec | str | None = None, alone: bool = False, moved: bool = True) -> Tower:
    """Adapted, and far from the start; `alone`: without the hooks that open a pass."""
    torch.manual_seed(0)
    model = Tower()
    tnpeft.attach(model, chain() if spec is None else spec, match=r"convs|linears", mode=mode)
    if moved:
        for number, adapter in enumerate(adapters(model)):
            move(adapter, 0.2, number)
    if alone:
        remove_pass(model)
    return model


def adapters(model: nn.Module) -> list[Adapter]:
    return list(adapters_of(model, "default").values())


X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1))


def results(model: Tower, x: Tensor = X) -> dict[str, Tensor]:
    """The output, and every gradient that there is."""
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    output = model(x)
    output.square().sum().backward()
    assert x.grad is not None
    found = {"output": output.detach(), "input": x.grad}
    return found | {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        assert relative(found[name], one) < 3e-5, name  # seven layers after another, far from the start
