"""What is attached to a model, for reports and files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from tnpeft.adapters import Adapter
from tnpeft.adapters.parked import MANGLED
from tnpeft.execution import AdaptedLayer
from tnpeft.surgery.adapted_model import AdapterRecord, adapted, find, known_adapter
from tnpeft.surgery.trained import all_tied
from tnpeft.surgery.tree import places, slots, ties, unwrapped

__all__ = [
    "adapters_of",
    "base_tensors",
    "layers_of",
    "names_of",
    "parameter_groups",
    "plain_keys",
    "plain_state_dict",
    "record_of",
    "scales_of",
    "statistics_of",
    "trained_of",
]


def names_of(model: nn.Module) -> tuple[str, ...]:
    """The names of the attached adapters, oldest first. Raises AttachError where nothing is attached."""
    return tuple(adapted(model)[1].adapters)


def scales_of(model: nn.Module) -> dict[str, float]:
    """The acting adapters with their scales, as `activate` takes them. Raises AttachError where nothing is attached."""
    return dict(adapted(model)[1].active)


def record_of(model: nn.Module, name: str) -> AdapterRecord:
    """The record of one adapter. Raises AttachError for an unknown name."""
    return known_adapter(adapted(model)[1], name)


def adapters_of(model: nn.Module, name: str) -> dict[str, Adapter]:
    """The compiled adapters by the layer they adapt, in the order they were attached in."""
    return {target: layer.adapter(name) for target, layer in layers_of(model, name).items()}


def layers_of(model: nn.Module, name: str) -> dict[str, AdaptedLayer]:
    """The adapted layers of an adapter by name, in the order they were attached in."""
    root, state = adapted(model)
    record = known_adapter(state, name)
    wrappers = {place.name: place.module for place in places(root) if isinstance(place.module, AdaptedLayer)}
    return {target: wrappers[target] for target in record.targets}


def trained_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The adapter's own copies of the parameters that train beside its cores, by the first of their names."""
    return _copies(model, name, parameters=True)


def statistics_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The adapter's own running statistics of norms, by the first of their names."""
    return _copies(model, name, parameters=False)


def base_tensors(root: nn.Module) -> dict[str, Tensor]:
    """Every parameter and saved buffer by the name it has in the plain model, for its shape and type."""
    buffers = {
        name: slot
        for name, slot in slots(root, "_buffers").items()
        if slot.key not in slot.owner._non_persistent_buffers_set
    }
    return {name: slot.tensor for name, slot in {**slots(root), **buffers}.items()}


def parameter_groups(root: nn.Module) -> tuple[tuple[str, ...], ...]:
    """The names of every parameter of the plain model; the names of a tied one are together."""
    return tuple(ties(slots(root)).values())


def plain_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict of the plain model: under the names of the model before `attach`, without adapters' tensors.

    The values are the base's own or, of a merged model, the effective ones. Raises AttachError where two parts of
    `model` are adapted on their own.
    """
    root = (find(model) or (unwrapped(model), None))[0]
    state: dict[str, Any] = root.state_dict()
    return {name: state[key] for key, name in plain_keys(root, state).items()}


def plain_keys(root: nn.Module, state: Iterable[str]) -> dict[str, str]:
    """Those keys of a state dict of `root` that belong to the plain model, each with its plain name."""
    hung = places(root)
    names = {"": ""} | {place.path: place.name for place in hung}
    layers = [(place.name, place.module) for place in hung if isinstance(place.module, AdaptedLayer)]
    below = tuple(f"{name}.{part}." for name, layer in layers for part in ("adapters", *layer.replaced_parts))
    plain = {key: _plain_key(key, names) for key in state}
    return {
        key: name
        for key, name in plain.items()
        if not key.rpartition(".")[2].startswith(MANGLED) and not name.startswith(below)
    }


def _plain_key(key: str, names: Mapping[str, str]) -> str:
    """A key of a state dict by the plain name of the innermost module that it leads through."""
    path = key
    while path not in names:
        path = path.rpartition(".")[0]
    rest = key.removeprefix(path).removeprefix(".")
    return f"{names[path]}.{rest}" if names[path] else rest


def _copies(model: nn.Module, name: str, parameters: bool) -> dict[str, Tensor]:
    root, state = adapted(model)
    known_adapter(state, name)
    return {
        tied.names[0]: tied.copy_of(name)
        for tied in all_tied(root, state)
        if name in tied.trainers and tied.is_parameter is parameters
    }
