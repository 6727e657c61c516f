"""Reading PEFT's files of the tuners in the table `tuner_rows`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tnpeft.adapters.parked import LOOKUPS
from tnpeft.errors import AdapterFileError, Problem, clip
from tnpeft.io.files import in_file
from tnpeft.io.foreign.beside import beside
from tnpeft.io.foreign.formats import INCOMPLETE, MADE_FOR, ONE_ADAPTER, clip_key
from tnpeft.io.foreign.layer_tensors import wide
from tnpeft.io.foreign.layer_update import Foreign
from tnpeft.io.foreign.peft_places import Place, check_places, place_of
from tnpeft.io.foreign.source import Source
from tnpeft.io.foreign.tuner_rows import rows_of
from tnpeft.io.foreign.tuner_table import Tuner
from tnpeft.io.foreign.tuner_update import TunerUpdate
from tnpeft.recipe.dropout import dropout_of

__all__ = ["read_tuner"]

_ROOT = "base_model"
_MERGE = "Such updates are no spec: merge the adapter with PEFT instead."
_BIAS_NOTE = (
    "one that is trained beside the adapter",
    "PEFT's, which multiplies the bias with the vector",
    "The outputs are the same; training here moves the two apart: such an adapter is not PEFT's any more.",
)
_DROPOUT_NOTE = (
    "an option that has a counterpart here",
    "one of PEFT's in training",
    "The update is the same; training here drops nothing: `dropout=` of `attach` says what it can.",
)


def read_tuner(
    source: Source, modules: Mapping[str, nn.Module], parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> Foreign:
    """The parts by layer and what else was trained. Raises AdapterFileError."""
    config = source.config or {}
    rows = rows_of(config["peft_type"])
    own = {key for row in rows for key in row.keys}
    shared = {key for row in rows for key in row.shared_keys}
    whole = {slot.key for row in rows for slot in row.slots if slot.whole}
    layers: dict[str, dict[str, str]] = {}  # for each module, as the file calls it, the keys by their ends
    once: dict[str, str] = {}
    others: dict[str, Tensor] = {}
    for key in source.tensors:
        module, end = _parts_of(key, own | shared)
        if end is None:
            others[key] = source.tensors[key]
            continue
        ends = once if module == _ROOT else layers.setdefault(module, {})
        if end in ends:
            found = f"'{source.called(ends[end])}' and '{source.called(key)}'"
            raise source.refuse(f"`{end}`", "one tensor", found, ONE_ADAPTER)
        ends[end] = key
    # PEFT may repeat what the model has once at each layer.
    layers = {module: {end: key for end, key in ends.items() if end in own} for module, ends in layers.items()}
    layers = {module: ends for module, ends in layers.items() if ends}
    places = {
        module: place_of(source, next(iter(ends.values())), module, modules, ()) for module, ends in layers.items()
    }
    _check_places(source, places, modules)
    parts: dict[str, TunerUpdate] = {}
    for module, ends in layers.items():
        keys = {end: source.called(key) for end, key in {**once, **ends}.items()}
        tensors = {end: _numbers(source, key, end in whole) for end, key in {**once, **ends}.items()}
        parts[places[module].name] = _part(source, config, rows, tensors, keys, places[module].pattern)
    trained, statistics, unknown = beside(source, others, parameters, buffers)
    if unknown or not parts:
        wanted = ", ".join(
            f"`{end}`" for end in dict.fromkeys(end for row in rows for end in row.keys + row.shared_keys)
        )
        found = ", ".join(f"'{clip_key(source.called(key))}'" for key in unknown[:3]) or "none of them"
        raise source.refuse("tensors", f"those of {rows[0].method}: {wanted}", found, MADE_FOR)
    notes = dict.fromkeys(_notes({part.row for part in parts.values()}, config))
    scaled = dict(_scaled_biases(parts, parameters, trained))
    if scaled:
        notes[Problem("bias of an adapted layer", *_BIAS_NOTE)] = None
    return Foreign(parts, trained | scaled, statistics, notes=tuple(in_file(source.path, notes)))


def _parts_of(key: str, ends: set[str]) -> tuple[str, str | None]:
    """The module and the end of a tuner's key, which has the adapter's name behind it in old files."""
    for end in ends:
        if match := re.fullmatch(rf"(.+)\.{end}(\.(?!weight$)\w+)?(\.weight)?", key):
            return match[1], end
    return key, None


def _check_places(source: Source, places: Mapping[str, Place], modules: Mapping[str, nn.Module]) -> None:
    names: dict[str, str] = {}
    for module, place in places.items():
        if (other := names.setdefault(place.name, module)) != module:
            found = f"tensors of '{other}' and of '{module}'"
            raise source.refuse(f"layer '{place.name}'", "those of one layer of the file", found, MADE_FOR)
        if isinstance(modules.get(place.name), LOOKUPS):
            found = type(modules[place.name]).__name__
            raise source.refuse(f"layer '{place.name}'", "a layer with a weight of its own", found, _MERGE)
    check_places(source, list(places.values()), modules)


def _numbers(source: Source, key: str, whole: bool) -> Tensor:
    """A tensor as cores are; whole numbers, which are places, stay whole."""
    tensor = source.tensors[key]
    if whole and tensor.dtype in (torch.int16, torch.int32, torch.int64) and tensor.layout == torch.strided:
        return tensor
    return wide(source.path, source.called(key), tensor)


def _part(
    source: Source,
    config: Mapping[str, Any],
    rows: tuple[Tuner, ...],
    tensors: dict[str, Tensor],
    keys: dict[str, str],
    name: str,
) -> TunerUpdate:
    for end in rows[0].keys:
        if end not in tensors:
            raise source.refuse(
                "tensors", f"`{end}` beside '{next(iter(keys.values()))}'", "no such tensor", INCOMPLETE
            )
    for end, tensor in tensors.items():
        if not tensor.ndim or not tensor.numel():
            found = f"the shape {tuple(tensor.shape)}"
            raise source.refuse(f"tensor '{keys[end]}'", "at least one axis and one number", found, MADE_FOR)
    _check_options(source, config, rows)
    row = next((row for row in rows if _is_listed(source, config, row, name) and row.when(config, tensors)), None)
    if row is None:
        raise source.refuse(f"PEFT's {rows[0].method}", "one of its forms that are specs", "another one", _MERGE)
    for option, values in row.needs.items():
        if (value := config.get(option, values[0])) not in values:
            expected = f"{values[0]!r}" if len(values) == 1 else f"{values[0]!r}, or another of those that are specs"
            raise source.refuse(f"`{option}`", expected, clip(value), _MERGE)
    given = {"input": config[row.input_dropout]} if row.input_dropout and config.get(row.input_dropout) else {}
    dropout, told = dropout_of(given)
    if told:
        raise AdapterFileError(*in_file(source.path, [problem for _, problem in told]))
    used = {slot.key for slot in row.slots} | {*row.remade}
    tensors = {end: tensor for end, tensor in tensors.items() if end in used}
    return TunerUpdate(row, config, tensors, {end: keys[end] for end in tensors}, dropout)


def _is_listed(source: Source, config: Mapping[str, Any], row: Tuner, name: str) -> bool:
    """Whether a layer has a row's form, if that is what an option says: by an expression, or by ends of names."""
    if row.lists is None:
        return True
    given = config.get(row.lists) or []
    try:
        if isinstance(given, str):
            return re.fullmatch(given, name) is not None
    except (re.error, OverflowError, RecursionError) as error:
        found = f"{clip(given)}: {error}"
        raise source.refuse(f"`{row.lists}`", "a regular expression", found, f"Mend `{source.config_name}`.") from error
    if not isinstance(given, list) or not all(isinstance(each, str) for each in given):
        raise source.refuse(f"`{row.lists}`", "a list of names", clip(given), f"Mend `{source.config_name}`.")
    return name.endswith(tuple(given))


def _check_options(source: Source, config: Mapping[str, Any], rows: tuple[Tuner, ...]) -> None:
    """The options that sizes and scales are made of are numbers."""
    for option in dict.fromkeys(option for row in rows for option in row.numbers):
        value = config.get(option, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            fix = f"Mend `{source.config_name}`."
            raise source.refuse(f"`{option}` of the PEFT config", "a finite number", clip(value), fix)


def _notes(rows: set[Tuner], config: Mapping[str, Any]) -> Iterator[Problem]:
    for row in rows:
        if row.dropout and config.get(row.dropout):
            yield Problem(f"`{row.dropout}`", *_DROPOUT_NOTE)


def _scaled_biases(
    parts: Mapping[str, TunerUpdate], parameters: Mapping[str, Tensor], trained: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The biases that PEFT multiplies with a layer's vector, multiplied."""
    for layer, part in parts.items():
        bias = trained.get(f"{layer}.bias", parameters.get(f"{layer}.bias"))
        if part.row.scales_bias and bias is not None:
            factor = part.tensors[part.row.slots[0].key].flatten()
            if factor.shape == bias.shape:  # else the layer's own check says what does not fit
                yield f"{layer}.bias", bias.detach() * factor.to(bias.device)
