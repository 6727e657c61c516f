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

    A key is the spec, the core, what the scope's regular expression captured in the layer's name, and
    the shape: layers of other shapes have tensors of their own, and so have places in tensors of other sizes. Adapters
    of other attaches never share.
    """

    def __init__(self) -> None:
        self._holders: dict[SharingKey, Any] = {}

    def holder(self, spec: Declaration, core: BoundCore, captured: Captured, adapter: _Adapter) -> _Adapter:
        """The adapter that holds `core`, which is `adapter` itself where none did before."""
        holder: _Adapter = self._holders.setdefault(sharing_key(spec, core, captured), adapter)
        return holder


def sharing_key(spec: Declaration, core: BoundCore, captured: Captured) -> SharingKey:
    """What layers must have alike to share a core."""
    return spec, core.name, sharing_label(spec, core, captured), core.shape, core.init.sizes


def sharing_label(spec: Declaration, core: BoundCore, captured: Captured) -> str:
    """What takes the layer's name's place in the random stream of a shared core."""
    assert core.shared is not None
    return "shared " + json.dumps([spec.name, core.shared, list(captured.get(core.shared, ()))])
