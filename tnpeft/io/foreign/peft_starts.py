"""LoRAs that PEFT started at a part of the weight, which it subtracted from the base: unconverted PiSSA and OLoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tnpeft.errors import clip
from tnpeft.io.foreign.layer_update import LayerUpdate
from tnpeft.io.foreign.source import Source
from tnpeft.network import Layer

__all__ = ["STARTS", "started_at"]

STARTS = ("pissa", "olora")
_CONVERT = "Save it with `path_initial_model_for_weight_conversion`, or merge the adapter with PEFT."


def started_at(
    source: Source,
    config: Mapping[str, Any],
    parts: Mapping[str, LayerUpdate],
    layers: Mapping[str, Layer],
    parameters: Mapping[str, Tensor],
) -> dict[str, LayerUpdate]:
    """The parts; if the config names a start, their frozen copy is what PEFT subtracts from the base weight.

    The copy is made from this model's weights, as PEFT does when it loads the file. The scale is multiplied into the
    second core, because the spec has none. Raises AdapterFileError if PEFT's start is not known here.
    """
    init = config.get("init_lora_weights")
    if config["peft_type"] != "LORA" or not isinstance(init, str) or init.lower() not in STARTS:
        return dict(parts)
    started = {}
    for name, part in parts.items():
        layer, weight = layers[name], parameters.get(f"{name}.weight")
        plain = layer.kind == "Linear" and not layer.turned and not layer.slices and part.orientation is None
        if not plain or weight is None or weight.shape != layer.weight_shape or not weight.is_floating_point():
            expected = "Linear layers with a weight (out, in) of floating-point numbers"
            found = f"{layer} on '{name}'"
            raise source.refuse(f"`init_lora_weights={init!r}`", expected, found, _CONVERT)
        if part.magnitude is not None:
            raise source.refuse("`use_dora`", f"false beside `init_lora_weights={init!r}`", clip(True), _CONVERT)
        if part.scale <= 0:
            found = f"{part.scale:g} on '{name}'"
            raise source.refuse(f"`init_lora_weights={init!r}`", "a positive scale, alpha / r", found, _CONVERT)
        rank = part.tensors["down"].shape[0]
        up, down = _pissa(weight, rank, part.scale) if init.lower() == "pissa" else _olora(weight, rank)
        tensors = {"down": part.tensors["down"], "up": part.tensors["up"] * part.scale}
        copy = {"down": down, "up": up * part.scale}
        started[name] = replace(part, topology="pissa", tensors=tensors, start=copy, scale=1.0)
    return started


def _pissa(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """The principal singular vectors, each side with the root of the singular values."""
    left, values, right = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    roots = (values[:rank] / scale).sqrt()
    return (left[:, :rank] * roots).cpu(), (roots[:, None] * right[:rank]).cpu()


def _olora(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first columns of Q and rows of R."""
    q, r = torch.linalg.qr(weight.detach().float())
    return q[:, :rank].cpu(), r[:rank].cpu()
