"""One layer's update by one of PEFT's tuners, and the adapter that it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tnpeft.adapters import Adapter, memory_problems
from tnpeft.adapters.base_weight import base_weight
from tnpeft.adapters.parked import ParameterLayer
from tnpeft.adapters.places import place_problem
from tnpeft.adapters.sharing import Sharing
from tnpeft.errors import BindError, Problem
from tnpeft.io.foreign.formats import INCOMPLETE, MADE_FOR
from tnpeft.io.foreign.tuner_table import Tuner
from tnpeft.network import Layer, Network, layer_of, load_spec
from tnpeft.network.dropout import Dropout
from tnpeft.schedule import DEFAULT_MODE

__all__ = ["TunerUpdate", "differs", "kind_problem", "tuner_adapter"]

_REMADE = 1e-2  # relative to the largest number: what follows from the weight may have been made of a narrower one


@dataclass(frozen=True)
class TunerUpdate:
    """A layer's tensors by the ends of their keys, those of the model among them; `keys` are whole keys."""

    row: Tuner
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    keys: Mapping[str, str] = field(default_factory=dict)
    dropout: Dropout | None = None
    orientation: str | None = None  # no tuner stands on a parameter


def tuner_adapter(part: TunerUpdate, module: nn.Module | ParameterLayer, name: str, sharing: Sharing) -> Adapter:
    """The adapter of one layer with the file's values. Raises BindError where they do not fit it or each other."""
    layer, row = layer_of(module) if isinstance(module, nn.Module) else module.signature, part.row
    if problem := kind_problem(row, layer):
        raise BindError(problem)
    for key in (*row.keys, *row.shared_keys):
        if key not in part.tensors:
            beside = next(iter(part.keys.values()))
            raise BindError(Problem("tensors", f"`{key}` beside '{beside}'", "no such tensor", INCOMPLETE))
    if fault := row.misfit(layer, part.tensors):
        raise BindError(Problem(f"PEFT's {row.method}", *fault, MADE_FOR))
    network = load_spec(row.spec).bind(layer, **row.params(part.config, part.tensors, layer))
    cores = _cores(part, network)
    _check_remade(part, module, network)
    if problem := place_problem(network, cores):
        raise BindError(problem)
    if problems := [*memory_problems({name: network}, {name: module}, DEFAULT_MODE)]:
        raise BindError(*problems)
    adapter = Adapter(network, module, name=name, initialise=False, sharing=sharing, dropout=part.dropout)
    if any(value.dtype == torch.float64 for value in cores.values()):
        adapter.double()
    wanted = adapter.state_dict()
    copies = {core: torch.full_like(cores[core], value) for core, value in row.copy.items()}
    values = {f"core_{core}": value for core, value in cores.items()}
    values |= {f"start_{core}": value for core, value in copies.items()}
    adapter.load_state_dict({key: value for key, value in values.items() if key in wanted})
    return adapter


def kind_problem(row: Tuner, layer: Layer) -> Problem | None:
    """Why a tuner cannot adapt a layer here, although PEFT's may."""
    plain = layer.kind in row.kinds and not layer.turned and layer.groups == 1 and not layer.slices
    if plain:
        return None
    fix = "Leave such layers out, or merge the adapter with PEFT instead."
    return Problem(f"PEFT's {row.method}", f"one of {', '.join(row.kinds)}, stored as (out, in)", str(layer), fix)


def _cores(part: TunerUpdate, network: Network) -> dict[str, Tensor]:
    """All cores but the weight, in their own shapes."""
    cores = part.row.made(part.config, network.layer, part.tensors)
    shapes = {core.name: core.shape for core in network.cores}
    for slot in part.row.slots:
        tensor = part.tensors[slot.key]
        try:
            core = slot.form.read(tensor if slot.item is None else tensor[slot.item], network.layer)
        except (IndexError, RuntimeError):
            core = tensor  # whose shape is then said
        if tuple(core.shape) != shapes[slot.core]:
            found = f"{tuple(core.shape)}" if core is tensor else f"{tuple(core.shape)} of {tuple(tensor.shape)}"
            expected = f"{shapes[slot.core]}, as {network.layer} has it for the options of the config"
            raise BindError(Problem(f"tensor '{part.keys[slot.key]}'", expected, found, MADE_FOR))
        cores[slot.core] = core
    return cores


def _check_remade(part: TunerUpdate, module: nn.Module | ParameterLayer, network: Network) -> None:
    """What the file has of the base weight must be this one's: here it is made again."""
    for key, make in part.row.remade.items():
        made = make(base_weight(module, network).detach().cpu().float())
        if differs(part.tensors[key], made, _REMADE):
            what = f"tensor '{part.keys[key]}'"
            raise BindError(Problem(what, "what this model's weight makes of it", "other values", MADE_FOR))


def differs(one: Tensor, other: Tensor, bound: float = 1e-4) -> bool:
    """Whether two tensors differ by more than rounding."""
    if one.shape != other.shape:
        return True
    largest = max(float(one.abs().max()), float(other.abs().max()))
    return float((one - other).abs().max()) > bound * largest
