"""The smallest adapted layers: one of each kind, with the fewest channels that a spec takes.

They use only tnpeft's public names, so that commits of any age can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import nn

import tnpeft

__all__ = ["KINDS", "MODES", "Kind", "attached", "pairs"]

MODES = ("auto", "dense", "factored", "hybrid")
_CHANNELS = ((4, 6), (6, 4), (4, 4), (8, 8), (8, 16), (16, 16), (16, 64))


class Kind(NamedTuple):
    """How a layer of some channels is made, and the shape of its input after the batch."""

    make: Callable[[int, int], nn.Module]
    shape: Callable[[int], tuple[int, ...]]


KINDS: Mapping[str, Kind] = {
    "Linear": Kind(nn.Linear, lambda i: (i,)),
    "Conv1d": Kind(lambda i, o: nn.Conv1d(i, o, 3, padding=1), lambda i: (i, 5)),
    "Conv2d": Kind(lambda i, o: nn.Conv2d(i, o, 3, padding=1, stride=2), lambda i: (i, 5, 4)),
    "Conv3d": Kind(lambda i, o: nn.Conv3d(i, o, 3, padding=1), lambda i: (i, 3, 4, 3)),
    "ConvTranspose1d": Kind(lambda i, o: nn.ConvTranspose1d(i, o, 3, stride=2), lambda i: (i, 5)),
    "ConvTranspose2d": Kind(lambda i, o: nn.ConvTranspose2d(i, o, 3, padding=1), lambda i: (i, 3, 4)),
    "ConvTranspose3d": Kind(lambda i, o: nn.ConvTranspose3d(i, o, 2, stride=2), lambda i: (i, 3, 2, 3)),
}


def pairs() -> list[tuple[str, str]]:
    """Every shipped spec with every kind of layer that it names."""
    return [(kind, name) for name in tnpeft.list_specs() for kind in KINDS if kind in tnpeft.load_spec(name).layers]


def attached(kind: str, spec: str, mode: str) -> tuple[nn.Sequential, torch.Size]:
    """A model of one adapted layer, by the seed as it is, and the shape of a batch of three for it.

    Raises TnpeftError where the spec takes none of the sizes tried.
    """
    scopes = dict.fromkeys(tnpeft.load_spec(spec).scopes, r"(\d)")
    for place, (inputs, outputs) in enumerate(_CHANNELS):
        model = nn.Sequential(KINDS[kind].make(inputs, outputs)).eval()
        try:
            tnpeft.attach(model, spec, match="0", mode=mode, scopes=scopes)
        except tnpeft.TnpeftError:
            if place == len(_CHANNELS) - 1:
                raise
        else:
            return model, torch.Size((3, *KINDS[kind].shape(inputs)))
    raise AssertionError
