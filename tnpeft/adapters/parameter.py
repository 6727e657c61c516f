"""A parameter of a module, as the weight of a layer: what an adapter stands on where there is no layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tnpeft.adapters.parked import ParameterLayer
from tnpeft.network import Layer

__all__ = ["ORIENTATIONS", "ParameterLayer", "bound_to", "oriented"]

ORIENTATIONS = ("o i", "i o", "e o i", "e i o")
"""The axes of a parameter as they are stored: `e` slices of a stack, `o` outputs, `i` inputs."""


def oriented(weight: Tensor, orientation: str) -> Layer:
    """The layer, or the stack of layers, whose weight a tensor is; its axes are as many as the orientation has."""
    sizes = dict(zip(orientation.split(), weight.shape, strict=True))
    turned = orientation.endswith("i o")
    return Layer("Linear", sizes["i"], sizes["o"], turned=turned, slices=sizes.get("e", 0))


def bound_to(layer: Any) -> Any:
    """What a spec is bound to: a module, or the signature of a parameter."""
    return layer.signature if isinstance(layer, ParameterLayer) else layer
