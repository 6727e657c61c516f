"""One example: a layer with its options, a spec's params on it, and the seed of every number in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from tnpeft.network import Layer

__all__ = ["DTYPES", "Case", "sample_input"]

DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True)
class Case:
    """A layer and params; its repr is the Python that makes it again.

    `options` are torch's own keywords (`stride`, `padding`, `bias`, ...), `seed` draws the layer's weight, the input
    and the cores.
    """

    kind: str
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...] = ()
    groups: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    params: Mapping[str, int | float] = field(default_factory=dict)
    dtype: str = "float32"
    seed: int = 0

    @classmethod
    def on(cls, layer: Layer, **more: Any) -> Case:
        return cls(layer.kind, layer.in_channels, layer.out_channels, layer.kernel_size, layer.groups, **more)

    @property
    def layer(self) -> Layer:
        return Layer(self.kind, self.in_channels, self.out_channels, self.kernel_size, self.groups)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def build(self, seed: int = 0) -> nn.Module:
        """The layer with random weights; `seed` tells several layers of one case apart."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1009 * self.seed + seed)
            made: nn.Module = getattr(nn, self.kind)(*self._positional(), **self._keywords())
        return made.to(self.torch_dtype)

    def input(self, seed: int = 0) -> Tensor:
        return sample_input(self.build(), 1009 * self.seed + seed)

    def _positional(self) -> tuple[Any, ...]:
        return (self.in_channels, self.out_channels, *((self.kernel_size,) if self.kernel_size else ()))

    def _keywords(self) -> dict[str, Any]:
        return {**({"groups": self.groups} if self.groups > 1 else {}), **self.options}

    @property
    def size(self) -> tuple[float, ...]:
        """A key by which simpler cases sort first."""
        numbers = (self.in_channels, self.out_channels, *self.kernel_size, self.groups)
        params = sum(abs(value) for value in self.params.values())
        return (self.layer.numel, sum(numbers), len(self.options), len(self.params) + params, self.seed)

    def __repr__(self) -> str:
        given = [f"{item.name}={value!r}" for item in fields(self)[3:] if (value := getattr(self, item.name))]
        shown = [text for text in given if text not in ("groups=1", "dtype='float32'")]
        return f"Case({', '.join([repr(self.kind), str(self.in_channels), str(self.out_channels), *shown])})"

    @property
    def layer_text(self) -> str:
        """The layer as Python."""
        arguments = [*map(repr, self._positional()), *(f"{key}={value!r}" for key, value in self._keywords().items())]
        if self.dtype != "float32":
            arguments.append(f"dtype=torch.{self.dtype}")
        return f"torch.nn.{self.kind}({', '.join(arguments)})"

    @property
    def option_text(self) -> str:
        """The layer and params as options of the command line."""
        parts = [str(self.in_channels), str(self.out_channels)]
        if self.kernel_size:
            parts.append("x".join(map(str, self.kernel_size)))
        if self.groups > 1:
            parts.append(f"groups={self.groups}")
        settings = "".join(f" --set {name}={value}" for name, value in self.params.items())
        return f"--layer {self.kind}:{','.join(parts)}{settings}"


def sample_input(layer: nn.Module, seed: int = 0, batch: int = 2, more: int = 1) -> Tensor:
    """A batch that the layer accepts, in its dtype; each axis has `more` voxels than the fewest that it needs."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, nn.Linear):
        shape: tuple[int, ...] = (batch, 1 + more, layer.in_features)
    else:
        shape = (batch, int(layer.in_channels), *_sides(layer, more))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(weight.device, weight.dtype)


def _sides(layer: Any, more: int) -> tuple[int, ...]:
    """Wide enough for the kernel and for padding by reflection."""
    padding = (0,) * len(layer.kernel_size) if isinstance(layer.padding, str) else layer.padding
    spans = [gap * (size - 1) + 1 for gap, size in zip(layer.dilation, layer.kernel_size, strict=True)]
    if isinstance(layer.padding, str):
        padding = tuple(math.ceil((span - 1) / 2) for span in spans)
    return tuple(max(span, wide + 1) + more for span, wide in zip(spans, padding, strict=True))
