"""The spellings of keys that other libraries have used over the years, brought to one.

diffusers has written one LoRA in four ways, and ComfyUI reads all of them; PEFT's is the latest.
"""

from __future__ import annotations

import re

__all__ = ["respelled"]

_ATTENTION = re.compile(r"\.to_(?P<which>q|k|v|out)_lora\.(?P<side>up|down)(?=\.|$)")  # `to_q_lora.up`
_NESTED = re.compile(r"\.lora(_linear_layer)?\.(?P<side>up|down)(?=\.|$)")  # `lora.up`, `lora_linear_layer.up`
_SIDES = {"up": "lora_B", "down": "lora_A"}
_OUTPUT = ".to_out.lora_magnitude_vector"


def respelled(key: str) -> str:
    """A key of any of diffusers' spellings in PEFT's, other keys as they are.

    `attn.processor.to_out_lora.up.weight` is `attn.to_out.0.lora_B.weight`, and where CLIP's layers are
    meant, `self_attn.to_q_lora.up.weight` is `self_attn.q_proj.lora_B.weight`.
    """
    key = key.replace(".processor.", ".")
    key = _ATTENTION.sub(_attention, key)
    key = _NESTED.sub(lambda match: f".{_SIDES[match['side']]}", key)
    return key.replace(_OUTPUT, ".to_out.0.lora_magnitude_vector")


def _attention(match: re.Match[str]) -> str:
    which, before = match["which"], match.string[: match.start()]
    if before.endswith("self_attn"):
        layer = f"{which}_proj"
    else:
        layer = "to_out.0" if which == "out" else f"to_{which}"
    return f".{layer}.{_SIDES[match['side']]}"
