"""`Handle`: an attached adapter, and what can be done with it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

from torch import nn

from tnpeft.adapters import Adapter
from tnpeft.recipe.groups import groups_of, tensors_of
from tnpeft.recipe.report import Report, report_of
from tnpeft.surgery import activate, adapters_of, anchor, detach, disabled, merge, record_of, scales_of, unmerge

__all__ = ["Handle"]

_NO_FACTORS: Mapping[str, float] = MappingProxyType({})


class Handle:
    """An attached adapter: what it trains, and the library's functions with its model and name filled in."""

    def __init__(self, model: nn.Module, name: str) -> None:
        record_of(model, name)
        self.model = model
        self.name = name

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The compiled adapter of each layer by the layer's name, with its cores and its `delta_weight()`."""
        return adapters_of(self.model, self.name)

    def report(self) -> Report:
        """What trains, per layer and in total; prints as a table."""
        return report_of(self.model, self.name)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What this adapter trains: cores as `layer.core`, then biases, norms and joint parameters by name.

        A core that several layers share comes once, under the first of them.
        """
        return ((tensor.name, tensor.parameter) for tensor in tensors_of(self.model, self.name))

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters to give the optimiser: those of `named_parameters`."""
        return (parameter for _, parameter in self.named_parameters())

    def parameter_groups(
        self,
        *,
        lr: float,
        lr_factors: Mapping[str, float] = _NO_FACTORS,
        no_decay: Iterable[str] = (),
        weight_decay: float | None = None,
    ) -> list[dict[str, Any]]:
        """Groups for an optimiser, with learning rates of their own for cores, layers, biases or norms, as in LoRA+.

        Each key of `lr_factors` names parameters, and its factor multiplies their `lr`; where several name one, all
        factors do. What a key of `no_decay` names has a `weight_decay` of 0. A key is a core (`up`), a core of one of
        several specs (`lora.up`), a role (`bias`, `norm` or `also`: what trains beside the cores), or else a regular
        expression, searched in the names of `named_parameters`. Every parameter is in one group. A core that layers
        share has a name in each of them: a regular expression must match them all. Each group also has a `name`, which
        torch passes over.

        Raises AttachError for a key that names nothing, and for a value that is no finite number of zero or more.
        """
        return groups_of(tensors_of(self.model, self.name), lr, lr_factors, no_decay, weight_decay)

    def activate(self, scale: float = 1.0) -> None:
        """Let this adapter act at a scale, and no other adapter; see `tnpeft.activate`."""
        activate(self.model, {self.name: scale})

    def scale(self, scale: float) -> None:
        """Let this adapter act at a scale, along with the others that act; see `tnpeft.activate`."""
        activate(self.model, {**scales_of(self.model), self.name: scale})

    def disabled(self) -> AbstractContextManager[None]:
        """Inside, the model computes what its base computes; see `tnpeft.disabled`."""
        return disabled(self.model)

    def anchor(self) -> None:
        """Make the current cores the frozen copy, so that the update is exactly zero again; see `tnpeft.anchor`."""
        anchor(self.model, self.name)

    def merge(self) -> None:
        """Compute the adapted layers' weights with this adapter alone; see `tnpeft.merge`."""
        merge(self.model, self.name)

    def unmerge(self) -> None:
        """Undo `merge`, to the bit; see `tnpeft.unmerge`."""
        unmerge(self.model)

    def detach(self, merge: bool = False) -> None:
        """Take this adapter off and leave the others, with its update or without; see `tnpeft.detach`."""
        detach(self.model, merge, self.name)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write this adapter to a file; see `tnpeft.save`."""
        _room_above("io").save(self.model, path, self.name)

    def hot_swap(self, path: str | os.PathLike[str]) -> None:
        """Give this adapter the values of a file, in place; see `tnpeft.hot_swap`."""
        _room_above("io").hot_swap(self.model, path, self.name)

    def truncate(self, budget: int | None = None, /, **how: Any) -> Any:
        """Shrink this adapter's ranks and keep the best fit of its update; see `tnpeft.truncate`."""
        return _room_above("fitting").truncate(self.model, budget, name=self.name, **how)

    def __repr__(self) -> str:
        return f"Handle(name={self.name!r}, layers={len(adapters_of(self.model, self.name))})"


def _room_above(room: str) -> Any:
    """A room that imports this one. It is looked up when it is needed, because files and fits import handles."""
    return importlib.import_module(f"tnpeft.{room}")
