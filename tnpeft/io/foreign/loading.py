"""From another library's file to an adapted model."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tnpeft.errors import AdapterFileError, AttachError, Problem, TnpeftError
from tnpeft.io.files import file_path, refuse, shown
from tnpeft.io.foreign.lycoris import read_lycoris
from tnpeft.io.foreign.parts import Foreign, adapter_of
from tnpeft.io.foreign.peft import read_peft
from tnpeft.io.foreign.source import Source, open_source
from tnpeft.io.foreign.tenvoo import read_tenvoo
from tnpeft.modules import Adapter
from tnpeft.recipe import Handle
from tnpeft.spec.document import clip
from tnpeft.surgery import find, install, model_problems, parameter_groups, plain_modules, plain_parameters, trained_of
from tnpeft.surgery.trained import all_tied

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

    `path` is PEFT's folder or its safetensors file with `adapter_config.json` beside it, a LyCORIS
    file, or a `.pth` of the TenVOO paper's code; the keys say which, or `format`: "peft", "lycoris" or
    "tenvoo". Each layer gets the shipped spec of its method, or one written for the purpose where the
    file's sizes are not that spec's. The model then computes what the other library computed, and
    what that trained beside the adapter (biases, saved modules) trains here.

    `alpha` is for the paper's LoCon, LoHa and LoKr, whose files do not hold it (`rank // 4` there).

    Raises AdapterFileError for files that are damaged, incomplete, of another method or made for
    another model, and AttachError where surgery refuses. The model is then as it was.
    """
    path = file_path(path)
    if problems := [*model_problems(model)]:
        raise AttachError(*problems)
    source = open_source(path, format)
    modules, parameters = plain_modules(model), _base_parameters(model)
    foreign = _read(source, modules, parameters, _checked_alpha(path, source.format, alpha))
    adapters = _adapters(path, foreign, modules)
    trained = _trained(path, foreign, model, parameters)
    try:
        install(model, name, adapters, trained, _about(source, trained, adapters))
    except AttachError as error:
        raise AttachError(*_in_file(path, error)) from error
    copies = trained_of(model, name)
    with torch.no_grad():
        for key, value in trained.items():
            copies[key].copy_(value)
    return Handle(model, name)


def _base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The plain model's parameters by name, its own ones where another adapter's copies are installed."""
    parameters = dict(plain_parameters(model))
    found = find(model)
    for tied in all_tied(*found) if found else ():
        if tied.is_parameter:
            parameters |= dict.fromkeys(tied.names, tied.original)
    return parameters


def _read(
    source: Source, modules: Mapping[str, nn.Module], parameters: Mapping[str, Tensor], alpha: float | None
) -> Foreign:
    if source.format == "tenvoo":
        return read_tenvoo(source, modules, parameters, alpha)
    return (read_peft if source.format == "peft" else read_lycoris)(source, modules, parameters)


def _checked_alpha(path: Path, format: str, alpha: object) -> float | None:  # noqa: A002 - as above
    if alpha is None:
        return None
    if format != "tenvoo":
        raise refuse(path, "`alpha`", "none: the file holds it", clip(alpha), "Leave it out.")
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not math.isfinite(alpha):
        raise refuse(path, "`alpha`", "a finite number", clip(alpha), "For example `alpha=1`.")
    return float(alpha)


def _adapters(path: Path, foreign: Foreign, modules: Mapping[str, nn.Module]) -> dict[str, Adapter]:
    """The adapters in the model's order. Every layer that does not fit is a problem of its own."""
    adapters: dict[str, Adapter] = {}
    problems: list[Problem] = []
    for name in modules:
        if name not in foreign.parts:
            continue
        weight = modules[name].weight
        if isinstance(weight, Tensor) and weight.device.type == "meta":
            fix = "Give the model its weights before loading an adapter."
            raise refuse(path, "base model", "values", f"none in layer '{name}' (it is on the meta device)", fix)
        try:
            adapters[name] = adapter_of(foreign.parts[name], modules[name], name)
        except TnpeftError as error:
            problems += _in_file(path, error, f"layer '{name}'")
    if problems:
        raise AdapterFileError(*problems)
    return adapters


def _trained(path: Path, foreign: Foreign, model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of what trained, by the first name of tied parameters."""
    first = {name: names[0] for names in parameter_groups(model) for name in names}
    trained: dict[str, Tensor] = {}
    for name, value in foreign.trained.items():
        if name not in parameters:
            raise refuse(path, f"parameter '{name}'", "one of this model", "none", _MADE_FOR)
        if value.shape != parameters[name].shape:
            expected, found = str(tuple(parameters[name].shape)), str(tuple(value.shape))
            raise refuse(path, f"parameter '{name}'", expected, found, _MADE_FOR)
        trained[first[name]] = value
    return trained


_MADE_FOR = "Load the file onto the model it was made for."


def _about(source: Source, trained: Mapping[str, Tensor], adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """What the report counts: biases of adapted layers, and everything else."""
    biases = [name for name in trained if name.removesuffix(".bias") in adapters and name.endswith(".bias")]
    also = [name for name in trained if name not in biases]
    return {"recipe": source.format, "trained": {"bias": biases, "norm": [], "also": also}}


def _in_file(path: Path, error: TnpeftError, where: str | None = None) -> list[Problem]:
    """The problems of an error, each with the file, and the layer in it, that leads to it."""
    places = [(shown(path), where, problem.where) for problem in error.problems]
    texts = [": ".join(str(part) for part in parts if part is not None) for parts in places]
    return [replace(problem, where=text) for problem, text in zip(error.problems, texts, strict=True)]
