"""Reading PEFT's adapters: LoRA, LoHa and LoKr, with what trained beside them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tnpeft.io.files import refuse
from tnpeft.io.foreign.names import dotted, layer_named
from tnpeft.io.foreign.parts import Foreign, Part
from tnpeft.io.foreign.slots import Slots, loha_part, lokr_part, lora_part, wide
from tnpeft.io.foreign.source import SUPPORTED, Source, unsupported
from tnpeft.network import layer_of
from tnpeft.spec.document import clip

__all__ = ["read_peft"]

_SLOT = re.compile(
    r"(?P<module>.+)\.(?P<slot>lora_(A|B|magnitude_vector)|(hada|lokr)_[wt][12](_[ab])?)"
    r"(?P<adapter>\.(?!weight$|bias$)\w+)?(?P<leaf>\.weight|\.bias)?"
)
_SLOTS = {"lora_A": "down", "lora_B": "up", "lora_magnitude_vector": "magnitude"}
_SAVED = re.compile(r"\.(base_layer|modules_to_save\.\w+)\.")  # what PEFT puts between a module and its parameter
# Options under which an update is no longer scale * B A, or the base weights are not the base model's.
_OTHER_MATHS = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config"),
    *("target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config"),
)
_LARGEST = 1e30  # beyond any alpha or rank, and within fp32
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "lycoris", "true", "false")


def read_peft(source: Source, modules: Mapping[str, nn.Module], parameters: Mapping[str, Tensor]) -> Foreign:
    """The parts by layer and what else was trained. Raises AdapterFileError."""
    config = source.config or {}
    _check_config(source, config)
    slots: dict[str, Slots] = {}
    biases: dict[str, Tensor] = {}
    trained: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, tensor in source.tensors.items():
        match = _SLOT.fullmatch(key)
        if match is None:
            name = dotted(_SAVED.sub(".", key), parameters)
            if name is None:
                unknown.append(key)
            else:
                trained[name] = wide(source.path, key, tensor)
            continue
        module = layer_named(source, key, match["module"], modules)
        if match["leaf"] == ".bias":
            biases[module] = wide(source.path, key, tensor)
            continue
        slot = _SLOTS.get(match["slot"]) or match["slot"].removeprefix("hada_").removeprefix("lokr_")
        slots.setdefault(module, Slots(source.path, module)).add(slot, key, tensor)
    if unknown or not slots:
        raise unsupported(source.path, unknown or source.tensors)
    parts = {name: _part(source, config, slots[name], modules[name]) for name in slots}
    for name, bias in biases.items():
        trained[f"{name}.bias"] = _with_bias(source, name, bias * parts[name].scale, trained, parameters)
    return Foreign(parts, trained)


def _check_config(source: Source, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind not in ("LORA", "LOHA", "LOKR"):
        fix = "Convert such adapters with the library that made them."
        raise refuse(source.path, "`peft_type`", f"LORA, LOHA or LOKR (supported are {SUPPORTED})", clip(kind), fix)
    for option in _OTHER_MATHS:
        if config.get(option):
            fix = "Such updates are not in the language of specs: merge the adapter with PEFT instead."
            raise refuse(source.path, f"`{option}`", "no such option", clip(config[option]), fix)
    init = config.get("init_lora_weights", config.get("init_weights"))
    if init not in _PLAIN_INITS:
        fix = "PEFT changes the base weights then: save it with `path_initial_model_for_weight_conversion`."
        raise refuse(source.path, "`init_lora_weights`", "an init that leaves the base weights alone", clip(init), fix)


def _part(source: Source, config: Mapping[str, Any], slots: Slots, module: nn.Module) -> Part:
    layer = layer_of(module)
    scale = _scale(source, config, slots)
    if config["peft_type"] == "LORA":
        if layer.groups > 1:
            expected = "an ungrouped convolution, which PEFT's update is of in every case"
            fix = "Such an update is none of the grouped layer's weight: train it anew."
            raise slots.refuse("LoRA", expected, str(layer), fix)
        part = lora_part(slots, layer, scale)
        if not config.get("use_dora"):
            return part
        return replace(part, magnitude=slots.need("magnitude", "down").flatten())
    if config["peft_type"] == "LOHA":
        return loha_part(slots, layer, scale)
    # PEFT takes the Kronecker product of a matrix and the three axes of a whole factor, which torch aligns at the end.
    return lokr_part(slots, layer, scale, inner=layer.kind == "Conv1d" and slots.get("w2") is not None)


def _scale(source: Source, config: Mapping[str, Any], slots: Slots) -> Callable[[int | None], float]:
    """alpha / r, or alpha / sqrt(r), with the layer's own alpha and r where patterns name it."""
    lora = config["peft_type"] == "LORA"
    default = config.get("lora_alpha" if lora else "alpha", 8)
    alpha = _number(source, "alpha", _by_pattern(source, config, "alpha_pattern", slots.layer, default))
    configured = _number(source, "r", _by_pattern(source, config, "rank_pattern", slots.layer, config.get("r", 8)))

    def scale(rank: int | None) -> float:
        if rank is not None and rank != configured and "w2" not in slots.tensors:
            fix = "Keep the config and the tensors of one adapter together."
            raise slots.refuse("rank", f"{configured:g}, as `adapter_config.json` has it", str(rank), fix)
        return alpha / math.sqrt(configured) if lora and config.get("use_rslora") else alpha / configured

    return scale


def _number(source: Source, what: str, value: object) -> float:
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not -_LARGEST < number < _LARGEST or (what == "r" and number < 1):
        expected = "a positive number" if what == "r" else "a finite number"
        raise refuse(source.path, f"`{what}` of the PEFT config", expected, clip(value), "Mend `adapter_config.json`.")
    return float(number)


def _by_pattern(source: Source, config: Mapping[str, Any], key: str, layer: str, default: object) -> object:
    """The value of the first pattern that ends the layer's name, as PEFT looks it up."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, Mapping):
        raise refuse(source.path, f"`{key}`", "a mapping", clip(patterns), "Mend `adapter_config.json`.")
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", layer):
                return value
        except (re.error, OverflowError, RecursionError) as error:
            fix = "Mend `adapter_config.json`."
            raise refuse(source.path, f"`{key}`", "regular expressions", f"{clip(pattern)}: {error}", fix) from error
    return default


def _with_bias(
    source: Source, layer: str, update: Tensor, trained: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> Tensor:
    """The bias of a layer whose `lora_B` has one of its own."""
    base = trained.get(f"{layer}.bias", parameters.get(f"{layer}.bias"))
    if base is None or base.shape != update.shape:
        fix = "Give the layer a bias, zero at first."
        raise refuse(source.path, f"bias of `lora_B` on layer '{layer}'", "a layer with a bias", "one without", fix)
    return base.detach().to(update.dtype) + update.to(base.device)
