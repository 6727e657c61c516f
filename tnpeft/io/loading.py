"""From a file to an adapted model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tnpeft.adapters import Adapter, Sharing, is_drawn, memory_problems, place_problem
from tnpeft.adapters.distributed import write
from tnpeft.adapters.offload import hook_of
from tnpeft.adapters.parked import ParameterLayer
from tnpeft.adapters.processes import flat_part, holders_of, in_step, summoned
from tnpeft.errors import AdapterFileError, AttachError, Problem, TnpeftWarning, clip, listed
from tnpeft.io.base import fingerprint
from tnpeft.io.checks import MOST_SHOWN, number_problem
from tnpeft.io.files import FOREIGN, file_path, in_file, of_file, read, refuse, shown, specs_of
from tnpeft.io.manifest import FITTED_AS, LayerEntry, Manifest, digest_of, dtype_name, encode
from tnpeft.io.renaming import with_plain_names
from tnpeft.io.same_base import check_base, other_base
from tnpeft.network import Layer, Network, Spec
from tnpeft.network.orientation import ORIENTATIONS, oriented
from tnpeft.recipe import Handle
from tnpeft.recipe.dropout import dropout_of
from tnpeft.spec.maps import map_kind, unregistered_map
from tnpeft.surgery import (
    activate,
    adapted,
    adapters_of,
    base_tensors,
    find,
    install,
    model_problems,
    names_of,
    norm_statistics,
    parameter_groups,
    record_of,
    refill,
    scale_problem,
    scales_of,
    statistics_of,
    trained_of,
)
from tnpeft.surgery.parameters import bases_of
from tnpeft.surgery.tree import slots

__all__ = ["hot_swap", "load", "put_on", "unlike", "without_values"]


def load(model: nn.Module, path: str | os.PathLike[str], name: str | None = None) -> Handle:
    """Put the adapter of a file written by `save` on `model`, a fresh copy of the base it was saved from.

    The adapter gets the name it was saved under, or `name`. It is then the only active one, at the scale it had, and
    the model computes what the saved one did, to the bit. Layers keep their execution mode, and the choices that
    `autotune` made for them. If an adapter of this name is attached already, with the same specs, params and layers,
    only the values are loaded, in place: optimisers and compiled graphs stay as they are. If the model is sharded,
    every process must call `load`, with the same file. A model under FSDP1 takes no new adapters, only values for those
    it has.

    Raises AdapterFileError for files that are no adapter, damaged, newer than this library or made for a base of other
    shapes. Raises AttachError where the adapter cannot be attached: the name is that of an adapter of another kind, or
    the model is merged. The model is then as it was. Warns (TnpeftWarning) of NaN and infinity in the file, and where
    adapted or trained layers of the base have other values than those it was saved from.
    """
    path, given, holders = file_path(path), model, holders_of(model)
    flat = flat_part(model) is not None
    model = adapted(model)[0] if flat and find(model) is not None else model
    with summoned(given, True):
        manifest, content = _content(model, path, name, holders, flat)
        name = manifest.name if name is None else name
        put_on(model, path, name, *content, manifest.about, manifest.scale)
    return Handle(model, name)


def hot_swap(model: nn.Module, path: str | os.PathLike[str], name: str | None = None) -> Handle:
    """Give an attached adapter the values of a file that `save` wrote, in place; nothing is compiled or planned anew.

    `name` says which adapter, and may be left out where one is attached; the name in the file does not matter. Specs,
    params (ranks) and layers must be the same. The same adapters act as before. If this one acts, it gets the file's
    scale, and a compiled graph is made anew where the scale differs. If the model is sharded, every process must call
    `hot_swap`, with the same file; each takes its own parts.

    Raises AdapterFileError and AttachError as `load` does, and AttachError for other specs, params or layers; the model
    is then as it was.
    """
    path, given, holders = file_path(path), model, holders_of(model)
    model, state = adapted(model)  # in what torch.compile and others put around it
    if name is None and len(state.adapters) > 1:
        known = ", ".join(f"'{each}'" for each in state.adapters)
        raise AttachError(Problem("adapter name", f"one of {known}", "none", "Pass `name=`."))
    name = next(iter(state.adapters)) if name is None else record_of(model, name).name
    with summoned(given, True):
        manifest, content = _content(model, path, name, holders)
        with _of_file_too(path):
            refill(model, name, *content, manifest.about)
        scales = scales_of(model)
        if scales.get(name, manifest.scale) != manifest.scale:
            activate(model, {**scales, name: manifest.scale})
    return Handle(model, name)


def _content(
    model: nn.Module, path: Path, name: str | None, holders: Sequence[Any], flat: bool = False
) -> tuple[Manifest, tuple[dict[str, Adapter], dict[str, Tensor], dict[str, Tensor]]]:
    """A file's manifest, its adapters compiled for the model, the parameters that trained beside them, and statistics.

    If an adapter of that name is attached, it can take these values; a `flat` model (FSDP1) accepts no other adapters.
    """
    with in_step(holders, lambda: unlike(path)) as said:
        manifest, tensors = read(path)
        content = manifest, dict(tensors)
        said.append(lambda: encode(*content))
        if wrong := [*model_problems(model)]:
            raise AttachError(*wrong)
        if problem := scale_problem(manifest.name, manifest.scale):
            raise AdapterFileError(replace(problem, what="`scale`", where=shown(path)))
        base = fingerprint(model)
        manifest, tensors = with_plain_names(manifest, tensors, base)
        check_base(path, manifest, model, base)
        numbers = number_problem(tensors, manifest.layers)
        attached = _attached(model, manifest.name if name is None else name)
        if attached is None and flat:
            found = "pieces of one process (FullyShardedDataParallel)"
            fix = "Load the adapter first, then wrap the model; names that it has by then take other values later."
            raise refuse(path, "base model", "whole weights", found, fix)
        adapters = _adapters(path, manifest, tensors, _bases(model, manifest))
        _check_names(path, manifest, model)
        here = base_tensors(model)
        trained, statistics = (
            _take(path, tensors, {names[0]: here[names[0]] for names in groups}, f"{kind}.")
            for kind, groups in (("trained", manifest.trained), ("statistics", manifest.statistics))
        )
        if tensors:
            raise refuse(path, "tensors", "those of the adapter alone", f"also '{min(tensors)}'", FOREIGN)
    # Not refused, and probably a mistake: another base of the same shapes, numbers that are none.
    if doubts := [
        replace(problem, where=shown(path)) for problem in (other_base(path, manifest, model), numbers) if problem
    ]:
        warnings.warn(TnpeftWarning(*doubts), stacklevel=3)
    return manifest, (adapters, trained, statistics)


def unlike(path: Path) -> AdapterFileError:
    """The error for a file that differs between processes."""
    fix = "Give each process the same file: copy it to every machine, or to a folder that they share."
    return refuse(path, "adapter file", "the same in every process", "others in some", fix)


def put_on(
    model: nn.Module,
    path: Path,
    name: str,
    adapters: Mapping[str, Adapter],
    trained: Mapping[str, Tensor],
    statistics: Mapping[str, Tensor],
    about: Mapping[str, Any],
    scale: float = 1.0,
) -> None:
    """Attach a file's adapters, with the values of parameters and running statistics that trained beside them.

    If an adapter of that name is attached, it takes the values in place. It is then the only active one, at `scale`.
    """
    with _of_file_too(path):
        if _attached(model, name) is not None:
            refill(model, name, adapters, trained, statistics, about)
        else:
            install(model, name, adapters, trained, about)
            with torch.no_grad():
                for copies, values in ((trained_of(model, name), trained), (statistics_of(model, name), statistics)):
                    for key, value in values.items():
                        write(copies[key], value)
    if scales_of(model) != {name: scale}:
        activate(model, {name: scale})


def _attached(model: nn.Module, name: str) -> dict[str, Adapter] | None:
    """The adapters of that name by layer; None if there are none."""
    return adapters_of(model, name) if find(model) is not None and name in names_of(model) else None


@contextmanager
def _of_file_too(path: Path) -> Iterator[None]:
    """Inside, an AttachError also names the file."""
    try:
        yield
    except AttachError as error:
        raise AttachError(*in_file(path, error.problems)) from error


def without_values(path: Path, layer: str) -> AdapterFileError:
    """The error for a base layer on the meta device."""
    fix = "Give the model its weights before loading an adapter."
    return refuse(path, "base model", "values", f"none in layer '{layer}' (it is on the meta device)", fix)


def _check_names(path: Path, manifest: Manifest, model: nn.Module) -> None:
    """Check that the parameters which trained, by the file, are those that would train here."""
    groups = {names[0]: names for names in parameter_groups(model)}
    hidden = [names[0] for names in manifest.trained if names[0] not in groups]
    if hidden:  # quantised layers may keep their bias as a buffer, or nowhere to be seen
        fix = "Load it onto a base that has them as parameters, or train the adapter without them."
        found = f"none here for {listed(hidden, MOST_SHOWN)}"
        raise refuse(path, "trained parameters", "parameters of the base model", found, fix)
    odd = [names[0] for names in manifest.trained if groups.get(names[0]) != names]
    if manifest.statistics != norm_statistics(model):
        odd.append("running statistics")
    if odd:
        raise refuse(path, "metadata", "that of an adapter", f"'{odd[0]}' trained, which does not fit", FOREIGN)


def _adapters(
    path: Path,
    manifest: Manifest,
    tensors: dict[str, Tensor],
    modules: Mapping[str, nn.Module | ParameterLayer],
) -> dict[str, Adapter]:
    """Every layer's adapter with its values, which are taken out of `tensors`."""
    specs = specs_of(path, manifest)
    _require_maps(path, specs)
    networks = {layer: _network(path, specs, entry, layer, modules) for layer, entry in manifest.layers.items()}
    _check_layers(path, manifest, networks)
    modes = {layer: entry.mode for layer, entry in manifest.layers.items()}
    if problems := [*memory_problems(networks, modules, modes)]:
        raise AdapterFileError(*(replace(problem, where=shown(path)) for problem in problems))
    sharing = Sharing()
    adapters = {
        layer: _adapter(path, networks[layer], entry, layer, modules[layer], sharing)
        for layer, entry in manifest.layers.items()
    }
    for layer, adapter in adapters.items():
        drawn = _draw_again(path, layer, adapter, manifest.layers[layer].drawn)
        wanted = {key: like for key, like in adapter.state_dict().items() if key not in drawn}
        values = _take(path, tensors, wanted, f"layers.{layer}.") | drawn
        if any(value.dtype == torch.float64 for value in values.values()):
            adapter.double()  # cores that were widened with their model keep their digits
        if problem := place_problem(adapter.network, {key.removeprefix("core_"): values[key] for key in values}):
            raise AdapterFileError(*in_file(path, [problem], f"layer '{layer}'"))
        adapter.load_state_dict(values)
    return adapters


def _check_layers(path: Path, manifest: Manifest, networks: Mapping[str, Network]) -> None:
    """Check the layers of a file that was fitted without a model: they were guessed from weights."""
    told = manifest.about.get(FITTED_AS)
    for name, network in networks.items():
        layer, fitted = str(replace(network.layer, opaque=False)), told.get(name) if isinstance(told, dict) else None
        if fitted not in (None, layer):
            fix = "Fit it again with `tnpeft fit --model`, which knows the layers."
            raise refuse(path, f"layer '{name}'", f"a {clip(fitted)[1:-1]}, as the adapter was fitted", layer, fix)


def _require_maps(path: Path, specs: Sequence[Spec]) -> None:
    """Check that all maps are registered: unlike an init, a map is needed at every step."""
    names = (call.name for spec in specs for each in spec.derivations.values() for call in each.maps)
    missing = [name for name in dict.fromkeys(names) if map_kind(name) is None]
    if missing:
        raise AdapterFileError(*(unregistered_map(name, shown(path)) for name in missing))


def _bases(model: nn.Module, manifest: Manifest) -> dict[str, nn.Module | ParameterLayer]:
    """The bases of a file's adapters: layers, and parameters in the orientation that it says."""
    parameters = slots(model) if any(entry.orientation for entry in manifest.layers.values()) else {}
    signatures: dict[str, Layer | None] = dict.fromkeys(manifest.layers)
    for name, entry in manifest.layers.items():
        slot, axes = parameters.get(name), entry.orientation
        if slot is not None and axes in ORIENTATIONS and len(axes.split()) == slot.tensor.dim():
            signatures[name] = oriented(slot.tensor.shape, axes)
    return bases_of(model, signatures)


def _network(
    path: Path,
    specs: list[Spec],
    entry: LayerEntry,
    name: str,
    modules: Mapping[str, nn.Module | ParameterLayer],
) -> Network:
    layer: Any = modules.get(name)
    if layer is None or entry.spec not in range(len(specs)):
        raise refuse(path, "metadata", "that of an adapter", f"a layer '{name}' that does not fit", FOREIGN)
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and weight.device.type == "meta" and hook_of(layer) is None:
        raise without_values(path, name)
    bound = layer.signature if isinstance(layer, ParameterLayer) else layer
    with of_file(path, f"layer '{name}'"):
        return specs[entry.spec].bind(bound, **entry.params)


def _adapter(path: Path, network: Network, entry: LayerEntry, name: str, layer: Any, sharing: Sharing) -> Adapter:
    """A layer's adapter, its cores still without values."""
    dropout, odd = dropout_of(entry.dropout)
    if odd:
        raise AdapterFileError(*(replace(problem, where=shown(path)) for _, problem in odd))
    with of_file(path, f"layer '{name}'"):
        return Adapter(
            network,
            layer,
            seed=entry.seed,
            name=name if entry.label is None else entry.label,
            mode=entry.mode,
            choices=entry.choices,
            initialise=False,
            sharing=sharing,
            captured=entry.captured,
            dropout=dropout,
        )


def _draw_again(path: Path, layer: str, adapter: Adapter, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The frozen cores that the file leaves out, by their keys in the adapter."""
    found: dict[str, Tensor] = {}
    cores = {core.name: core for core in adapter.network.cores}
    for name, expected in names.items():
        core = cores.get(name)
        if core is None or not core.frozen or not is_drawn(core) or name in adapter.shared:
            raise refuse(path, "metadata", "that of an adapter", f"a core '{name}' that is not drawn", FOREIGN)
        with of_file(path, f"layer '{layer}'"):
            values = adapter.initial(core)
        if digest_of(values) != expected:
            fix = "Save the adapter again where it was made, after writing to that core."
            raise refuse(path, f"frozen core '{name}' of layer '{layer}'", "the values of its seed", "others", fix)
        found[f"core_{name}"] = values
    return found


def _take(path: Path, tensors: dict[str, Tensor], wanted: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove and return the file's tensors of the wanted names and shapes."""
    for key, like in wanted.items():
        found = tensors.get(prefix + key)
        if found is None or found.shape != like.shape or found.is_floating_point() != like.is_floating_point():
            shape = "no such tensor" if found is None else f"{dtype_name(found.dtype)}{tuple(found.shape)}"
            expected = f"{dtype_name(like.dtype)}{tuple(like.shape)}"
            raise refuse(path, f"tensor '{prefix}{key}'", expected, shape, FOREIGN)
    return {key: tensors.pop(prefix + key) for key in wanted}
