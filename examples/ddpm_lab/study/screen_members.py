"""Which methods a screen has: every shipped spec that fits the model, at the params that its budgets allow."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn

import tnpeft
from ddpm_lab.config.settings import Base, Model
from ddpm_lab.model.unet import build_unet
from ddpm_lab.study.screen_settings import LinearScreen, Screen, Size
from ddpm_lab.study.screen_text import Transformer
from ddpm_lab.support.faults import fault
from tnpeft import TnpeftError
from tnpeft.network import layer_of
from tnpeft.surgery import is_layer

__all__ = ["Derived", "Member", "derived_linear", "derived_unet"]

UNET_TRAINS = {"bias": "adapted", "norm": True}  # as the paper's recipes have it


@dataclass(frozen=True)
class Member:
    """One spec at one budget; `budget` is the least that holds it, None where it is above all."""

    spec: str
    family: str
    budget: int | None
    match: str
    params: Mapping[str, Any]
    parameters: int

    @property
    def name(self) -> str:
        return f"{self.spec}-{short(self.budget)}"


@dataclass
class Derived:
    """The members by family, and why other specs are in no row."""

    members: list[Member] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def lead(self, family: str, middle: int) -> Member:
        """Who searches for the rate of a family: its first member at the middle budget, or its first."""
        own = [member for member in self.members if member.family == family]
        return next((member for member in own if member.budget == middle), own[0])


def short(budget: int | None) -> str:
    if budget is None:
        return "more"
    return f"{budget // 1000}k" if budget % 1000 == 0 else str(budget)


def derived_unet(model: Model, base: Base, screen: Screen) -> Derived:
    """The members of `screen`; the model is on the meta device, and half a minute's work is done once."""
    return _derived_unet(model.model_dump_json(), base.model_dump_json(), screen.model_dump_json())


@lru_cache(maxsize=4)
def _derived_unet(model: str, base: str, screen: str) -> Derived:
    with torch.device("meta"):
        unet: nn.Module = build_unet(Model.model_validate_json(model), Base.model_validate_json(base))
    return _derived(unet, Screen.model_validate_json(screen), UNET_TRAINS)


def derived_linear(screen: LinearScreen) -> Derived:
    """The members of `screen_linear`: cores alone train, as PEFT's do."""
    return _derived_linear(screen.model_dump_json())


@lru_cache(maxsize=4)
def _derived_linear(text: str) -> Derived:
    screen = LinearScreen.model_validate_json(text)
    with torch.device("meta"):
        model = Transformer(screen.text.words, screen.text.length, screen.width, screen.layers)
    return _derived(model, screen, {})


def _derived(model: nn.Module, screen: Screen, train: Mapping[str, Any]) -> Derived:
    if not screen.budgets or not screen.match:
        fix = "For example `budgets: [30000, 60000]` and `match: [conv]`."
        raise fault("screen", "budgets and layers", "at least one of each", "none", fix)
    found = Derived()
    for family, about in screen.families.items():
        for name, size in about.specs.items():
            try:
                found.members += _Sizes(model, screen, train, name).members(family, size)
            except TnpeftError as error:
                problem = error.problems[0]
                found.left_out[name] = f"expected {problem.expected}, found {problem.found}"
    return found


class _Sizes:
    """The params of one spec on one model, and what trains with them."""

    def __init__(self, model: nn.Module, screen: Screen, train: Mapping[str, Any], name: str) -> None:
        self.model, self.screen, self.name = model, screen, name
        self.spec = tnpeft.load_spec(name)
        self.match = "|".join(self._fitting())
        scopes = {each: pattern for each, pattern in screen.scopes.items() if each in self.spec.scopes}
        self.settings: dict[str, Any] = {"match": self.match, "train": dict(train), "scopes": scopes}

    def _fitting(self) -> Iterator[str]:
        """The patterns whose layers the spec takes, the first in any case: its layers must fit."""
        for number, pattern in enumerate(self.screen.match):
            named = [each for name, each in self.model.named_modules() if re.search(pattern, name)]
            kinds = {layer_of(each).kind for each in named if is_layer(each)}
            if not number or kinds <= set(self.spec.layers):
                yield pattern

    def members(self, family: str, size: Size) -> list[Member]:
        """A member for each budget that allows other params than a smaller one."""
        found: dict[tuple[Any, ...], Member] = {}
        for params, parameters in self._sizes(size):
            budget = next((each for each in sorted(self.screen.budgets) if each >= parameters), None)
            member = Member(self.name, family, budget, self.match, params, parameters)
            found.setdefault(tuple(params.items()), member)
        return list(found.values())

    def _sizes(self, size: Size) -> list[tuple[dict[str, Any], int]]:
        budgets = sorted(self.screen.budgets)
        if size is None:
            return [({}, self._count({}))]
        if isinstance(size, str):
            largest = self._solved(size, budgets[-1])  # a spec that does not fit says why
            return [*self._smaller(size, budgets[:-1]), largest]
        ((param, values),) = size.items()
        counts = {value: self._count({param: value}) for value in values}
        chosen = [
            max(fits, key=lambda value: counts[value])
            for budget in budgets
            if (fits := [value for value in values if counts[value] <= budget])
        ]
        if not chosen:
            least = min(counts.values())
            raise fault("screen", "the spec", "room for the smallest adapter", f"{least:,} at the least", "Raise it.")
        return [({param: value}, counts[value]) for value in chosen]

    def _smaller(self, param: str, budgets: list[int]) -> Iterator[tuple[dict[str, Any], int]]:
        for budget in budgets:
            try:
                yield self._solved(param, budget)
            except TnpeftError:
                continue  # not even its smallest adapter is so small

    def _solved(self, param: str, budget: int) -> tuple[dict[str, Any], int]:
        found = tnpeft.budget(self.spec, self.model, budget, param=param, **self.settings)
        return dict(found.settings), found.total

    def _count(self, params: Mapping[str, Any]) -> int:
        model = copy.deepcopy(self.model)
        tnpeft.attach(model, self.spec, **self.settings, **params)
        return sum(each.numel() for each in model.parameters() if each.requires_grad)
