"""Cores that several layers share: which adapter holds them, and who may use them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tnpeft.network import BoundCore
from tnpeft.spec import Spec

if TYPE_CHECKING:
    from tnpeft.modules.adapter import Adapter

__all__ = ["Captured", "Sharing", "sharing_label"]

Captured = Mapping[str, tuple[str, ...]]
"""For each scope, what its regular expression captured in a layer's name."""

_Key = tuple[Spec, str, str, tuple[int, ...]]


class Sharing:
    """The shared cores of one attach: the first layer of a key holds the tensor, the others use it.

    A key is the spec, the core, what the scope's regular expression captured in the layer's name, and
    the shape: layers of other shapes have tensors of their own. Adapters of other attaches never share.
    """

    def __init__(self) -> None:
        self._holders: dict[_Key, Adapter] = {}

    def holder(self, adapter: Adapter, core: BoundCore) -> Adapter:
        """The adapter that holds `core`, which is `adapter` itself where none did before."""
        label = sharing_label(adapter.network.spec, core, adapter.captured)
        key = (adapter.network.spec, core.name, label, core.shape)
        return self._holders.setdefault(key, adapter)


def sharing_label(spec: Spec, core: BoundCore, captured: Captured) -> str:
    """What takes the layer's name's place in the random stream of a shared core."""
    assert core.shared is not None
    return "shared " + json.dumps([spec.name, core.shared, list(captured.get(core.shared, ()))])
