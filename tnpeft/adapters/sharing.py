"""Cores that several layers share: which adapter holds them, and who may use them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from tnpeft.network import BoundCore
from tnpeft.spec import Declaration

__all__ = ["Captured", "Sharing", "SharingKey", "sharing_key", "sharing_label"]

Captured = Mapping[str, tuple[str, ...]]
"""For each scope, what its regular expression captured in a layer's name."""

_Adapter = TypeVar("_Adapter")
SharingKey = tuple[Declaration, str, str, tuple[int, ...], tuple[int, ...]]


class Sharing:
    """The shared cores of one attach: the first layer of a key holds the tensor, the others use it.

    A key is the spec, the core, what the scope's regular expression captured in the layer's name, and the shape. So
    layers of other shapes have other tensors, as do index cores for tensors of other sizes. Adapters of different calls
    of `attach` never share.
    """

    def __init__(self) -> None:
        self._holders: dict[SharingKey, Any] = {}

    def holder(self, spec: Declaration, core: BoundCore, captured: Captured, adapter: _Adapter) -> _Adapter:
        """The adapter that holds `core`: `adapter` itself if none did before."""
        holder: _Adapter = self._holders.setdefault(sharing_key(spec, core, captured), adapter)
        return holder


def sharing_key(spec: Declaration, core: BoundCore, captured: Captured) -> SharingKey:
    """What must be equal for layers to share a core."""
    return spec, core.name, sharing_label(spec, core, captured), core.shape, core.init.sizes


def sharing_label(spec: Declaration, core: BoundCore, captured: Captured) -> str:
    """What replaces the layer's name in the random stream of a shared core."""
    assert core.shared is not None
    return "shared " + json.dumps([spec.name, core.shared, list(captured.get(core.shared, ()))])
