"""A recipe meets a model: which layers it adapts, which parameters train beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from tnpeft.errors import AttachError, Problem, near_miss
from tnpeft.recipe.model import Entry, Recipe, Train, compiled
from tnpeft.spec.document import clip
from tnpeft.surgery import SUPPORTED, layer_problem, plain_modules, plain_name, plain_parameters

__all__ = ["Trained", "targets", "trained"]


def targets(model: nn.Module, recipe: Recipe) -> dict[str, Entry]:
    """The layers that each entry claims, by name, in the model's order.

    Raises AttachError for an entry that matches nothing, a layer that two entries claim, and a
    matched layer that cannot be adapted; each with near misses.
    """
    modules = plain_modules(model)
    problems: list[Problem] = []
    claimed: dict[str, Entry] = {}
    owners: dict[int, tuple[str, Entry]] = {}  # by layer: one reached by two names is still one
    for entry in recipe.entries:
        for name in _matched(entry, modules, problems):
            first_name, first = owners.setdefault(id(modules[name]), (name, entry))
            claimed.setdefault(name, entry)
            if first is not entry:
                also = f" (which is '{first_name}' too)" if first_name != name else ""
                found = f"two, {_label(first)} and {_label(entry)}"
                fix = "Narrow one of the patterns."
                problems.append(Problem(f"layer '{name}'{also}", "one adapter", found, fix, entry.where))
    if problems:
        raise AttachError(*problems)
    return {name: claimed[name] for name in modules if name in claimed}


def _label(entry: Entry) -> str:
    return f"{entry.spec.name} ({clip(entry.match)})"


def _matched(entry: Entry, modules: Mapping[str, nn.Module], problems: list[Problem]) -> list[str]:
    if isinstance(entry.match, tuple):
        names = [name if name in modules else plain_name(name) for name in entry.match]
        unknown = [name for name in names if name not in modules]
        for name in unknown:
            fix = near_miss(name, _adaptable(modules)) or "List the names with `model.named_modules()`."
            problems.append(Problem(f"layer {clip(name)}", "the name of a layer", "no such layer", fix, entry.where))
        found = [name for name in dict.fromkeys(names) if name in modules]
        layers = found
    else:
        pattern = compiled(entry.match)
        found = [name for name in modules if name and pattern.search(name)]
        # A pattern may catch the containers around a layer, and what has no parameters of its own.
        layers = [name for name in found if _is_layer(modules[name])]
        unknown = []
    for name in layers:
        problem = layer_problem(name, modules[name])
        if problem is not None:
            problems.append(problem)
    if not layers and not unknown:
        problems.append(_nothing(entry, modules, found))
    return layers


def _is_layer(module: nn.Module) -> bool:
    if isinstance(module, SUPPORTED):
        return True
    return next(module.children(), None) is None and next(module.parameters(recurse=False), None) is not None


def _adaptable(modules: Mapping[str, nn.Module]) -> list[str]:
    return [name for name, module in modules.items() if isinstance(module, SUPPORTED)]


def _nothing(entry: Entry, modules: Mapping[str, nn.Module], containers: list[str]) -> Problem:
    known = _adaptable(modules)
    pattern = "" if isinstance(entry.match, tuple) else entry.match
    if containers:
        found = f"only containers such as '{containers[0]}'"
        inner = next((name for name in known if name.startswith(f"{containers[0]}.")), None)
        fix = f"Match the layers inside, such as '{inner}'." if inner else "Match layers, not containers."
    else:
        found = "none"
        plain = pattern.replace("\\", "").strip("^$")
        hint = near_miss(plain, known) or near_miss(plain, {part for name in known for part in name.split(".")})
        examples = ", ".join(f"'{name}'" for name in known[:4]) or "no layer that can be adapted"
        fix = f"{hint} The model has {examples}{' and more' if len(known) > 4 else ''}.".strip()
    return Problem(
        f"spec '{entry.spec.name}', match {clip(entry.match)}", "at least one layer", found, fix, entry.where
    )


@dataclass(frozen=True)
class Trained:
    """Names of the parameters that train beside the cores, by the reason why."""

    bias: tuple[str, ...] = ()
    norm: tuple[str, ...] = ()
    also: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.bias, *self.norm, *self.also)))


_NORMS = tuple(
    getattr(nn, name) for name in ("GroupNorm", "LayerNorm", "RMSNorm", "CrossMapLRN2d") if hasattr(nn, name)
)


def _norms(model: nn.Module, train: Train) -> set[str]:
    """`true`: the norms that the model calls so (the paper's choice), or all where it calls none so; `all`: all."""
    every = {name for name, module in plain_modules(model).items() if _is_norm(module)} if train.norm else set()
    called = {name for name in every if "norm" in name.lower()}
    return every if train.norm == "all" else called or every


def _is_norm(module: nn.Module) -> bool:
    """torch's norms, and other people's leaf modules that say they are one."""
    if isinstance(module, (*_NORMS, _NormBase)):
        return True
    leaf = next(module.children(), None) is None
    return leaf and type(module).__name__.lower().rstrip("123d").endswith("norm")


def trained(model: nn.Module, train: Train, adapted: Iterable[str]) -> Trained:
    """The parameters that `train` names; weights of adapted layers stay frozen. Raises AttachError."""
    adapted = tuple(adapted)
    names = list(plain_parameters(model))
    weights = {f"{layer}.weight" for layer in adapted}
    if train.bias == "all":
        bias = [name for name in names if name.rpartition(".")[2].endswith("bias")]
    elif train.bias == "adapted":
        present = set(names)
        bias = [name for name in (f"{layer}.bias" for layer in adapted) if name in present]
    else:
        bias = []
    norms = _norms(model, train)
    norm = [name for name in names if name.rpartition(".")[0] in norms]
    also: dict[str, None] = {}
    problems = []
    for pattern in train.also:
        found = [name for name in names if compiled(pattern).search(name)]
        if not found:
            fix = near_miss(pattern.strip("^$"), names) or f"The model has '{names[0]}', ..."
            problems.append(Problem(f"`also` {clip(pattern)}", "at least one parameter", "none", fix))
        also.update(dict.fromkeys(name for name in found if name not in weights))
    if problems:
        raise AttachError(*problems)
    seen = set(norm)
    bias = [name for name in bias if name not in seen]
    seen |= set(bias)
    return Trained(tuple(bias), tuple(norm), tuple(name for name in also if name not in seen))
