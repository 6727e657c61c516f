"""How the calls of a layer with one adapter run: each size is planned once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tnpeft.adapters import Adapter
from tnpeft.execution.results import StartConstants
from tnpeft.planning import Call
from tnpeft.program import ChainProgram, ClusterMerge, ClusterProgram
from tnpeft.schedule import Plan

__all__ = ["CALLS", "Acting", "Calls", "Running"]

# Calls that a layer remembers, those of the most recent sizes: sequences may have any length. A call that was
# forgotten is planned as before, for plans are deterministic, and what was timed is in the adapter's `choices`.
CALLS = 64


class Running(NamedTuple):
    """How one call runs: the mode and its plan; if it is not dense, the programs of the factored chain."""

    mode: str
    plan: Plan
    call: Call | None = None
    chain: ChainProgram | None = None
    clusters: ClusterProgram | None = None
    merge: ClusterMerge | None = None


class Calls:
    """How calls of one layer with one adapter run, by their sizes, and what is computed from the frozen copy.

    It belongs to the layer and is neither copied nor pickled.
    """

    def __init__(self) -> None:
        self.known: dict[Any, Running] = {}
        self.delta_constants: StartConstants[Any] = StartConstants()
        self.cluster_constants: StartConstants[Any] = StartConstants()
        self._last: dict[bool, Running] = {}
        self._planning = threading.Lock()

    def get(self, key: Any, make: Callable[[], Running]) -> Running:
        """How a call of this size runs, decided once for all threads: timing twice might give two modes."""
        with self._planning:
            running = self.known.pop(key, None) or make()
            self.known[key] = running
            if len(self.known) > CALLS:
                del self.known[next(iter(self.known))]
        self._last[torch.is_grad_enabled()] = running
        return running

    @property
    def last(self) -> Running | None:
        """How the last call ran, with or without gradients as they are enabled now; failing that, the other."""
        differentiable = torch.is_grad_enabled()
        return self._last.get(differentiable) or self._last.get(not differentiable)

    @property
    def mode(self) -> str | None:
        """The mode of the last call with gradients or, if there was none, of the last one."""
        last = self._last.get(True) or self._last.get(False)
        return None if last is None else last.mode

    def keep_plain(self, chain: ChainProgram, clusters: ClusterProgram) -> str:
        """Keep the programs of a call on the plain path; returns the name of the attribute that has them.

        A compiler guards each attribute separately, but a table as a whole.
        """
        key = f"_plain_{id(chain)}_{id(clusters)}"
        if key not in self.__dict__:
            plain = [name for name in list(self.__dict__) if name.startswith("_plain_")]
            for name in plain[: len(plain) + 1 - CALLS]:
                self.__dict__.pop(name, None)
            self.__dict__[key] = chain, clusters
        return key


class Acting(NamedTuple):
    """An adapter that acts on a layer, at a scale."""

    adapter: Adapter
    scale: float
    calls: Calls
