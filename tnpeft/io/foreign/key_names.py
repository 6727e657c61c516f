"""Which layer of a model a key means: libraries wrap models, and write `_` instead of `.`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from torch import nn

from tnpeft.adapters.parked import LOOKUPS
from tnpeft.errors import AdapterFileError, Problem
from tnpeft.io.files import shown
from tnpeft.io.foreign.formats import MADE_FOR, clip_key
from tnpeft.io.foreign.source import Source
from tnpeft.network.look_alikes import kind_name
from tnpeft.spec.pattern import KINDS
from tnpeft.surgery import layer_problem
from tnpeft.surgery.tree import places

__all__ = ["check_layers", "dotted", "layer_named", "reached_twice", "underscored", "where_to_load"]

# `text_model.` stood between CLIP's text encoder and its layers before transformers 5.
_WRAPPERS = ("base_model.model.", "base_model.", "_orig_mod.", "module.", "model.", "text_model.")
_PREFIXES = ("lycoris_", "lora_", "text_model_", "")
_OUTSIDE = "tnpeft adapts no such layer and loads no part of a file: merge the adapter in the library that made it."


def dotted(name: str, known: Collection[str], place: str = "") -> str | None:
    """`name` without the prefixes of wrappers around the model, as the model has it; None if it has no such name.

    `place` is where in the model the names of the file belong.
    """
    while place + name not in known:
        rest = _in_wrapper(name)
        if rest is None:
            return None
        name = rest
    return place + name


def _in_wrapper(name: str) -> str | None:
    """A name without the prefix of the outermost wrapper; None where it has none."""
    return next((name[len(prefix) :] for prefix in _WRAPPERS if name.startswith(prefix)), None)


def layer_named(source: Source, key: str, written: str, modules: Mapping[str, nn.Module]) -> str:
    """The module of the tensor `key`; the file has the module's name as `written`. Raises AdapterFileError."""
    name = dotted(written, modules, source.place)
    if name is None:
        what = f"tensor '{clip_key(source.called(key))}'"
        fix = where_to_load(written, [module[len(source.place) :] for module in modules])
        raise source.refuse(what, "a layer of this model", "no such layer", fix)
    return name


def where_to_load(written: str, known: Collection[str]) -> str:
    """What to do with a file whose name of a layer, with its dots, no layer of the model has."""
    name = written
    while (rest := _in_wrapper(name)) is not None:
        name = rest
    steps = name.split(".")
    place = next((place for place in range(1, len(steps)) if ".".join(steps[place:]) in known), None)
    if place is not None:  # this model is a part of the file's
        whole = "model"
        for step in reversed(steps[:place]):
            whole = f'{{"{step}": {whole}}}' if whole == "model" else f'{{"{step}": torch.nn.ModuleDict({whole})}}'
        return f"This model has '{'.'.join(steps[place:])}': load the file onto `torch.nn.ModuleDict({whole})`."
    outer = [module.removesuffix(f".{name}") for module in known if name and module.endswith(f".{name}")]
    if len(outer) == 1:  # and the other way round
        return (
            f"This model has '{outer[0]}.{name}': load the file onto `model.{outer[0]}`, if it was made for that part."
        )
    return MADE_FOR


def check_layers(source: Source, names: Iterable[str], modules: Mapping[str, nn.Module], tables: bool = False) -> None:
    """Raises AdapterFileError for all layers that the file adapts and tnpeft cannot.

    `tables` says whether the file's library has a special form for embeddings.
    """
    problems = []
    for name in names:
        if isinstance(modules[name], LOOKUPS) and not tables:
            found = kind_name(type(modules[name]))
            kinds = ", ".join(KINDS)
            problem: Problem | None = Problem("layer type", f"one of {kinds}", found, _OUTSIDE, layers=(name,))
        else:
            problem = layer_problem(name, modules[name])
        if problem is not None:
            fix = _OUTSIDE if problem.what == "layer type" else problem.fix
            problems.append(replace(problem, fix=fix, where=shown(source.path)))
    if problems:
        raise AdapterFileError(*problems)


def reached_twice(root: nn.Module) -> dict[str, str]:
    """For a module with several names, from each name to another one: PEFT replaces it only under the first."""
    spots: dict[int, dict[tuple[int, str], str]] = {}
    names: dict[int, list[str]] = {}
    for place in places(root):
        spots.setdefault(id(place.module), {}).setdefault((id(place.parent), place.key), place.name)
        names.setdefault(id(place.module), []).append(place.name)
    several = {module: [*there.values()] for module, there in spots.items() if len(there) > 1}
    return {
        name: next(second for second in firsts if second != name)
        for module, firsts in several.items()
        for name in names[module]
    }


def underscored(
    names: Iterable[str], modules: Iterable[str], place: str = ""
) -> dict[str, str | tuple[str, ...] | None]:
    """For each LyCORIS name its module: several if they would be written in the same way, None if no prefix fits.

    The prefix is the library's own or, if another was configured, the one that fits every name. A name with dots is
    first looked up as it is. `place` is where in the model the names of the file belong.
    """
    names = list(names)
    known = {module[len(place) :]: module for module in modules if module.startswith(place)}
    written: dict[str, list[str]] = {}
    for rest, module in known.items():
        if rest:
            written.setdefault(rest.replace(".", "_"), []).append(module)
    prefixes = [*_PREFIXES, *_common_prefixes(names, written)]
    meant: dict[str, str | tuple[str, ...] | None] = {}
    for name in names:
        whole = dotted(name, known) if "." in name else None
        meant[name] = _module(name, prefixes, written) if whole is None else known[whole]
    return meant


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
