"""The space of networks that a search draws from: choices by name, and the network that they make."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tnpeft.network import Spec
from tnpeft.spec.pattern import KINDS

__all__ = ["Choices", "Space", "Topology"]

Choices = dict[str, int]  # each choice by its name

FACTORS = 3  # legs of a channel side, at most
EXTRAS = 3  # bonds beyond one for each core, at most
HYPEREDGES = 2
NONE = -1


@dataclass(frozen=True)
class Topology:
    """A network without sizes: the open legs of each core, and the bonds, each with its cores and its width.

    `sides` says into how many legs the output and the input side are split. A bond of width 2 has twice its rank.
    """

    sides: tuple[int, int]
    legs: tuple[tuple[str, ...], ...]
    bonds: tuple[tuple[tuple[int, ...], int], ...]

    @property
    def key(self) -> str:
        """A text that identifies it. It depends on the order of cores; `Spec.canonical` does not, but is slower."""
        return repr((self.sides, self.legs, self.bonds))

    def spec(self, kinds: Sequence[str], ranks: Mapping[str, int] | None = None, name: str = "found") -> Spec:
        """The spec on some kinds of layers: bond number n has the param `r<n>`, 1 unless `ranks` has it."""
        axes = KINDS[kinds[0]]
        kernel = [f"k{axis}" for axis in range(axes)]
        outs, ins = (
            [f"{letter}{number}" for number in range(count)] for letter, count in zip("oi", self.sides, strict=True)
        )
        sizes = {
            " ".join(legs): channels if len(legs) == 1 else f"factorize({channels}, {len(legs)})"
            for legs, channels in ((outs, "out_channels"), (ins, "in_channels"))
        }
        if kernel:
            sizes[" ".join(kernel)] = "kernel_size" if axes > 1 else "kernel_size[0]"
        for number, (_, width) in enumerate(self.bonds):
            sizes[f"b{number}"] = f"r{number}" if width == 1 else f"{width} * r{number}"
        params = {f"r{number}": (ranks or {}).get(f"r{number}", 1) for number in range(len(self.bonds))}
        zero = next(number for number, legs in enumerate(self.legs) if outs[-1] in legs)
        cores = {f"c{number}": self._core(number, number == zero) for number in range(len(self.legs))}
        weight = " ".join([_group(outs), _group(ins), *kernel])
        layers = "any" if set(kinds) == set(KINDS) else list(kinds)
        parts: dict[str, Any] = {"name": name, "title": f"A found network of {len(cores)} cores", "layers": layers}
        return Spec.build(**parts, params=params, sizes=sizes, cores=cores, weight=weight, start="zero")

    def _core(self, number: int, zero: bool) -> dict[str, str]:
        """A core as `Spec.build` takes it; the legs that it is contracted over are the fan of its init."""
        bonds = [f"b{place}" for place, (members, _) in enumerate(self.bonds) if number in members]
        fan = [*bonds, *(leg for leg in self.legs[number] if leg.startswith("i"))] or list(self.legs[number])
        init = "zeros" if zero else f"kaiming_uniform(fan=[{', '.join(fan)}])"
        return {"legs": " ".join([*self.legs[number], *bonds]), "init": init}


def _group(legs: Sequence[str]) -> str:
    return legs[0] if len(legs) == 1 else f"({' '.join(legs)})"


@dataclass(frozen=True)
class Space:
    """Networks of 2 to `cores` cores on layers with `axes` kernel axes.

    The channel sides have one to three legs each. These and the kernel's legs may be on any core. Each core but the
    first may have a bond to an earlier one; up to three more bonds join any pairs, and up to two hyperedges any cores.
    All choices are made for every network, also those without effect, because samplers that cross networks need a fixed
    space.
    """

    axes: int
    cores: int = 8

    @property
    def options(self) -> dict[str, tuple[int, ...]]:
        """The choices, by name, each with its options."""
        pairs = tuple(range(len(self._pairs)))
        options: dict[str, tuple[int, ...]] = {"cores": tuple(range(2, self.cores + 1))}
        options |= {side: tuple(range(1, FACTORS + 1)) for side in ("out_legs", "in_legs")}
        options |= {f"at_{leg}": tuple(range(self.cores)) for leg in self._legs(FACTORS, FACTORS)}
        for core in range(1, self.cores):
            options |= {f"bond_{core}": tuple(range(NONE, core)), f"width_{core}": (1, 2)}
        options["extras"] = tuple(range(EXTRAS + 1))
        options |= {f"extra_{number}": pairs for number in range(EXTRAS)}
        options["hyperedges"] = tuple(range(HYPEREDGES + 1))
        for number in range(HYPEREDGES):
            options |= {f"hyper_{number}_{core}": (0, 1) for core in range(self.cores)}
        return options

    def drawn(self, choose: Callable[[str, tuple[int, ...]], int]) -> Choices:
        """Every choice, made by `choose(name, options)`."""
        return {name: choose(name, options) for name, options in self.options.items()}

    def topology(self, choices: Mapping[str, int]) -> Topology:
        """The network that choices make: cores without effect are dropped, and at least one bond joins two cores."""
        count = choices["cores"]
        sides = choices["out_legs"], choices["in_legs"]
        legs: list[list[str]] = [[] for _ in range(count)]
        for leg in self._legs(*sides):
            legs[choices[f"at_{leg}"] % count].append(leg)
        return _tidy(sides, legs, self._bonds(choices, count))

    def choices(self, topology: Topology) -> Choices:
        """Choices that make a given network; choices without effect take their first option."""
        made = {name: options[0] for name, options in self.options.items()}
        made |= {"cores": len(topology.legs), "out_legs": topology.sides[0], "in_legs": topology.sides[1]}
        made |= {f"at_{leg}": core for core, legs in enumerate(topology.legs) for leg in legs}
        extras, hyper = [], 0
        for members, width in topology.bonds:
            if len(members) > 2:
                made |= {f"hyper_{hyper}_{core}": int(core in members) for core in range(self.cores)}
                hyper += 1
            elif made[f"bond_{members[1]}"] == NONE:
                made |= {f"bond_{members[1]}": members[0], f"width_{members[1]}": width}
            else:
                extras.append(self._pairs.index((members[0], members[1])))
        made |= {f"extra_{number}": pair for number, pair in enumerate(extras)}
        return made | {"extras": len(extras), "hyperedges": hyper}

    @property
    def _pairs(self) -> list[tuple[int, int]]:
        return list(itertools.combinations(range(self.cores), 2))

    def _legs(self, outs: int, ins: int) -> list[str]:
        ends = [f"{letter}{number}" for letter, count in (("o", outs), ("i", ins)) for number in range(count)]
        return [*ends, *(f"k{axis}" for axis in range(self.axes))]

    def _bonds(self, choices: Mapping[str, int], count: int) -> dict[tuple[int, ...], int]:
        """The width of each bond, by its cores; bonds of the same cores are one."""
        bonds: dict[tuple[int, ...], int] = {}
        for core in range(1, count):
            if (other := choices[f"bond_{core}"]) != NONE:
                bonds[other, core] = choices[f"width_{core}"]
        for number in range(choices["extras"]):
            first, second = sorted(core % count for core in self._pairs[choices[f"extra_{number}"]])
            if first != second:
                bonds.setdefault((first, second), 1)
        for number in range(choices["hyperedges"]):
            members = tuple(core for core in range(count) if choices[f"hyper_{number}_{core}"])
            if len(members) > 1:
                bonds.setdefault(members, 1)
        return bonds


def _tidy(sides: tuple[int, int], legs: Sequence[Sequence[str]], bonds: Mapping[tuple[int, ...], int]) -> Topology:
    """The network without cores of no effect (no open leg, at most one bond), renumbered; two cores share a bond."""
    kept, members = set(range(len(legs))), {frozenset(cores): width for cores, width in bonds.items()}
    while loose := [core for core in kept if not legs[core] and sum(core in bond for bond in members) < 2]:
        kept -= set(loose)
        members = _within(members, kept)
    if len(kept) < 2:
        # All legs on one core: the output's go to a core of their own.
        own = [[leg for leg in legs[next(iter(kept))] if leg.startswith("o")]]
        own.append([leg for leg in legs[next(iter(kept))] if not leg.startswith("o")])
        return Topology(sides, (tuple(own[0]), tuple(own[1])), (((0, 1), 1),))
    order = sorted(kept)
    places = {core: place for place, core in enumerate(order)}
    found = sorted((tuple(sorted(places[core] for core in bond)), width) for bond, width in members.items())
    return Topology(sides, tuple(tuple(legs[core]) for core in order), tuple(found) or (((0, 1), 1),))


def _within(bonds: Mapping[frozenset[int], int], kept: Iterable[int]) -> dict[frozenset[int], int]:
    """The bonds among some cores; one that joins fewer than two of them is dropped."""
    cut: dict[frozenset[int], int] = {}
    for bond, width in bonds.items():
        left = bond & frozenset(kept)
        if len(left) > 1:
            cut[left] = max(width, cut.get(left, 1))
    return cut
