"""Adapter files: safetensors that carry their spec."""

from tnpeft.io.foreign import load_foreign, save_foreign
from tnpeft.io.inspecting import inspect
from tnpeft.io.inspection import InspectedLayer, Inspection
from tnpeft.io.loading import hot_swap, load
from tnpeft.io.saving import save

__all__ = ["InspectedLayer", "Inspection", "hot_swap", "inspect", "load", "load_foreign", "save", "save_foreign"]
