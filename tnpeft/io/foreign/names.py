"""Which layer of a model a key means: libraries wrap models, and write `_` for `.`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import nn

from tnpeft.io.files import refuse
from tnpeft.io.foreign.source import Source, clip_key
from tnpeft.surgery import layer_problem

__all__ = ["dotted", "layer_named", "underscored"]

_WRAPPERS = ("base_model.model.", "base_model.", "_orig_mod.", "module.", "model.")
_PREFIXES = ("lycoris_", "lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_", "")


def dotted(name: str, known: Collection[str]) -> str | None:
    """`name` as the model has it, without the prefixes of wrappers around the model; None where it has none such."""
    while name not in known:
        rest = next((name[len(prefix) :] for prefix in _WRAPPERS if name.startswith(prefix)), None)
        if rest is None:
            return None
        name = rest
    return name


def layer_named(source: Source, key: str, written: str, modules: Mapping[str, nn.Module]) -> str:
    """The layer that the tensor `key` is for, whose name the file has as `written`. Raises AdapterFileError."""
    name = dotted(written, modules)
    if name is None:
        fix = "Load the file onto the model it was made for."
        raise refuse(source.path, f"tensor '{clip_key(key)}'", "a layer of this model", "no such layer", fix)
    if problem := layer_problem(name, modules[name]):
        raise refuse(source.path, f"layer '{name}', {problem.what}", problem.expected, problem.found, problem.fix)
    return name


def underscored(names: Iterable[str], modules: Iterable[str]) -> dict[str, str | tuple[str, ...] | None]:
    """For each LyCORIS name its module; several where they would be written alike, None where no prefix fits.

    The prefix is the library's own or, where another was configured, the one that fits every name.
    """
    names = list(names)
    written: dict[str, list[str]] = {}
    for module in modules:
        if module:
            written.setdefault(module.replace(".", "_"), []).append(module)
    prefixes = [*_PREFIXES, *_common_prefixes(names, written)]
    return {name: _module(name, prefixes, written) for name in names}


def _module(name: str, prefixes: Iterable[str], written: Mapping[str, list[str]]) -> str | tuple[str, ...] | None:
    for prefix in prefixes:
        if name.startswith(prefix) and (rest := name[len(prefix) :].replace(".", "_")) in written:
            modules = written[rest]
            return modules[0] if len(modules) == 1 else tuple(modules)
    return None


def _common_prefixes(names: list[str], written: Collection[str]) -> list[str]:
    """Every prefix up to a `_` after which all the names are the model's."""
    if not names:
        return []
    first = names[0]
    ends = [place + 1 for place, letter in enumerate(first) if letter == "_"]
    return [
        first[:end]
        for end in ends
        if all(name.startswith(first[:end]) and name[end:].replace(".", "_") in written for name in names)
    ]
