"""A model with every kind of layer that other libraries adapt, and how they adapt, save and load it."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tnpeft

# LyCORIS says on stderr what it makes; `logging` is its own.
logging.getLogger("LyCORIS").setLevel(logging.CRITICAL)

LAYERS = ("line", "conv1", "conv2", "point", "conv3")
FLAT = LAYERS[:-1]  # what PEFT's LoHa and LoKr take


class Net(nn.Module):
    """Linear, Conv1d, Conv2d (one of them 1 x 1) and Conv3d in a row, on an input of 2 x 10 x 12."""

    def __init__(self, groups: int = 1, dilation: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(12, 18)
        self.conv1 = nn.Conv1d(18, 20, 3, padding=dilation, groups=groups, dilation=dilation)
        self.conv2 = nn.Conv2d(20, 24, (3, 2), padding=1)
        self.point = nn.Conv2d(24, 24, 1)
        self.conv3 = nn.Conv3d(24, 12, (1, 3, 2), stride=(1, 2, 1), padding=1)
        self.norm = nn.GroupNorm(2, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.line(x).transpose(1, 2))
        x = self.point(self.conv2(x.unflatten(2, (5, 2)))).unsqueeze(2)
        return self.norm(self.conv3(x)).flatten(1)


X = torch.randn(2, 10, 12, generator=torch.Generator().manual_seed(1))


def move(model: nn.Module, size: float = 0.5) -> None:
    """What training does: other values in all that trains."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal to 3e-5 of the outputs, which are of size 1 to 10."""
    torch.testing.assert_close(found, expected, rtol=3e-5, atol=3e-5)


def loaded(path: Path, base: nn.Module | None = None, **options: Any) -> nn.Module:
    model = Net() if base is None else base
    tnpeft.load_foreign(model, path, **options)
    return model.eval()


def specs_of(model: nn.Module) -> set[str]:
    return {row.spec for row in tnpeft.Handle(model, "default").report().layers}


def with_peft(config: Any, base: nn.Module | None = None) -> nn.Module:
    """A model that PEFT adapted and that was trained."""
    import peft

    model = peft.get_peft_model(copy.deepcopy(Net() if base is None else base), config)
    move(model)
    return model.eval()


def peft_of(path: Path, base: nn.Module | None = None) -> nn.Module:
    import peft

    return peft.PeftModel.from_pretrained(Net() if base is None else base, str(path)).eval()


def with_lycoris(base: nn.Module | None = None, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The network of LyCORIS modules, trained, and the model that it adapts."""
    from lycoris import create_lycoris

    model = copy.deepcopy(Net() if base is None else base)
    network = create_lycoris(model, 1.0, warn_on_unmatched=False, **options)
    network.apply_to()
    for module in network.loras:  # a plain tensor in LyCORIS 4.1, which nothing trains
        if isinstance(getattr(module, "dora_scale", None), Tensor):
            module.dora_scale = nn.Parameter(module.dora_scale.detach() * 1.25)
    move(network)
    return network, model.eval()


def lycoris_of(path: Path, base: nn.Module | None = None) -> nn.Module:
    from lycoris import create_lycoris_from_weights

    model = Net() if base is None else base
    network, _ = create_lycoris_from_weights(1.0, str(path), model)
    network.apply_to()
    return model.eval()


def adapted(what: Any, match: str, trained: bool = True, base: nn.Module | None = None, **options: Any) -> nn.Module:
    """A model that tnpeft adapted and that was trained."""
    model = Net() if base is None else base
    tnpeft.attach(model, what, match=match, **options)
    if trained:
        move(model)
    return model.eval()


def save_or_refuse(model: nn.Module, path: Path, kind: str) -> str | None:
    """Write the file, or say why it cannot be written."""
    try:
        tnpeft.save_foreign(model, path, kind)
    except tnpeft.AdapterFileError as error:
        return str(error)
    return None
