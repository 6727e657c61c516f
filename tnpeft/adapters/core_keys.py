"""The keys under which an adapter holds its cores, their frozen copies and its magnitude."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from tnpeft.network import Network

__all__ = ["CORE", "DORA", "MAGNITUDE", "START", "CoreKeys", "keys_of"]

CORE, START, DORA, MAGNITUDE = "core_", "start_", "dora_", "magnitude"

Keys = tuple[str | None, ...]


class CoreKeys(NamedTuple):
    """Keys of cores and frozen copies in the network's order, None for the base weight; and of all stored tensors."""

    cores: Keys
    start: Keys
    stored: Keys


@lru_cache(maxsize=1024)
def keys_of(network: Network) -> CoreKeys:
    """The keys of a network, cached because models have many equal layers. A frozen core is its own copy."""
    cores = tuple([None if core.origin == "weight" else CORE + core.name for core in network.cores])
    start = tuple([key if core.frozen else START + core.name for key, core in zip(cores, network.cores, strict=True)])
    copies = start if network.start == "frozen_copy" else ()
    magnitude = (DORA + MAGNITUDE,) if network.compose == "dora" else ()
    return CoreKeys(cores, start, (*cores, *copies, *magnitude))
