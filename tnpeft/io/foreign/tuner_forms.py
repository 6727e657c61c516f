"""The form of a tensor of one of PEFT's tuners in its file, and of the same core here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tnpeft.network import Layer

__all__ = [
    "BASES_A",
    "BASES_B",
    "COLUMN",
    "FIRST_INPUTS",
    "FIRST_OUTPUTS",
    "LESS_ONE_COLUMN",
    "LESS_ONE_ROW",
    "PLACES",
    "SAME",
    "TURNED",
    "Form",
]

_INDEX = torch.int32


@dataclass(frozen=True)
class Form:
    """How to convert a file's tensor to a core of one layer, and back; the core's own shape is that of its spec."""

    read: Callable[[Tensor, Layer], Tensor]
    write: Callable[[Tensor, Layer], Tensor]


SAME = Form(lambda tensor, _: tensor, lambda core, _: core)
TURNED = Form(lambda tensor, _: tensor.mT, lambda core, _: core.mT)
COLUMN = Form(lambda tensor, _: tensor.flatten(), lambda core, _: core[:, None])  # (r) is (r, 1) there


def _units(layer: Layer) -> tuple[int, ...]:
    return (1,) * len(layer.kernel_size)


# A factor of the weight, of which a zero here is a one there: (o, 1), of convolutions (1, o, 1...), and (1, i, 1...).
LESS_ONE_COLUMN = Form(
    lambda tensor, _: tensor.flatten() - 1,
    lambda core, layer: (core + 1).reshape(1, -1, *_units(layer)) if layer.kernel_size else (core + 1)[:, None],
)
LESS_ONE_ROW = Form(
    lambda tensor, _: tensor.flatten() - 1, lambda core, layer: (core + 1).reshape(1, -1, *_units(layer))
)

# What a model has once, as large as its largest layer needs it; a layer uses the first entries.
FIRST_INPUTS = Form(lambda tensor, layer: tensor[:, : layer.in_channels], lambda core, _: core)  # (r, i)
FIRST_OUTPUTS = Form(lambda tensor, layer: tensor[: layer.out_channels], lambda core, _: core)  # (o, r)


def _bases(layer: Layer, rank: int) -> int:
    """How many bases RandLoRA has for a layer."""
    return -(-min(layer.in_channels, layer.out_channels) // rank)


def _first_bases(tensor: Tensor, layer: Layer) -> Tensor:
    """(o, n, r) of the first bases, whose numbers PEFT counts as those of (o, r, n)."""
    first = tensor[: layer.out_channels, : _bases(layer, tensor.shape[-1])]
    return first.reshape(first.shape[0], first.shape[2], first.shape[1]).transpose(1, 2)


BASES_A = Form(lambda tensor, layer: tensor[:, 0, : layer.in_channels], lambda core, _: core[:, None])  # (r, 1, i)
BASES_B = Form(_first_bases, lambda core, _: core.transpose(1, 2).reshape(core.shape))

# Rows and columns are one place in the weight, counted row by row.
PLACES = Form(
    lambda tensor, layer: tensor[0].long() * layer.in_channels + tensor[1].long(),
    lambda core, layer: torch.stack([core // layer.in_channels, core % layer.in_channels]).to(_INDEX),
)
