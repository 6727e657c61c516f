"""What a file holds besides its updates: trained parameters and running statistics of the base model."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from tnpeft.adapters.distributed import whole
from tnpeft.io.foreign.formats import INCOMPLETE, clip_key
from tnpeft.io.foreign.key_names import dotted
from tnpeft.io.foreign.layer_tensors import wide
from tnpeft.io.foreign.layer_update import LayerUpdate
from tnpeft.io.foreign.source import Source

__all__ = ["beside", "with_biases", "without_bases"]

# What PEFT puts between a module and its parameter: with the adapter's name in old files, which is looked for second.
_BETWEEN = (re.compile(r"\.(base_layer|modules_to_save)\."), re.compile(r"\.(base_layer|modules_to_save\.\w+)\."))
_ORIGINAL = ".original_module."  # the base's own values, beside what was saved
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def beside(
    source: Source, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """The parameters, the running statistics, and the keys that are neither. The base's own buffers stay out.

    Raises AdapterFileError for buffers that have other values: no adapter trains them.
    """
    trained: dict[str, Tensor] = {}
    statistics: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        if _ORIGINAL in key:
            continue
        if name := _named(key, parameters, source.place):
            trained[name] = wide(source.path, source.called(key), tensor)
        elif (name := _named(key, buffers, source.place)) is None:
            unknown.append(key)
        elif torch.equal(buffers[name].detach().cpu().to(tensor.dtype), tensor):
            continue
        elif name.rpartition(".")[2] in _STATISTICS:
            statistics[name] = tensor
        else:
            fix = "An adapter trains no buffers but the running statistics of norms: set this one in the model first."
            what = f"tensor '{clip_key(source.called(key))}'"
            raise source.refuse(what, f"the values of the buffer '{name}' of this model", "others", fix)
    return trained, statistics, unknown


def _named(key: str, known: Mapping[str, Tensor], place: str) -> str | None:
    """The tensor of the model that a key of PEFT's is for, if there is one."""
    names = (dotted(between.sub(".", key), known, place) for between in _BETWEEN)
    return next((name for name in names if name is not None), None)


def without_bases(
    source: Source, parts: Mapping[str, LayerUpdate], trained: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What trained, without the base's weight below an adapter, which PEFT saves with an adapted embedding."""
    kept: dict[str, Tensor] = {}
    for name, value in trained.items():
        if name not in parts and name.removesuffix(".weight") not in parts:
            kept[name] = value
        elif not torch.equal(wide(source.path, name, whole(parameters[name].detach()).cpu()), value):
            fix = "Give the model this weight first: the file has it, and an adapter on top of it."
            raise source.refuse(f"weight '{name}' below an adapter", "that of this model", "another", fix)
    return kept


def with_biases(
    source: Source,
    parts: Mapping[str, LayerUpdate],
    biases: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The biases of layers whose `lora_B` has a bias, which is scaled as the update is."""
    values: dict[str, Tensor] = {}
    for layer, bias in biases.items():
        name = f"{layer}.bias"
        base = trained.get(name, parameters.get(name))
        part = parts.get(layer)
        if part is None:
            raise source.refuse(f"layer '{layer}'", "`lora_A` and `lora_B`", "the bias of `lora_B` alone", INCOMPLETE)
        if base is None or base.shape != bias.shape:
            fix = "Give the layer a bias, zero at first."
            raise source.refuse(f"bias of `lora_B` on layer '{layer}'", "a layer with a bias", "one without", fix)
        update = bias * part.scale
        base = whole(base.detach())
        values[name] = base.to(update.dtype) + update.to(base.device)
    return values
