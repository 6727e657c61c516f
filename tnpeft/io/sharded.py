"""Saving a model of which each process holds parts: all gather what adapters train, and one writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import distributed, nn

from tnpeft.adapters import Adapter
from tnpeft.adapters.distributed import is_distributed, reshard, whole
from tnpeft.adapters.parked import MANGLED
from tnpeft.errors import TnpeftError

__all__ = ["is_flat_sharded", "is_in_parts", "one_writer"]


@contextmanager
def one_writer(model: nn.Module) -> Iterator[bool]:
    """Inside, what adapters train is whole in every process; yields whether this one is to write.

    Where processes hold parts (FSDP), all of them must enter. They leave together, once the file is written; an error
    of one is raised in all. A model that is whole in its process is written by each that asks.
    """
    if not is_in_parts(model):
        yield True
        return
    parts = next(filter(is_distributed, model.parameters()), None)
    flat: Any = next(filter(is_flat_sharded, model.modules()), None)
    groups = _groups(parts, flat)
    error: Exception | None = None
    with _whole(model), nullcontext() if flat is None else type(flat).summon_full_params(model, writeback=False):
        try:
            yield all(group.rank() == 0 for group in groups)
        except Exception as raised:  # noqa: BLE001 - raised again, once the others know
            error = raised
    if told := _first_told(error, groups):
        raise told


def is_in_parts(model: Any) -> bool:
    """Whether the processes hold parts of the model, so that all of them must take part in saving it."""
    if not isinstance(model, nn.Module):  # which is told later
        return False
    reshard(model)
    return any(map(is_distributed, model.parameters())) or any(map(is_flat_sharded, model.modules()))


def is_flat_sharded(module: Any) -> bool:
    """Whether it is a FullyShardedDataParallel that holds its own piece of the parameters just now."""
    handle = module.__dict__.get("_handle")
    flat = getattr(handle, "flat_param", None)
    return handle is not None and flat is not None and bool(handle.uses_sharded_strategy and handle.is_sharded(flat))


def _groups(parts: Any, flat: Any) -> list[Any]:
    """The processes that hold a model's parts, along each axis of their mesh."""
    if parts is None:
        return [flat.process_group]
    return [parts.device_mesh.get_group(axis) for axis in range(parts.device_mesh.ndim)]


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


def _first_told(error: Exception | None, groups: Sequence[Any]) -> Exception | None:
    """The process's own error, or the first that another process tells."""
    sent = error
    if error is not None and not isinstance(error, TnpeftError):  # others need not be fit to be sent
        sent = RuntimeError(repr(error))
    for group in groups:
        told: list[Exception | None] = [None] * group.size()
        distributed.all_gather_object(told, sent, group=group)
        sent = next((each for each in told if each is not None), None)
    return error or sent
