"""A recipe meets a model: which layers it adapts, and which parameters train beside the cores."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from tnpeft.adapters.parked import LOOKUPS
from tnpeft.errors import AttachError, Problem, clip, near_miss
from tnpeft.network.look_alikes import kind_name
from tnpeft.network.signature import kind_of, torch_kind
from tnpeft.recipe.model import Entry, Recipe, Train
from tnpeft.recipe.narrowing import kinds_of, narrowed, rank_problems
from tnpeft.recipe.parameter_targets import matched_parameters
from tnpeft.recipe.selection import ALL, compiled
from tnpeft.surgery import SUPPORTED, is_layer, is_opaque, plain_modules, plain_name, plain_parameters
from tnpeft.surgery.checks import spec_problem
from tnpeft.surgery.tree import Slot, slots

__all__ = ["Trained", "fused_attention", "passed_over", "skipped", "targets", "trained"]


def targets(model: nn.Module, recipe: Recipe) -> dict[str, Entry]:
    """The layers and parameters that each entry claims, by name, in the model's order.

    Raises AttachError for an entry that matches nothing, a layer that two entries claim, and a
    matched layer that cannot be adapted; each with near misses.
    """
    modules = plain_modules(model)
    problems: list[Problem] = []
    claimed: dict[str, Entry] = {}
    owners: dict[object, tuple[str, Entry]] = {}  # by layer: one reached by two names is still one
    parameters: dict[str, Slot] = {}
    for entry in recipe.entries:
        beside: list[str] = []
        if entry.parameters is not None:
            parameters = parameters or slots(model)
            beside = matched_parameters(entry, entry.parameters, parameters, problems)
        for name in _matched(entry, modules, beside, problems):
            place = id(modules[name]) if name in modules else (id(parameters[name].owner), parameters[name].key)
            first_name, first = owners.setdefault(place, (name, entry))
            claimed.setdefault(name, entry)
            if first is not entry:
                found, fix = f"two, {_label(first)} and {_label(entry)}", "Narrow one of the patterns."
                problem = Problem("", "one adapter", found, fix, entry.where, layers=(name,))
                if first_name != name:
                    problem = replace(problem, what=f"layer '{name}' (which is '{first_name}' too)", layers=())
                problems.append(problem)
    if problems:
        raise AttachError(*problems)
    return {name: claimed[name] for name in (*modules, *parameters) if name in claimed}


# What people write for all layers elsewhere.
_ALL_LIKE = re.compile(r"all(\W|_)?(linear|conv|convs|layers|modules)?", re.IGNORECASE)


_GUESSED = 10  # unknown names for which near ones are looked for, which takes time


def _label(entry: Entry) -> str:
    given = entry.parameters
    said = entry.match if given is None or entry.match else [*given.patterns] or given.names
    return f"{entry.spec.name} ({clip(said)})"


def _matched(
    entry: Entry, modules: Mapping[str, nn.Module], parameters: Sequence[str], problems: list[Problem]
) -> list[str]:
    """The layers that an entry adapts, and the `parameters` it matches, both narrowed by its selection."""
    if entry.match == ALL:
        found_all = {**_of_kinds(entry, modules), **dict.fromkeys(parameters)}
        chosen = narrowed(entry, list(found_all), modules, problems)
        found_all = {name: found_all[name] for name in chosen or found_all}
        layers = [name for name in chosen if found_all[name] is None]
        if not layers and (chosen or not found_all):
            refused_all = [problem for problem in found_all.values() if problem is not None]
            problems.append(_none_of_all(entry, refused_all, modules))
        problems += rank_problems(entry, layers)
        return layers
    if isinstance(entry.match, tuple):
        names = [name if name in modules else plain_name(name) for name in entry.match]
        unknown = [name for name in names if name not in modules]
        known = _adaptable(modules)
        for number, name in enumerate(unknown):
            fix = near_miss(name, known) if number < _GUESSED else ""
            fix = fix or "List the names with `model.named_modules()`."
            layer = (clip(name)[1:-1],)
            problems.append(Problem("", "the name of a layer", "no such layer", fix, entry.where, layers=layer))
        found = [name for name in dict.fromkeys(names) if name in modules]
        matched = found
    else:
        pattern = compiled(entry.match)
        found = [name for name in modules if name and pattern.search(name)]
        # A pattern may catch the containers around a layer, and what has no parameters of its own.
        matched = _outermost([name for name in found if is_layer(modules[name])], modules)
        unknown = []
    both = narrowed(entry, [*matched, *parameters], modules, problems)
    layers = [name for name in both if name in modules] if parameters else both
    kinds = kinds_of(entry)
    refused = {
        name: problem for name in layers if (problem := spec_problem(name, modules[name], entry.spec)) is not None
    }
    if isinstance(entry.match, str):
        caught = [modules[name] for name in layers if name not in refused]
        fits = any((torch_kind(type(layer)) or kind_of(layer)) in kinds for layer in caught)
        elsewhere = fits or any(kind_of(module) in kinds for module in modules.values())
        refused = {name: _too_wide(problem, fits, elsewhere) for name, problem in refused.items()}
    problems += refused.values()
    problems += rank_problems(entry, both)
    if entry.match and not matched and not unknown:
        problems.append(_nothing(entry, modules, found))
    return both


def _too_wide(problem: Problem, fits: bool, elsewhere: bool) -> Problem:
    """The problem, with advice for a pattern that finds layers which the spec does not take.

    `fits` says whether it catches one of the spec's kinds, `elsewhere` whether the model has any.
    """
    if problem.fix != "Match other layers." or (elsewhere and not fits):
        return problem
    if not fits:
        return replace(problem, fix="Choose another spec: the model has no layer of its kinds.")
    return replace(problem, fix=f"Narrow the pattern, or match `{ALL}`: every layer of the spec's kinds.")


def _of_kinds(entry: Entry, modules: Mapping[str, nn.Module]) -> dict[str, Problem | None]:
    """Every layer of the entry's kinds, with the reason why it cannot be adapted, if there is one.

    Layers inside one that another library has adapted or quantised belong to that one.
    """
    kinds = kinds_of(entry)
    layers = [
        name
        for name, module in modules.items()
        if name and (kind_of(module) in kinds or (not isinstance(module, SUPPORTED) and is_opaque(module)))
    ]
    return {name: spec_problem(name, modules[name], entry.spec) for name in _outermost(layers, modules)}


def _outermost(names: Sequence[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """The names without parts of another library's layers that are named themselves."""
    whole = {name for name in names if is_opaque(modules[name])}
    return [name for name in names if not whole.intersection(itertools.accumulate(_parents(name)))]


def _parents(name: str) -> Iterator[str]:
    """The steps of a name before the last one: of `a.b.c`, `a` and `.b`."""
    parts = name.split(".")[:-1]
    return (f"{'.' * (number > 0)}{part}" for number, part in enumerate(parts))


def skipped(model: nn.Module, recipe: Recipe) -> dict[str, str]:
    """With `match: all`: the layers of the spec's kinds that cannot be adapted, each with the reason."""
    modules = plain_modules(model)
    found: dict[str, str] = {}
    for entry in (entry for entry in recipe.entries if entry.match == ALL):
        kinds = _of_kinds(entry, modules)
        chosen = narrowed(entry, list(kinds), modules, [])
        found |= {name: problem.found for name in chosen if (problem := kinds[name]) is not None}
    return found


def passed_over(model: nn.Module, recipe: Recipe, claimed: Iterable[str]) -> dict[str, int]:
    """With `match: all`: the other kinds of modules that have weights of their own, and how many there are."""
    if all(entry.match != ALL for entry in recipe.entries):
        return {}
    modules, counts = plain_modules(model), Counter[str]()
    known = {*claimed, *(name for entry in recipe.entries if entry.match == ALL for name in _of_kinds(entry, modules))}
    told = {id(modules[name]) for name in (*known, *fused_attention(model, known)) if name in modules}
    for slot in slots(model).values():
        name = slot.name.rpartition(".")[0]
        if slot.name in known or id(slot.owner) in told:
            continue
        if not known.isdisjoint(itertools.accumulate(_parents(f"{name}."))):
            continue
        if "weight" in slot.key and not is_lazy(slot.tensor) and slot.tensor.dim() > 1:
            told.add(id(slot.owner))
            counts[kind_name(type(slot.owner))] += 1
    return dict(counts)


def fused_attention(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """The `MultiheadAttention`s whose output projection is in `layers`; their q, k and v weights are no layers."""
    modules = plain_modules(model)
    parents = (name.rpartition(".")[0] for name in layers if name.rpartition(".")[2] == "out_proj")
    return [name for name in dict.fromkeys(parents) if isinstance(modules.get(name), nn.MultiheadAttention)]


def _none_of_all(entry: Entry, refused: Iterable[Problem], modules: Mapping[str, nn.Module]) -> Problem:
    kinds = entry.selection.kinds or entry.spec.layers
    what, expected = f"spec '{entry.spec.name}', match '{ALL}'", f"at least one of {', '.join(kinds)}"
    for problem in AttachError(*refused).problems:  # folded
        return replace(problem, what=what, expected=f"{expected} that can be adapted", where=entry.where)
    tables = [name for name, module in modules.items() if isinstance(module, LOOKUPS) and not _adaptable(modules)]
    fix = f"Match embeddings by their names: '{tables[0]}'." if tables else "Choose another spec."
    return Problem(what, expected, "none", fix, entry.where)


def _adaptable(modules: Mapping[str, nn.Module]) -> list[str]:
    return [name for name, module in modules.items() if kind_of(module) is not None]


def _nothing(entry: Entry, modules: Mapping[str, nn.Module], caught: list[str]) -> Problem:
    known = _adaptable(modules)
    pattern = "" if isinstance(entry.match, tuple) else entry.match
    containers = [name for name in caught if next(modules[name].children(), None) is not None]
    if containers:
        found = f"only containers such as '{containers[0]}'"
        inner = next((name for name in known if name.startswith(f"{containers[0]}.")), None)
        fix = f"Match the layers inside, such as '{inner}'." if inner else "Match layers, not containers."
    elif caught:
        found = f"only what has no weight, such as '{caught[0]}', {kind_name(type(modules[caught[0]]))}"
        fix = f"{_examples(known)}."
    else:
        found = "none"
        plain = pattern.replace("\\", "").strip("^$")
        hint = f"Did you mean `{ALL}`?" if _ALL_LIKE.fullmatch(pattern) else ""
        hint = hint or near_miss(plain, known) or near_miss(plain, {part for name in known for part in name.split(".")})
        fix = f"{hint} {_examples(known)}.".strip()
    return Problem(
        f"spec '{entry.spec.name}', match {clip(entry.match)}", "at least one layer", found, fix, entry.where
    )


def _examples(known: Sequence[str]) -> str:
    examples = ", ".join(f"'{name}'" for name in known[:4]) or "no layer that can be adapted"
    return f"The model has {examples}{' and more' if len(known) > 4 else ''}"


@dataclass(frozen=True)
class Trained:
    """Names of the parameters that train beside the cores, by role."""

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
    """`true`: norms with "norm" in their names (the paper's choice), or all if there are none; `all`: all."""
    every = {name for name, module in plain_modules(model).items() if _is_norm(module)} if train.norm else set()
    called = {name for name in every if "norm" in name.lower()}
    return every if train.norm == "all" else called or every


def _is_norm(module: nn.Module) -> bool:
    """Whether it is a norm of torch, or a leaf module of another library whose class name ends in "norm"."""
    if isinstance(module, (*_NORMS, _NormBase)):
        return True
    leaf = next(module.children(), None) is None
    return leaf and type(module).__name__.lower().rstrip("123d").endswith("norm")


def trained(model: nn.Module, train: Train, adapted: Iterable[str]) -> Trained:
    """The parameters that `train` names; weights of adapted layers stay frozen. Raises AttachError."""
    adapted = tuple(adapted)
    names = list(plain_parameters(model))
    weights = {f"{layer}.weight" for layer in adapted} | {*adapted}
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
