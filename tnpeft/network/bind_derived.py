"""References, derived cores and factors of a spec, bound to a layer: every leg with its size."""

from __future__ import annotations

from collections.abc import Iterator
from graphlib import TopologicalSorter

from tnpeft.network.derived import BoundMap, BoundReference, BoundSummand, DerivedCore, Factor
from tnpeft.network.layer import Layer
from tnpeft.spec.declaration import Core, Declaration
from tnpeft.spec.derived import Derivation, Reference, index_of, legs_before_maps
from tnpeft.spec.legs import cores_by_name, legs_of
from tnpeft.spec.maps import MapCall, map_kind
from tnpeft.spec.pattern import KINDS, expand
from tnpeft.spec.resolve import Resolved

__all__ = ["derived_cores", "factors_of", "stored_cores"]


def stored_cores(spec: Declaration) -> tuple[Core, ...]:
    """The cores of a spec that are not derived, including those that are the base weight."""
    return tuple(core for core in spec.cores if core.derivation is None)


def derived_cores(spec: Declaration, resolved: Resolved, layer: Layer) -> tuple[DerivedCore, ...]:
    """The derived cores, each after those that it is made of."""
    derivations = spec.derivations
    order = TopologicalSorter({name: set(each.sources) & set(derivations) for name, each in derivations.items()})
    return tuple(_derived(name, derivations[name], spec, resolved, KINDS[layer.kind]) for name in order.static_order())


def _derived(name: str, derivation: Derivation, spec: Declaration, resolved: Resolved, spatial: int) -> DerivedCore:
    legs = resolved.legs[name]
    before = legs_before_maps(cores_by_name(spec)[name].legs, derivation.maps)
    summands = tuple(
        BoundSummand(tuple(_reference(each, spec, resolved, spatial) for each in summand.references), scale)
        for summand, scale in zip(derivation.summands, resolved.sums[name], strict=True)
    )
    maps = tuple(
        _map(call, arguments, resolved, spatial)
        for call, arguments in zip(derivation.maps, resolved.maps[name], strict=True)
    )
    shape = tuple(resolved.sizes[leg] for leg in legs)
    return DerivedCore(name, legs, shape, expand(before, spatial), summands, maps)


def _reference(reference: Reference, spec: Declaration, resolved: Resolved, spatial: int) -> BoundReference:
    legs = expand(legs_of(reference, cores_by_name(spec)), spatial)
    return BoundReference(reference.core, legs, tuple(resolved.sizes[leg] for leg in legs))


def _map(call: MapCall, arguments: dict[str, float], resolved: Resolved, spatial: int) -> BoundMap:
    takes, gives = expand(call.takes, spatial), expand(call.gives, spatial)
    words = {key: value for key, value in call.arguments.items() if isinstance(value, str) and key != "at"}
    shape = tuple(resolved.sizes[leg] for leg in gives)
    known: dict[str, float | str] = {**arguments, **words}
    kind = map_kind(call.name)  # None for one that is registered no more: `map_function` says so
    linear = kind is not None and kind.linear
    return BoundMap(call.name, takes, gives, shape, tuple(sorted(known.items())), index_of(call), linear)


def factors_of(spec: Declaration, resolved: Resolved, layer: Layer) -> tuple[Factor, ...]:
    """The references in terms, each text once; none if all of them are stored cores with their own legs."""
    cores, spatial = cores_by_name(spec), KINDS[layer.kind]
    named = {reference.label: reference for term in spec.terms for reference in term.references}
    idle = {core.name for core in stored_cores(spec)} - {reference.core for reference in named.values()}
    if not idle and not any(_is_rewritten(reference, cores[reference.core]) for reference in named.values()):
        return ()
    return tuple(Factor(label, _reference(each, spec, resolved, spatial)) for label, each in _in_order(named, spec))


def _is_rewritten(reference: Reference, core: Core) -> bool:
    grouped = core.origin != "weight" and core.axes != tuple((leg,) for leg in core.legs)
    return reference.axes is not None or core.derivation is not None or grouped


def _in_order(named: dict[str, Reference], spec: Declaration) -> Iterator[tuple[str, Reference]]:
    """References in the order of the file's cores."""
    for core in spec.cores:
        for label, reference in named.items():
            if reference.core == core.name:
                yield label, reference
