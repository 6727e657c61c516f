"""Full checkpoints: a safetensors file, a folder of shards, a state dict of `torch.save`; one tensor read at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tnpeft.documents.paths import is_folder
from tnpeft.documents.recognise import recognise
from tnpeft.errors import near_miss
from tnpeft.fitting.conversion import how_to_convert, state_dict_of
from tnpeft.fitting.extract import check_tensors
from tnpeft.io.files import file_path, not_safetensors, refuse
from tnpeft.surgery import base_tensors, parameter_groups
from tnpeft.surgery.tree import slots, ties

__all__ = ["Changed", "Checkpoint", "fill"]

_MEND = "Pass a .safetensors file, or a folder that holds one or shards with an index."
_DIFFERENT = "Pass the change of tensors that the base has, in their shapes."


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a safetensors file, of a folder with one such file or shards and their index, or of a torch file.

    A torch file must hold a state dict and nothing else; none of its code is run. A tensor is read when it is asked
    for, and not kept. Raises AdapterFileError for what cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = file_path(path)
        self._shards: dict[str, Any] = {}
        for file in _files(self.path):
            shard = _opened(file)
            for name in shard.keys():  # noqa: SIM118 - not a mapping
                if name in self._shards:
                    raise refuse(self.path, f"tensor '{name}'", "one of that name", "two, in several files", _MEND)
                self._shards[name] = shard

    def __getitem__(self, name: str) -> Tensor:
        shard = self._shards[name]
        try:
            tensor: Tensor = shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise refuse(self.path, f"tensor '{name}'", "to be read", str(error), "Copy the file again.") from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)


class Changed(Mapping[str, Tensor]):
    """A base with a change added in float64; tensors that the change does not name are as they were.

    Raises AdapterFileError for a change of a tensor that the base does not have.
    """

    def __init__(self, base: Checkpoint, change: Checkpoint) -> None:
        self.base, self.change = base, change
        for name in change:
            if name not in base:
                fix = near_miss(name, base) or _DIFFERENT
                raise refuse(change.path, "change", "names of the base's tensors", f"'{name}'", fix)

    def __getitem__(self, name: str) -> Tensor:
        value = self.base[name]
        if name not in self.change:
            return value
        change = self.change[name]
        if change.shape != value.shape:
            found = f"{tuple(change.shape)}"
            raise refuse(self.change.path, f"change of '{name}'", f"the shape {tuple(value.shape)}", found, _DIFFERENT)
        return value.double() + change.double()

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


def _files(path: Path) -> list[Path]:
    if not is_folder(path):
        return [path]
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        found = ", ".join(index.name for index in indices)
        raise refuse(path, "checkpoint", "one index of shards", found, "Name the .safetensors file instead.")
    if indices:
        return _listed(indices[0])
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise refuse(path, "checkpoint", "safetensors files", "a folder without any", _MEND)
    return files


def _listed(index: Path) -> list[Path]:
    """The shards that an index names, which must be in its folder."""
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        files = [index.parent / name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise refuse(index, "index of shards", "a `weight_map` of file names", type(error).__name__, _MEND) from error
    for file in files:
        if file.parent != index.parent:
            raise refuse(index, "index of shards", "names of files beside it", f"'{file}'", _MEND)
    return files


class _StateDict:
    """A torch file's state dict, read as safetensors are; its bytes stay on the disk until they are used."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.keys = tensors.keys
        self.get_tensor = tensors.__getitem__


def _opened(file: Path) -> Any:
    kind = recognise(file)
    if kind is not None and kind.name == "torch" and (tensors := state_dict_of(file)) is not None:
        return _StateDict(tensors)
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        mend = how_to_convert(file) if kind is not None and kind.name == "torch" else _MEND
        raise not_safetensors(file, "checkpoint", error, mend) from error
    except OSError as error:
        # The path, which some versions quote, is the place already.
        found = error.strerror or str(error).removesuffix(f": {file}").removesuffix(f': "{file}"')
        raise refuse(file, "checkpoint", "a file that can be read", found, _MEND) from error


def fill(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Give a model on the meta device the checkpoint's values, in the model's own types; tied tensors stay tied.

    Buffers that no checkpoint holds stay on meta, because the model is not run. Raises AttachError.
    """
    check_tensors(base_tensors(model), checkpoint, parameter_groups(model), f"checkpoint {checkpoint.path}")
    found = {**slots(model), **slots(model, "_buffers")}
    for names in ties(found).values():
        name = next((name for name in names if name in checkpoint), None)
        if name is not None:
            value = _like(found[name].tensor, checkpoint[name])
            for other in names:
                found[other].put(value)


def _like(like: Tensor, value: Tensor) -> Tensor:
    value = value.to(like.dtype)
    return nn.Parameter(value, requires_grad=like.requires_grad) if isinstance(like, nn.Parameter) else value
