"""Adapter files of other code: PEFT, diffusers, LyCORIS, kohya's sd-scripts, ComfyUI, and that of the TenVOO paper."""

from tnpeft.io.foreign.loading import load_foreign
from tnpeft.io.foreign.saving import save_foreign

__all__ = ["load_foreign", "save_foreign"]
