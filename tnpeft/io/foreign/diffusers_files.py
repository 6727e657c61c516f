"""Writing diffusers' files: LoRA under PEFT's keys behind a part's prefix, with PEFT's config in the header."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from tnpeft.errors import Problem
from tnpeft.io.foreign.formats import trained_problem
from tnpeft.io.foreign.layer_update import LayerUpdate
from tnpeft.io.foreign.peft_files import config_of, lora_tensors, method_of, peft_problems, targets
from tnpeft.io.foreign.source import HEADER
from tnpeft.network import Layer

__all__ = ["diffusers_contents", "diffusers_problems"]

_LEFT_OUT = ("base_model_name_or_path", "inference_mode", "task_type")
_ELSEWHERE = 'Write it as "lycoris", "kohya" or "comfyui", or merge it into the model.'


def diffusers_problems(
    parts: Mapping[str, LayerUpdate], layers: Mapping[str, Layer], trained: Mapping[str, Tensor]
) -> Iterator[Problem]:
    """Why diffusers cannot hold these parts, all of them."""
    others = {name: method_of(part) for name, part in parts.items() if method_of(part) != "LORA"}
    for name, method in others.items():
        yield Problem("diffusers' pipelines", "LoRA", method, _ELSEWHERE, f"layer '{name}'")
    if trained:
        yield trained_problem(trained, "none: diffusers has no place for them")
    if not others and not trained:
        yield from peft_problems(parts, layers)


def diffusers_contents(
    path: Path, parts: Mapping[str, LayerUpdate], names: Mapping[str, tuple[str, str]], modules: Collection[str]
) -> dict[Path, bytes]:
    """The file; `names` has for each layer the prefix of its part and its name in it, `modules` all names of modules.

    The scale is multiplied into the cores, so that alpha equals the rank, as readers assume that ignore the header.
    """
    tensors: dict[str, Tensor] = {}
    header: dict[str, Any] = {}
    for prefix in dict.fromkeys(prefix for prefix, _ in names.values()):
        inside = {names[layer][1]: part for layer, part in parts.items() if names[layer][0] == prefix}
        written = {name: lora_tensors(part, part.scale) for name, part in inside.items()}
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


def _key(prefix: str, key: str) -> str:
    """A key; for text encoders in the spelling that diffusers recognises whatever the layer's name."""
    if not prefix.startswith("text_encoder"):
        return key
    return key.replace("lora_A", "lora_linear_layer.down").replace("lora_B", "lora_linear_layer.up")


def _config(ranks: Mapping[str, int], dora: bool, modules: Collection[str]) -> dict[str, Any]:
    """PEFT's config without the options that do not concern the update."""
    options = {"lora_dropout": 0.0, "bias": "none", "init_lora_weights": True, "use_dora": dora}
    config = config_of("LORA", ranks, ranks, {**options, "target_modules": targets(list(ranks), modules)})
    return {key: value for key, value in config.items() if key not in _LEFT_OUT}
