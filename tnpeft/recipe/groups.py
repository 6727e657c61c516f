"""What an adapter trains, sorted into an optimiser's groups: by core, by layer and by role."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import nn

from tnpeft.errors import AttachError, Problem, clip, near_miss
from tnpeft.recipe.report import REASONS, reasons_of
from tnpeft.recipe.selection import compiled
from tnpeft.surgery import adapters_of, record_of, trained_of

__all__ = ["TrainedTensor", "groups_of", "tensors_of"]


@dataclass(frozen=True)
class TrainedTensor:
    """A parameter that an adapter trains, under the name that `Handle.named_parameters` gives it.

    `words` are keys that name it: its core, alone and with its spec (`lora.up`), or its role (`bias`, `norm`, `also`).
    `users` are its names in all layers that share it, `ties` its other names in the model.
    """

    name: str
    parameter: nn.Parameter
    words: tuple[str, ...]
    users: tuple[str, ...] = ()
    ties: tuple[str, ...] = ()

    def is_found_by(self, pattern: re.Pattern[str]) -> bool:
        """Whether a pattern finds it: a shared core by its names in all layers, a tied tensor by any of its names."""
        if self.users:
            return all(pattern.search(name) for name in self.users)
        return any(pattern.search(name) for name in (self.name, *self.ties))


def tensors_of(model: nn.Module, name: str) -> Iterator[TrainedTensor]:
    """Everything that the adapter `name` trains, each tensor once: cores, then biases, norms and joint parameters."""
    adapters = adapters_of(model, name)
    users: dict[int, list[str]] = {}
    for layer, adapter in adapters.items():
        for core, holder in adapter.shared.items():
            users.setdefault(id(holder.cores[core]), []).append(f"{layer}.{core}")
    for layer, adapter in adapters.items():
        for core, parameter in adapter.trained.items():
            others = users.get(id(parameter), ())
            names = (f"{layer}.{core}", *others) if others else ()
            yield TrainedTensor(f"{layer}.{core}", parameter, (core, f"{adapter.network.spec.name}.{core}"), names)
    record = record_of(model, name)
    tied = {names[0]: names for names in record.trained}
    reasons = {key: reason for reason, keys in reasons_of(record).items() for key in keys}
    for key, tensor in trained_of(model, name).items():
        if isinstance(tensor, nn.Parameter):
            reason = next(reasons[each] for each in tied[key] if each in reasons)
            yield TrainedTensor(key, tensor, (reason,), ties=tied[key][1:])


def groups_of(
    tensors: Iterable[TrainedTensor],
    lr: float,
    lr_factors: Mapping[str, float],
    no_decay: Iterable[str],
    weight_decay: float | None,
) -> list[dict[str, Any]]:
    """Optimiser groups, each with its parameters, its `lr`, its `weight_decay` if one is set, and a `name`.

    Raises AttachError for keys that name nothing and for what is no number, SpecError for an invalid pattern.
    """
    tensors, spared = list(tensors), _keys(no_decay)
    numbers = {"`lr`": lr, **{f"`lr_factors` {clip(key)}": value for key, value in _factors(lr_factors).items()}}
    numbers |= {"`weight_decay`": weight_decay} if weight_decay is not None else {}
    problems = [problem for what, value in numbers.items() for problem in _number_problems(what, value)]
    factored = {key: _found("lr_factors", key, tensors, problems) for key in lr_factors}
    undecayed = {name for key in spared for name in _found("no_decay", key, tensors, problems)}
    if problems:
        raise AttachError(*problems)
    groups: dict[tuple[tuple[str, ...], bool], dict[str, Any]] = {}
    for tensor in tensors:
        keys = tuple(key for key, names in factored.items() if tensor.name in names)
        bare = tensor.name in undecayed
        if (keys, bare) not in groups:
            decay = 0.0 if bare else weight_decay
            groups[keys, bare] = {
                "params": [],
                "lr": lr * math.prod(lr_factors[key] for key in keys),
                **({} if decay is None else {"weight_decay": decay}),
                "name": (" * ".join(keys) or "adapter") + ", no decay" * bare,
            }
        groups[keys, bare]["params"].append(tensor.parameter)
    return list(groups.values())


def _factors(lr_factors: object) -> Mapping[object, object]:
    if not isinstance(lr_factors, Mapping):
        fix = 'For example `lr_factors={"up": 16}`.'
        raise AttachError(Problem("`lr_factors`", "factors by core, layer or role", clip(lr_factors), fix))
    return lr_factors


def _keys(no_decay: object) -> list[object]:
    if isinstance(no_decay, str) or not isinstance(no_decay, Iterable):
        fix = 'For example `no_decay=["bias", "norm"]`.'
        raise AttachError(Problem("`no_decay`", "a list of cores, layers or roles", clip(no_decay), fix))
    return list(no_decay)


def _number_problems(what: str, value: object) -> Iterator[Problem]:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
        yield Problem(what, "a finite number, zero or more", clip(value), "Write a number, such as 0.01.")


def _found(argument: str, key: object, tensors: list[TrainedTensor], problems: list[Problem]) -> set[str]:
    """The names of the tensors that a key names: a core, a role, or else a pattern on their names."""
    what = f"`{argument}` {clip(key)}"
    if not isinstance(key, str) or not key:
        problems.append(Problem(what, "a core, a role or a regular expression", clip(key), "Write it as a text."))
        return set()
    words = dict.fromkeys([*(word for tensor in tensors for word in tensor.words), *REASONS])
    if key in words:
        return {tensor.name for tensor in tensors if key in tensor.words}
    pattern = compiled(key)
    found = {tensor.name for tensor in tensors if tensor.is_found_by(pattern)}
    if not found:
        problems.append(_nothing(what, key, pattern, tensors, words))
    return found


def _nothing(
    what: str, key: str, pattern: re.Pattern[str], tensors: list[TrainedTensor], words: Iterable[str]
) -> Problem:
    """The problem of a key that names nothing, or only some of the layers that share a core."""
    cores = dict.fromkeys(tensor.words[0] for tensor in tensors)
    example = tensors[0].name if tensors else "layers.0.up"
    expected = f"one of {', '.join(dict.fromkeys([*cores, *REASONS]))}, or a regular expression on names such as "
    for tensor in tensors:
        if any(pattern.search(name) for name in tensor.users):
            fix = f"Name the core, `{tensor.words[0]}`, or match all of its layers."
            return Problem(what, f"{expected}'{example}'", f"some of the layers that share '{tensor.name}'", fix)
    parts = dict.fromkeys(part for tensor in tensors for part in tensor.name.split("."))
    fix = near_miss(key, [*words, *parts]) or "`handle.named_parameters()` has the names."
    return Problem(what, f"{expected}'{example}'", "nothing that is called so", fix)
