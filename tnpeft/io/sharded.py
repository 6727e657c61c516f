"""Files of a sharded model: all processes gather what adapters train, and one writes."""

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
    """Inside, every process has what adapters train as whole tensors; yields whether this process writes.

    If processes hold parts (FSDP), all of them must enter. They leave together, once the file is written; an error in
    one is raised in all. If each process has the whole model, each that calls this writes.
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
    """Inside, adapters have whole tensors in place of their DTensors; the base keeps its parts."""
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
