"""Dropout of an adapter in training, and the cores into which random masks are multiplied.

There are three kinds, each with its probability: entries of the update's input, entries of every bond (both scaled by 1
/ (1 - p)), and the whole update of a layer in one call.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

from tnpeft.errors import Problem
from tnpeft.network.model import Network

__all__ = ["Dropout", "Mask", "dropout_problems", "masks_of"]


@dataclass(frozen=True)
class Dropout:
    """Probabilities of dropout in training, each below 1.

    `input`: an entry of the update's input. `bond`: an entry of a bond. `module`: the update of a layer, in one call.
    """

    input: float = 0.0
    bond: float = 0.0
    module: float = 0.0

    @classmethod
    def of(cls, given: Mapping[str, float] | None) -> Dropout | None:
        """The dropout of these probabilities, by name; None if all are zero."""
        dropout = cls(**given) if given else None
        return dropout if dropout is not None and dropout.as_dict() else None

    def as_dict(self) -> dict[str, float]:
        """The probabilities that are not zero, by name."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name))}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in self.as_dict().items())


class Mask(NamedTuple):
    """Random factors of one bond, or one for the whole update: drawn once per call, multiplied into cores.

    A factor is 0 with the `probability`, else the `scale`. Each affected term has one of the cores.
    """

    size: int
    probability: float
    scale: float
    places: tuple[tuple[int, tuple[int, ...]], ...]  # a core, by its number in the network, and the mask's shape there


def masks_of(network: Network, dropout: Dropout | None) -> tuple[Mask, ...]:
    """The masks of the bonds, with dropout of bonds; then that of the module, with dropout of modules.

    With a trained magnitude the module has no mask: the magnitude gives an update even if the cores give none.
    """
    masks: list[Mask] = []
    if dropout is not None and dropout.bond:
        for leg, cores in _carriers(network).items():
            places = tuple((core, _shape(network, core, leg)) for core in cores or ())
            masks.append(Mask(network.sizes[leg], dropout.bond, 1 / (1 - dropout.bond), places))
    if dropout is not None and dropout.module:
        carriers = _hit_by([set(term.cores) for term in network.terms], network) if network.compose is None else ()
        masks.append(Mask(1, dropout.module, 1.0, tuple((core, _shape(network, core)) for core in carriers or ())))
    return tuple(masks)


def _shape(network: Network, core: int, leg: str | None = None) -> tuple[int, ...]:
    """The shape of a mask for one leg, with which a core is multiplied."""
    return tuple(network.sizes[each] if each == leg else 1 for each in network.cores[core].legs)


def dropout_problems(network: Network, dropout: Dropout) -> Iterator[Problem]:
    """Why a network cannot have this dropout."""
    if not dropout.bond:
        return
    what, name = "`dropout`, `bond`", network.spec.name
    carriers = _carriers(network)
    if not carriers:
        fix = "Drop its `input` or `module`, or take another spec or a larger rank."
        yield Problem(what, f"a bond of two entries or more in '{name}'", "none", fix)
    for leg, cores in carriers.items():
        if cores is None:
            found = "terms that have its cores in common in such a way that none has it once in each"
            yield Problem(what, f"a bond '{leg}' of '{name}' that can be dropped", found, "Drop `input` or `module`.")


def _carriers(network: Network) -> dict[str, tuple[int, ...] | None]:
    """Every bond of two entries or more, with the cores that carry its mask; None where no cores can.

    A bond joins cores of a term, and is no leg of the weight.
    """
    found: dict[str, tuple[int, ...] | None] = {}
    legs = {core.name: set(core.legs) for core in network.cores}
    for leg in dict.fromkeys(leg for core in network.cores for leg in core.legs):
        wanted, others = [], set[str]()
        for term in network.terms:
            holders = {core for core in term.cores if leg in legs[core]}
            is_bond = len(holders) > 1 and all(leg not in axis for axis in term.weight)
            if is_bond:
                wanted.append(holders)
            else:
                others |= holders
        if wanted and network.sizes[leg] > 1:
            found[leg] = _hit_by([holders - others for holders in wanted], network, exactly=True)
    return found


def _hit_by(groups: list[set[str]], network: Network, exactly: bool = False) -> tuple[int, ...] | None:
    """The fewest cores, the smallest first, of which every group has one (`exactly`: no more); None if there are none.

    A core that is the base weight is none of them.
    """
    names = set().union(*groups)
    cores = [number for number, core in enumerate(network.cores) if core.name in names and core.origin != "weight"]
    cores.sort(key=lambda number: network.cores[number].numel)
    for count in range(1, len(groups) + 1):
        for chosen in itertools.combinations(cores, count):
            hits = [sum(network.cores[core].name in group for core in chosen) for group in groups]
            if all(hit == 1 if exactly else hit for hit in hits):
                return chosen
    return None
