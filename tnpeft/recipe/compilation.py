"""From the layers and parameters that a recipe claims to their adapters, before these go on a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from tnpeft.adapters import Adapter, Captured, Sharing, memory_problems
from tnpeft.adapters.base_weight import never_called
from tnpeft.adapters.parked import ParameterLayer
from tnpeft.errors import AttachError, BindError, Problem
from tnpeft.network import Network
from tnpeft.network.dropout import Dropout, dropout_problems
from tnpeft.recipe.given_values import Start, given_values
from tnpeft.recipe.model import Entry
from tnpeft.schedule import check_mode

__all__ = ["bound_layers", "compiled_layers"]


def bound_layers(
    modules: Mapping[str, nn.Module | ParameterLayer], claimed: Mapping[str, Entry], mode: str
) -> dict[str, Network]:
    """One network per layer (once for a layer with two names); every layer's mistakes are collected.

    No weight is read yet.
    """
    check_mode(mode)
    networks: dict[str, Network] = {}
    names: dict[int, str] = {}
    problems: list[Problem] = []
    for name, entry in claimed.items():
        if names.setdefault(id(modules[name]), name) != name:
            continue
        try:
            layer = modules[name]
            bound = layer.signature if isinstance(layer, ParameterLayer) else layer
            networks[name] = entry.spec.bind(bound, **entry.params_of(name))
        except BindError as error:
            problems += _of_layer(name, error)
    problems += memory_problems(networks, modules, mode)
    for name, network in networks.items():
        if dropout := claimed[name].dropout:
            problems += _dropout_problems(name, network, modules[name], dropout)
    if problems:
        raise AttachError(*problems)
    return networks


def compiled_layers(
    networks: Mapping[str, Network],
    modules: Mapping[str, nn.Module | ParameterLayer],
    claimed: Mapping[str, Entry],
    captured: Mapping[str, Captured],
    seed: int | None,
    mode: str,
    autotune: bool,
    start: Start | None = None,
) -> dict[str, Adapter]:
    """The adapters of bound layers; every layer's mistakes are collected. `start` gives first values of cores."""
    problems: list[Problem] = []
    given: Mapping[str, Mapping[str, Tensor]] = {}
    if start is not None:
        names = {id(modules[name]): name for name in networks}
        given = given_values(start, networks, captured, {name: names[id(modules[name])] for name in claimed})
    sharing = Sharing()
    adapters: dict[str, Adapter] = {}
    for name, network in networks.items():
        layer = modules[name]
        # A parameter is read: nobody knows the input of its layer.
        is_read = isinstance(layer, ParameterLayer) and not layer.is_whole
        try:
            adapters[name] = Adapter(
                network,
                layer,
                seed=seed,
                name=name,
                mode="dense" if is_read else mode,
                autotune=autotune,
                sharing=sharing,
                captured=captured[name],
                dropout=claimed[name].dropout,
                given=given.get(name),
            )
        except BindError as error:
            problems += _of_layer(name, error)
    if problems:
        raise AttachError(*problems)
    return adapters


def _dropout_problems(
    name: str, network: Network, layer: nn.Module | ParameterLayer, dropout: Dropout
) -> list[Problem]:
    """Why a layer cannot have this dropout."""
    if found := never_called(layer):
        fix = "Exclude it, or adapt it by another entry of a recipe, or under another name, without `dropout`."
        return [Problem("`dropout`", "a layer whose input is seen", found, fix, layers=(name,))]
    return [replace(problem, layers=(name,)) for problem in dropout_problems(network.plain, dropout)]


def _of_layer(name: str, error: BindError) -> list[Problem]:
    return [replace(problem, layers=(name,)) for problem in error.problems]
