"""Adapter files: safetensors that carry their spec."""

from tnpeft.io.loading import load
from tnpeft.io.saving import save

__all__ = ["load", "save"]
