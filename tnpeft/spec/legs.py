"""The legs that the cores of a spec have where they are named: references rename them, maps remove and make some."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from tnpeft.spec.declaration import Core, Declaration, Term
from tnpeft.spec.derived import Reference

__all__ = ["cores_by_name", "inner_legs", "legs_of", "uses_of"]


def cores_by_name(source: Declaration) -> dict[str, Core]:
    """Every core that a spec declares."""
    return {core.name: core for core in source.cores}


def legs_of(reference: Reference, cores: Mapping[str, Core]) -> tuple[str, ...]:
    """The legs under which a reference names its core."""
    if reference.axes is None:
        return cores[reference.core].legs if reference.core in cores else ()
    return tuple(leg for axis in reference.axes for leg in axis)


def inner_legs(source: Declaration) -> Iterator[tuple[Core | Term, tuple[str, ...]]]:
    """The legs that are not those of cores, each with its owner: those of references, and those that maps take."""
    cores = cores_by_name(source)
    for term in source.terms:
        for reference in term.references:
            if reference.axes is not None:
                yield cores.get(reference.core, term), legs_of(reference, cores)
    for name, derivation in source.derivations.items():
        for summand in derivation.summands:
            for reference in summand.references:
                yield cores[name], legs_of(reference, cores)
        for call in derivation.maps:
            yield cores[name], (*call.takes, *call.gives)


def uses_of(source: Declaration) -> Counter[str]:
    """How often each leg occurs in a core, or in a reference that gives a core other legs."""
    uses = Counter(leg for core in source.cores for leg in core.legs)
    for _, legs in inner_legs(source):
        uses.update(legs)
    return uses
