"""The processes that hold parts of one model: which they are, and how they stay in step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import distributed, nn

from tnpeft.adapters.distributed import DISTRIBUTED, UNITS, is_distributed, reshard
from tnpeft.errors import TnpeftError

__all__ = [
    "first_told",
    "flat_part",
    "holders_of",
    "in_step",
    "is_flat_sharded",
    "is_in_parts",
    "summoned",
]


_Said = list[Callable[[], object]]


def in_step(groups: Sequence[Any], unlike: Callable[[], TnpeftError]) -> AbstractContextManager[_Said]:
    """Inside, each of the `holders_of` a model checks or reads something; an error in one process is raised in all.

    Yields a list for functions that return what was found. If that differs between processes, `unlike` is raised.
    Processes must not exchange anything inside. Without groups nothing is exchanged or compared.
    """
    return _in_step(groups, unlike) if groups else nullcontext([])


@contextmanager
def _in_step(groups: Sequence[Any], unlike: Callable[[], TnpeftError]) -> Iterator[_Said]:
    said: _Said = []
    error: Exception | None = None
    found: set[str] = set()
    try:
        yield said
        found = {"".join(str(say()) for say in said)}
    except Exception as raised:  # noqa: BLE001 - raised again, once the others know
        error = raised
    if told := first_told(error, groups):
        raise told
    for group in groups:
        found = found.union(*_everyones(found, group))
    if len(found) > 1:
        raise unlike()


def is_in_parts(model: Any) -> bool:
    """Whether the processes hold parts of the model, so that all of them must take part in saving and loading."""
    if not isinstance(model, nn.Module):  # which is told later
        return False
    reshard(model)
    return any(map(is_distributed, model.parameters())) or any(map(is_flat_sharded, model.modules()))


def holders_of(model: Any) -> list[Any]:
    """The groups of processes that hold a model's parts, along each axis of their mesh; none for a whole model."""
    if (UNITS not in sys.modules and DISTRIBUTED not in sys.modules) or not is_in_parts(model):
        return []
    parts: Any = next(filter(is_distributed, model.parameters()), None)
    if parts is None:
        flat: Any = next(filter(is_flat_sharded, model.modules()))
        return [flat.process_group]
    return [parts.device_mesh.get_group(axis) for axis in range(parts.device_mesh.ndim)]


def flat_part(model: Any) -> Any:
    """The first FullyShardedDataParallel (FSDP1) in a model, or None."""
    kind = getattr(sys.modules.get(UNITS), "FullyShardedDataParallel", None)
    if kind is None or not isinstance(model, nn.Module):  # which is told later
        return None
    return next((module for module in model.modules() if isinstance(module, kind)), None)


def is_flat_sharded(module: Any) -> bool:
    """Whether it is a FullyShardedDataParallel that currently holds only its own piece of the parameters."""
    handle = module.__dict__.get("_handle")
    flat = getattr(handle, "flat_param", None)
    return handle is not None and flat is not None and bool(handle.uses_sharded_strategy and handle.is_sharded(flat))


def summoned(model: Any, writes: bool) -> AbstractContextManager[Any]:
    """Inside, what FullyShardedDataParallel has in pieces is whole; with `writes` changes reach the pieces."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    flat: Any = next(filter(is_flat_sharded, modules), None)
    return nullcontext() if flat is None else type(flat).summon_full_params(model, writeback=writes)


def first_told(error: Exception | None, groups: Sequence[Any]) -> Exception | None:
    """The process's own error, or the first that another process tells."""
    sent = error
    if error is not None and not isinstance(error, TnpeftError):  # others need not be fit to be sent
        sent = RuntimeError(repr(error))
    for group in groups:
        sent = next((each for each in _everyones(sent, group) if each is not None), None)
    return error or sent


def _everyones(mine: Any, group: Any) -> list[Any]:
    """What each process of a group has."""
    found = [None] * group.size()
    distributed.all_gather_object(found, mine, group=group)
    return found
