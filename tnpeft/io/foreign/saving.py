"""From an adapted model to another library's file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tnpeft.adapters import Adapter
from tnpeft.adapters.distributed import whole
from tnpeft.adapters.parked import LOOKUPS
from tnpeft.errors import AdapterFileError, Problem, TnpeftWarning, clip, listed
from tnpeft.io.files import file_path, in_file, refuse, replace_files, shown, what_is_at
from tnpeft.io.foreign.components import named_parts
from tnpeft.io.foreign.diffusers_files import diffusers_contents, diffusers_problems
from tnpeft.io.foreign.formats import MERGE
from tnpeft.io.foreign.key_names import reached_twice
from tnpeft.io.foreign.layer_update import LayerUpdate
from tnpeft.io.foreign.lycoris_files import (
    comfyui_parts,
    comfyui_problems,
    lycoris_contents,
    lycoris_problems,
    one_alpha,
)
from tnpeft.io.foreign.peft_files import beside_problems, dropout_note, method_of, peft_contents, peft_problems
from tnpeft.io.foreign.peft_forms import form_problems
from tnpeft.io.foreign.rewrites import part_of, untuckered
from tnpeft.io.foreign.source import DIFFUSERS_WEIGHTS
from tnpeft.io.foreign.tuner_table import Tuner
from tnpeft.io.foreign.tuner_writing import tuner_contents, tuner_dropout_note, tuner_of, tuner_problems
from tnpeft.io.saving import chosen
from tnpeft.io.sharded import one_writer
from tnpeft.surgery import AdaptedModel, base_tensors, parameter_groups, plain_modules, statistics_of
from tnpeft.surgery.trained import all_tied

__all__ = ["WRITTEN", "save_foreign"]

_FILE = ".safetensors"
WRITTEN = ("peft", "diffusers", "lycoris", "kohya", "comfyui")


def save_foreign(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: str,  # noqa: A002 - what it is
    name: str | None = None,
    *,
    prefix: str | None = None,
) -> None:
    """Write one adapter of `model` as another library's loader reads it.

    * `"peft"`: a folder for `PeftModel.from_pretrained`.
    * `"diffusers"`: a folder (or, where the path ends in `.safetensors`, a file) for a pipeline's
      `load_lora_weights` and a model's `load_lora_adapter(path, prefix="unet", use_safetensors=True)`, whose defaults
      are the prefix "transformer" and a pickle. LoRA only. Names begin with `unet.` for a class with UNet in its name,
      else with `transformer.`.
    * `"lycoris"`: a safetensors file for `create_lycoris_from_weights`; names begin with `lycoris_`.
    * `"kohya"`: the same with `lora_unet_`. sd-scripts, LyCORIS's kohya network, ComfyUI and diffusers' pipelines read
      it; diffusers' `load_lora_adapter` does not.
    * `"comfyui"`: the same with `diffusion_model.`, and with dots in the names as the model has them.

    `prefix` replaces the beginning of the names, "" for none. In an `nn.ModuleDict` of a pipeline's parts (`unet` or
    `transformer`, `te` or `text_encoder`, `te2`, ...) each part gets the prefix of its own.

    A model that the other library adapts with the file computes what `model` computes. A spec can be written, whatever
    its name, if its network is that of LoRA, LoCon, LoHa or LoKr; for PEFT also if it is that of another tuner, listed
    in docs/peft.md. Kernel cores, unequal ranks and low-rank factors that the loader cannot read are multiplied out. A
    LoRA with a frozen copy becomes one of twice the rank. A scale from `activate` is multiplied into the file's.

    Raises AdapterFileError, before anything is written, for what the other library cannot hold.
    """
    path = file_path(path)
    if format not in WRITTEN:
        raise refuse(path, "`format`", f"one of {', '.join(WRITTEN)}", clip(format), "Pass one of these.")
    _check_folder_name(path, format)
    prefix = _checked_prefix(path, format, prefix)
    with one_writer(model) as writes:
        root, state, name, adapters = chosen(model, path, name)
        gain = state.active.get(name, 1.0)
        modules = plain_modules(root)
        _raise(path, [] if format == "peft" else [*_parameter_problems(modules, adapters)])
        moved = _moved_statistics(root, state, name)
        kept = moved if format == "peft" and gain == 1.0 else {}
        odd = [*_statistics_problems([each for each in moved if each not in kept])]
        trained = _trained(root, state, name, gain) | kept
        rows = {layer: tuner_of(each) for layer, each in adapters.items()} if format == "peft" else {}
        if any(rows.values()):
            contents, note = _tuner(path, root, rows, adapters, trained, gain, odd)
        else:
            parts = _parts(path, adapters, modules, gain, odd)
            contents = _contents(path, root, format, prefix, parts, adapters, trained)
            note = dropout_note(parts, modules) if format == "peft" else None
        if not writes:
            pass
        elif format == "peft" or (format == "diffusers" and path.suffix != _FILE):
            _write_folder(path, contents)
        else:
            _check_place(path)
            replace_files(contents)
    if note is not None:
        warnings.warn(TnpeftWarning(*in_file(path, [note])), stacklevel=2)


def _parameter_problems(modules: Mapping[str, nn.Module], adapters: Iterable[str]) -> Iterator[Problem]:
    """No file but PEFT's holds what stands on an embedding or a parameter as other layers' updates."""
    beside = [name for name in adapters if name not in modules or isinstance(modules[name], LOOKUPS)]
    if beside:
        fix = "Write it with `tnpeft.save`, or merge it into the model."
        yield Problem("adapters", "those of layers alone", f"also {listed(beside)}", fix)


def _parts(
    path: Path,
    adapters: Mapping[str, Adapter],
    modules: Mapping[str, nn.Module],
    gain: float,
    problems: Iterable[Problem],
) -> dict[str, LayerUpdate]:
    """What each layer's adapter is; raises where some are nothing that others have, and for other problems."""
    wheres = {name: f"{'layer' if name in modules else 'parameter'} '{name}'" for name in adapters}
    found = {name: part_of(adapter, wheres[name], gain) for name, adapter in adapters.items()}
    _raise(path, [*(part for part in found.values() if isinstance(part, Problem)), *problems])
    return {layer: part for layer, part in found.items() if isinstance(part, LayerUpdate)}


def _tuner(
    path: Path,
    root: nn.Module,
    rows: Mapping[str, Tuner | None],
    adapters: Mapping[str, Adapter],
    trained: Mapping[str, Tensor],
    gain: float,
    odd: list[Problem],
) -> tuple[dict[Path, bytes], Problem | None]:
    """The files of one of PEFT's tuners, and what they cannot say. Raises AdapterFileError for what it cannot hold."""
    modules, base = plain_modules(root), base_tensors(root)
    problems = tuner_problems(rows, adapters, modules, trained, base, gain)
    _raise(path, [*odd, *_place_problems(root, rows), *problems])
    known = {name: row for name, row in rows.items() if row is not None}
    contents = tuner_contents(path, known, adapters, trained, modules, base, gain)
    return contents, tuner_dropout_note(rows, adapters)


def _contents(
    path: Path,
    root: nn.Module,
    kind: str,
    prefix: str | None,
    parts: dict[str, LayerUpdate],
    adapters: Mapping[str, Adapter],
    trained: Mapping[str, Tensor],
) -> dict[Path, bytes]:
    """The files to write. Raises AdapterFileError for what the other library cannot hold."""
    modules, base = plain_modules(root), base_tensors(root)
    layers = {layer: adapter.network.layer for layer, adapter in adapters.items()}
    problems = [*_option_problems(modules, parts, kind in ("peft", "diffusers"))]
    names: dict[str, str] = {}
    first = {names[0]: trained[names[0]] for names in parameter_groups(root) if names[0] in trained}
    if kind == "peft":
        problems += [*_place_problems(root, parts), *peft_problems(parts, layers)]
        problems += [*form_problems(parts, layers, modules, base), *beside_problems(parts, trained, modules, base)]
    elif kind == "diffusers":
        problems += [*_place_problems(root, parts), *diffusers_problems(parts, layers, first)]
    else:
        problems += comfyui_problems(parts, layers) if kind == "comfyui" else ()
        names = _whole_names(path, root, parts, kind, prefix)
        problems += lycoris_problems(parts, layers, first, names)
    _raise(path, problems)
    if not parts:
        raise refuse(path, "adapter", "one with adapted layers", "none", "Save it with `tnpeft.save`.")
    if kind == "peft":
        return peft_contents(path, parts, layers, trained, modules, base)
    if kind == "diffusers":
        named = _named(path, root, parts, prefix, flat=False)
        file = path if path.suffix == _FILE else path / DIFFUSERS_WEIGHTS
        return diffusers_contents(file, parts, named, modules)
    return lycoris_contents(path, _for_readers(parts, kind), names)


def _checked_prefix(path: Path, kind: str, prefix: object) -> str | None:
    """A prefix with what stands between it and the names, which those who know it may leave out."""
    if prefix is None:
        return None
    if kind == "peft":
        raise refuse(path, "`prefix`", 'none: "peft" has its own', clip(prefix), "Leave it out.")
    between = "." if kind in ("diffusers", "comfyui") else "_"
    if not isinstance(prefix, str) or (between == "_" and "." in prefix):
        expected = "a text without dots" if between == "_" else "a text"
        fix = 'For example `prefix="lora_te"`; "comfyui" writes names with dots.'
        fix = fix if between == "_" else 'For example `prefix="transformer"`.'
        raise refuse(path, "`prefix`", expected, clip(prefix), fix)
    return prefix if not prefix or prefix.endswith(between) else prefix + between


def _named(
    path: Path, root: nn.Module, layers: Iterable[str], prefix: str | None, flat: bool, denoiser: str | None = None
) -> dict[str, tuple[str, str]]:
    """For each layer what its name begins with, and its name behind that."""
    if prefix is not None:
        return {layer: (prefix, layer) for layer in layers}
    named = named_parts(root, layers, flat, denoiser)
    if isinstance(named, Problem):
        raise AdapterFileError(*in_file(path, [named]))
    return named


def _whole_names(path: Path, root: nn.Module, layers: Iterable[str], kind: str, prefix: str | None) -> dict[str, str]:
    """The layers' names in a file of LyCORIS, kohya or ComfyUI."""
    if kind == "comfyui":
        named = _named(path, root, layers, prefix, flat=False, denoiser="diffusion_model.")
        return {layer: before + _clip_name(before, name) for layer, (before, name) in named.items()}
    named = _named(path, root, layers, "lycoris_" if prefix is None and kind == "lycoris" else prefix, flat=True)
    return {layer: before + _clip_name(before, name).replace(".", "_") for layer, (before, name) in named.items()}


def _clip_name(prefix: str, name: str) -> str:
    """A layer of CLIP's text encoder as every reader calls it, also where transformers 5 leaves `text_model.` out."""
    text = prefix.startswith(("lora_te", "text_encoder"))
    return f"text_model.{name}" if text and name.startswith(("encoder.layers.", "embeddings.")) else name


def _for_readers(parts: Mapping[str, LayerUpdate], kind: str) -> dict[str, LayerUpdate]:
    """The same updates in forms that every reader of such a file takes alike."""
    if kind == "kohya":
        return one_alpha({name: untuckered(part) if "mid" in part.tensors else part for name, part in parts.items()})
    return comfyui_parts(parts) if kind == "comfyui" else dict(parts)


def _raise(path: Path, problems: list[Problem]) -> None:
    if problems:
        raise AdapterFileError(*in_file(path, problems))


def _trained(root: nn.Module, state: AdaptedModel, name: str, gain: float) -> dict[str, Tensor]:
    """What the adapter makes of the parameters that it trains, at all their names: b0 + gain (b - b0)."""
    values: dict[str, Tensor] = {}
    for tied in all_tied(root, state):
        if name in tied.trainers and tied.is_parameter:
            copy = tied.copy_of(name).detach()
            if gain != 1.0:
                copy = torch.lerp(whole(tied.original.detach()).double(), copy.double(), gain)
            value = copy.cpu()
            values |= dict.fromkeys(tied.names, value)
    return values


def _moved_statistics(root: nn.Module, state: AdaptedModel, name: str) -> dict[str, Tensor]:
    """Running statistics of norms that training changed."""
    copies, moved = statistics_of(root, name), dict[str, Tensor]()
    for tied in all_tied(root, state):
        if tied.names[0] in copies and not torch.equal(tied.original, tied.copy_of(name)):
            moved |= dict.fromkeys(tied.names, tied.copy_of(name).detach().cpu())
    return moved


def _statistics_problems(moved: Collection[str]) -> Iterator[Problem]:
    """Why they cannot be written: files but PEFT's, which hold whole modules, have no place for them."""
    if moved:
        fix = "Train with the norms in evaluation mode, or keep the adapter in tnpeft's own file."
        yield Problem("running statistics", "those of the base model", f"others in '{next(iter(moved))}'", fix)


def _option_problems(
    modules: Mapping[str, nn.Module], parts: Mapping[str, LayerUpdate], peft: bool
) -> Iterator[Problem]:
    """Options of a layer that the other library's forward drops, so that it would compute something else."""
    for name, part in parts.items():
        mode, dilation = (getattr(modules.get(name), option, None) for option in ("padding_mode", "dilation"))
        found = f"`padding_mode={mode!r}`" if mode not in (None, "zeros") else None
        if peft and method_of(part) == "LORA" and any(step != 1 for step in dilation or ()):
            found = found or f"`dilation={dilation}`"
        if found:
            expected = "a layer without it, for the other library's forward drops it"
            yield Problem("layer option", expected, found, MERGE, f"layer '{name}'")


def _place_problems(root: nn.Module, layers: Iterable[str]) -> Iterator[Problem]:
    """Layers with two places in the model, of which PEFT would adapt the first alone."""
    others = reached_twice(root)
    for name in layers:
        if name not in others:
            name = name.rpartition(".")[0]  # a parameter's owner
        if name in others:
            expected, found = "one in the model", f"also that of '{others[name]}': PEFT would adapt the first alone"
            yield Problem("place", expected, found, MERGE, f"layer '{name}'")


def _check_place(path: Path) -> None:
    found = what_is_at(path)
    if found not in ("a file", "no such file"):
        fix = "Add a name, for example `adapter.safetensors`."
        raise refuse(path, "adapter file", "a file name", found, fix)


def _check_folder_name(path: Path, kind: str) -> None:
    """A folder that would be called as a file is, which nobody reads as one."""
    of_file = path.suffix in (".bin", ".ckpt", ".pt", ".pth") or (kind == "peft" and path.suffix == _FILE)
    if kind not in ("peft", "diffusers") or not of_file or what_is_at(path) == "a folder":
        return
    plain, found = shown(path.with_suffix("")), f"that of a {path.suffix} file"
    fix = f"Pass a folder's name, for example '{plain}'"
    if kind == "peft":
        fix = f"{fix}; PEFT reads two files in it."
        raise refuse(path, "adapter folder", "the name of a folder", found, fix)
    fix = f"{fix}, or '{plain}{_FILE}'."
    raise refuse(path, "adapter", f"the name of a folder or a {_FILE} file", found, fix)


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
