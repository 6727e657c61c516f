"""Files of a model of which each process holds parts: all gather what adapters train and one writes, or all read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import distributed, nn

from tnpeft.adapters import Adapter
from tnpeft.adapters.distributed import is_distributed, reshard, whole
from tnpeft.adapters.parked import MANGLED
from tnpeft.errors import TnpeftError
from tnpeft.io.files import refuse

__all__ = ["holders_of", "in_step", "is_flat_sharded", "is_in_parts", "one_writer", "summoned"]


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
    if told := _first_told(error, groups):
        raise told


@contextmanager
def in_step(groups: Sequence[Any], path: Path) -> Iterator[list[Callable[[], str]]]:
    """Inside, each process reads a file; an error of one is raised in all of the groups, the `holders_of` a model.

    Yields a list for what says what was read, which must be the same for all. Nothing may be exchanged inside.
    """
    said: list[Callable[[], str]] = []
    if not groups:
        yield said
        return
    error: Exception | None = None
    read: set[str] = set()
    try:
        yield said
        read = {"".join(say() for say in said)}
    except Exception as raised:  # noqa: BLE001 - as above
        error = raised
    if told := _first_told(error, groups):
        raise told
    for group in groups:
        read = read.union(*_everyones(read, group))
    if len(read) > 1:
        fix = "Give each process the same file: copy it to every machine, or to a folder that they share."
        raise refuse(path, "adapter file", "the same in every process", "others in some", fix)


def is_in_parts(model: Any) -> bool:
    """Whether the processes hold parts of the model, so that all of them must take part in saving and loading."""
    if not isinstance(model, nn.Module):  # which is told later
        return False
    reshard(model)
    return any(map(is_distributed, model.parameters())) or any(map(is_flat_sharded, model.modules()))


def summoned(model: nn.Module, writes: bool) -> AbstractContextManager[Any]:
    """Inside, what FullyShardedDataParallel has in pieces is whole; with `writes` the pieces get its values."""
    flat: Any = next(filter(is_flat_sharded, model.modules()), None)
    return nullcontext() if flat is None else type(flat).summon_full_params(model, writeback=writes)


def is_flat_sharded(module: Any) -> bool:
    """Whether it is a FullyShardedDataParallel that holds its own piece of the parameters just now."""
    handle = module.__dict__.get("_handle")
    flat = getattr(handle, "flat_param", None)
    return handle is not None and flat is not None and bool(handle.uses_sharded_strategy and handle.is_sharded(flat))


def holders_of(model: nn.Module) -> list[Any]:
    """The processes that hold a model's parts, along each axis of their mesh; none of a model that is whole."""
    if not is_in_parts(model):
        return []
    parts: Any = next(filter(is_distributed, model.parameters()), None)
    if parts is None:
        flat: Any = next(filter(is_flat_sharded, model.modules()))
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
        sent = next((each for each in _everyones(sent, group) if each is not None), None)
    return error or sent


def _everyones(mine: Any, group: Any) -> list[Any]:
    """What each process of a group has."""
    found = [None] * group.size()
    distributed.all_gather_object(found, mine, group=group)
    return found
