"""The network: a spec bound to a layer, every size known and checked."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import networkx
import opt_einsum

from tnpeft.network.layer import Layer
from tnpeft.spec import Spec

__all__ = ["BoundCore", "BoundInit", "Network"]


@dataclass(frozen=True)
class BoundInit:
    """An initial distribution with its arguments worked out, e.g. `kaiming_uniform` with fan 16, gain 1.41."""

    name: str
    arguments: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class BoundCore:
    """One core with its legs' sizes, in storage order."""

    name: str
    legs: tuple[str, ...]
    shape: tuple[int, ...]
    init: BoundInit
    frozen: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Network:
    """A tensor network whose open legs make a layer's weight.

    `weight` holds, for each axis of the canonical weight (out_channels, in_channels // groups,
    kernel axes...), the open legs that multiply out to it in row-major order. An axis whose legs
    multiply to more than the layer has (a padded `factorize`) keeps its first entries.
    """

    spec: Spec
    layer: Layer
    params: Mapping[str, int | float]
    sizes: Mapping[str, int]
    cores: tuple[BoundCore, ...]
    weight: tuple[tuple[str, ...], ...]
    scale: float
    formula: str

    @property
    def start(self) -> str:
        """`zero` or `frozen_copy`."""
        return self.spec.start

    @property
    def num_parameters(self) -> int:
        """Trainable elements: those of every core that is not frozen."""
        return sum(core.numel for core in self.cores if not core.frozen)

    @property
    def open_legs(self) -> tuple[str, ...]:
        """The weight's legs in row-major order of the canonical weight."""
        return tuple(leg for axis in self.weight for leg in axis)

    @property
    def padded_shape(self) -> tuple[int, ...]:
        """The canonical weight before the crop of padded axes."""
        return tuple(math.prod(self.sizes[leg] for leg in axis) for axis in self.weight)

    @cached_property
    def symbols(self) -> Mapping[str, str]:
        """One einsum letter for each index, in order of appearance."""
        order = dict.fromkeys(leg for core in self.cores for leg in core.legs)
        return {leg: opt_einsum.get_symbol(number) for number, leg in enumerate(order)}

    @cached_property
    def einsum(self) -> str:
        """The network as one einsum over its cores in file order; the output is the canonical weight, leg by leg."""
        letters = self.symbols
        inputs = ",".join("".join(letters[leg] for leg in core.legs) for core in self.cores)
        return f"{inputs}->{''.join(letters[leg] for leg in self.open_legs)}"

    @cached_property
    def signature(self) -> Hashable:
        """All that a plan depends on; equal signatures share one plan and one program."""
        cores = tuple((self.symbols_of(core), core.shape, core.frozen) for core in self.cores)
        axes = tuple("".join(self.symbols[leg] for leg in axis) for axis in self.weight)
        return (cores, axes, self.layer.weight_shape, self.layer.transposed, self.layer.groups, self.scale, self.start)

    def symbols_of(self, core: BoundCore) -> str:
        return "".join(self.symbols[leg] for leg in core.legs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Network:
        return self

    @cached_property
    def graph(self) -> networkx.Graph[tuple[str, str]]:
        """The bipartite graph of cores and indices.

        Nodes are ("core", name) with `shape` and `frozen`, and ("index", name) with `size` and
        `open`; an edge joins a core to each of its legs. Bipartite, because a plain graph merges
        parallel bonds and cannot hold an index that three cores share.
        """
        graph: networkx.Graph[tuple[str, str]] = networkx.Graph(name=self.spec.name)
        open_legs = set(self.open_legs)
        for core in self.cores:
            graph.add_node(("core", core.name), kind="core", shape=core.shape, frozen=core.frozen)
            for leg in core.legs:
                graph.add_node(("index", leg), kind="index", size=self.sizes[leg], open=leg in open_legs)
                graph.add_edge(("core", core.name), ("index", leg))
        return graph
