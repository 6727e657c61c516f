"""Other libraries' files on disk: what they are, and their tensors. No pickle is run."""

from __future__ import annotations

import json
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tnpeft.errors import AdapterFileError
from tnpeft.io.files import not_safetensors, refuse, what_is_at
from tnpeft.io.foreign.archive import archive_problem
from tnpeft.io.manifest import KEY
from tnpeft.spec.document import clip
from tnpeft.spec.recognise import recognise

__all__ = [
    "CONFIG",
    "FORMATS",
    "SUPPORTED",
    "WEIGHTS",
    "Source",
    "clip_key",
    "format_of",
    "open_source",
    "tensors_of",
    "unsupported",
]

FORMATS = ("peft", "lycoris", "tenvoo")
SUPPORTED = (
    "PEFT's LoRA, LoHa and LoKr, LyCORIS's LoCon, LoHa and LoKr, or TenVOO, QuanTA, LoCon, LoHa and LoKr of the TenVOO "
    "paper"
)
CONFIG, WEIGHTS, PICKLED_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_DAMAGED = "Copy or download the file again."
_MAX_CONFIG = 1 << 20
_MAX_REPEATED = 1 << 20  # bytes of a tensor that repeats fewer
# What `torch.load(weights_only=True)` raises for files that are damaged or hold more than tensors.
_LOAD_ERRORS = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
_PEFT = re.compile(r"\.(lora_(A|B|embedding_A|magnitude_vector)|(hada|lokr)_[wt]\d(_[ab])?(\.\w+)?$)")
_PAPER = re.compile(r"(tenvoo_weights|quanta_weights|\.loha_w\d_[ab]$)")
_LYCORIS = re.compile(r"\.(lora_(up|down|mid)\.weight|(hada|lokr)_[wt]\d(_[ab])?|w_norm|diff)$")
# Marks of methods that are none of the supported ones, in their keys.
_OTHERS = {
    "oft_": "OFT or BOFT",
    "boft_": "BOFT",
    "ia3_": "IA3",
    ".on_input": "IA3",
    "lora_E": "AdaLoRA",
    "vera_lambda": "VeRA",
    ".a1.weight": "GLoRA",
    ".lambda_layer": "T-LoRA",
    "prompt_embeddings": "prompt tuning",
}


@dataclass(frozen=True)
class Source:
    """A file (or PEFT's folder) that was read: its format, its tensors by key, and PEFT's config."""

    path: Path
    format: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None = None


def open_source(path: Path, format: str | None) -> Source:  # noqa: A002 - the public argument's name
    """Read a file; its keys say the format unless it is given. Raises AdapterFileError."""
    if format is not None and format not in FORMATS:
        fix = "Leave `format` out to let the file's keys decide."
        raise refuse(path, "`format`", f"one of {', '.join(FORMATS)}", clip(format), fix)
    found = what_is_at(path)
    folder = path if found == "a folder" else path.parent
    if found == "a folder":
        names = (WEIGHTS, PICKLED_WEIGHTS)
        weights = next((path / name for name in names if what_is_at(path / name) == "a file"), None)
        if weights is None:
            raise refuse(path, "folder", f"`{WEIGHTS}` in it", "no such file", "Pass PEFT's adapter folder, or a file.")
    elif found == "a file":
        weights = path
    else:
        raise refuse(path, "adapter file", "a file, or PEFT's folder", found, "Check the path.")
    tensors, pickled = tensors_of(weights)
    has_config = what_is_at(folder / CONFIG) == "a file"
    kind = format or _format(path, tensors, pickled, has_config)
    if kind == "peft" and not has_config:
        fix = "Keep the two files that PEFT saves together: the scale of the update stands in the config."
        raise refuse(path, "PEFT adapter", f"`{CONFIG}` beside it", "no such file", fix)
    return Source(path, kind, tensors, _config(folder / CONFIG) if kind == "peft" else None)


def format_of(path: Path) -> str:
    """The format of a file by its keys: one of `FORMATS`, or "tnpeft". Raises AdapterFileError."""
    if what_is_at(path) == "a file":
        try:
            with safe_open(path, framework="pt") as opened:
                if KEY in (opened.metadata() or {}):
                    return "tnpeft"
        except (SafetensorError, OSError):
            pass  # what it is, or why it is nothing, the next line says
    return open_source(path, None).format


def unsupported(path: Path, keys: Iterable[str]) -> AdapterFileError:
    """The error for a file whose method is none that can be read."""
    keys = list(keys)
    name = next((other for mark, other in _OTHERS.items() if any(mark in key for key in keys)), None)
    shown = ", ".join(f"'{clip_key(key)}'" for key in keys[:3]) or "no tensors"
    found = f"{name} ({shown})" if name else shown
    return refuse(path, "method", SUPPORTED, found, "Convert such adapters with the library that made them.")


def clip_key(key: str) -> str:
    return key if key.isprintable() and len(key) <= 120 else clip(key, 120)


def _format(path: Path, tensors: Mapping[str, Tensor], pickled: bool, has_config: bool) -> str:
    if any(_PAPER.search(key) for key in tensors):
        return "tenvoo"
    peft = any("lora_A" in key or "lora_B" in key or key.startswith("base_model.") for key in tensors)
    if peft or (has_config and any(_PEFT.search(key) for key in tensors)):
        return "peft"
    modules = [key[: match.start()] for key in tensors if (match := _LYCORIS.search(key))]
    if modules:
        return "tenvoo" if pickled and all("." in module for module in modules) else "lycoris"
    if has_config:
        return "peft"
    raise unsupported(path, tensors)


def tensors_of(path: Path) -> tuple[dict[str, Tensor], bool]:
    """A file's tensors on the CPU, and whether torch's own format holds them."""
    kind = recognise(path)
    if kind is not None and kind.name == "torch":
        return _pickled(path), True
    if kind is not None and kind.name == "pickle":
        fix = f"Write it anew: `torch.save(torch.load({path.name!a}, weights_only=True), {path.name!a})`."
        raise refuse(path, "adapter file", "a zip, as torch writes since 1.6", "a bare pickle, which is not run", fix)
    try:
        with safe_open(path, framework="pt") as opened:
            if KEY in (opened.metadata() or {}):
                raise refuse(path, "file", "one of another library", "one of tnpeft", "Use `tnpeft.load`.")
            return {key: opened.get_tensor(key) for key in opened.keys()}, False  # noqa: SIM118 - not a mapping
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, AdapterFileError):
            raise
        raise not_safetensors(path, "adapter file", error, _DAMAGED, or_torch=True) from error
    except OSError as error:
        fix = "Check the file and its permissions."
        raise refuse(path, "adapter file", "to be read", error.strerror or str(error), fix) from error


def _pickled(path: Path) -> dict[str, Tensor]:
    """The state dict of a torch file, perhaps under the key that training scripts put it under."""
    if fault := archive_problem(path):
        raise refuse(path, "adapter file", fault.expected, fault.found, fault.fix)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that are not torch's own, which fail or hold tensors alone
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _LOAD_ERRORS as error:
        # torch wraps what its unpickler said in advice to run the pickle all the same, which nobody should follow.
        said = error.__context__ if isinstance(error, pickle.UnpicklingError) and error.__context__ else error
        found = " ".join(str(said).split())[:200] or type(said).__name__
        fix = "Copy or download it again, or save its state dict alone; nothing else is loaded from a pickle."
        raise refuse(path, "adapter file", "a state dict that `weights_only` can load", found, fix) from error
    for name in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        fix = "Save the state dict alone."
        raise refuse(path, "adapter file", "a mapping of names to tensors", f"a {type(content).__name__}", fix)
    for key, tensor in content.items():
        if problem := _tensor_problem(tensor):
            fix = "Save the state dict of an ordinary model on the CPU."
            raise refuse(path, f"tensor '{clip_key(key)}'", "its values, one by one", problem, fix)
    return {key: value.detach() for key, value in content.items()}


def _tensor_problem(tensor: Tensor) -> str | None:
    """Why a tensor of a pickle is not what its shape says; a few bytes may stand for gigabytes."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        return f"a {str(tensor.layout).removeprefix('torch.').replace('strided', 'quantised')} one"
    if tensor.device.type != "cpu":
        return f"one on the {tensor.device.type} device"
    if tensor.numel() * tensor.itemsize > max(tensor.untyped_storage().nbytes(), _MAX_REPEATED):
        return f"{tuple(tensor.shape)} made of {tensor.untyped_storage().nbytes():,} bytes"
    return None


def _config(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_CONFIG + 1)
        config = json.loads(text) if len(text) <= _MAX_CONFIG else None
    except (OSError, ValueError, RecursionError) as error:
        found = " ".join(str(error).split())[:200]
        raise refuse(path, "PEFT config", "a JSON file", found, _DAMAGED) from error
    if not isinstance(config, Mapping):
        raise refuse(path, "PEFT config", "a JSON object", clip(config), _DAMAGED)
    return config
