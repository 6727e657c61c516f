"""Memory that operations allocate, and that autograd saves, counted storage by storage."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Bytes of the storages made inside that are alive, and the most that were; workspace within a kernel is unseen."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0
        self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(tensor)._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and _storage(tensor)._cdata not in given:
                self._count(_storage(tensor))
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known[key] = size
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.alive -= self._known.pop(key)

    def restart(self) -> None:
        """Take the peak from here on."""
        self.peak = self.alive


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def saved_bytes(forward: Callable[[], Tensor], *known: Tensor) -> int:
    """Bytes that autograd saves in a forward pass, each storage once, without those of `known` tensors."""
    held = {tensor.untyped_storage().data_ptr() for tensor in known}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = forward()  # alive until all is counted: a storage that was freed could lie where a later one does
    assert output.requires_grad  # else nothing was to be saved
    del output
    return sum(sizes.values())
