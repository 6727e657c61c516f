"""What the compiler knows of a layer: its signature, without any values."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Layer"]


@dataclass(frozen=True)
class Layer:
    """A layer's signature: its kind and sizes, without any values.

    `in_channels` and `out_channels` are the layer's own numbers (`in_features` and `out_features` for a Linear);
    `kernel_size` has one number per kernel axis, none for Linear. A `turned` Linear stores its weight as (in, out), as
    transformers' Conv1D does. The weight of an `opaque` layer is neither read nor replaced: adapters add to what the
    layer computes. With `slices` it is a stack of that many Linear layers whose weights are one tensor: (slices, out,
    in) or, `turned`, (slices, in, out). Its channels are those of each of them.
    """

    kind: str
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...] = ()
    groups: int = 1
    turned: bool = False
    opaque: bool = False
    slices: int = 0

    @property
    def stack(self) -> tuple[int, ...]:
        """The first axis of a stack: (slices,); empty for a single layer."""
        return (self.slices,) if self.slices else ()

    @property
    def transposed(self) -> bool:
        return self.kind.startswith("ConvTranspose")

    @property
    def input_first(self) -> bool:
        """Whether the stored weight has its input side first."""
        return self.turned or self.transposed

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The canonical shape: (out_channels, in_channels // groups, *kernel_size); for a stack (slices, out, in)."""
        sides = self.out_channels, self.in_channels // self.groups
        return (self.slices, *sides) if self.slices else (*sides, *self.kernel_size)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of `layer.weight`: transposed convolutions and turned layers store the input side first."""
        if not self.input_first:
            return self.weight_shape
        return (*self.stack, self.in_channels, self.out_channels // self.groups, *self.kernel_size)

    @property
    def split_shape(self) -> tuple[int, ...]:
        """The shape of the weight split by groups or slices: (groups or slices, out, in, *kernel_size)."""
        split = self.slices or self.groups
        outputs, inputs = self.out_channels // self.groups, self.in_channels // self.groups
        return (split, outputs, inputs, *self.kernel_size)

    @property
    def numel(self) -> int:
        return math.prod(self.weight_shape)

    def __str__(self) -> str:
        numbers = [str(self.in_channels), str(self.out_channels)]
        if self.kernel_size:
            numbers.append("x".join(map(str, self.kernel_size)))
        if self.groups > 1:
            numbers.append(f"groups={self.groups}")
        numbers += ["turned"] * self.turned + ["opaque"] * self.opaque
        return f"{self.kind}({', '.join(numbers)})" + f" x {self.slices}" * bool(self.slices)
