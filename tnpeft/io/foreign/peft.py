"""Reading PEFT's adapters: LoRA, LoHa and LoKr on layers, embeddings and parameters, and what else trained."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tnpeft.adapters.base_weight import never_called
from tnpeft.adapters.parked import LOOKUPS
from tnpeft.errors import AdapterFileError, Problem, clip
from tnpeft.io.files import in_file
from tnpeft.io.foreign.beside import beside, with_biases, without_bases
from tnpeft.io.foreign.formats import MADE_FOR, PEFT_DROPOUTS, PEFT_SLOTS, SUPPORTED, clip_key, unsupported
from tnpeft.io.foreign.layer_tensors import LayerTensors, tensors_of_layer, wide
from tnpeft.io.foreign.layer_update import Foreign, LayerUpdate
from tnpeft.io.foreign.peft_places import Place, check_places, layer_at, place_of, update_at
from tnpeft.io.foreign.peft_starts import STARTS, started_at
from tnpeft.io.foreign.source import Source
from tnpeft.io.foreign.tuner_reading import read_tuner
from tnpeft.io.foreign.tuner_rows import METHODS, rows_of
from tnpeft.network import Layer
from tnpeft.network.dropout import Dropout
from tnpeft.recipe.dropout import dropout_of

__all__ = ["read_peft"]

_SLOT = re.compile(
    r"(?P<module>.+)\.(?P<slot>lora_(A|B|magnitude_vector|embedding_[AB])|(hada|lokr)_[wt][12](_[ab])?)"
    r"(?P<adapter>\.(?!weight$|bias$)\w+)?(?P<leaf>\.weight|\.bias)?"
)
_ALPHA = re.compile(r"(?P<module>.+)\.(?P<slot>alpha)")
# Options under which an update is no longer scale * B A, or the base weights are not the base model's.
_OTHER_MATHS = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config"),
    *("trainable_token_indices", "use_bdlora", "use_qalora", "velora_config"),
)
_LARGEST = 1e30  # beyond any alpha or rank, and within fp32
_TOGETHER = "Keep the config and the tensors of one adapter together."
_ROWS = "rank_dropout"  # of LoHa and LoKr
_NO_COUNTERPART = (
    "an option that has a counterpart here",
    "PEFT's, which drops rows of an update",
    "The update is the same; training here drops none: `dropout={'bond': ...}` of `attach` drops entries of bonds.",
)
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "lycoris", "true", "false")


def read_peft(
    source: Source, modules: Mapping[str, nn.Module], parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> Foreign:
    """The parts by layer or parameter and what else was trained. Raises AdapterFileError."""
    config = source.config or {}
    if source.format == "peft" and rows_of(config.get("peft_type")):
        return read_tuner(source, modules, parameters, buffers)
    _check_config(source, config)
    dropout, notes = _dropout(source, config)
    keys = {key: match for key in source.tensors if (match := _SLOT.fullmatch(key))}
    adapted = {match["module"] for match in keys.values()}
    alphas = {key: match for key in source.tensors if (match := _ALPHA.fullmatch(key)) and match["module"] in adapted}
    keys |= alphas
    targets = _names(source, config, "target_parameters")
    places: dict[str, Place] = {}  # by the modules' names in the file
    for key, match in keys.items():
        if match["module"] not in places:
            places[match["module"]] = place_of(source, key, match["module"], modules, targets)
    check_places(source, list(places.values()), modules)
    slots: dict[str, LayerTensors] = {}
    biases: dict[str, Tensor] = {}
    for key, match in keys.items():
        place, tensor = places[match["module"]], source.tensors[key]
        if key not in alphas and match["leaf"] == ".bias":
            biases[place.name] = wide(source.path, source.called(key), tensor)
        else:
            _check_form(source, key, match["slot"], place, modules)
            slot = PEFT_SLOTS.get(match["slot"], match["slot"].removeprefix("hada_").removeprefix("lokr_"))
            written = match["module"].removeprefix("base_model.model.")
            tensors_of_layer(slots, source.path, place.name, written).add(slot, source.called(key), tensor)
    others = {key: tensor for key, tensor in source.tensors.items() if key not in keys}
    trained, statistics, unknown = beside(source, others, parameters, buffers)
    if unknown or not slots:
        raise unsupported(source.path, map(source.called, unknown or source.tensors))
    standing = {place.name: place for place in places.values()}
    bound = {name: layer_at(standing[name], modules, parameters) for name in slots}
    parts = {name: _part(source, config, slots[name], standing[name], bound[name]) for name in slots}
    parts = started_at(source, config, parts, bound, parameters)
    trained = without_bases(source, parts, trained, parameters) | with_biases(
        source, parts, biases, trained, parameters
    )
    if dropout is not None:
        seen = {name: name in modules and _is_called(modules[name]) for name in parts}
        parts = {name: replace(part, dropout=dropout) if seen[name] else part for name, part in parts.items()}
    saved = tuple(_names(source, config, "modules_to_save"))
    copied = frozenset(name for name in trained if any(module.endswith(saved) for module in _around(name)))
    return Foreign(parts, trained, statistics, copied, notes)


def _around(name: str) -> Iterator[str]:
    """The modules that a parameter is in, from the outermost one."""
    return itertools.accumulate(name.split(".")[:-1], "{}.{}".format)


def _is_called(module: nn.Module) -> bool:
    """Whether a layer's own calls can leave something out: PEFT passes all others by."""
    return not isinstance(module, LOOKUPS) and never_called(module) is None


def _names(source: Source, config: Mapping[str, Any], key: str) -> list[str]:
    """A list of names in the config."""
    names = config.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise source.refuse(f"`{key}`", "a list of names", clip(names), f"Mend `{source.config_name}`.")
    return names


def _check_form(source: Source, key: str, slot: str, place: Place, modules: Mapping[str, nn.Module]) -> None:
    """Refuse an embedding's tensors elsewhere, and others on an embedding but by `target_parameters`."""
    table = isinstance(modules.get(place.name), LOOKUPS) and not place.by_parameter
    if slot.startswith("lora_embedding") != (table and slot != "lora_magnitude_vector"):
        expected = "`lora_embedding_A` and `lora_embedding_B`" if table else "`lora_A` and `lora_B`"
        what = f"tensor '{clip_key(source.called(key))}' of '{place.name}'"
        raise source.refuse(what, f"{expected}, as PEFT has them there", f"`{slot}`", MADE_FOR)


def _dropout(source: Source, config: Mapping[str, Any]) -> tuple[Dropout | None, tuple[Problem, ...]]:
    """What training left out, and what of it has no counterpart here. Raises AdapterFileError."""
    known = PEFT_DROPOUTS[config["peft_type"]]
    dropout, told = dropout_of({name: config[option] for option, name in known.items() if config.get(option)})
    if told:
        raise AdapterFileError(*in_file(source.path, [problem for _, problem in told]))
    notes = [Problem(f"`{_ROWS}`", *_NO_COUNTERPART)] if config.get(_ROWS) else []
    return dropout, tuple(in_file(source.path, notes))


def _check_config(source: Source, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind not in ("LORA", "LOHA", "LOKR"):
        fix = "Convert such adapters with the library that made them."
        expected = f"LORA, LOHA or LOKR (supported are {SUPPORTED})"
        if source.format == "peft":
            expected = f"one of LORA, LOHA, LOKR, {', '.join(METHODS)}"
        raise source.refuse("`peft_type`", expected, clip(kind), fix)
    for option in _OTHER_MATHS:
        if config.get(option):
            fix = "Such updates are not in the language of specs: merge the adapter with PEFT instead."
            raise source.refuse(f"`{option}`", "no such option", clip(config[option]), fix)
    init = config.get("init_lora_weights", config.get("init_weights"))
    if init not in _PLAIN_INITS and not (kind == "LORA" and str(init).lower() in STARTS):
        fix = "PEFT changes the base weights then: save it with `path_initial_model_for_weight_conversion`."
        raise source.refuse("`init_lora_weights`", "an init that leaves the base weights alone", clip(init), fix)


def _part(source: Source, config: Mapping[str, Any], slots: LayerTensors, place: Place, layer: Layer) -> LayerUpdate:
    scale = _scale(source, config, slots, place.pattern)
    if config["peft_type"] == "LORA" and layer.groups > 1:
        expected = "an ungrouped convolution, which PEFT's update is of in every case"
        fix = "Such an update is none of the grouped layer's weight: train it anew."
        raise slots.refuse("LoRA", expected, str(layer), fix)
    part = update_at(place, layer, config["peft_type"].lower(), slots, scale)
    if config["peft_type"] == "LORA" and config.get("use_dora"):
        return replace(part, magnitude=slots.need("magnitude").flatten())
    return part


def _scale(
    source: Source, config: Mapping[str, Any], slots: LayerTensors, pattern: str
) -> Callable[[int | None], float]:
    """alpha / r, or alpha / sqrt(r), with the layer's own alpha and r where patterns name it."""
    lora = config["peft_type"] == "LORA"
    default = config.get("lora_alpha" if lora else "alpha", 8)
    alpha = _number(source, "alpha", _by_pattern(source, config, "alpha_pattern", pattern, default))
    stored = slots.tensors.get("alpha")
    if stored is not None and stored.flatten().tolist() != [alpha]:
        found = f"{stored.flatten()[:4].tolist()} in '{slots.keys['alpha']}'"
        raise slots.refuse("alpha", f"{alpha:g}, as `{source.config_name}` has it", found, _TOGETHER)
    configured = _number(source, "r", _by_pattern(source, config, "rank_pattern", pattern, config.get("r", 8)))

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
