"""`truncate`: an attached adapter gets smaller ranks, and an update that is nearest to its old one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import nn

from tnpeft.adapters import Adapter, Sharing
from tnpeft.adapters.base_weight import base_weight
from tnpeft.adapters.distributed import refuse_distributed
from tnpeft.adapters.offload import present
from tnpeft.errors import AttachError, BindError, ExecutionError, Problem, clip, listed
from tnpeft.fitting.arguments import check_method
from tnpeft.fitting.extract import ExtractedLayer, fitted_layer, refuse_shared, row_of
from tnpeft.fitting.fit import Method
from tnpeft.network import Network, Spec, param_problems
from tnpeft.recipe import Handle
from tnpeft.recipe.report import printed
from tnpeft.recipe.selection import Selection, compiled, selection_of
from tnpeft.spec.habits import unknown_params
from tnpeft.surgery import adapted, layers_of, model_problems, names_of, record_of, replace_adapters
from tnpeft.surgery.switch import refuse_disabled, refuse_merged

__all__ = ["Truncation", "truncate"]

# Inits of which a smaller core is a part of a larger one.
_NESTED = ("zeros", "ones", "eye", "constant", "largest", "smallest")


@dataclass(frozen=True)
class Truncation:
    """The result of `truncate`: the layers that shrank, and how much of its update each keeps.

    `before` and `after` count all elements that train.
    """

    name: str
    layers: tuple[ExtractedLayer, ...]
    before: int
    after: int

    @property
    def captured(self) -> float:
        """The share of the energy of the updates (their squared norms) that is kept, over the layers that shrank."""
        whole = sum(row.norm**2 for row in self.layers)
        return max(0.0, 1.0 - sum((row.error * row.norm) ** 2 for row in self.layers) / whole) if whole else 1.0

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for JSON."""
        return {**asdict(self), "captured": self.captured}

    def __str__(self) -> str:
        title = f"Adapter '{self.name}': {self.before:,} parameters became {self.after:,}, {self.captured:.2%} kept"
        table = Table(title=title, title_justify="left")
        for heading in ("layer", "spec", "parameters", "update", "error", "kept"):
            table.add_column(heading, justify="left" if heading in ("layer", "spec") else "right", overflow="fold")
        for row in self.layers:
            numbers = (f"{row.parameters:,}", f"{row.norm:.3e}", f"{row.error:.3e}", f"{row.captured:.2%}")
            table.add_row(row.name, row.spec, *numbers)
        return printed(table)


def truncate(
    model: nn.Module,
    budget: int | None = None,
    /,
    *,
    name: str | None = None,
    param: str = "r",
    ranks: Mapping[str, Mapping[str, float]] | None = None,
    method: Method = "auto",
    iterations: int | None = None,
    **params: float,
) -> Truncation:
    """Shrink the ranks of an attached adapter; each layer keeps the update of smaller rank that is nearest to its own.

    `params` are the new values (`r=4`), `ranks` those of some layers, as `attach` takes them. Or `budget` says how many
    parameters may train, and the largest value of `param` that meets it is taken; biases, norms and whatever else
    trains count too. A layer that would grow stays as it is. Other params that were given to `attach` keep their
    values, and defaults are worked out anew. `name` may be left out where one adapter is attached; `method` and
    `iterations` are those of `fit`.

    For LoRA the truncated singular value decomposition gives the update that is kept; for other networks `fit` finds
    it. With `start: frozen_copy` the copy is chosen anew, as in `fit`. The cores are new parameters: make a new
    optimiser, and wrap the model in DistributedDataParallel anew.

    Raises BindError and AttachError, the latter also for trained cores that layers share and for frozen random cores
    whose size would change; the model is then as it was.
    """
    check_method(method, iterations)
    if problems := [*model_problems(model)]:
        raise AttachError(*problems)
    handle = Handle(model, _name(model, name))
    adapters = _checked(handle)
    wanted = _wanted(handle, budget, param, ranks or {}, params)
    _refuse_drawn(adapters, wanted)
    before = _size(handle)
    fresh = _compiled(handle, wanted)
    bases = {layer: each.base for layer, each in layers_of(model, handle.name).items()}
    rows: list[ExtractedLayer] = []
    for layer in wanted:
        began = time.perf_counter()
        with present(bases[layer]), torch.no_grad():
            weight = base_weight(bases[layer], fresh[layer].network).detach()
            delta = adapters[layer].delta_weight(weight)
            fitted = fitted_layer(layer, fresh[layer], weight, delta, method, iterations)
        rows.append(row_of(layer, fitted, delta, time.perf_counter() - began))
    if wanted:
        replace_adapters(model, handle.name, fresh)
    return Truncation(handle.name, tuple(rows), before, _size(handle))


def _name(model: nn.Module, name: str | None) -> str:
    """The adapter's name: the given one, or that of the only adapter."""
    known = names_of(model)
    if name is None and len(known) > 1:
        expected = f"one of {', '.join(map(repr, known))}"
        raise AttachError(Problem("adapter name", expected, "none", "Pass `name=`."))
    return known[0] if name is None else record_of(model, name).name


def _size(handle: Handle) -> int:
    return sum(parameter.numel() for parameter in handle.parameters())


def _checked(handle: Handle) -> dict[str, Adapter]:
    """The adapters of the layers, if each can be fitted by itself in the model's present state. Raises AttachError."""
    _, state = adapted(handle.model)
    refuse_disabled(state)
    refuse_merged(state)
    refuse_shared(handle.adapters, "truncate")
    for layer, adapter in handle.adapters.items():
        try:
            refuse_distributed(layer, adapter.stored)
        except ExecutionError as error:
            raise AttachError(*error.problems) from error
        if not adapter.has_values:
            fix = "Load the adapter, or call `reset_parameters` of the adapted layer, first."
            raise AttachError(
                Problem("cores", "values", "none (they were made on the meta device)", fix, layers=(layer,))
            )
    return handle.adapters


def _refuse_drawn(adapters: Mapping[str, Adapter], wanted: Mapping[str, Network]) -> None:
    """Raises AttachError if frozen random cores would change their size: other cores were trained for the old ones."""
    problems = []
    for layer, network in wanted.items():
        shapes = {core.name: core.shape for core in adapters[layer].network.cores}
        for core in network.cores:
            random = core.origin is None and core.init.name not in _NESTED
            if core.frozen and random and core.shape != shapes[core.name]:
                what, expected = f"spec '{network.spec.name}', core '{core.name}'", "one that trains, or keeps its size"
                fix = "Attach it anew at the smaller rank, or take a spec whose cores all train."
                found = "a frozen one that is drawn anew at another size, to which the trained ones do not fit"
                problems.append(Problem(what, expected, found, fix, core=core.name, layers=(layer,)))
    if problems:
        raise AttachError(*problems)


def _wanted(
    handle: Handle, budget: object, param: str, ranks: Mapping[str, Mapping[str, float]], params: Mapping[str, Any]
) -> dict[str, Network]:
    """The smaller networks, by layer; a layer that would not shrink has none."""
    selection = _selection(handle, budget, param, ranks, params)
    networks = {layer: adapter.network for layer, adapter in handle.adapters.items()}
    own = {layer: {**params, **selection.params_at(layer)} for layer in networks}
    if budget is None:
        return _smaller_ones(networks, own)
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise AttachError(
            Problem("budget", "a positive whole number of parameters", clip(budget), "For example 600_000.")
        )
    beside = _size(handle) - sum(network.num_parameters for network in networks.values())
    largest = max(int(network.params.get(param, 1)) for network in networks.values())
    least = beside
    for value in range(largest, 0, -1):
        try:
            wanted = _smaller_ones(networks, {layer: {param: value, **given} for layer, given in own.items()})
        except BindError:
            continue  # a rank that a spec does not take
        least = beside + sum(wanted.get(layer, network).num_parameters for layer, network in networks.items())
        if least <= budget:
            return wanted
    found, fix = f"{least:,} at {param}=1, the least it takes", f"Allow {least:,}."
    raise AttachError(Problem(f"budget of {budget:,}", "room for the smallest adapter", found, fix))


def _selection(
    handle: Handle, budget: object, param: str, ranks: Mapping[str, Mapping[str, float]], params: Mapping[str, Any]
) -> Selection:
    """The selection of `ranks`, once all arguments are checked. Raises AttachError."""
    if budget is None and not params and not ranks:
        fix = "For example `r=4`, or a number of parameters."
        raise AttachError(Problem("truncate", "a budget or smaller params", "neither", fix))
    if budget is not None and param in params:
        fix = "Leave one of them out."
        raise AttachError(Problem("truncate", f"a budget or `{param}`", "both", fix))
    selection, told = selection_of({"ranks": ranks}, None)
    problems = [problem for _, problem in told]
    specs = {adapter.network.spec.name: adapter.network.spec for adapter in handle.adapters.values()}
    known = dict.fromkeys(each for spec in specs.values() for each in spec.params)
    names = [
        *params,
        *([param] if budget is not None else ()),
        *(each for row in selection.ranks.values() for each in row),
    ]
    problems += unknown_params(f"params of adapter '{handle.name}'", dict.fromkeys(names), known)
    for spec in specs.values():
        for given in (params, *selection.ranks.values()):
            problems += param_problems(spec, {key: value for key, value in given.items() if key in spec.params})
    for pattern in selection.ranks:
        if not any(compiled(pattern).search(layer) for layer in handle.adapters):
            fix = f"It adapts {listed([*handle.adapters])}."
            problems.append(Problem(f"`ranks` {clip(pattern)}", "at least one layer of the adapter", "none", fix))
    if problems:
        raise AttachError(*problems)
    return selection


def _smaller_ones(networks: Mapping[str, Network], wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, Network]:
    """The networks with other params, for the layers that shrink with them. Equal layers share one."""
    known: dict[tuple[Any, ...], Network | None] = {}
    found: dict[str, Network] = {}
    for layer, network in networks.items():
        params = {key: value for key, value in wanted[layer].items() if key in network.spec.params}
        key = (id(network), *sorted(params.items()))
        if key not in known:
            known[key] = _smaller(network, params)
        if (smaller := known[key]) is not None:
            found[layer] = smaller
    return found


def _smaller(network: Network, params: Mapping[str, Any]) -> Network | None:
    """The network with some params changed, those that were given kept, and defaults anew; None if it would grow."""
    spec = network.spec
    assert isinstance(spec, Spec)
    defaults = spec.bind(network.layer, **{key: network.params[key] for key in params}).params
    given = {key: value for key, value in network.params.items() if value != defaults[key]}
    changed = spec.bind(network.layer, **{**given, **params})
    return changed if changed.params != network.params and changed.num_parameters <= network.num_parameters else None


def _compiled(handle: Handle, wanted: Mapping[str, Network]) -> dict[str, Adapter]:
    """Adapters of the smaller networks; if frozen cores are shared, for every layer, because they are linked."""
    together = any(core.shared for adapter in handle.adapters.values() for core in adapter.network.cores)
    modules = layers_of(handle.model, handle.name)
    sharing = Sharing()
    fresh: dict[str, Adapter] = {}
    for layer, adapter in handle.adapters.items():
        if layer in wanted or (together and wanted):
            fresh[layer] = Adapter(
                wanted.get(layer, adapter.network),
                modules[layer].base,
                seed=adapter.seed,
                name=adapter.layer_name,
                mode=adapter.mode,
                autotune=adapter.autotune,
                sharing=sharing,
                captured=adapter.captured,
                dropout=adapter.dropout,
            )
            if any(core.dtype == torch.float64 for core in adapter.parameters()):
                fresh[layer].double()  # cores that were widened with their model keep their digits
            if layer not in wanted:
                fresh[layer].take(adapter)
    return fresh
