"""From another library's file to an adapted model."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tnpeft.adapters import Adapter
from tnpeft.adapters.processes import holders_of, in_step
from tnpeft.adapters.sharing import Sharing
from tnpeft.errors import AdapterFileError, AttachError, Problem, TnpeftError, TnpeftWarning, clip
from tnpeft.io.checks import number_problem
from tnpeft.io.files import file_path, in_file, refuse, shown
from tnpeft.io.foreign.formats import MADE_FOR
from tnpeft.io.foreign.key_names import reached_twice
from tnpeft.io.foreign.layer_update import Foreign, adapter_of
from tnpeft.io.foreign.peft import read_peft
from tnpeft.io.foreign.pipeline import read_parts
from tnpeft.io.foreign.source import Source, open_source
from tnpeft.io.foreign.tenvoo import read_tenvoo
from tnpeft.io.foreign.tuner_update import TunerUpdate, tuner_adapter
from tnpeft.io.loading import put_on, unlike, without_values
from tnpeft.io.manifest import digest, dtype_name
from tnpeft.network import Layer
from tnpeft.network.orientation import oriented
from tnpeft.recipe import Handle
from tnpeft.surgery import (
    base_tensors,
    model_problems,
    norm_statistics,
    parameter_groups,
    plain_modules,
    plain_parameters,
)
from tnpeft.surgery.checks import flat_problem
from tnpeft.surgery.parameters import bases_of
from tnpeft.surgery.tree import slots

__all__ = ["load_foreign"]


def load_foreign(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = "default",
    format: str | None = None,  # noqa: A002 - what it is
    *,
    alpha: float | None = None,
) -> Handle:
    """Put an adapter that another library saved on `model`, the base that it was trained on.

    `path` is PEFT's folder or its safetensors file with `adapter_config.json` beside it, a file of diffusers (or the
    folder it is in), LyCORIS, kohya's sd-scripts or ComfyUI, or a `.pth` of the TenVOO paper's code. The keys in the
    file tell which, or `format` does: "peft", "diffusers", "lycoris", "kohya", "comfyui" or "tenvoo". A file for a
    denoiser and its text encoders goes onto a module that has them as children, such as
    `nn.ModuleDict({"unet": unet, "te": text_encoder})`.

    Each layer gets the shipped spec of its method, or a spec written for it where the file's sizes do not fit that one.
    The model then computes what the other library computed. Biases and modules that were trained along with the adapter
    train here too. If FSDP2 has sharded the model, every process must call `load_foreign`, with the same file.

    `alpha` is for the paper's LoCon, LoHa and LoKr, whose files do not hold it; the paper's code has `rank // 4`.

    Raises AdapterFileError for files that are damaged, incomplete, of another method or made for another model, and
    AttachError where the adapter cannot be attached. The model is then as it was. Warns (TnpeftWarning) of NaN and
    infinity in the file.
    """
    path = file_path(path)
    with in_step(holders_of(model), lambda: unlike(path)) as said:
        if problems := [*model_problems(model)]:
            raise AttachError(*problems)
        if flat := flat_problem(model):
            raise AttachError(flat)
        source = open_source(path, format)
        alpha = _checked_alpha(path, source.format, alpha)
        said.append(lambda: (name, alpha, digest({"config": source.config, "headers": source.headers}, source.tensors)))
    modules, parameters, buffers = plain_modules(model), *_base_tensors(model)
    foreign = _read(source, modules, parameters, buffers, alpha)
    if source.format in ("peft", "diffusers"):
        _check_places(path, model, foreign)
        _check_ties(path, model, foreign)
    adapters = _adapters(path, foreign, model, modules)
    trained = _fitting(path, "parameter", foreign.trained, parameters, parameter_groups(model))
    statistics = _fitting(path, "running statistics", foreign.statistics, buffers, norm_statistics(model))
    _warn(path, foreign.notes, adapters, trained)
    put_on(model, path, name, adapters, trained, statistics, _about(source, trained, adapters))
    return Handle(model, name)


def _base_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The base's parameters and its buffers, by name."""
    tensors = base_tensors(model)
    parameters = {name: tensors[name] for name in plain_parameters(model)}
    return parameters, {name: tensor for name, tensor in tensors.items() if name not in parameters}


def _read(
    source: Source,
    modules: Mapping[str, nn.Module],
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    alpha: float | None,
) -> Foreign:
    if source.format == "tenvoo":
        return read_tenvoo(source, modules, parameters, buffers, alpha)
    if source.format == "peft":
        return read_peft(source, modules, parameters, buffers)
    return read_parts(source, modules, parameters, buffers)


def _check_places(path: Path, model: nn.Module, foreign: Foreign) -> None:
    """Refuse a layer with two places in the model, of which PEFT adapts only the first."""
    others = reached_twice(model)
    for name in foreign.parts:
        if name in others:
            what, expected = f"layer '{name}', which is also '{others[name]}'", "a layer in one place of the model"
            fix = "Give each place a layer of its own, for example a `copy.deepcopy`."
            raise refuse(path, what, expected, "one in several, of which PEFT adapts the first alone", fix)


def _check_ties(path: Path, model: nn.Module, foreign: Foreign) -> None:
    """Refuse copies of a parameter that is tied to another here, of which the file has none, or other values."""
    for names in parameter_groups(model):
        values = [foreign.trained.get(name) for name in names]
        for name in names:
            if name in foreign.copied and not all(
                value is not None and torch.equal(value, foreign.trained[name]) for value in values
            ):
                other = next(each for each in names if each != name)
                what, expected = f"parameter '{name}', tied to '{other}'", "one value for both"
                here = f"model.get_submodule('{name.rpartition('.')[0]}').{name.rpartition('.')[2]}"
                fix = f"Untie it, then load the file: `{here} = torch.nn.Parameter({here}.detach().clone())`."
                raise refuse(path, what, expected, f"one for '{name}' alone, or two", fix)


def _checked_alpha(path: Path, format: str, alpha: object) -> float | None:  # noqa: A002 - as above
    if alpha is None:
        return None
    if format != "tenvoo":
        raise refuse(path, "`alpha`", "none: the file holds it", clip(alpha), "Leave it out.")
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not math.isfinite(alpha):
        raise refuse(path, "`alpha`", "a finite number", clip(alpha), "For example `alpha=1`.")
    return float(alpha)


def _adapters(path: Path, foreign: Foreign, model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, Adapter]:
    """The adapters in the model's order. Everything that does not fit is a problem of its own."""
    adapters: dict[str, Adapter] = {}
    problems: list[Problem] = []
    sharing = Sharing()
    known = slots(model) if foreign.parts.keys() - modules.keys() else {}
    order = [name for name in (*modules, *known) if name in foreign.parts]
    signatures: dict[str, Layer | None] = dict.fromkeys(order)
    for name in order:
        if axes := foreign.parts[name].orientation:
            signatures[name] = oriented(known[name].tensor.shape, axes)
    for name, base in bases_of(model, signatures).items():
        weight = getattr(base, "weight", None)
        if isinstance(weight, Tensor) and weight.device.type == "meta":
            raise without_values(path, name)
        try:
            part = foreign.parts[name]
            adapters[name] = (
                tuner_adapter(part, base, name, sharing)
                if isinstance(part, TunerUpdate)
                else adapter_of(part, base, name)
            )
        except TnpeftError as error:
            kind = "layer" if name in modules else "parameter"
            problems += in_file(path, error.problems, f"{kind} '{name}'")
    if problems:
        raise AdapterFileError(*problems)
    return adapters


def _warn(path: Path, notes: Iterable[Problem], adapters: Mapping[str, Adapter], trained: Mapping[str, Tensor]) -> None:
    """Warn of what the file says that has no effect here, and of NaN and infinity."""
    cores = {
        f"layers.{layer}.{key}": core for layer, each in adapters.items() for key, core in each.state_dict().items()
    }
    tensors = {**cores, **{f"trained.{name}": value for name, value in trained.items()}}
    problem = number_problem(tensors, adapters)
    if problems := [*notes, *((replace(problem, where=shown(path)),) if problem else ())]:
        warnings.warn(TnpeftWarning(*problems), stacklevel=3)


def _fitting(
    path: Path, what: str, values: Mapping[str, Tensor], here: Mapping[str, Tensor], groups: Iterable[tuple[str, ...]]
) -> dict[str, Tensor]:
    """Values that trained, by the first name of tied tensors of the model. Raises AdapterFileError."""
    first = {name: names[0] for names in groups for name in names}
    fitting: dict[str, Tensor] = {}
    for name, value in values.items():
        if name not in first:
            raise refuse(path, f"{what} '{name}'", "those of this model", "none", MADE_FOR)
        if value.shape != here[name].shape or value.is_floating_point() != here[name].is_floating_point():
            expected, found = (f"{dtype_name(each.dtype)}{tuple(each.shape)}" for each in (here[name], value))
            if value.is_floating_point() == here[name].is_floating_point():
                expected, found = str(tuple(here[name].shape)), str(tuple(value.shape))
            raise refuse(path, f"{what} '{name}'", expected, found, MADE_FOR)
        fitting[first[name]] = value
    return fitting


def _about(source: Source, trained: Mapping[str, Tensor], adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """What the report counts: biases of adapted layers, and everything else."""
    biases = [name for name in trained if name.removesuffix(".bias") in adapters and name.endswith(".bias")]
    also = [name for name in trained if name not in biases]
    return {"recipe": source.format, "trained": {"bias": biases, "norm": [], "also": also}}
