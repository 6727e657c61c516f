"""Files of a model of which each process holds parts: all gather what adapters train, and one writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tnpeft.adapters import Adapter
from tnpeft.adapters.distributed import is_distributed, whole
from tnpeft.adapters.parked import MANGLED
from tnpeft.adapters.processes import first_told, holders_of, summoned

__all__ = ["one_writer"]


@contextmanager
def one_writer(model: nn.Module) -> Iterator[bool]:
    """Inside, what adapters train is whole in every process; yields whether this one is to write.

    Where processes hold parts (FSDP), all of them must enter. They leave together, once the file is written; an error
    of one is raised in all. A model that is whole in its process is written by each that asks.
    """
    groups = holders_of(model)
    if not groups:
        yield True
        return
    error: Exception | None = None
    with _whole(model), summoned(model, False):
        try:
            yield all(group.rank() == 0 for group in groups)
        except Exception as raised:  # noqa: BLE001 - raised again, once the others know
            error = raised
    if told := first_told(error, groups):
        raise told


@contextmanager
def _whole(model: nn.Module) -> Iterator[None]:
    """Inside, whole tensors stand where adapters have DTensors; the base keeps its parts."""
    parted = [
        (module._parameters, key, tensor)
        for module in model.modules()
        for key, tensor in module._parameters.items()
        if is_distributed(tensor) and (isinstance(module, Adapter) or key.startswith(MANGLED))
    ]
    try:
        for table, key, tensor in parted:
            assert tensor is not None
            table[key] = nn.Parameter(whole(tensor), requires_grad=tensor.requires_grad)
        yield
    finally:
        for table, key, tensor in parted:
            table[key] = tensor
