"""The tensors of one layer by what they are to their method, and the parts they make.

The names are LyCORIS's: `up`, `down` and `mid` for LoRA and LoCon; `w1_a`, `w1_b`, `t1` and the same
with 2 for LoHa; `w1` (or `w1_a` and `w1_b`) and `w2` (or `w2_a`, `w2_b` and `t2`) for LoKr. A
convolution's kernel may be flattened into the last axis, and unit axes may follow.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tnpeft.errors import AdapterFileError, Problem
from tnpeft.io.files import refuse, shown
from tnpeft.io.foreign.formats import INCOMPLETE, MADE_FOR, ONE_ADAPTER
from tnpeft.io.foreign.layer_update import LayerUpdate
from tnpeft.io.foreign.topologies import kron_name
from tnpeft.network import Layer

__all__ = ["LayerTensors", "loha_part", "lokr_part", "lora_part", "tensors_of_layer", "wide"]

Scale = Callable[[int | None], float]  # of the rank, None where no tensor has one


@dataclass
class LayerTensors:
    """One layer's tensors by slot, each with its key in the file, which calls the layer `written`."""

    path: Path
    layer: str
    written: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    def add(self, slot: str, key: str, tensor: Tensor) -> None:
        if slot in self.tensors:
            found = f"'{self.keys[slot]}' and '{key}'"
            raise self.refuse(f"`{slot}`", "one tensor", found, ONE_ADAPTER)
        number = tensor.float() if slot == "alpha" else tensor  # kohya's is often whole
        self.tensors[slot], self.keys[slot] = wide(self.path, key, number), key

    def get(self, slot: str) -> Tensor | None:
        return self.tensors.get(slot)

    def need(self, slot: str, like: str) -> Tensor:
        """The tensor of a slot; `like` is a slot whose key shows how it would be called."""
        tensor = self.tensors.get(slot)
        if tensor is None:
            beside = self.keys.get(like, like)
            raise self.refuse("tensors", f"`{_native(slot, beside)}` beside '{beside}'", "no such tensor", INCOMPLETE)
        return tensor

    def refuse(self, what: str, expected: str, found: str, fix: str) -> AdapterFileError:
        return AdapterFileError(Problem(what, expected, found, fix, where=f"{shown(self.path)}: layer '{self.layer}'"))

    def matrix(self, slot: str, like: str) -> Tensor:
        """A tensor of two axes, unit axes behind them dropped."""
        tensor = self.need(slot, like)
        return self._squeezed(slot, tensor, 2)

    def kernel(self, slot: str, like: str, kernel: tuple[int, ...]) -> Tensor:
        """A tensor of two axes and the kernel's, which may be flattened into the second."""
        tensor, window = self.need(slot, like), math.prod(kernel)
        if tensor.ndim == 2 and kernel and tensor.shape[1] % window == 0:
            return tensor.reshape(tensor.shape[0], tensor.shape[1] // window, *kernel)
        return self._squeezed(slot, tensor, 2 + len(kernel))

    def _squeezed(self, slot: str, tensor: Tensor, axes: int) -> Tensor:
        if tensor.ndim < axes or any(size != 1 for size in tensor.shape[axes:]):
            key = self.keys[slot]
            raise self.refuse(f"tensor '{key}'", f"{axes} axes", f"the shape {tuple(tensor.shape)}", MADE_FOR)
        return tensor.reshape(tensor.shape[:axes])

    def part(self, topology: str, scale: float, cores: Mapping[str, tuple[str, Tensor]]) -> LayerUpdate:
        """A part whose cores are given with the slot each comes from. Refuses slots that are left over."""
        over = self.tensors.keys() - {slot for slot, _ in cores.values()} - {"alpha", "magnitude", "dora_scale"}
        if over:
            found = f"also '{self.keys[min(over)]}'"
            raise self.refuse("tensors", f"those of {topology} alone", found, ONE_ADAPTER)
        tensors = {core: tensor for core, (_, tensor) in cores.items()}
        keys = {core: self.keys.get(slot, slot) for core, (slot, _) in cores.items()}
        return LayerUpdate(topology, tensors, scale, keys=keys)


def tensors_of_layer(slots: dict[str, LayerTensors], path: Path, layer: str, written: str) -> LayerTensors:
    """The slots of a layer, new ones at its first tensor; two names in a file are never one layer."""
    those = slots.setdefault(layer, LayerTensors(path, layer, written))
    if those.written != written:
        both = f"tensors of '{those.written}' and of '{written}'"
        raise those.refuse("tensors", "those of one layer of the file", both, MADE_FOR)
    return those


def _native(slot: str, beside: str) -> str:
    """What the file would call a slot, by the key of its neighbour."""
    if slot in ("up", "down", "mid"):
        if "lora_A" in beside or "lora_B" in beside:
            return {"up": "lora_B", "down": "lora_A"}.get(slot, slot)
        old = re.search(r"\w*lora(_linear_layer)?\.(?=up|down)", beside)  # of diffusers
        return f"{old[0] if old else 'lora_'}{slot}"
    if slot == "magnitude":
        return "lora_magnitude_vector"
    method = re.search(r"(hada|loha|lokr)_(?=[wt]\d(_[ab])?(\.|$))", beside)
    return f"{method[0] if method else ''}{slot}"


def wide(path: Path, key: str, tensor: Tensor) -> Tensor:
    """fp32 of what a file stores narrower, as cores are; refuses what holds no real numbers."""
    if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_quantized:
        found = str(tensor.dtype).removeprefix("torch.")
        if tensor.layout != torch.strided:
            found = str(tensor.layout).removeprefix("torch.")
        raise refuse(path, f"tensor '{key}'", "floating-point numbers", found, "Save the adapter unquantised.")
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def lora_part(slots: LayerTensors, layer: Layer, scale: Scale) -> LayerUpdate:
    up, kernel = slots.matrix("up", "down"), layer.kernel_size
    if slots.get("mid") is not None:
        down = slots.matrix("down", "up")
        mid = slots.kernel("mid", "up", kernel)
        cores = {"up": ("up", up), "mid": ("mid", mid), "down": ("down", down)}
        return slots.part("locon_tucker", scale(down.shape[0]), cores)
    down = slots.kernel("down", "up", kernel)
    return slots.part("lora", scale(down.shape[0]), {"up": ("up", up), "down": ("down", down)})


def loha_part(slots: LayerTensors, layer: Layer, scale: Scale) -> LayerUpdate:
    cores: dict[str, tuple[str, Tensor]] = {}
    kernel = layer.kernel_size
    tucker = slots.get("t1") is not None or slots.get("t2") is not None
    for half in ("1", "2"):
        up, down, mid = f"w{half}_a", f"w{half}_b", f"t{half}"
        if tucker:
            cores[f"mid_{half}"] = (mid, slots.kernel(mid, up, kernel))
            cores[f"down_{half}"] = (down, slots.matrix(down, up))
        else:
            cores[f"down_{half}"] = (down, slots.kernel(down, up, kernel))
        cores[f"up_{half}"] = (up, slots.matrix(up, down))
    rank = cores["down_1"][1].shape[0]
    return slots.part("loha_tucker" if tucker else "loha", scale(rank), cores)


def lokr_part(slots: LayerTensors, layer: Layer, scale: Scale, inner: bool = False) -> LayerUpdate:
    """`inner` says where a whole second factor is the outer one of the product."""
    kernel = layer.kernel_size
    cores: dict[str, tuple[str, Tensor]] = {}
    if slots.get("w1") is not None:
        small = "whole"
        cores["small"] = ("w1", slots.matrix("w1", "w2"))
    else:
        small = "low"
        cores["small_up"] = ("w1_a", slots.matrix("w1_a", "w1_b"))
        cores["small_down"] = ("w1_b", slots.matrix("w1_b", "w1_a"))
    if slots.get("w2") is not None:
        large, rank = "whole", None if small == "whole" else cores["small_down"][1].shape[0]
        cores["large"] = ("w2", slots.kernel("w2", "w1", kernel))
        return slots.part(kron_name(small, large, inner), scale(rank), cores)
    up = slots.matrix("w2_a", "w2_b")
    if slots.get("t2") is not None:
        large, down = "tucker", slots.matrix("w2_b", "w2_a")
        cores["mid"] = ("t2", slots.kernel("t2", "w2_a", kernel))
    else:
        large, down = "low", slots.kernel("w2_b", "w2_a", kernel)
    cores |= {"up": ("w2_a", up), "down": ("w2_b", down)}
    return slots.part(kron_name(small, large), scale(down.shape[0]), cores)
