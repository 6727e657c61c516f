"""Reading the files of diffusers, LyCORIS, kohya's sd-scripts and ComfyUI: of one model, or of a pipeline's several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tnpeft.errors import Problem
from tnpeft.io.foreign.components import components
from tnpeft.io.foreign.formats import ONE_ADAPTER
from tnpeft.io.foreign.layer_update import Foreign, LayerUpdate
from tnpeft.io.foreign.lycoris import read_lycoris
from tnpeft.io.foreign.peft import read_peft
from tnpeft.io.foreign.source import Source
from tnpeft.io.foreign.spelling import respelled
from tnpeft.io.foreign.tuner_update import TunerUpdate

__all__ = ["read_parts"]


def read_parts(
    source: Source, modules: Mapping[str, nn.Module], parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> Foreign:
    """What the file says of every part of the pipeline. Raises AdapterFileError.

    If diffusers' header has PEFT's config of a part, it gives the scales; else the `alpha` of each layer does, and
    without one the scale is 1.
    """
    parts: dict[str, LayerUpdate | TunerUpdate] = {}
    trained: dict[str, Tensor] = {}
    statistics: dict[str, Tensor] = {}
    copied: set[str] = set()
    notes: list[Problem] = []
    for component in components(_respelled(source), modules):
        if component.config:
            component = replace(component, config=_whole(component.config, component.tensors))
            foreign = read_peft(component, modules, parameters, buffers)
        else:
            foreign = read_lycoris(component, modules, parameters)
        if twice := parts.keys() & foreign.parts:
            found = f"tensors of '{min(twice)}' under two prefixes"
            raise source.refuse("layers", "each once", found, ONE_ADAPTER)
        parts |= foreign.parts
        trained |= foreign.trained
        statistics |= foreign.statistics
        copied |= foreign.copied
        notes += foreign.notes
    return Foreign(parts, trained, statistics, frozenset(copied), tuple(dict.fromkeys(notes)))


def _respelled(source: Source) -> Source:
    tensors: dict[str, Tensor] = {}
    written: dict[str, str] = {}
    for key, tensor in source.tensors.items():
        new = respelled(key)
        if new in tensors:
            found = f"'{written[new]}' and '{key}'"
            raise source.refuse(f"tensor '{new}'", "one", found, ONE_ADAPTER)
        tensors[new], written[new] = tensor, key
    return replace(source, tensors=tensors, written=written)


def _whole(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A header's config, whose method diffusers sees from the keys."""
    method = "LOKR" if any(".lokr_" in key for key in tensors) else "LORA"
    return {"peft_type": method, **config}
