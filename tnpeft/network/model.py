"""The network: a spec bound to a layer, every size known and checked."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import networkx
import opt_einsum

from tnpeft.network.derived import DerivedCore, Factor
from tnpeft.network.layer import Layer
from tnpeft.spec.declaration import Declaration
from tnpeft.spec.expression import Expression, Value
from tnpeft.spec.inits import INDEX_INITS

__all__ = ["BoundCore", "BoundInit", "BoundTerm", "Network", "with_slices"]


@dataclass(frozen=True)
class BoundInit:
    """An initial distribution with its arguments worked out, e.g. `kaiming_uniform` with fan 16, gain 1.41."""

    name: str
    arguments: Mapping[str, float] = field(default_factory=dict)
    legs: tuple[str, ...] = ()  # that it names: those of places, or along which values are the same
    sizes: tuple[int, ...] = ()  # of these
    core: str | None = None  # whose value it takes
    entry: Expression | None = None  # what each entry is: the core's legs are its position
    numbers: Mapping[str, Value] = field(default_factory=dict)  # what other names in `entry` are


@dataclass(frozen=True)
class BoundCore:
    """One core with its legs' sizes, in storage order; `shared` and `origin` as in the spec.

    An axis of a stored core that holds several legs, as `(i k...) r` says, is one of its shape; `split` has the sizes
    of its legs then. With `changes` its tensor holds what changed since the start, and its frozen copy the start: that
    of a derived core, where the difference of two rounded values would have few digits.
    """

    name: str
    legs: tuple[str, ...]
    shape: tuple[int, ...]
    init: BoundInit
    frozen: bool = False
    shared: str | None = None
    origin: str | None = None
    changes: bool = False
    split: tuple[int, ...] | None = None

    @property
    def unfolded(self) -> tuple[int, ...]:
        """The sizes of its legs, one by one."""
        return self.shape if self.split is None else self.split

    @property
    def is_index(self) -> bool:
        """Whether it holds whole numbers, which only maps read."""
        return self.init.name in INDEX_INITS

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def with_slices(core: BoundCore, leg: str, slices: int) -> BoundCore:
    """The cores of all slices of a stack as one, the leg of the slices first; one that layers share has none."""
    if core.shared is not None:
        return core
    split = None if core.split is None else (slices, *core.split)
    return replace(core, legs=(leg, *core.legs), shape=(slices, *core.shape), split=split)


@dataclass(frozen=True)
class BoundTerm:
    """One term of the update: the cores of its network, by name, its scale, and how its open legs make the weight.

    `weight` holds, for each axis of the canonical weight (slices of a stack, out_channels, in_channels // groups,
    kernel axes...), the open legs that multiply out to it in row-major order. An axis whose legs
    multiply to more than the layer has (a padded `factorize`) keeps its first entries.
    """

    cores: tuple[str, ...]
    weight: tuple[tuple[str, ...], ...]
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Network:
    """A spec bound to a layer: a tensor network whose open legs make its weight, or a sum of such networks (terms)."""

    spec: Declaration
    layer: Layer
    params: Mapping[str, int | float]
    sizes: Mapping[str, int]
    cores: tuple[BoundCore, ...]
    terms: tuple[BoundTerm, ...]
    scale: float
    formula: str
    slice_network: Network | None = None  # of a stack: that of each of its layers
    derived: tuple[DerivedCore, ...] = ()  # each after those that it is made of
    factors: tuple[Factor, ...] = ()  # what terms name; none where they name the cores as they are stored
    start_std: float | None = None  # of T at the start, in standard deviations of the weight
    evaluated: tuple[DerivedCore, ...] = ()  # of a plain network: those that its cores are, or are made of

    @property
    def start(self) -> str:
        """`zero` or `frozen_copy`."""
        return self.spec.start

    @property
    def compose(self) -> str | None:
        """`dora` if a trained magnitude scales each output channel, else None."""
        return self.spec.compose

    @property
    def num_parameters(self) -> int:
        """Trainable elements: those of every core that is not frozen, and the magnitudes of `compose: dora`.

        A shared core counts here for each layer that has it, and once in the report of a model.
        """
        magnitudes = math.prod(self.magnitude_shape) if self.compose == "dora" else 0
        return sum(core.numel for core in self.cores if not core.frozen) + magnitudes

    @property
    def magnitude_shape(self) -> tuple[int, ...]:
        """The shape of the magnitudes of `compose: dora`: one for each output channel."""
        return (*self.layer.stack, self.layer.out_channels)

    @cached_property
    def plain(self) -> Network:
        """The network to plan and contract, in which each factor is a core; without factors, this network."""
        if not self.factors:
            return self
        one = self.slice_network
        if one is not None:
            leg = self.terms[0].weight[0][0]
            cores = tuple(with_slices(core, leg, self.layer.slices) for core in one.plain.cores)
            return replace(self, cores=cores, derived=(), factors=(), slice_network=one.plain, evaluated=self.derived)
        cores = tuple(self.core_of(factor) for factor in self.factors)
        return replace(self, cores=cores, derived=(), factors=(), evaluated=self.derived)

    def core_of(self, factor: Factor) -> BoundCore:
        """A factor as a core by itself: frozen (or shared) if all stored cores that it is made of are."""
        stored = {core.name: core for core in self.cores}
        name, reference = factor.reference.core, factor.reference
        roots = [stored[root] for root in self.roots_of(name)]
        frozen = all(core.frozen for core in roots)
        shared = "model" if all(core.shared is not None for core in roots) else None
        changes = self.start == "frozen_copy" and name not in stored and not frozen
        origin = stored[name].origin if name in stored else None
        made = BoundInit("derived")
        return BoundCore(factor.label, reference.legs, reference.shape, made, frozen, shared, origin, changes)

    def roots_of(self, name: str) -> tuple[str, ...]:
        """The stored cores that a core is made of, index cores included; a stored core is its own root."""
        made = {core.name: core for core in self.derived}
        roots: dict[str, None] = {}
        pending = [name]
        while pending:
            core = made.get(pending.pop(0))
            if core is None:
                roots[name] = None
            else:
                for source in (*core.sources, *(each.at for each in core.maps if each.at is not None)):
                    roots |= dict.fromkeys(self.roots_of(source))
        return tuple(roots)

    @cached_property
    def parts(self) -> tuple[Network, ...]:
        """The terms as networks of their own, each with its scale; a network of one plain term is its only part.

        In them, derived cores count as plain tensors.
        """
        if self.factors:
            return self.plain.parts
        if len(self.terms) == 1 and self.terms[0].scale == 1.0 and len(self.terms[0].cores) == len(self.cores):
            return (self,)
        return tuple(self._part(term) for term in self.terms)

    def _part(self, term: BoundTerm) -> Network:
        names = set(term.cores)
        cores = tuple(core for core in self.cores if core.name in names)
        sizes = {leg: self.sizes[leg] for core in cores for leg in core.legs}
        plain = replace(term, scale=1.0)
        scale = self.scale * term.scale
        return replace(self, sizes=sizes, cores=cores, terms=(plain,), scale=scale, formula="", slice_network=None)

    @property
    def weight(self) -> tuple[tuple[str, ...], ...]:
        """The open legs of each axis of the weight, in the first term."""
        return self.terms[0].weight

    @cached_property
    def open_legs(self) -> tuple[str, ...]:
        """The weight's legs in row-major order of the canonical weight; of several terms, each leg once."""
        return tuple(dict.fromkeys(leg for term in self.terms for axis in term.weight for leg in axis))

    def term_of(self, core: BoundCore) -> BoundTerm:
        """The first term that names a core under its own legs; if none does, the first term."""
        return next((term for term in self.terms if core.name in term.cores), self.terms[0])

    def open_legs_of(self, core: BoundCore) -> tuple[str, ...]:
        """The weight's legs in the first term that names a core."""
        return tuple(leg for axis in self.term_of(core).weight for leg in axis)

    @property
    def padded_shape(self) -> tuple[int, ...]:
        """The shape of the canonical weight of the first term before padded axes are cropped."""
        return tuple(math.prod(self.sizes[leg] for leg in axis) for axis in self.weight)

    @cached_property
    def reads_weight(self) -> bool:
        """Whether the update depends on the base weight: a core is that weight, or the spec has `compose: dora`."""
        return self.compose is not None or any(core.origin == "weight" for core in self.cores)

    @cached_property
    def symbols(self) -> Mapping[str, str]:
        """One einsum letter for each index, in order of appearance."""
        named = [core.legs for core in self.cores] + [core.legs for core in self.derived]
        named += [factor.reference.legs for factor in self.factors]
        order = dict.fromkeys(leg for legs in named for leg in legs)
        return {leg: opt_einsum.get_symbol(number) for number, leg in enumerate(order)}

    @cached_property
    def einsum(self) -> str:
        """The network as one einsum over its cores in file order; the output is the canonical weight, leg by leg.

        A sum has one einsum for each term, joined by ` + `; a letter means the same index in all of them. Derived cores
        count as plain tensors.
        """
        if self.factors:
            return self.plain.einsum
        letters = self.symbols
        texts = []
        for term in self.terms:
            cores = [core for core in self.cores if core.name in term.cores]
            inputs = ",".join("".join(letters[leg] for leg in core.legs) for core in cores)
            texts.append(f"{inputs}->{''.join(letters[leg] for axis in term.weight for leg in axis)}")
        return " + ".join(texts)

    @cached_property
    def signature(self) -> Hashable:
        """All that a plan depends on; networks with equal signatures share one plan and one program."""
        terms = tuple(self._signature_of(term) for term in self.terms)
        layer = self.layer
        stored = layer.weight_shape, layer.transposed, layer.groups, layer.turned, layer.opaque, layer.slices
        return (terms, *stored, self.scale, self.start)

    def _signature_of(self, term: BoundTerm) -> Hashable:
        cores = tuple(
            (place, self.symbols_of(core), core.shape, core.frozen, core.origin == "weight", core.changes)
            for place, core in enumerate(self.cores)
            if core.name in term.cores
        )
        axes = tuple("".join(self.symbols[leg] for leg in axis) for axis in term.weight)
        return cores, axes, term.scale

    def symbols_of(self, core: BoundCore) -> str:
        return "".join(self.symbols[leg] for leg in core.legs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Network:
        return self

    @cached_property
    def graph(self) -> networkx.Graph[tuple[str, str]]:
        """The bipartite graph of cores and indices.

        Nodes of cores are ("core", name). Stored ones have `shape`, `frozen`, `shared`, `origin` and `terms` (numbers);
        derived ones have the kind "derived", `shape` and `sources`. Nodes of indices are ("index", name), with `size`
        and `open`. An edge joins a core to each of its legs. The graph is bipartite because a plain one merges parallel
        bonds and cannot hold an index that three cores share.
        """
        graph: networkx.Graph[tuple[str, str]] = networkx.Graph(name=self.spec.name)
        open_legs = set(self.open_legs)
        for made in self.derived:
            graph.add_node(("core", made.name), kind="derived", shape=made.shape, sources=made.sources)
            for leg in made.legs:
                graph.add_node(("index", leg), kind="index", size=self.sizes[leg], open=leg in open_legs)
                graph.add_edge(("core", made.name), ("index", leg))
        for core in self.cores:
            terms = tuple(number for number, term in enumerate(self.terms) if core.name in term.cores)
            about = {"shape": core.shape, "frozen": core.frozen, "shared": core.shared, "origin": core.origin}
            graph.add_node(("core", core.name), kind="core", terms=terms, **about)
            for leg in core.legs:
                graph.add_node(("index", leg), kind="index", size=self.sizes[leg], open=leg in open_legs)
                graph.add_edge(("core", core.name), ("index", leg))
        return graph
