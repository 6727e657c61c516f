"""The tensors of one layer by their role in the method (slot), and the updates that they make.

The names are LyCORIS's. A convolution's kernel may be flattened into the last axis, and unit axes may follow.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tnpeft.errors import AdapterFileError, Problem
from tnpeft.io.files import refuse, shown
from tnpeft.io.foreign.formats import INCOMPLETE, MADE_FOR, ONE_ADAPTER
from tnpeft.io.foreign.layer_update import LayerUpdate
from tnpeft.io.foreign.topologies import kron_name, topology_named
from tnpeft.network import Layer
from tnpeft.spec.pattern import ELLIPSIS

__all__ = ["SLOTS", "LayerTensors", "tensors_of_layer", "update_of", "wide"]

# Method → the cores of its topologies with the slots of their tensors, in the order in which they are read.
SLOTS = {
    "lora": {"up": "up", "mid": "mid", "down": "down"},
    "loha": {"mid_1": "t1", "down_1": "w1_b", "up_1": "w1_a", "mid_2": "t2", "down_2": "w2_b", "up_2": "w2_a"},
    "lokr": {"small": "w1", "small_up": "w1_a", "small_down": "w1_b"}
    | {"large": "w2", "mid": "t2", "up": "w2_a", "down": "w2_b"},
}
# Slot → another one, whose key shows how the file would call it.
_NEIGHBOURS = {"up": "down", "down": "up", "magnitude": "down", "t1": "w1_a", "t2": "w2_a"}
_NEIGHBOURS |= {"w1_a": "w1_b", "w1_b": "w1_a", "w2_a": "w2_b", "w2_b": "w2_a"}
Scale = Callable[[int | None], float]  # of the rank, None where no tensor has one


@dataclass
class LayerTensors:
    """One layer's tensors by slot, each with its key in the file; `written` is the layer's name there."""

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

    def need(self, slot: str) -> Tensor:
        """The tensor of a slot; the error for a missing one spells its key as the file spells others."""
        tensor = self.tensors.get(slot)
        if tensor is None:
            beside = self.keys.get(_NEIGHBOURS[slot], _NEIGHBOURS[slot])
            raise self.refuse("tensors", f"`{_native(slot, beside)}` beside '{beside}'", "no such tensor", INCOMPLETE)
        return tensor

    def refuse(self, what: str, expected: str, found: str, fix: str) -> AdapterFileError:
        return AdapterFileError(Problem(what, expected, found, fix, where=f"{shown(self.path)}: layer '{self.layer}'"))

    def shaped(self, slot: str, kernel: tuple[int, ...] = ()) -> Tensor:
        """A tensor of two axes and the kernel's, which may be flattened into the second; unit axes follow at most."""
        tensor, window, axes = self.need(slot), math.prod(kernel), 2 + len(kernel)
        if tensor.ndim == 2 and kernel and tensor.shape[1] % window == 0:
            return tensor.reshape(tensor.shape[0], tensor.shape[1] // window, *kernel)
        if tensor.ndim < axes or any(size != 1 for size in tensor.shape[axes:]):
            key = self.keys[slot]
            raise self.refuse(f"tensor '{key}'", f"{axes} axes", f"the shape {tuple(tensor.shape)}", MADE_FOR)
        return tensor.reshape(tensor.shape[:axes])


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
    """A tensor in at least fp32, as cores are; raises for one that holds no real numbers."""
    if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_quantized:
        found = str(tensor.dtype).removeprefix("torch.")
        if tensor.layout != torch.strided:
            found = str(tensor.layout).removeprefix("torch.")
        raise refuse(path, f"tensor '{key}'", "floating-point numbers", found, "Save the adapter unquantised.")
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def update_of(method: str, slots: LayerTensors, layer: Layer, scale: Scale, inner: bool = False) -> LayerUpdate:
    """The update of a `method` of `SLOTS`; `inner` says where LoKr's whole second factor is the outer one."""
    name = _topology(method, slots.tensors, inner)
    cores = topology_named(name).cores
    filled = {core: slot for core, slot in SLOTS[method].items() if core in cores}
    kernels = {core: layer.kernel_size if ELLIPSIS in legs else () for core, legs in cores.items()}
    tensors = {core: slots.shaped(slot, kernels[core]) for core, slot in filled.items()}
    rank = next((tensors[core].shape[0] for core in ("down", "down_1", "small_down") if core in tensors), None)
    size = scale(rank)
    if over := slots.tensors.keys() - filled.values() - {"alpha", "magnitude", "dora_scale"}:
        found = f"also '{slots.keys[min(over)]}'"
        raise slots.refuse("tensors", f"those of {name} alone", found, ONE_ADAPTER)
    return LayerUpdate(name, tensors, size, keys={core: slots.keys[slot] for core, slot in filled.items()})


def _topology(method: str, slots: Collection[str], inner: bool) -> str:
    if method == "lora":
        return "locon_tucker" if "mid" in slots else "lora"
    if method == "loha":
        return "loha_tucker" if "t1" in slots or "t2" in slots else "loha"
    small = "whole" if "w1" in slots else "low"
    large = "whole" if "w2" in slots else "tucker" if "t2" in slots else "low"
    return kron_name(small, large, inner and large == "whole")
