"""The memory that adapters need on a device, before any of it is allocated, and the bound on it.

The least that is needed is what a forward pass has alive at once: the cores of all layers with their frozen copies, and
what contracting the cores of one layer takes. Activations and gradients come on top; they are the model's.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tnpeft.adapters.base_weight import stand_in
from tnpeft.adapters.offload import hook_of
from tnpeft.adapters.parked import ParameterLayer
from tnpeft.errors import BindError, Problem
from tnpeft.network import BoundCore, Network
from tnpeft.schedule import plan
from tnpeft.schedule.memory import FLOAT_BYTES

__all__ = ["VARIABLE", "memory_limit", "memory_problems"]

VARIABLE = "TNPEFT_MEMORY_LIMIT"
_FIX = (
    "Use a smaller rank or another topology, or allow more with `tnpeft.memory_limit(bytes)` "
    f"(on the command line with {VARIABLE})."
)


@dataclass(frozen=True)
class _Limit:
    """The most bytes, or None for any number; `whose` says who set it."""

    most: int | None
    whose: str


_limit: ContextVar[_Limit | None] = ContextVar("memory_limit", default=None)


@contextmanager
def memory_limit(most: int | None) -> Iterator[None]:
    """Inside, adapters may need `most` bytes of each device, whatever memory there is; with None, any number of bytes.

    It holds for `attach`, `compile`, `load`, `load_foreign` and all that calls them. Outside, the bound is the memory
    of the layers' device; on the CPU, what the container's and the process's limits leave of it. The environment
    variable TNPEFT_MEMORY_LIMIT (bytes) replaces this bound. Raises BindError for what is no number of bytes.
    """
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        fix = "For example `tnpeft.memory_limit(64 << 30)`, or None for no bound."
        raise BindError(Problem("memory_limit", "a positive whole number of bytes, or None", f"{most!r:.60}", fix))
    token = _limit.set(_Limit(most, "`tnpeft.memory_limit`"))
    try:
        yield
    finally:
        _limit.reset(token)


@dataclass
class _Demand:
    """Bytes that layers need on one device; `passing` is the most that one of them needs in addition to all cores."""

    held: int = 0
    passing: int = 0
    cores: dict[str, int] = field(default_factory=dict)
    shared: set[Hashable] = field(default_factory=set)


def memory_problems(
    networks: Mapping[str, Network], modules: Mapping[str, nn.Module | ParameterLayer], mode: str | Mapping[str, str]
) -> Iterator[Problem]:
    """Problems of layers whose networks need more memory than there is, alone or together; on meta none is needed."""
    demands: dict[torch.device, _Demand] = {}
    peaks: dict[Hashable, int] = {}
    refused = False  # one at least is too large by itself
    for name, network in networks.items():
        device, width = _place(modules[name], network)
        limit = _limit_of(device)
        if limit.most is None:
            continue
        demand = demands.setdefault(device, _Demand())
        cores = width * sum(_elements(network, core) for core in network.cores)
        known_as = (network.signature, width, mode[name] if isinstance(mode, Mapping) else mode)
        if known_as not in peaks:
            try:
                peaks[known_as] = _peak(network, width, known_as[2], limit.most)
            except BindError as error:
                yield from (replace(problem, what=f"layer '{name}': {problem.what}") for problem in error.problems)
                return
        if max(cores, peaks[known_as]) > limit.most:
            refused = True
            what = f"layer '{name}'" if name else str(network.layer)
            yield _problem(f"{what}, spec '{network.spec.name}'", limit, cores, peaks[known_as])
        demand.cores[name] = width * sum(_elements(network, core) for core in _counted(network, demand))
        demand.held += demand.cores[name]
        demand.passing = max(demand.passing, peaks[known_as] - cores)
    for device, demand in demands.items() if not refused else ():
        limit = _limit_of(device)
        if limit.most is not None and demand.held + demand.passing > limit.most:
            largest = max(demand.cores, key=demand.cores.__getitem__)
            what = f"{len(demand.cores)} layers together, the largest '{largest}' with {demand.cores[largest]:,} bytes"
            yield _problem(what, limit, demand.held, demand.held + demand.passing)


def _problem(what: str, limit: _Limit, cores: int, peak: int) -> Problem:
    found = f"{max(cores, peak):,} bytes: {cores:,} of cores, the rest while they are contracted"
    return Problem(what, f"a need of at most {limit.most:,} bytes ({limit.whose})", found, _FIX)


def _place(module: Any, network: Network) -> tuple[torch.device, int]:
    """Where a layer's cores will be, and the bytes of each of their elements."""
    weight = module.weight if not network.layer.opaque else stand_in(module, network.layer)
    assert isinstance(weight, torch.Tensor)
    device = weight.device
    if device.type == "meta" and (hook := hook_of(module)) is not None:  # accelerate has the values elsewhere
        with suppress(RuntimeError, TypeError):
            device = torch.device(getattr(hook, "execution_device", None) or "meta")
    return device, 2 * FLOAT_BYTES if weight.dtype == torch.float64 else FLOAT_BYTES


def _elements(network: Network, core: BoundCore) -> int:
    if core.origin == "weight":
        return 0
    return core.numel * (2 if network.start == "frozen_copy" and not core.frozen else 1)


def _counted(network: Network, demand: _Demand) -> Iterator[BoundCore]:
    """The cores but those that an earlier layer may share; a scope's layers are taken for one."""
    for core in network.cores:
        key = (network.spec.name, core.name, core.shape, core.init.sizes)
        if core.shared is None or key not in demand.shared:
            yield core
        if core.shared is not None:
            demand.shared.add(key)


def _peak(network: Network, width: int, mode: str, most: int) -> int:
    """The bytes of a forward pass; where dense takes too many, of the factored one that may run in its place."""
    least = plan(network).memory.forward
    if width // FLOAT_BYTES * least > most and mode in ("auto", "factored"):
        factored = plan(network, "factored")
        least = min(least, factored.memory.forward) if factored.mode == "factored" else least
    return width // FLOAT_BYTES * least


def _limit_of(device: torch.device) -> _Limit:
    chosen = _limit.get()
    if device.type == "meta":
        return _Limit(None, "")
    if chosen is not None:
        return chosen
    if text := os.environ.get(VARIABLE, "").strip():
        return _Limit(_bytes_from(text), VARIABLE)
    return _memory_of(device.type, device.index)


def _bytes_from(text: str) -> int:
    try:
        most = int(float(text)) if "e" in text.lower() else int(text)
    except (ValueError, OverflowError):
        most = 0
    if most < 1:
        fix = f"For example {VARIABLE}=64e9, or leave it unset."
        raise BindError(Problem(VARIABLE, "a positive number of bytes", f"{text[:60]!a}", fix))
    return most


@lru_cache(maxsize=64)
def _memory_of(kind: str, index: int | None) -> _Limit:
    """The memory of a device, in bytes; None if it is not known."""
    if kind == "cuda":
        place = torch.device(kind, torch.cuda.current_device() if index is None else index)
        return _Limit(torch.cuda.get_device_properties(place).total_memory, f"the memory of {place}")
    if kind not in ("cpu", "mps"):
        return _Limit(None, "")
    limits = [*_host_memory(), *_container_memory(), *_process_memory()]
    return _Limit(min(limits, default=None), "the memory of this machine")


def _host_memory() -> Iterator[int]:
    with suppress(AttributeError, OSError, ValueError):  # Windows has no sysconf
        yield os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _container_memory() -> Iterator[int]:
    """The limits of the control groups above this process, of version 2 and 1."""
    root = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
        for _, controllers, name in groups:
            folder = root if not controllers else root / "memory"
            if controllers and "memory" not in controllers.split(","):
                continue
            group = folder / name.strip("/")
            for place in (group, *(parent for parent in group.parents if parent.is_relative_to(folder))):
                for file in ("memory.max", "memory.limit_in_bytes"):
                    with suppress(OSError, ValueError):  # "max" is no number
                        yield int((place / file).read_text())


def _process_memory() -> Iterator[int]:
    with suppress(ImportError, OSError, ValueError):  # Windows has no `resource`
        import resource

        most, _ = resource.getrlimit(resource.RLIMIT_AS)
        if most != resource.RLIM_INFINITY:
            yield most
