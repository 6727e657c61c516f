"""Other libraries' files on disk: what they are, and their tensors. No pickle is run."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tnpeft.documents.recognise import recognise
from tnpeft.errors import AdapterFileError, clip
from tnpeft.io.files import refuse, safetensors_of, what_is_at
from tnpeft.io.foreign.archive import COPY_AGAIN, LOAD_ERRORS, archive_problem, load_archive
from tnpeft.io.foreign.formats import FORMATS, clip_key, guess, unknown
from tnpeft.io.manifest import KEY

__all__ = [
    "CONFIG",
    "DIFFUSERS_WEIGHTS",
    "HEADER",
    "WEIGHTS",
    "Source",
    "format_of",
    "open_source",
    "tensor_problem",
    "tensors_of",
    "weights_of",
]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
IN_FOLDERS = (WEIGHTS, "adapter_model.bin", DIFFUSERS_WEIGHTS, "pytorch_lora_weights.bin")
HEADER = "lora_adapter_metadata"  # under which diffusers puts PEFT's config into a file's header
_MAX_CONFIG = 1 << 20
_MAX_REPEATED = 1 << 20  # bytes of a tensor that repeats fewer
_SHOWN = 4  # of what a file holds
_CODE = re.compile(r"GLOBAL (\S+)")
_ADVICE = re.compile(r"\s*(?:Please|In order to|You can|If you)\b")


@dataclass(frozen=True)
class Source:
    """A file (or PEFT's folder) that was read, or the part of it that adapts one of several models.

    `config` is PEFT's, from the file beside it or the header. `headers` are the configs in the header, by the prefix of
    their keys. `written` has the file's spelling of keys that it spells differently. `place` is where in the model the
    part belongs, with a dot at its end.
    """

    path: Path
    format: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None = None
    headers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    written: Mapping[str, str] = field(default_factory=dict)
    place: str = ""
    config_name: str = CONFIG

    def called(self, key: str) -> str:
        """A key as the file has it."""
        return self.written.get(key, key)

    def config_of(self, prefix: str) -> Mapping[str, Any] | None:
        """The header's config for the keys with a prefix, or for all."""
        return self.headers.get(prefix) or self.headers.get("")

    def refuse(self, what: str, expected: str, found: str, fix: str) -> AdapterFileError:
        return refuse(self.path, what, expected, found, fix)


def open_source(path: Path, format: str | None) -> Source:  # noqa: A002 - the public argument's name
    """Read a file; its keys tell the format, unless it is given. Raises AdapterFileError."""
    if format is not None and format not in FORMATS:
        fix = "Leave `format` out to let the file's keys decide."
        raise refuse(path, "`format`", f"one of {', '.join(FORMATS)}", clip(format), fix)
    weights = weights_of(path)
    tensors, header, pickled = tensors_of(weights)
    beside = weights.parent / CONFIG
    has_config = what_is_at(beside) == "a file"
    headers = _headers(weights, header.get(HEADER))
    kind = format or ("diffusers" if headers else guess(tensors, pickled, has_config))
    if kind is None:
        raise unknown(path, tensors)
    if kind == "diffusers" and format is None and not headers and weights.stem == "adapter_model":
        kind = "peft"  # whose file it is by its name, with keys that somebody has cut
    if kind == "tenvoo":
        return Source(path, kind, tensors)
    if kind != "peft" and (headers or not any(key.startswith("base_model.") for key in tensors)):
        return Source(path, kind, tensors, headers=headers)
    if not has_config and "" not in headers:
        fix = "Keep the two files that PEFT saves together: the scale of the update stands in the config."
        raise refuse(path, "PEFT adapter", f"`{CONFIG}` beside it", "no such file", fix)
    if has_config:
        return Source(path, "peft", tensors, _config(beside))
    return Source(path, "peft", tensors, headers[""], config_name=HEADER)


def weights_of(path: Path) -> Path:
    """The file with the tensors: `path`, or that of PEFT or diffusers in it. Raises AdapterFileError."""
    found = what_is_at(path)
    if found == "a file":
        return path
    if found != "a folder":
        raise refuse(path, "adapter file", "a file, or a folder of PEFT or diffusers", found, "Check the path.")
    weights = next((path / name for name in IN_FOLDERS if what_is_at(path / name) == "a file"), None)
    if weights is None:
        expected = f"`{WEIGHTS}` or `{DIFFUSERS_WEIGHTS}` in it"
        kind = recognise(path)
        fix = kind.fix if kind is not None and kind.name == "folder" else ""  # which files there are in it
        fix = fix or "Pass the folder that PEFT or diffusers saved to, or a file."
        raise refuse(path, "folder", expected, "no such file", fix)
    return weights


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


def tensors_of(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str], bool]:
    """A file's tensors on the CPU, its header's texts, and whether torch's own format holds them."""
    kind = recognise(path)
    if kind is not None and kind.name == "torch":
        return _pickled(path), {}, True
    if kind is not None and kind.name == "pickle":
        loaded = f"torch.load(open({path.name!a}, 'rb'), weights_only=True)"
        fix = f"Write it anew: `torch.save({loaded}, {path.with_suffix('.pth').name!a})`."
        raise refuse(path, "adapter file", "a zip, as torch writes since 1.6", "a bare pickle, which is not run", fix)
    with safetensors_of(path, damaged=COPY_AGAIN, or_torch=True) as opened:
        header = opened.metadata() or {}
        if KEY in header:
            raise refuse(path, "file", "one of another library", "one of tnpeft", "Use `tnpeft.load`.")
        return {key: opened.get_tensor(key) for key in opened.keys()}, header, False  # noqa: SIM118 - no mapping


def _pickled(path: Path) -> dict[str, Tensor]:
    """The state dict of a torch file, perhaps under the key that training scripts put it under."""
    if fault := archive_problem(path):
        raise refuse(path, "adapter file", fault.expected, fault.found, fault.fix)
    try:
        content = load_archive(path)
    except LOAD_ERRORS as error:
        raise _not_loaded(path, error) from error
    for name in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if found := _content_problem(content):
        fix = "Save the model's state dict alone."
        raise refuse(path, "adapter file", "a mapping of names to tensors", found, fix)
    for key, tensor in content.items():
        if problem := tensor_problem(tensor):
            fix = "Save the state dict of an ordinary model on the CPU."
            raise refuse(path, f"tensor '{clip_key(key)}'", "its values, one by one", problem, fix)
    return {key: value.detach() for key, value in content.items()}


def _not_loaded(path: Path, error: Exception) -> AdapterFileError:
    """torch wraps what its unpickler said in advice to run the pickle all the same, which nobody should follow."""
    said = error.__context__ if isinstance(error, pickle.UnpicklingError) and error.__context__ else error
    text = " ".join(str(said).split())
    code = _CODE.search(text)
    if code is not None:
        found = f"a pickle with `{clip_key(code[1])}`, which would run code"
        fix = "Save the model's state dict alone; nothing else is loaded from a pickle."
    else:
        found = _ADVICE.split(text)[0][:200] or type(said).__name__
        fix = "Copy or download it again, or save its state dict alone; nothing else is loaded from a pickle."
    return refuse(path, "adapter file", "a state dict that `weights_only` can load", found, fix)


def _content_problem(content: object) -> str | None:
    """What a torch file holds that is no state dict, in words; None for one."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    keys = [key for key in content if not isinstance(key, str)]
    if keys:
        return f"a {type(content).__name__} with keys that are no texts: {_some(clip(key, 40) for key in keys)}"
    values = {key: type(value).__name__ for key, value in content.items() if not isinstance(value, Tensor)}
    if not values:
        return None
    named = (f"'{clip_key(key)}' ({kind})" for key, kind in values.items())
    return f"a {type(content).__name__} with values that are no tensors: {_some(named)}"


def _some(texts: Iterable[str]) -> str:
    first = list(islice(texts, _SHOWN + 1))
    return ", ".join(first[:_SHOWN]) + " and more" * (len(first) > _SHOWN)


def tensor_problem(tensor: Tensor) -> str | None:
    """Why a tensor of a pickle has not the memory that its shape needs: a few bytes could claim to be gigabytes."""
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
    except OSError as error:
        found = error.strerror or str(error)
        raise refuse(path, "PEFT config", "a JSON file", found, COPY_AGAIN) from error
    return _parsed(path, "PEFT config", text)


def _headers(path: Path, text: str | None) -> dict[str, Mapping[str, Any]]:
    """PEFT's configs in a header, by the prefix of the keys that each is for; "" where one is for all."""
    if text is None:
        return {}
    headers: dict[str, dict[str, Any]] = {}
    for key, value in _parsed(path, f"`{HEADER}` in the header", text.encode()).items():
        prefix, dot, option = key.rpartition(".")
        headers.setdefault(prefix + dot, {})[option] = value
    return dict(headers)


def _parsed(path: Path, what: str, text: bytes) -> Mapping[str, Any]:
    try:
        config = json.loads(text) if len(text) <= _MAX_CONFIG else None
    except (ValueError, RecursionError) as error:
        found = " ".join(str(error).split())[:200]
        raise refuse(path, what, "a JSON file", found, COPY_AGAIN) from error
    if not isinstance(config, Mapping):
        raise refuse(path, what, "a JSON object", clip(config), COPY_AGAIN)
    return config
