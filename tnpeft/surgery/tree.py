"""A model's tree with the names it has when nothing is adapted."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from tnpeft.adapters.offload import store
from tnpeft.adapters.parked import MANGLED, acting, own, parked_key
from tnpeft.adapters.parked_states import note_values
from tnpeft.execution import AdaptedLayer, AdaptedParameter

__all__ = [
    "Place",
    "Slot",
    "adapted_layers",
    "places",
    "plain_modules",
    "plain_name",
    "plain_parameters",
    "slots",
    "ties",
    "unwrapped",
]


# Modules that only run another one, under these keys, have no place in its name: those of `torch.compile`,
# FullyShardedDataParallel and activation checkpointing.
_COMPILED = "_orig_mod"
_SKIPPED = (_COMPILED, "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class Place(NamedTuple):
    """A module's place, `parent._modules[key]`; `name` is its plain name, `path` that in `named_modules`."""

    name: str
    parent: nn.Module
    key: str
    module: nn.Module
    path: str

    def put(self, module: nn.Module | None) -> None:
        """Put another module in this place; with None, remove the one that is there."""
        if module is None:
            self.parent._modules.pop(self.key, None)
            return
        self.parent._modules[self.key] = module
        initialise = getattr(type(self.parent), "_initialize", None) if self.key == _COMPILED else None
        if initialise is not None:
            initialise(self.parent)  # it holds the function that it compiles, that of the module before


class Slot(NamedTuple):
    """A tensor's place: in the owner's `_parameters` or `_buffers`; `name` is its plain name."""

    name: str
    owner: nn.Module
    table: str
    key: str

    @property
    def tensor(self) -> Tensor:
        """The base's own tensor."""
        return own(self.owner, self.table, self.key)

    @property
    def acting(self) -> Tensor:
        """The tensor that the owner computes with."""
        return acting(self.owner, self.table, self.key)

    def put(self, tensor: Tensor) -> None:
        self.owner.__dict__[self.table][self.key] = tensor

    def beside(self, who: str) -> Tensor | None:
        """The tensor of `who` that is kept beside the base's own."""
        tensor: Tensor | None = self.owner.__dict__[self.table].get(parked_key(who, self.key))
        return tensor

    def put_beside(self, who: str, tensor: Tensor | None) -> None:
        """Keep a tensor of `who` beside the base's own; with None, remove it."""
        store(self.owner, self.table, parked_key(who, self.key), tensor)
        note_values(self.owner, self.table, parked_key(who, self.key))


def places(root: nn.Module) -> list[Place]:
    """Every place below `root`, for a module with two names both; below an adapted layer, the places in its base.

    The layer that adapts a parameter has the parameter's name, or its embedding's. A wrapper that only runs another
    module has the same name as that one, and comes first.
    """
    below: list[Place] = []
    _add_places(root, "", "", below)
    return below


def _add_places(module: nn.Module, prefix: str, path: str, below: list[Place]) -> None:
    for key, child in module._modules.items():
        if child is None:
            continue
        skipped = key in _SKIPPED and _only_runs(module, key)
        if skipped and not prefix and not child._modules:
            skipped = False  # a layer needs a name
        name = prefix.removesuffix(".") if skipped else prefix + key
        if isinstance(child, AdaptedParameter):
            name = prefix.removesuffix(".") if child.base.is_whole else prefix + child.base.key
            below.append(Place(name, module, key, child, path + key))
            continue
        below.append(Place(name, module, key, child, path + key))
        inner = child.__dict__.get("_base", child)  # of an adapted layer: what the base holds
        if inner._modules:
            _add_places(inner, f"{name}." if name else "", f"{path}{key}.", below)


def _only_runs(module: nn.Module, key: str) -> bool:
    """Whether a module holds nothing but another one, under a wrapper's key."""
    return key in _SKIPPED and len(module._modules) == 1 and not module._parameters and not module._buffers


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers of `torch.compile`, DistributedDataParallel and DataParallel, if there are any."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif _COMPILED in model._modules and _only_runs(model, _COMPILED):
            model = model.get_submodule(_COMPILED)
        else:
            return model


def plain_name(name: str) -> str:
    """A name from `named_modules` or `named_parameters`, without the steps of wrappers that only run another module."""
    return ".".join(part for part in name.split(".") if part not in _SKIPPED)


def plain_modules(root: nn.Module) -> dict[str, nn.Module]:
    """Every module by its plain name, with base layers for adapted ones; a module with two names is under both."""
    modules = {"": root}
    for place in places(root):
        if not isinstance(place.module, AdaptedParameter):
            modules[place.name] = place.module.base if isinstance(place.module, AdaptedLayer) else place.module
    return modules


def slots(root: nn.Module, table: str = "_parameters") -> dict[str, Slot]:
    """Every parameter (or buffer) of the plain model by name, tied ones under each of their names."""
    known: dict[str, Slot] = {}
    for prefix, module in plain_modules(root).items():
        for key, tensor in module.__dict__[table].items():
            if tensor is not None and not key.startswith(MANGLED):
                name = f"{prefix}.{key}" if prefix else key
                known[name] = Slot(name, module, table, key)
    return known


def ties(known: dict[str, Slot]) -> dict[int, tuple[str, ...]]:
    """All names of each tensor, by the tensor's `id`, in the order of the tree."""
    names: dict[int, tuple[str, ...]] = {}
    for name, slot in known.items():
        key = id(slot.tensor)
        names[key] = (*names.get(key, ()), name)
    return names


def plain_parameters(root: nn.Module) -> dict[str, Tensor]:
    """The tensor that acts as each parameter, by its name in the plain model; tied ones under each of their names."""
    return {name: slot.acting for name, slot in slots(root).items()}


def adapted_layers(root: nn.Module) -> list[AdaptedLayer]:
    """Every adapted layer, once."""
    return [module for module in root.modules() if isinstance(module, AdaptedLayer)]
