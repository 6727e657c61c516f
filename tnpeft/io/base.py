"""The base model as a file knows it: shapes, types and ties by name, and digests of the adapted weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tnpeft.adapters.distributed import whole
from tnpeft.io.manifest import BaseTensor, digest_of, dtype_name
from tnpeft.surgery import base_tensors

__all__ = ["base_digests", "fingerprint", "has_values"]


def fingerprint(root: nn.Module) -> dict[str, BaseTensor]:
    """Shape, type and ties of every parameter and saved buffer of the base model, by name."""
    first: dict[int, str] = {}
    entries: dict[str, BaseTensor] = {}
    for name, tensor in base_tensors(root).items():
        # Moving a model unties its buffers.
        tied = first.setdefault(id(tensor), name) if isinstance(tensor, nn.Parameter) else name
        shape, dtype = tuple(tensor.shape), dtype_name(tensor.dtype)
        entries[name] = BaseTensor(shape=shape, dtype=dtype, tied=None if tied == name else tied)
    return entries


def base_digests(model: nn.Module, layers: Iterable[str], trained: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the base's own parameters of the adapted layers, and of those that train beside them, by name.

    Tensors without values here (on the meta device, offloaded) are left out. If the model is sharded, all processes
    must call this.
    """
    values = base_tensors(model)
    names = [name for layer in layers for name in (layer, f"{layer}.weight", f"{layer}.bias")]  # or a parameter
    wanted = dict.fromkeys([*names, *trained])
    digests = {}
    for name in (name for name in wanted if name in values):
        tensor = whole(values[name])  # one at a time
        if has_values(tensor):
            digests[name] = digest_of(tensor)
    return digests


def has_values(tensor: Tensor) -> bool:
    """Whether it is an ordinary tensor with memory of its own, whose bytes are its values."""
    ordinary = type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
    return ordinary and tensor.device.type != "meta" and tensor.layout == torch.strided and not tensor.is_quantized
