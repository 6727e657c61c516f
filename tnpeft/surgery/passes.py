"""Forward passes of an adapted model: while one is open, layers of one signature contract their clusters together.

The root module has a hook before its forward pass and one after it. Groups are made anew for each pass, of the layers
that are to run factored or hybrid as they did when they were called last; nothing outlives the pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from tnpeft.modules import AdaptedLayer, Adapter, Group
from tnpeft.surgery.tree import adapted_layers

__all__ = ["forget_groups", "register_pass", "remove_pass"]


class _Groups:
    """The layers of a model by what they have in common."""

    def __init__(self, root: nn.Module) -> None:
        self.layers = adapted_layers(root)
        self.groups: dict[Hashable, Group] = {}

    def open(self) -> None:
        found: dict[Hashable, list[Adapter]] = {}
        for layer in self.layers:
            adapter = _grouped(layer)
            if adapter is not None:
                found.setdefault(_key(layer, adapter), []).append(adapter)
        known, self.groups = self.groups, {}
        for key, adapters in found.items():
            group = known.get(key)
            if len(adapters) > 1:
                if group is None or group.adapters != tuple(adapters):
                    group = Group(adapters, adapters[0].calling.last)  # type: ignore[arg-type]
                self.groups[key] = group
                group.open()

    def close(self) -> None:
        for group in self.groups.values():
            group.close()


_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Groups] = weakref.WeakKeyDictionary()


def register_pass(root: nn.Module) -> None:
    """Let forward passes of `root` group its layers."""
    if _open not in root._forward_pre_hooks.values():
        root.register_forward_pre_hook(_open)
        root.register_forward_hook(_close, always_call=True)


def remove_pass(root: nn.Module) -> None:
    """Undo `register_pass`."""
    forget_groups(root)
    for table, hook in ((root._forward_pre_hooks, _open), (root._forward_hooks, _close)):
        for number in [number for number, known in table.items() if known is hook]:
            del table[number]
            root._forward_hooks_always_called.pop(number, None)


def forget_groups(root: nn.Module) -> None:
    """After a change of its layers, adapters or their scales."""
    groups = _KNOWN.pop(root, None)
    if groups is not None:
        groups.close()


def _open(root: nn.Module, _inputs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    groups = _KNOWN.get(root)
    if groups is None:
        groups = _KNOWN[root] = _Groups(root)
    groups.open()


def _close(root: nn.Module, _inputs: Any, _output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    groups = _KNOWN.get(root)
    if groups is not None:
        groups.close()


def _grouped(layer: AdaptedLayer) -> Adapter | None:
    """The adapter of a layer that is to run factored or hybrid, as far as is known from its last call."""
    if len(layer.scales) != 1 or layer.disabled or layer.merged:
        return None
    ((adapter, scale),) = layer.active
    last = adapter.calling.last if adapter.mode != "dense" else None
    return adapter if last is not None and last.mode != "dense" and scale == 1.0 else None


def _key(layer: AdaptedLayer, adapter: Adapter) -> Hashable:
    last = adapter.calling.last
    weight = layer.base.weight
    return id(last.clusters if last else None), weight.device, weight.dtype == torch.float64
