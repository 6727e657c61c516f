"""Writing PEFT's folders of the tuners in the table `tuner_rows`."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from tnpeft.adapters import Adapter
from tnpeft.adapters.base_weight import base_weight, never_called
from tnpeft.adapters.parked import LOOKUPS
from tnpeft.errors import Problem
from tnpeft.io.files import refuse
from tnpeft.io.foreign.formats import MERGE, trained_problem
from tnpeft.io.foreign.peft_files import pattern_of, targets, usual
from tnpeft.io.foreign.peft_forms import saved_modules, tensors_of
from tnpeft.io.foreign.source import CONFIG, WEIGHTS
from tnpeft.io.foreign.tuner_rows import TUNERS, rows_of
from tnpeft.io.foreign.tuner_table import Tuner
from tnpeft.io.foreign.tuner_update import differs, kind_problem
from tnpeft.network import load_spec
from tnpeft.spec.canonical import canonical

__all__ = ["tuner_contents", "tuner_dropout_note", "tuner_of", "tuner_problems"]

_ROOT = "base_model.model."
_APART = "Attach, and save, each as an adapter of its own."
_EXACT = 1e-6  # of the weight: how near to nothing the subtracted start must be


def tuner_of(adapter: Adapter) -> Tuner | None:
    """The row of an adapter's spec, or None."""
    spec = adapter.network.spec
    for row in TUNERS:
        shipped = load_spec(row.spec)
        same = spec is shipped or (
            {core.name for core in spec.cores} == {core.name for core in shipped.cores}
            and canonical(spec) == canonical(shipped)
        )
        if same:
            return row
    return None


def tuner_problems(
    rows: Mapping[str, Tuner | None],
    adapters: Mapping[str, Adapter],
    modules: Mapping[str, nn.Module],
    trained: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    gain: float,
) -> Iterator[Problem]:
    """Why PEFT cannot hold these adapters, of which some are a row's."""
    methods = {row.method if row else f"spec '{adapters[name].network.spec.name}'": name for name, row in rows.items()}
    if len(methods) > 1:
        found = ", ".join(f"{method} on '{name}'" for method, name in methods.items())
        yield Problem("methods", "one of PEFT's for all layers", found, _APART)
        return
    for name, row in rows.items():
        assert row is not None
        adapter, where = adapters[name], f"layer '{name}'"
        if (place := _other_place(name, modules)) is not None:
            yield Problem(f"PEFT's {row.method}", "a layer that is called", place, MERGE, where)
            continue
        if problem := kind_problem(row, adapter.network.layer):
            yield Problem(problem.what, problem.expected, problem.found, MERGE, where)
            continue
        if gain != 1.0 and row.gain is None:
            fix = "Activate it at scale 1: its update is no multiple of another's."
            yield Problem(f"PEFT's {row.method}", "an adapter at scale 1", f"one at {gain:g}", fix, where)
        if row.copy and _starts_elsewhere(adapter, row, modules[name]):
            expected = "a start whose update is none, which PEFT subtracts nothing for"
            yield Problem(f"PEFT's {row.method}", expected, "one that `start: frozen_copy` subtracts", MERGE, where)
        if problem := _bias_problem(name, adapter, row, trained, base, gain):
            yield problem
    yield from saved_modules(trained.keys() - _biases(rows, trained), _no_parts(rows), modules)[1]


def _other_place(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """What an adapter stands on where that is no layer whose calls PEFT's tuner would see."""
    if name not in modules:
        return "a parameter"
    module = modules[name]
    return type(module).__name__ if isinstance(module, LOOKUPS) else never_called(module)


def _starts_elsewhere(adapter: Adapter, row: Tuner, module: nn.Module) -> bool:
    """Whether what the adapter subtracts is another update than what PEFT subtracts."""
    trial = copy.deepcopy(adapter)
    weight = base_weight(module, adapter.network).detach()
    with torch.no_grad():
        for core, value in row.copy.items():
            trial.cores[core].copy_(torch.full_like(trial.cores[core], value))
        delta = trial.delta_weight(weight)
    return bool(delta.abs().max() > _EXACT * weight.abs().max())


def _bias_problem(
    name: str,
    adapter: Adapter,
    row: Tuner,
    trained: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    gain: float,
) -> Problem | None:
    """Why the bias of an adapted layer is not what PEFT makes of it: the base's, or the base's times a vector."""
    key = f"{name}.bias"
    if key not in base:
        return None
    if not row.scales_bias:
        return trained_problem([key], f"no biases of adapted layers beside {row.method}") if key in trained else None
    bias = base[key].detach().cpu()
    factor = adapter.cores[row.scales_bias].detach().cpu().flatten() * gain + 1
    if differs(trained.get(key, bias), bias * factor.to(bias.dtype)):
        expected = "a layer without bias, or with one that is multiplied by the vector"
        return Problem(f"PEFT's {row.method}", expected, f"another '{key}'", MERGE, f"layer '{name}'")
    return None


def _biases(rows: Mapping[str, Tuner | None], trained: Mapping[str, Tensor]) -> set[str]:
    return {name for name in trained if name.endswith(".bias") and name.removesuffix(".bias") in rows}


def _no_parts(rows: Mapping[str, Tuner | None]) -> dict[str, Any]:
    """The adapted layers as `saved_modules` takes them, by name alone."""
    return dict.fromkeys(rows)


def tuner_contents(
    path: Path,
    rows: Mapping[str, Tuner],
    adapters: Mapping[str, Adapter],
    trained: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
    base: Mapping[str, Tensor],
    gain: float,
) -> dict[Path, bytes]:
    """The folder's files, the config last. Raises AdapterFileError if layers differ where the config has one value."""
    method = next(iter(rows.values())).method
    config: dict[str, Any] = {
        "peft_type": method,
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": targets(list(rows), modules),
        **_options(path, rows, adapters),
    }
    values: dict[str, Tensor] = {}
    pieces: dict[str, list[Tensor]] = {}
    for name, row in rows.items():
        tensors, once = _tensors(path, name, row, adapters[name], modules[name], config, gain)
        values |= {f"{_ROOT}{name}.{key}{row.leaf}": tensor for key, tensor in tensors.items()}
        for key, tensor in once.items():
            pieces.setdefault(key, []).append(tensor)
    values |= {f"base_model.{key}": _joined(path, key, those) for key, those in pieces.items()}
    if saved := saved_modules(trained.keys() - _biases(rows, trained), _no_parts(rows), modules)[0]:
        config["modules_to_save"] = saved
        values |= {f"{_ROOT}{name}": value for name, value in tensors_of(saved, trained, base).items()}
    whole = {key: value.clone(memory_format=torch.contiguous_format) for key, value in values.items()}
    data = safetensors.torch.save(whole, {"format": "pt"})
    return {path / WEIGHTS: data, path / CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}


def _tensors(
    path: Path,
    name: str,
    row: Tuner,
    adapter: Adapter,
    module: nn.Module,
    config: Mapping[str, Any],
    gain: float,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A layer's tensors by the ends of their keys, and its part of those that the model has once."""
    network = adapter.network
    cores = {core: tensor.detach().cpu() for core, tensor in adapter.cores.items()}
    if row.gain is not None:
        cores[row.gain] = cores[row.gain] * gain
    found: dict[bool, dict[str, list[Tensor]]] = {False: {}, True: {}}
    for slot in row.slots:
        found[slot.shared].setdefault(slot.key, []).append(slot.form.write(cores[slot.core], network.layer))
    items = {slot.key for slot in row.slots if slot.item is not None}
    own, once = (
        {key: torch.stack(those) if key in items else those[0] for key, those in found[shared].items()}
        for shared in (False, True)
    )
    if fault := row.misfit(network.layer, own):
        raise refuse(path, f"PEFT's {row.method} on layer '{name}'", *fault, MERGE)
    for core, made in row.made(config, network.layer, own).items():
        if differs(cores[core], made):
            expected = f"'{core}' as PEFT makes it"
            raise refuse(path, f"PEFT's {row.method} on layer '{name}'", expected, "another one", MERGE)
    if row.remade:
        weight = base_weight(module, network).detach().cpu().float()
        own |= {key: make(weight) for key, make in row.remade.items()}
    return own, once


def _joined(path: Path, key: str, pieces: list[Tensor]) -> Tensor:
    """The tensor whose first entries along each axis every layer uses; where two layers use one they must agree."""
    sizes = [max(sizes) for sizes in zip(*(piece.shape for piece in pieces), strict=True)]
    whole, known = pieces[0].new_zeros(sizes), torch.zeros(sizes, dtype=torch.bool)
    for piece in pieces:
        part = tuple(slice(size) for size in piece.shape)
        if bool((known[part] & (whole[part] != piece)).any()):
            expected = "one for the model, of which each layer uses the first entries"
            raise refuse(path, f"PEFT's `{key}`", expected, "another for layers of other sizes", MERGE)
        whole[part], known[part] = piece, True
    return whole


def _options(path: Path, rows: Mapping[str, Tuner], adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """The config's options, one for all layers but where a pattern says others."""
    given: dict[str, dict[str, Any]] = {}
    forms = rows_of(next(iter(rows.values())).method)
    options: dict[str, Any] = {row.lists: [] for row in forms if row.lists}
    for name, row in rows.items():
        network = adapters[name].network
        for option, value in row.options({**network.params}, network.sizes).items():
            given.setdefault(option, {})[name] = _plain(value)
    first = next(iter(rows.values()))
    if first.input_dropout and (dropped := _one_dropout(rows, adapters)):
        options[first.input_dropout] = dropped
    # A name is looked for at the end of others.
    clear = first.anchored or not any(other.endswith(f".{name}") for name in rows for other in rows)
    patterns = first.patterns if clear else {}
    for option, values in given.items():
        options[option] = usual(values)
        others = {name: value for name, value in values.items() if value != options[option]}
        if others and option not in patterns:
            name, value = next(iter(others.items()))
            found = f"{options[option]} and, on '{name}', {value}"
            raise refuse(path, f"PEFT's `{option}`", "one for all layers", found, _APART)
        if option in patterns:
            keys = {name: pattern_of(name) if first.anchored else name for name in others}
            options[patterns[option]] = {keys[name]: value for name, value in others.items()}
    for key in [row.lists for row in rows.values() if row.lists]:
        names = [name for name, row in rows.items() if row.lists == key]
        options[key] = "|".join(map(re.escape, names))  # a list would be one of mere endings
    return options


def _plain(value: Any) -> Any:
    """A whole number as one."""
    if isinstance(value, float):
        near = float(f"{value:.15g}")
        return int(near) if near.is_integer() else near
    return value


def tuner_dropout_note(rows: Mapping[str, Tuner | None], adapters: Mapping[str, Adapter]) -> Problem | None:
    """The warning for dropout that PEFT's config cannot express."""
    left_out = [adapter.dropout for adapter in adapters.values() if adapter.dropout is not None]
    if not left_out or _one_dropout({name: row for name, row in rows.items() if row is not None}, adapters):
        return None
    expected = "`input` alone, alike on all layers, where PEFT's tuner has it"
    return Problem("`dropout`", expected, str(left_out[0]), "The folder says none: set it there, if training goes on.")


def _one_dropout(rows: Mapping[str, Tuner], adapters: Mapping[str, Adapter]) -> float | None:
    """How likely all layers drop entries of their input, where that is all that they drop and PEFT's tuner can."""
    (dropout, *others) = {adapters[name].dropout for name in rows}
    if others or dropout is None or next(iter(rows.values())).input_dropout is None:
        return None
    return dropout.as_dict()["input"] if dropout.as_dict().keys() == {"input"} else None
