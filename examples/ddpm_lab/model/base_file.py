"""The tensors of a model in whatever its checkpoint wraps them: entries of a training script, prefixes of wrappers."""

from __future__ import annotations

import pickle
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ddpm_lab.data.reading import not_a_file
from ddpm_lab.support.faults import LabError, fault
from tnpeft.errors import Problem
from tnpeft.io.foreign.archive import load_archive

__all__ = ["FIX", "model_tensors", "name_some"]

FIX = "Give the checkpoint of this model, or set `model` to the checkpoint's."
WHAT = "`base.checkpoint`"
PICKLES = (b"PK\x03\x04", b"\x80")  # a zip archive and a bare pickle, as torch writes them
# Parts of a name that wrappers put anywhere: torch.compile, DDP, FSDP and activation checkpointing.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# What a damaged file gives: the unpickler reads whatever follows.
UNREADABLE = (
    *(SafetensorError, pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, LookupError),
    *(MemoryError, OSError, RuntimeError, TypeError, ValueError, struct.error),
)
DEEPEST = 8  # mappings in mappings
MOST_NAMED = 3


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds: tensors by their dotted names, and the numbers beside them."""

    tensors: Mapping[str, torch.Tensor]
    numbers: Mapping[str, float]


def model_tensors(path: Path, names: Sequence[str], note: Callable[[str], None]) -> dict[str, torch.Tensor]:
    """The tensors of the part of a checkpoint that has most of these names, by what they are called there.

    A part is what follows a common beginning such as `unet_state_dict.` or `state_dict.unet.`. `note` is told which
    one it is and what else the file holds. Raises LabError where there is none, or several fit equally well.
    """
    content = _content(path)
    fitting = _parts(content.tensors, names)
    if not fitting:
        raise fault(path, WHAT, f"this model's tensors, {name_some(names)}", _list(content.tensors), FIX)
    part = _chosen(content.tensors, fitting, path)
    left_out = (
        tuple(other for other in fitting if other != part) if part == "" else ()
    )  # another copy beside a bare one
    state = {
        name.removeprefix(part): value
        for name, value in content.tensors.items()
        if name.startswith(part) and not (left_out and name.startswith(left_out))
    }
    beside = [name for name in content.tensors if name.removeprefix(part) not in state]
    if part or beside:
        where = f"under `{part.removesuffix('.')}` of {path}" if part else f"of {path}"
        left = f"; not used: {name_some(beside)}" if beside else ""
        note(f"Base: {len(state)} tensors {where}{left}")
    for name, number in content.numbers.items():
        if "scale_factor" in name:
            note(f"Base: `{name}` {number:g} is not used: it scales a latent space, and this model works on voxels")
    return state


def name_some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(f"`{name}`" for name in names[:MOST_NAMED]) + more


def _parts(tensors: Mapping[str, torch.Tensor], names: Sequence[str]) -> list[str]:
    """The beginnings, with their dots, that most of the model's names follow, the shortest first."""
    known = set(names)
    votes = Counter(begin for name in tensors for begin in _beginnings(name) if name[len(begin) :] in known)
    best = max(votes.values(), default=0)
    return sorted((begin for begin, count in votes.items() if count == best), key=len)


def _chosen(tensors: Mapping[str, torch.Tensor], fitting: Sequence[str], path: Path) -> str:
    """The part that fits best; raises LabError where several do that differ, none of them bare."""
    if "" not in fitting and not all(_same(tensors, fitting[0], other) for other in fitting[1:]):
        parts = ", ".join(f"`{begin.removesuffix('.')}`" for begin in fitting)
        fix = "Save the tensors of the one that you want in a file of their own."
        raise fault(path, WHAT, "one model", f"{len(fitting)} with the same names, {parts}", fix)
    return fitting[0]


def _same(tensors: Mapping[str, torch.Tensor], part: str, other: str) -> bool:
    """Whether two parts hold the same tensors."""
    one, two = (
        {name.removeprefix(begin): value for name, value in tensors.items() if name.startswith(begin)}
        for begin in (part, other)
    )
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def _beginnings(name: str) -> Iterator[str]:
    yield ""
    for place, letter in enumerate(name):
        if letter == ".":
            yield name[: place + 1]


def _list(tensors: Mapping[str, torch.Tensor]) -> str:
    return f"only {name_some([*tensors])}" if tensors else "no tensors"


def _content(path: Path) -> Content:
    """Everything in a file that is a tensor or a number; nothing else is ever unpickled."""
    loaded = _loaded(path)
    if not isinstance(loaded, Mapping):
        raise fault(path, WHAT, "a mapping of names to tensors", type(loaded).__name__, FIX)
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, float] = {}
    seen: set[int] = set()

    def walk(values: Mapping[Any, Any], begin: str, depth: int) -> None:
        if id(values) in seen or depth > DEEPEST:
            return
        seen.add(id(values))
        for key, value in values.items():
            name = begin + ".".join(part for part in str(key).split(".") if part not in WRAPPERS)
            if isinstance(value, torch.Tensor) and name in tensors and not torch.equal(value, tensors[name]):
                name = f"{begin}{key}"  # two tensors that only wrappers tell apart
            if isinstance(value, Mapping):
                walk(value, f"{name}." if name and not name.endswith(".") else name, depth + 1)
            elif isinstance(value, torch.Tensor):
                tensors[name] = value
                if value.numel() == 1 and not value.is_complex():
                    numbers[name] = float(value)
            elif isinstance(value, (int, float)):
                numbers[name] = float(value)

    walk(loaded, "", 0)
    return Content(tensors, numbers)


def _loaded(path: Path) -> Any:
    try:
        kind = not_a_file(path)
        if kind is not None:
            raise fault(path, WHAT, "a file", kind, "Check the path.")
        with path.open("rb") as file:
            start = file.read(4)
    except FileNotFoundError:
        raise fault(path, WHAT, "a file", "nothing there", "Check the path.") from None
    except OSError as error:
        raise fault(path, WHAT, "a file that can be read", str(error.strerror), "Check the path.") from None
    try:  # by what it holds: names of files are often wrong
        if not start.startswith(PICKLES):
            return load_file(path)
        return load_archive(path)
    except UNREADABLE as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> LabError:
    """What a file is that is neither; torch's own advice is to run the code in it."""
    text = " ".join(str(error).split())
    found, fix = text[:120] or type(error).__name__, "Check the file."
    if "TorchScript" in text:
        found, fix = "a TorchScript archive", "Give the state dict; in a MONAI bundle it is `models/model.pt`."
    elif isinstance(error, LookupError):
        found = "a pickle that is damaged"
    elif isinstance(error, pickle.UnpicklingError):
        code = re.search(r"GLOBAL (\S+)", text)
        found = (
            f"a pickle with `{code[1]}`, which would run code" if code else "a pickle that is damaged or would run code"
        )
        fix = "Save the tensors alone: `torch.save(model.state_dict(), FILE)`."
    return LabError(Problem(WHAT, "a safetensors file or a state dict", found, fix, str(path)))
