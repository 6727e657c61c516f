"""Which part of a model PEFT's keys mean: a layer, an embedding, or a parameter of `target_parameters`.

PEFT wraps the module that owns such parameters once for each, in the order of the module's own. So `experts.lora_A`
belongs to the last one, and `experts.base_layer.lora_A` to the one before.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from tnpeft.adapters.parked import LOOKUPS
from tnpeft.errors import AdapterFileError, Problem
from tnpeft.io.files import in_file
from tnpeft.io.foreign.formats import MADE_FOR, clip_key
from tnpeft.io.foreign.key_names import check_layers, dotted, layer_named
from tnpeft.io.foreign.layer_tensors import LayerTensors, Scale, update_of
from tnpeft.io.foreign.layer_update import LayerUpdate
from tnpeft.io.foreign.source import Source
from tnpeft.network import Layer, layer_of
from tnpeft.network.orientation import oriented
from tnpeft.network.signature import kind_of
from tnpeft.surgery.parameters import parameter_problem
from tnpeft.surgery.tree import Slot

__all__ = ["WRAPPED", "Place", "check_places", "is_turned", "layer_at", "orientation_in_peft", "place_of", "update_at"]

WRAPPED = ".base_layer"
_WRAPPED = re.compile(r"\.base_layer(?=\.|$)")
_ROOT = "base_model.model."


@dataclass(frozen=True)
class Place:
    """What one of PEFT's adapters adapts: its `name` here, and the name by which PEFT looks up patterns.

    Parameters have an `orientation`. `by_parameter` says that `target_parameters` names it, even if it is a layer's
    weight.
    """

    name: str
    pattern: str
    orientation: str | None = None
    by_parameter: bool = False


def place_of(
    source: Source,
    key: str,
    written: str,
    modules: Mapping[str, nn.Module],
    targets: Collection[str],
) -> Place:
    """The place of the tensor `key`, whose module the file calls `written`; `targets` are the `target_parameters`.

    Raises AdapterFileError where the model has none.
    """
    plain = written if dotted(written, modules, source.place) is not None else _WRAPPED.sub("", written)
    name = layer_named(source, key, plain, modules)
    pattern, module = plain.removeprefix(_ROOT), modules[name]
    wrapped = [own for own in module._parameters if _is_target(f"{pattern}.{own}", targets)]
    if wrapped:
        depth = _depth(written)
        if depth >= len(wrapped):
            expected = f"one of the {len(wrapped)} parameters of '{name}' that `target_parameters` has"
            raise source.refuse(f"tensor '{clip_key(key)}'", expected, f"the one before {depth} others", MADE_FOR)
        return _parameter(name, wrapped[-1 - depth], f"{pattern}.{wrapped[-1 - depth]}", module)
    return Place(name, pattern)


def _depth(written: str) -> int:
    """How many wrappers a key's module is inside of."""
    depth = 0
    while written.endswith(WRAPPED):
        written, depth = written.removesuffix(WRAPPED), depth + 1
    return depth


def _is_target(name: str, targets: Collection[str]) -> bool:
    """Whether PEFT's `target_parameters` mean a parameter of this name."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _parameter(owner: str, key: str, pattern: str, module: nn.Module) -> Place:
    """The place of a parameter; a layer's weight is that layer's, an embedding's the embedding's."""
    if key == "weight" and (isinstance(module, LOOKUPS) or kind_of(module) is not None):
        return Place(owner, pattern, by_parameter=True)
    tensor: Any = module._parameters[key]
    name = f"{owner}.{key}" if owner else key
    return Place(name, pattern, orientation_in_peft(tensor.shape, module), by_parameter=True)


def orientation_in_peft(shape: Collection[int], owner: nn.Module) -> str | None:
    """The orientation in which PEFT takes a parameter; None for one that it does not adapt."""
    if len(shape) == 3:
        return "e i o" if is_turned(shape, owner) else "e o i"
    return "o i" if len(shape) == 2 else None


def is_turned(shape: Collection[int], owner: nn.Module) -> bool:
    """Whether PEFT takes a stack for one of (inputs, outputs), of which it adds an update of a single one unturned."""
    return len(shape) == 3 and bool(getattr(owner, "is_transposed", False)) and next(iter(shape)) > 1


def check_places(source: Source, places: Collection[Place], modules: Mapping[str, nn.Module]) -> None:
    """Raises AdapterFileError for all that the file adapts and tnpeft cannot."""
    problems = [*_parameter_problems((place for place in places if place.name not in modules), modules)]
    if problems:
        raise AdapterFileError(*in_file(source.path, problems))
    check_layers(source, dict.fromkeys(place.name for place in places if place.name in modules), modules, tables=True)


def _parameter_problems(places: Iterator[Place], modules: Mapping[str, nn.Module]) -> Iterator[Problem]:
    for place in places:
        owner, _, key = place.name.rpartition(".")
        problem = parameter_problem(Slot(place.name, modules[owner], "_parameters", key), place.orientation)
        if problem is not None:
            yield problem


def layer_at(place: Place, modules: Mapping[str, nn.Module], parameters: Mapping[str, Tensor]) -> Layer:
    """The layer, or the stack of layers, that stands at a place that was checked."""
    if place.orientation is not None:
        return oriented(parameters[place.name].shape, place.orientation)
    module = modules[place.name]
    return (
        oriented(parameters[f"{place.name}.weight"].shape, "i o") if isinstance(module, LOOKUPS) else layer_of(module)
    )


def update_at(place: Place, layer: Layer, method: str, slots: LayerTensors, scale: Scale) -> LayerUpdate:
    """The update of what stands at a place. PEFT has the experts of a stack in one matrix, behind each other."""
    if not layer.slices:
        # PEFT takes the Kronecker product of a matrix and the three axes of a whole factor, which torch aligns at the
        # end.
        part = update_of(method, slots, layer, scale, inner=layer.kind == "Conv1d")
        tensors = part.tensors
        if place.by_parameter and layer.turned and place.orientation is None:  # PEFT sees it as it is stored
            tensors = {"up": tensors["down"].T, "down": tensors["up"].T}
        return replace(part, tensors=tensors, orientation=place.orientation)
    for slot, axis in (("down", 0), ("up", 1)):
        shape = tuple(slots.shaped(slot).shape)
        if shape[axis] % layer.slices:
            expected = f"an axis {axis} that {layer.slices} slices divide"
            raise slots.refuse(f"tensor '{clip_key(slots.keys[slot])}'", expected, f"{shape}", MADE_FOR)
    part = update_of(method, slots, layer, lambda rank: scale(rank and rank // layer.slices))
    down, up = part.tensors["down"], part.tensors["up"]
    tensors = {
        "down": down.reshape(layer.slices, -1, down.shape[1]),  # (e, r, i)
        "up": up.reshape(up.shape[0], -1, layer.slices).permute(2, 0, 1),  # (o, r, e) to (e, o, r)
    }
    return replace(part, tensors=tensors, orientation=place.orientation)
