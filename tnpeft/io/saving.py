"""From an adapted model to a file."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tnpeft.adapters import Adapter, is_drawn
from tnpeft.errors import AdapterFileError, AttachError, TnpeftWarning, clip
from tnpeft.io.base import base_digests, fingerprint
from tnpeft.io.checks import number_problem, stored, tensor_problems
from tnpeft.io.files import file_path, in_file, refuse, shown, write
from tnpeft.io.manifest import LayerEntry, Manifest, SpecEntry, digest_of
from tnpeft.io.sharded import one_writer
from tnpeft.network.orientation import orientation_of
from tnpeft.spec import Declaration
from tnpeft.surgery import AdaptedModel, adapted, adapters_of, statistics_of, trained_of
from tnpeft.surgery.tree import slots
from tnpeft.version import __version__

__all__ = ["chosen", "save"]


def save(model: nn.Module, path: str | os.PathLike[str], name: str | None = None) -> None:
    """Write one adapter of `model` to a safetensors file that carries its spec.

    The file holds the cores (but for frozen ones that the seed gives again), the frozen copies, and whatever else the
    adapter trained. Its metadata have all that `load` needs to put the same adapter on a fresh base model. `name` may
    be left out where one adapter is attached. The file is replaced as a whole or not at all.

    If FSDP has sharded the model, every process must call `save`: all gather, the first one writes, and all return once
    the file is there. With DistributedDataParallel one process is enough.

    Raises AdapterFileError, before anything is written, where the model is not adapted or is merged, the name is
    unknown, or a tensor has no values or not the shape that its network says; and where the file cannot be written.
    Warns (TnpeftWarning) of NaN and infinity.
    """
    path = file_path(path)
    with one_writer(model) as writes:
        root, state, name, adapters = chosen(model, path, name)
        drawn = {layer: _drawn(adapter) for layer, adapter in adapters.items()}
        manifest, kept = _manifest(root, state, name, adapters, drawn), _tensors(root, name, adapters, drawn)
        # Copies: what writes them shares their memory, which makes it unresizable.
        tensors = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in kept.items()}
        if writes:
            write(path, manifest, tensors)
    if problem := number_problem(tensors, adapters):
        warnings.warn(TnpeftWarning(replace(problem, where=shown(path))), stacklevel=2)


def chosen(model: nn.Module, path: Path, name: str | None) -> tuple[nn.Module, AdaptedModel, str, dict[str, Adapter]]:
    """The adapted root in `model`, its state, and the adapter to write: its name and its compiled layers.

    Raises AdapterFileError if there is none, or if it cannot be written as it is.
    """
    try:
        root, state = adapted(model)
    except AttachError as error:
        raise AdapterFileError(*error.problems) from error
    name = _which(path, state, name)
    if state.merged:
        fix = "Call `tnpeft.unmerge(model)` first."
        raise refuse(path, "model", "an unmerged model", "a merged one", fix)
    adapters = adapters_of(root, name)
    for layer, adapter in adapters.items():
        if not adapter.has_values:
            fix = "Call `reset_parameters` of the adapted layer, or load the adapter, first."
            raise refuse(path, f"cores of layer '{layer}'", "values", "none (they were made on the meta device)", fix)
    if problems := [*tensor_problems(model, root, name, adapters)]:
        raise AdapterFileError(*in_file(path, problems))
    return root, state, name, adapters


def _which(path: Path, state: AdaptedModel, name: object) -> str:
    known = ", ".join(f"'{known}'" for known in state.adapters)
    if name is None and len(state.adapters) == 1:
        return next(iter(state.adapters))
    if name is None:
        raise refuse(path, "adapter name", f"one of {known}", "none", "Pass `name=`: a file holds one adapter.")
    if not isinstance(name, str) or name not in state.adapters:
        raise refuse(path, "adapter name", f"one of {known}", clip(name), "Pass one of these names.")
    return name


def _drawn(adapter: Adapter) -> dict[str, str]:
    """The frozen cores that are still what the seed gives, with their digests; none whose value was given."""
    found: dict[str, str] = {}
    for core in adapter.network.cores:
        if core.frozen and is_drawn(core) and core.name not in (*adapter.shared, *adapter.given):
            tensor = adapter.cores[core.name].detach().cpu()
            if torch.equal(tensor, adapter.initial(core).to(tensor.dtype)):
                found[core.name] = digest_of(tensor if core.is_index else tensor.float())
    return found


def _manifest(
    root: nn.Module, state: AdaptedModel, name: str, adapters: dict[str, Adapter], drawn: dict[str, dict[str, str]]
) -> Manifest:
    record, parameters = state.adapters[name], slots(root)
    specs: dict[Declaration, int] = {}
    layers = {
        layer: LayerEntry(
            spec=specs.setdefault(adapter.network.spec, len(specs)),
            params=dict(adapter.network.params),
            seed=adapter.seed,
            mode=adapter.mode,
            choices=dict(adapter.choices),
            captured={scope: tuple(texts) for scope, texts in adapter.captured.items()},
            drawn=drawn[layer],
            label=None if adapter.layer_name == layer else adapter.layer_name,
            orientation=orientation_of(adapter.network.layer) if layer in parameters else None,
            dropout=adapter.dropout.as_dict() if adapter.dropout else {},
        )
        for layer, adapter in adapters.items()
    }
    return Manifest(
        library=__version__,
        name=name,
        scale=state.scale_of(name),
        specs=tuple(
            SpecEntry(
                text=spec.text,
                file=Path(spec.file).name,
                tables={key: dict(table) for key, table in spec.tables.items()},
            )
            for spec in specs
        ),
        layers=layers,
        trained=record.trained,
        statistics=record.statistics,
        base=fingerprint(root),
        digests=base_digests(root, adapters, (names[0] for names in record.trained)),
        about=dict(record.about),
    )


def _tensors(
    root: nn.Module, name: str, adapters: dict[str, Adapter], drawn: dict[str, dict[str, str]]
) -> dict[str, Tensor]:
    tensors = {
        f"layers.{layer}.{key}": tensor
        for layer, adapter in adapters.items()
        for key, tensor in stored(adapter).items()
        if key.removeprefix("core_") not in drawn[layer]
    }
    tensors |= {f"trained.{key}": tensor for key, tensor in trained_of(root, name).items()}
    tensors |= {f"statistics.{key}": tensor for key, tensor in statistics_of(root, name).items()}
    return tensors
