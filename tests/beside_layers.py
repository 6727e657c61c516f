"""A model with weights of every kind that is no layer's, and the plain model with the sums in their places."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tnpeft

TOKENS = torch.arange(10).reshape(2, 5) * 3 % 20
PARAMETERS = {r"\.square$": "i o", r"experts$": "e o i"}


class Block(nn.Module):
    """A square weight, a stack of experts that is read once for each of them, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Parameter(torch.randn(8, 8) / 3)
        self.experts = nn.Parameter(torch.randn(3, 6, 8) / 3)
        self.shift = nn.Parameter(torch.zeros(8))
        self.line = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.square
        for expert in range(3):
            y = y + torch.tanh(x @ self.experts[expert].T) @ self.experts[expert]
        return self.line(y) + self.shift


class Model(nn.Module):
    def __init__(self, checkpointing: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.checkpointing = checkpointing

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return x


def model() -> Model:
    torch.manual_seed(0)
    return Model()


def attached(spec: Any = "lora", mode: str = "dense", **settings: Any) -> tuple[Model, Model, tnpeft.Handle]:
    """The model with a trained adapter on its parameters, the embedding and a layer; its base; the handle."""
    adapted, base = model(), model()
    handle = tnpeft.attach(
        adapted, spec, match=["embed", "blocks.0.line"], parameters=PARAMETERS, mode=mode, **settings
    )
    train(handle)
    return adapted, base, handle


def train(handle: tnpeft.Handle) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def summed(base: nn.Module, handles: dict[tnpeft.Handle, float]) -> dict[str, Tensor]:
    """The base's state in float64, with each adapter's updates at its scale."""
    state = {
        name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in base.state_dict().items()
    }
    for handle, scale in handles.items():
        for name, adapter in handle.adapters.items():
            key = name if name in state else f"{name}.weight"
            state[key] = state[key] + scale * adapter.delta_weight().double()
    return state


def expected(base: nn.Module, handles: dict[tnpeft.Handle, float] | tnpeft.Handle, *inputs: Any, **more: Any) -> Any:
    """What the plain model computes in float64 with the summed weights."""
    handles = {handles: 1.0} if isinstance(handles, tnpeft.Handle) else handles
    wide = [value.double() if value.is_floating_point() else value for value in inputs]
    return torch.func.functional_call(copy.deepcopy(base).double(), summed(base, handles), tuple(wide), more)


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance / 10)
