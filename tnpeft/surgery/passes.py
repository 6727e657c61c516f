"""Forward passes of an adapted model: while one is open, its layers contract together what is alike of their cores.

The root module has a hook before its forward pass and one after it. Layers are expected to run in the mode that they
were given, or as they did when they were called last; no result outlives the pass. Each thread has passes of its own: a
hook opens one, and closes it, for the thread that runs it.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import nn

from tnpeft.errors import ExecutionError
from tnpeft.modules import AdaptedLayer, Batches, ForwardPass, Member
from tnpeft.modules.dispatch import needs_plain_ops
from tnpeft.modules.distributed import SPLIT_FIX, split_problem
from tnpeft.surgery.tree import adapted_layers

__all__ = ["forget_batches", "register_pass", "remove_pass"]


class _Thread(threading.local):
    """The pass of a model that a thread has open."""

    current: ForwardPass | None = None


class _Passes:
    """The layers of a model, their batches in its latest pass, and the open passes, one at most in a thread."""

    def __init__(self, root: nn.Module) -> None:
        self.layers = adapted_layers(root)
        self.batches = Batches(())
        self._thread = _Thread()

    def open(self) -> None:
        self.close()  # an interrupt may have left the last pass open, or the model calls itself
        members = [member for layer in self.layers if (member := _member(layer)) is not None]
        batches = self.batches
        if members != batches.members:
            batches = self.batches = Batches(members)
        self._thread.current = ForwardPass(batches)

    def close(self) -> None:
        current, self._thread.current = self._thread.current, None
        if current is not None:
            current.close()


_KNOWN: weakref.WeakKeyDictionary[nn.Module, _Passes] = weakref.WeakKeyDictionary()


def register_pass(root: nn.Module) -> None:
    """Let forward passes of `root` batch its layers."""
    if _open not in root._forward_pre_hooks.values():
        root.register_forward_pre_hook(_open)
        root.register_forward_hook(_close, always_call=True)


def remove_pass(root: nn.Module) -> None:
    """Undo `register_pass`."""
    forget_batches(root)
    for table, hook in ((root._forward_pre_hooks, _open), (root._forward_hooks, _close)):
        for number in [number for number, known in table.items() if known is hook]:
            del table[number]
            root._forward_hooks_always_called.pop(number, None)


def forget_batches(root: nn.Module) -> None:
    """After a change of its layers, adapters or their scales."""
    passes = _KNOWN.pop(root, None)
    if passes is not None:
        passes.close()


def _open(root: nn.Module, _inputs: Any) -> None:
    if needs_plain_ops():
        return
    passes = _KNOWN.get(root)
    if passes is None:
        passes = _KNOWN.setdefault(root, _Passes(root))
    if problem := split_problem([("", root)], SPLIT_FIX):
        raise ExecutionError(problem)
    passes.open()


def _close(root: nn.Module, _inputs: Any, _output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    passes = _KNOWN.get(root)
    if passes is not None:
        passes.close()


def _member(layer: AdaptedLayer) -> Member | None:
    """What a layer is to contract; None of layers that contract their own. All but `dense` is known from a call."""
    if len(layer.scales) != 1 or layer.disabled or layer.merged:
        return None
    ((adapter, scale),) = layer.active
    if scale != 1.0 or not adapter.has_values:
        return None
    if adapter.mode == "dense":
        return Member.dense(layer, adapter)
    last = adapter.calling.last
    if last is None or last.clusters is None:
        return None if last is None else Member.dense(layer, adapter)
    return Member.of(layer, adapter, last.clusters)
