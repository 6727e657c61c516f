"""Adapters with the same state but other parameters, for code that wraps parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["Twinned"]

_Adapter = TypeVar("_Adapter", bound="Twinned")


class Twinned:
    """A mixin for what has its own parameters, and may use those of holders."""

    _holders: dict[str, Any]
    _parameters: dict[str, Any]

    def twin(self: _Adapter, alias: Callable[[Tensor], Tensor]) -> _Adapter:
        """An adapter with the same state, but `alias(parameter)` in place of each parameter, also its holders'."""
        holders = {id(holder): holder for holder in self._holders.values()}
        twins = {key: holder.twin(alias) for key, holder in holders.items()}
        twin = self.__class__.__new__(self.__class__)
        aliases = {key: alias(core) for key, core in self._parameters.items() if core is not None}
        shared = {key: twins[id(holder)] for key, holder in self._holders.items()}
        twin.__dict__.update(self.__dict__, _parameters=aliases, _holders=shared)
        return twin
