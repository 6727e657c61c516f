"""An adapted layer for the modes: the base layer, how it is called, and what acts on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from tnpeft.execution.calls import Acting
from tnpeft.execution.forward_pass import ModelResults

__all__ = ["Site", "Ways"]


class Ways(NamedTuple):
    """The functions for calls of a kind of layer: the usual one, and those with dropout, rows and a kept weight.

    The last one is for calls with weights that are kept, by `tnpeft.serving`.
    """

    usual: Callable[..., Tensor]
    dropping: Callable[..., Tensor]
    rows: Callable[..., Tensor]
    serving: Callable[..., Tensor]


class Site(NamedTuple):
    """A place where adapters act. On a merged layer none do; an `idle` one computes what its base layer does."""

    name: str  # of the layer in its model, as its adapters know it
    base: Any  # the wrapped layer, whose `weight` and `bias` are those that act
    call_base: Callable[..., Tensor]  # (base, x, weight, *rest): its own function with another weight
    acting: tuple[Acting, ...]
    idle: bool
    results: ModelResults
    alone: Acting | None  # the only adapter that acts, if it does so at scale 1
    way: Callable[..., Tensor]  # what computes a call, one of `Ways`
    every: Mapping[str, Acting] = MappingProxyType({})  # while rows have adapters of their own: all that there are
    usual: Any = None  # then, the site for threads whose rows have none; while weights are kept, the site without
