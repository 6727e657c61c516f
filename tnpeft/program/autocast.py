"""Autocast: the type in which it calls a layer, and contractions that run outside of it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

__all__ = ["autocast_dtype", "without_autocast"]


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The type in which autocast calls a layer with this input; the input's own where there is none."""
    device = x.device.type
    autocast = x.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Contractions run in the cores' own dtype, whatever autocast says."""
    device = tensor.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
