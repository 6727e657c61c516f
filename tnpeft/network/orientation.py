"""Which axes of a parameter are outputs and inputs: the layer, or the stack of layers, whose weight it is."""

from __future__ import annotations

from collections.abc import Sequence

from tnpeft.network.layer import Layer

__all__ = ["ORIENTATIONS", "orientation_of", "oriented"]

ORIENTATIONS = ("o i", "i o", "e o i", "e i o")
"""The axes of a parameter as they are stored: `e` slices of a stack, `o` outputs, `i` inputs."""


def oriented(shape: Sequence[int], orientation: str) -> Layer:
    """The layer, or the stack of layers, whose weight has this shape, with as many axes as the orientation."""
    sizes = dict(zip(orientation.split(), shape, strict=True))
    turned = orientation.endswith("i o")
    return Layer("Linear", sizes["i"], sizes["o"], turned=turned, slices=sizes.get("e", 0))


def orientation_of(layer: Layer) -> str:
    """The axes of a layer's weight, as an entry of `ORIENTATIONS`."""
    return "e " * bool(layer.slices) + ("i o" if layer.turned else "o i")
