"""An adapted layer as the modes see it: the base layer, how it is called, and what acts on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from tnpeft.execution.calls import Acting
from tnpeft.execution.forward_pass import ModelResults

__all__ = ["Site"]


class Site(NamedTuple):
    """Where adapters act. A merged layer has none that do; one that is `idle` computes as its base layer does."""

    name: str  # of the layer in its model, as its adapters know it
    base: Any  # the wrapped layer, whose `weight` and `bias` are those that act
    call_base: Callable[..., Tensor]  # (base, x, weight, *rest): its own function with another weight
    acting: tuple[Acting, ...]
    idle: bool
    results: ModelResults
    alone: Acting | None  # the only adapter that acts, if it does so at scale 1
