"""Writing diffusers' files: LoRA under PEFT's keys behind a part's prefix, with PEFT's config in the header."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from tnpeft.errors import Problem
from tnpeft.io.foreign.layer_update import LayerUpdate
from tnpeft.io.foreign.peft_files import method_of, peft_problems, targets
from tnpeft.io.foreign.rewrites import untuckered
from tnpeft.io.foreign.source import HEADER
from tnpeft.network import Layer

__all__ = ["diffusers_contents", "diffusers_problems"]

_ELSEWHERE = 'Write it as "lycoris", "kohya" or "comfyui", or merge it into the model.'


def diffusers_problems(
    parts: Mapping[str, LayerUpdate], layers: Mapping[str, Layer], trained: Mapping[str, Tensor]
) -> Iterator[Problem]:
    """Why diffusers cannot hold these parts, all of them."""
    others = {name: method_of(part) for name, part in parts.items() if method_of(part) != "LORA"}
    for name, method in others.items():
        yield Problem("diffusers' pipelines", "LoRA", method, _ELSEWHERE, f"layer '{name}'")
    if trained:
        shown = ", ".join(f"'{name}'" for name in list(trained)[:3])
        fix = "Train the cores alone, or merge the adapter."
        yield Problem("parameters trained beside the cores", "none: diffusers has no place for them", shown, fix)
    if not others and not trained:
        yield from peft_problems(parts, layers, trained)


def diffusers_contents(
    path: Path, parts: Mapping[str, LayerUpdate], names: Mapping[str, tuple[str, str]], modules: Collection[str]
) -> dict[Path, bytes]:
    """The file; `names` has for each layer the prefix of its part and its name in it, `modules` all names of modules.

    The scale goes into the cores: then alpha is the rank, as readers take it to be that know no header.
    """
    tensors: dict[str, Tensor] = {}
    header: dict[str, Any] = {}
    for prefix in dict.fromkeys(prefix for prefix, _ in names.values()):
        inside = {names[layer][1]: part for layer, part in parts.items() if names[layer][0] == prefix}
        written = {name: _tensors(part) for name, part in inside.items()}
        for name, values in written.items():
            tensors |= {f"{prefix}{name}.{_key(prefix, key)}": value.contiguous() for key, value in values.items()}
        ranks = {name: values["lora_A.weight"].shape[0] for name, values in written.items()}
        dora = any(part.magnitude is not None for part in inside.values())
        layer = next(layer for layer in parts if names[layer][0] == prefix)
        place = layer.removesuffix(names[layer][1])
        known = [module.removeprefix(place) for module in modules if module.startswith(place)]
        header |= {f"{prefix}{key}": value for key, value in _config(ranks, dora, known).items()}
    metadata = {"format": "pt", HEADER: json.dumps(header, indent=2, sort_keys=True)}
    return {path: safetensors.torch.save(tensors, metadata)}


def _tensors(part: LayerUpdate) -> dict[str, Tensor]:
    up, down = (untuckered(part).tensors[core] for core in ("up", "down"))
    units = (1,) * (down.ndim - 2)
    tensors = {"lora_A.weight": down, "lora_B.weight": (up * part.scale).reshape(*up.shape, *units)}
    if part.magnitude is not None:
        tensors["lora_magnitude_vector"] = part.magnitude.reshape((1, -1, *units) if units else (-1,))
    return tensors


def _key(prefix: str, key: str) -> str:
    """Text encoders' keys have the spelling that diffusers recognises whatever the layer is called."""
    if not prefix.startswith("text_encoder"):
        return key
    return key.replace("lora_A", "lora_linear_layer.down").replace("lora_B", "lora_linear_layer.up")


def _config(ranks: Mapping[str, int], dora: bool, modules: Collection[str]) -> dict[str, Any]:
    rank = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{re.escape(name)}": value for name, value in ranks.items() if value != rank}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": targets(list(ranks), modules),
        "use_dora": dora,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
    }
