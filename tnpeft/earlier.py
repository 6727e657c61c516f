"""For pickles of whole models that earlier versions wrote: where they look for classes.

A pickle names a class by its module. Rooms have moved since. Each module that such pickles name is registered here
under its earlier name, and looks up what it is asked for.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import Any

__all__ = ["register"]

_MOVED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "tnpeft.modules.adapter": ("tnpeft.adapters.adapter",),
        "tnpeft.modules.layers": ("tnpeft.execution.layers", "tnpeft.execution.layer_kinds"),
        "tnpeft.modules.parked": ("tnpeft.adapters.parked",),
        "tnpeft.modules.parked_states": ("tnpeft.adapters.parked_states",),
        "tnpeft.planning.model": ("tnpeft.schedule.model",),
        "tnpeft.plan.call": ("tnpeft.planning.call",),
        "tnpeft.plan.model": ("tnpeft.schedule", "tnpeft.planning"),
        "tnpeft.spec.model": ("tnpeft.network.spec",),
        "tnpeft.surgery.state": ("tnpeft.surgery.adapted_model",),
    }
)
_RENAMED: Mapping[str, str] = MappingProxyType({"ModelState": "AdaptedModel"})


class _Moved(ModuleType):
    """A module under the name that it had."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        name = _RENAMED.get(name, name)
        for place in map(importlib.import_module, _MOVED[self.__name__]):
            if name in vars(place):
                return vars(place)[name]
        raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")


def register() -> None:
    """Make the earlier names known to `import`, which loads nothing yet."""
    for name in _MOVED:
        sys.modules.setdefault(name, _Moved(name))
