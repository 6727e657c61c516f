"""From an adapted model to another library's file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tnpeft.errors import AdapterFileError, Problem
from tnpeft.io.files import file_path, refuse, replace_files, shown, what_is_at
from tnpeft.io.foreign.lycoris_files import lycoris_contents, lycoris_problems
from tnpeft.io.foreign.parts import Part
from tnpeft.io.foreign.peft_files import method_of, peft_contents, peft_problems
from tnpeft.io.foreign.reduce import part_of
from tnpeft.io.saving import chosen
from tnpeft.network import layer_of
from tnpeft.spec.document import clip
from tnpeft.surgery import ModelState, plain_modules, statistics_of
from tnpeft.surgery.trained import all_tied

__all__ = ["WRITTEN", "save_foreign"]

WRITTEN = ("peft", "lycoris")


def save_foreign(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: str,  # noqa: A002 - what it is
    name: str | None = None,
) -> None:
    """Write one adapter of `model` as another library's loader reads it.

    `format="peft"` writes a folder for `PeftModel.from_pretrained`, `"lycoris"` a safetensors file for
    `create_lycoris_from_weights`; the model that they adapt computes what `model` computes. A spec of
    any name can be written whose network is that of LoRA, LoCon, LoHa or LoKr. Cores for the kernel,
    unequal ranks and low-rank factors that the loader would not read are multiplied out; a LoRA with
    a frozen copy becomes one of twice the rank; a scale from `activate` goes into the file's.

    Raises AdapterFileError, before anything is written, for what the other library cannot hold.
    """
    path = file_path(path)
    if format not in WRITTEN:
        raise refuse(path, "`format`", f"one of {', '.join(WRITTEN)}", clip(format), "Pass one of these.")
    root, state, name, adapters = chosen(model, path, name)
    gain = state.active.get(name, 1.0)
    parts: dict[str, Part] = {}
    problems: list[Problem] = []
    for layer, adapter in adapters.items():
        part = part_of(adapter, layer, gain)
        if isinstance(part, Problem):
            problems.append(part)
        else:
            parts[layer] = part
    trained = _trained(root, state, name, gain)
    problems += _statistics_problems(root, state, name)
    _raise(path, problems)
    modules = plain_modules(root)
    layers = {layer: layer_of(modules[layer]) for layer in parts}
    check = peft_problems if format == "peft" else lycoris_problems
    _raise(path, [*_option_problems(modules, parts, format == "peft"), *check(parts, layers, trained)])
    if not parts:
        raise refuse(path, "adapter", "one with adapted layers", "none", "Save it with `tnpeft.save`.")
    if format == "peft":
        _write_folder(path, peft_contents(path, parts, trained, modules))
    else:
        _check_place(path)
        replace_files(lycoris_contents(path, parts))


def _raise(path: Path, problems: list[Problem]) -> None:
    if problems:
        where = shown(path)
        places = [where if problem.where is None else f"{where}: {problem.where}" for problem in problems]
        raise AdapterFileError(*(replace(each, where=place) for each, place in zip(problems, places, strict=True)))


def _trained(root: nn.Module, state: ModelState, name: str, gain: float) -> dict[str, Tensor]:
    """What the adapter makes of the parameters that it trains: b0 + gain (b - b0)."""
    values = {}
    for tied in all_tied(root, state):
        if name in tied.trainers and tied.is_parameter:
            copy, base = tied.copy_of(name).detach(), tied.original.detach()
            values[tied.names[0]] = (copy if gain == 1.0 else torch.lerp(base.double(), copy.double(), gain)).cpu()
    return values


def _statistics_problems(root: nn.Module, state: ModelState, name: str) -> list[Problem]:
    """Running statistics of norms that training changed, which no adapter file of others holds."""
    copies = statistics_of(root, name)
    for tied in all_tied(root, state):
        if tied.names[0] in copies and not torch.equal(tied.original, tied.copy_of(name)):
            fix = "Train with the norms in evaluation mode, or keep the adapter in tnpeft's own file."
            return [Problem("running statistics", "those of the base model", f"others in '{tied.names[0]}'", fix)]
    return []


def _option_problems(modules: Mapping[str, nn.Module], parts: Mapping[str, Part], peft: bool) -> Iterator[Problem]:
    """Options of a layer that the other library's forward drops, so that it would compute something else."""
    fix = "Merge it into the model instead, or keep it in tnpeft's own file."
    for name, part in parts.items():
        mode, dilation = (getattr(modules[name], option, None) for option in ("padding_mode", "dilation"))
        found = f"`padding_mode={mode!r}`" if mode not in (None, "zeros") else None
        if peft and method_of(part) == "LORA" and any(step != 1 for step in dilation or ()):
            found = found or f"`dilation={dilation}`"
        if found:
            expected = "a layer without it, for the other library's forward drops it"
            yield Problem("layer option", expected, found, fix, f"layer '{name}'")


def _check_place(path: Path) -> None:
    found = what_is_at(path)
    if found not in ("a file", "no such file"):
        fix = "Add a name, for example `adapter.safetensors`."
        raise refuse(path, "adapter file", "a file name", found, fix)


def _write_folder(path: Path, contents: dict[Path, bytes]) -> None:
    """Both files or none; a folder that was made for them goes again where they cannot be written."""
    found = what_is_at(path)
    if found not in ("a folder", "no such file"):
        raise refuse(path, "adapter folder", "a new or an existing folder", found, "Choose another path.")
    for file in contents:
        if what_is_at(file) not in ("a file", "no such file"):
            raise refuse(file, "adapter file", "a file name", what_is_at(file), "Choose another folder.")
    made = found == "no such file"
    if made:
        try:
            path.mkdir()
        except OSError as error:
            fix = "Choose a folder that exists, can be written to and has room."
            raise refuse(path, "adapter folder", "to be made", error.strerror or str(error), fix) from error
    try:
        replace_files(contents)
    except AdapterFileError:
        if made:
            path.rmdir()
        raise
