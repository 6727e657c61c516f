"""Reading PEFT's adapters: LoRA, LoHa and LoKr, with what trained beside them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tnpeft.errors import clip
from tnpeft.io.foreign.beside import beside, with_biases
from tnpeft.io.foreign.formats import PEFT_SLOTS, SUPPORTED, unsupported
from tnpeft.io.foreign.key_names import check_layers, dotted, layer_named
from tnpeft.io.foreign.layer_tensors import LayerTensors, tensors_of_layer, update_of, wide
from tnpeft.io.foreign.layer_update import Foreign, LayerUpdate
from tnpeft.io.foreign.source import Source
from tnpeft.network import layer_of

__all__ = ["read_peft"]

_SLOT = re.compile(
    r"(?P<module>.+)\.(?P<slot>lora_(A|B|magnitude_vector|embedding_[AB])|(hada|lokr)_[wt][12](_[ab])?)"
    r"(?P<adapter>\.(?!weight$|bias$)\w+)?(?P<leaf>\.weight|\.bias)?"
)
_ALPHA = re.compile(r"(?P<module>.+)\.(?P<slot>alpha)")
# Options under which an update is no longer scale * B A, or the base weights are not the base model's.
_OTHER_MATHS = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config"),
    *("target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config"),
)
_LARGEST = 1e30  # beyond any alpha or rank, and within fp32
_TOGETHER = "Keep the config and the tensors of one adapter together."
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "lycoris", "true", "false")


def read_peft(
    source: Source, modules: Mapping[str, nn.Module], parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> Foreign:
    """The parts by layer and what else was trained. Raises AdapterFileError."""
    config = source.config or {}
    _check_config(source, config)
    keys = {key: match for key in source.tensors if (match := _SLOT.fullmatch(key))}
    adapted = {match["module"] for match in keys.values()}
    alphas = {key: match for key in source.tensors if (match := _ALPHA.fullmatch(key)) and match["module"] in adapted}
    keys |= alphas
    layers = {key: layer_named(source, key, _around(source, keys[key]["module"], modules), modules) for key in keys}
    check_layers(source, dict.fromkeys(layers.values()), modules)
    slots: dict[str, LayerTensors] = {}
    biases: dict[str, Tensor] = {}
    for key, match in keys.items():
        name, tensor = layers[key], source.tensors[key]
        if key not in alphas and match["leaf"] == ".bias":
            biases[name] = wide(source.path, source.called(key), tensor)
        else:
            slot = PEFT_SLOTS.get(match["slot"], match["slot"].removeprefix("hada_").removeprefix("lokr_"))
            written = match["module"].removeprefix("base_model.model.")
            tensors_of_layer(slots, source.path, name, written).add(slot, source.called(key), tensor)
    others = {key: tensor for key, tensor in source.tensors.items() if key not in keys}
    trained, statistics, unknown = beside(source, others, parameters, buffers)
    if unknown or not slots:
        raise unsupported(source.path, map(source.called, unknown or source.tensors))
    parts = {name: _part(source, config, slots[name], modules[name]) for name in slots}
    trained |= with_biases(source, parts, biases, trained, parameters)
    return Foreign(parts, trained, statistics)


def _around(source: Source, written: str, modules: Mapping[str, nn.Module]) -> str:
    """The adapted module itself: PEFT adapts an attention's projection inside of the attention that it adapts."""
    outer = written.partition(".base_layer")[0]
    return written if dotted(outer, modules, source.place) is None else outer


def _check_config(source: Source, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind not in ("LORA", "LOHA", "LOKR"):
        fix = "Convert such adapters with the library that made them."
        raise source.refuse("`peft_type`", f"LORA, LOHA or LOKR (supported are {SUPPORTED})", clip(kind), fix)
    for option in _OTHER_MATHS:
        if config.get(option):
            fix = "Such updates are not in the language of specs: merge the adapter with PEFT instead."
            raise source.refuse(f"`{option}`", "no such option", clip(config[option]), fix)
    init = config.get("init_lora_weights", config.get("init_weights"))
    if init not in _PLAIN_INITS:
        fix = "PEFT changes the base weights then: save it with `path_initial_model_for_weight_conversion`."
        raise source.refuse("`init_lora_weights`", "an init that leaves the base weights alone", clip(init), fix)


def _part(source: Source, config: Mapping[str, Any], slots: LayerTensors, module: nn.Module) -> LayerUpdate:
    layer = layer_of(module)
    scale = _scale(source, config, slots)
    if config["peft_type"] == "LORA" and layer.groups > 1:
        expected = "an ungrouped convolution, which PEFT's update is of in every case"
        fix = "Such an update is none of the grouped layer's weight: train it anew."
        raise slots.refuse("LoRA", expected, str(layer), fix)
    # PEFT takes the Kronecker product of a matrix and the three axes of a whole factor, which torch aligns at the end.
    part = update_of(config["peft_type"].lower(), slots, layer, scale, inner=layer.kind == "Conv1d")
    if config["peft_type"] == "LORA" and config.get("use_dora"):
        return replace(part, magnitude=slots.need("magnitude").flatten())
    return part


def _scale(source: Source, config: Mapping[str, Any], slots: LayerTensors) -> Callable[[int | None], float]:
    """alpha / r, or alpha / sqrt(r), with the layer's own alpha and r where patterns name it."""
    lora = config["peft_type"] == "LORA"
    default = config.get("lora_alpha" if lora else "alpha", 8)
    alpha = _number(source, "alpha", _by_pattern(source, config, "alpha_pattern", slots.written, default))
    stored = slots.tensors.get("alpha")
    if stored is not None and stored.flatten().tolist() != [alpha]:
        found = f"{stored.flatten()[:4].tolist()} in '{slots.keys['alpha']}'"
        raise slots.refuse("alpha", f"{alpha:g}, as `{source.config_name}` has it", found, _TOGETHER)
    configured = _number(source, "r", _by_pattern(source, config, "rank_pattern", slots.written, config.get("r", 8)))

    def scale(rank: int | None) -> float:
        if rank is not None and rank != configured and "w2" not in slots.tensors:
            raise slots.refuse("rank", f"{configured:g}, as `{source.config_name}` has it", str(rank), _TOGETHER)
        return alpha / math.sqrt(configured) if lora and config.get("use_rslora") else alpha / configured

    return scale


def _number(source: Source, what: str, value: object) -> float:
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not -_LARGEST < number < _LARGEST or (what == "r" and number < 1):
        expected = "a positive number" if what == "r" else "a finite number"
        raise source.refuse(f"`{what}` of the PEFT config", expected, clip(value), f"Mend `{source.config_name}`.")
    return float(number)


def _by_pattern(source: Source, config: Mapping[str, Any], key: str, layer: str, default: object) -> object:
    """The value of the first pattern that ends the layer's name in PEFT's model, as PEFT looks it up."""
    patterns, mend = config.get(key) or {}, f"Mend `{source.config_name}`."
    if not isinstance(patterns, Mapping):
        raise source.refuse(f"`{key}`", "a mapping", clip(patterns), mend)
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", layer):
                return value
        except (re.error, OverflowError, RecursionError) as error:
            raise source.refuse(f"`{key}`", "regular expressions", f"{clip(pattern)}: {error}", mend) from error
    return patterns.get(layer, default)
