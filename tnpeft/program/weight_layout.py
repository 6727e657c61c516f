"""From the network's open legs to the weight as torch stores it: transposed axes, groups, crop, memory order.

A tensor in *memory form* is contiguous and has the stored weight's axes from the slowest to the fastest varying. The
last step of the program writes memory form directly where the weight's axes are whole legs; where padded axes are
cropped, or a grouped transposed convolution splits the output axis, one more copy is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tnpeft.network.model import Network

__all__ = ["WeightLayout"]


@dataclass(frozen=True)
class WeightLayout:
    """The way from the last result to the delta weight, and back for its gradient.

    `legs`, in the network's index letters, is the order in which the last step stores its result. `direct`: that is
    memory form. Else it is the canonical weight before the crop, of shape `padded`.
    """

    legs: str
    direct: bool
    padded: tuple[int, ...]
    canonical: tuple[int, ...]
    stored: tuple[int, ...]
    split: tuple[int, ...]  # of the canonical weight: (groups or slices, out, in, ...); empty if it is stored so
    order: tuple[int, ...]
    shape: tuple[int, ...]  # of memory form
    back: tuple[int, ...]  # from the axes of memory form to the stored ones

    @classmethod
    def of(cls, network: Network, memory_order: tuple[int, ...]) -> WeightLayout:
        layer = network.layer
        direct = network.padded_shape == layer.weight_shape and (not layer.input_first or layer.groups == 1)
        axes = list(network.weight)
        if direct:
            if layer.input_first:
                first = 1 if layer.slices else 0
                axes[first], axes[first + 1] = axes[first + 1], axes[first]
            axes = [axes[axis] for axis in memory_order]
        legs = "".join(network.symbols[leg] for axis in axes for leg in axis)
        split, stored = layer.split_shape if layer.input_first else (), layer.stored_shape
        shape = tuple(stored[axis] for axis in memory_order)
        back = tuple(memory_order.index(axis) for axis in range(len(memory_order)))
        return cls(legs, direct, network.padded_shape, layer.weight_shape, stored, split, memory_order, shape, back)

    def apply(self, result: Tensor) -> Tensor:
        """The last step's result as the stored weight; its strides are those of the memory order."""
        if not self.direct:
            result = self._stored(result.reshape(self.padded)).permute(self.order)
            result = result.clone(memory_format=torch.contiguous_format)
        # Through one axis, because an axis of size 1 may otherwise keep an odd stride.
        return result.reshape(-1).reshape(self.shape).permute(self.back)

    def apply_all(self, results: Tensor, count: int) -> Sequence[Tensor]:
        """The stored weights of `count` layers, from their results in a row."""
        if count == 1:
            return [self.apply(results)]
        if not self.direct:
            return [self.apply(result) for result in results.reshape(count, -1).unbind(0)]
        back = (1 + axis for axis in self.back)
        return results.reshape(-1).reshape(count, *self.shape).permute(0, *back).unbind(0)

    def undo(self, gradient: Tensor) -> Tensor:
        """The gradient of the last step's result, stored as it is, from that of the stored weight."""
        if self.direct:
            return gradient.permute(self.order).contiguous()
        canonical = self._canonical(gradient)
        missing = [(0, wide - narrow) for wide, narrow in zip(self.padded, self.canonical, strict=True)]
        if any(after for _, after in missing):
            canonical = torch.nn.functional.pad(canonical, [number for pair in reversed(missing) for number in pair])
        return canonical.contiguous()

    def _stored(self, padded: Tensor) -> Tensor:
        """Crop; transposed convolutions store (in, out // groups, ...): stored[g*a + i, o] = canonical[g*b + o, i]."""
        cropped = padded[tuple(slice(size) for size in self.canonical)]
        if not self.split:
            return cropped
        return cropped.reshape(self.split).transpose(1, 2).reshape(self.stored)

    def _canonical(self, stored: Tensor) -> Tensor:
        if not self.split:
            return stored
        split, outputs, inputs, *kernel = self.split
        grouped = stored.reshape(split, inputs, outputs, *kernel)
        return grouped.transpose(1, 2).reshape(self.canonical)
