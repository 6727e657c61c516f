"""Digests of tensors: SHA-256 of their bytes, in the order of their axes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["add_bytes", "digest_of_modules"]

_PIECE = 1 << 20  # bytes hashed at once


def add_bytes(total: hashlib._Hash, tensor: Tensor) -> None:
    """Add a tensor's bytes to a digest."""
    # By copies of pieces: `numpy` makes storage that it shares unresizable, which FSDP then trips over.
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    for start in range(0, len(flat), _PIECE):
        total.update(flat[start : start + _PIECE].to("cpu", copy=True).numpy().data)


def digest_of_modules(modules: Mapping[str, nn.Module]) -> str:
    """The digest of all tensors in some modules, with their names; tensors without values add none."""
    total = hashlib.sha256()
    for name, module in modules.items():
        for key, tensor in module.state_dict().items():
            total.update(f"{name}.{key} {tuple(tensor.shape)}".encode())
            if not tensor.is_meta:
                add_bytes(total, tensor)
    return total.hexdigest()
