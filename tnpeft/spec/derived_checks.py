"""What must hold for derived cores, references and index cores, before any layer is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set

import networkx

from tnpeft.errors import Position, Problems, near_miss
from tnpeft.spec.declaration import Core, Declaration, Term
from tnpeft.spec.derived import Derivation, Reference, Summand, arrow_legs, index_of, legs_before_maps
from tnpeft.spec.inits import Init
from tnpeft.spec.legs import cores_by_name, legs_of, uses_of
from tnpeft.spec.maps import NOT_ZERO, MapCall, passes_zero
from tnpeft.spec.pattern import ELLIPSIS

__all__ = [
    "check_derived",
    "check_zero_through_maps",
    "is_circular",
    "sized_by_hand",
    "stored_in",
    "uses_second_half",
    "zeros_in",
]

MAX_SHOWN = 20  # names of a circle


def check_derived(spec: Declaration, problems: Problems) -> None:
    """Report every mistake in what derived cores, references and inits name."""
    if not uses_second_half(spec):
        return
    _version(spec, problems)
    if is_circular(spec):
        _circles(spec, problems)
        return
    cores, known = cores_by_name(spec), set(uses_of(spec))
    for core in spec.cores:
        if core.derivation is not None:
            _derivation(core, core.derivation, cores, problems)
        _init_legs(core, known, problems)
        _value(core, cores, problems)
    for label, reference in _references(spec):
        _axes_of(label, reference, cores, problems)
        _index_outside(label, reference, cores, problems)


def uses_second_half(spec: Declaration) -> bool:
    """Whether a spec uses anything that version 1 of the language does not have."""
    grouped = any(core.origin != "weight" and core.axes != tuple((leg,) for leg in core.legs) for core in spec.cores)
    renamed = any(reference.axes is not None for term in spec.terms for reference in term.references)
    new_inits = any(core.is_index or _is_new(core.init) for core in spec.cores)
    return grouped or renamed or new_inits or bool(spec.derivations) or spec.start_std is not None


def _is_new(init: Init) -> bool:
    """Whether version 1 of the language lacks this init."""
    skips = str(init.arguments.get("skip", 0)) != "0"
    return skips or init.name in ("svd_u", "svd_s", "svd_v") or not {"same", "core", "entry"}.isdisjoint(init.arguments)


def _version(spec: Declaration, problems: Problems) -> None:
    node = spec.root.get("tnpeft")
    if node is not None and node.value == 1:
        fix = "Write `tnpeft: 2`: versions of tnpeft before 0.2 then say that they are too old for it."
        expected = (
            "the language version 2 for derived cores, references with legs, grouped legs, index cores, inits by "
            "position or value and `start_std`"
        )
        problems.add(node.position, "`tnpeft`", expected, "1", fix)


def _graph(spec: Declaration) -> networkx.DiGraph[str]:
    graph: networkx.DiGraph[str] = networkx.DiGraph()
    for name, derivation in spec.derivations.items():
        graph.add_edges_from((name, source) for source in derivation.sources)
    return graph


def is_circular(spec: Declaration) -> bool:
    """Whether a core is derived from itself, directly or through others."""
    return bool(spec.derivations) and not networkx.is_directed_acyclic_graph(_graph(spec))


def _circles(spec: Declaration, problems: Problems) -> None:
    graph, cores = _graph(spec), cores_by_name(spec)
    for component in networkx.strongly_connected_components(graph):
        ring = [name for name in cores if name in component]
        if len(ring) > 1 or any(graph.has_edge(name, name) for name in ring):
            shown = [*ring[:MAX_SHOWN], *(["..."] if len(ring) > MAX_SHOWN else []), ring[0]]
            names, where = ", ".join(f"'{name}'" for name in shown), cores[ring[0]].position
            fix = "Derive one of them from a stored core."
            problems.add(
                where, f"core '{ring[0]}'", "no circle", f"{names} derived from one another", fix, core=ring[0]
            )


def _derivation(core: Core, derivation: Derivation, cores: Mapping[str, Core], problems: Problems) -> None:
    _legs_met(core, derivation, problems)
    before = legs_before_maps(core.legs, derivation.maps)
    for summand in derivation.summands:
        _summand(core, summand, before, cores, problems)
    for number, call in enumerate(derivation.maps, start=1):
        _index(core, number, call, cores, problems)


def _legs_met(core: Core, derivation: Derivation, problems: Problems) -> None:
    """Every map finds the legs that it takes, and the legs after the last map are the core's."""
    legs = [*legs_before_maps(core.legs, derivation.maps)]
    for number, call in enumerate(derivation.maps, start=1):
        missing = [leg for leg in call.takes if leg not in legs]
        what, where = f"core '{core.name}', map {number}", call.position or core.position
        if missing:
            fix = near_miss(missing[0], legs) or f"Its legs are {' '.join(legs) or 'none'} at that place."
            problems.add(where, what, f"a leg '{missing[0]}' to act on", "none", fix, core=core.name, index=missing[0])
            return
        left = [leg for leg in legs if leg not in call.takes]
        twice = [leg for leg in call.gives if leg in left]
        if twice:
            fix = "Name the leg that it makes otherwise."
            found = f"'{twice[0]}' there already"
            problems.add(where, what, f"a new leg '{twice[0]}'", found, fix, core=core.name, index=twice[0])
            return
        legs = [*left, *call.gives] if call.takes != call.gives else legs
    if lost := [leg for leg in legs if leg not in core.legs]:
        fix = f"Add '{lost[0]}' to its `legs`."
        where = core.position
        problems.add(
            where, f"core '{core.name}'", f"the leg '{lost[0]}', which its maps make", "none", fix, core=core.name
        )


def _summand(
    core: Core, summand: Summand, before: Sequence[str], cores: Mapping[str, Core], problems: Problems
) -> None:
    """In each product no index is in one core alone, and every leg of the result is in some core."""
    uses = Counter(leg for reference in summand.references for leg in legs_of(reference, cores))
    for reference in summand.references:
        for leg in legs_of(reference, cores):
            if uses[leg] == 1 and leg not in before:
                what = f"{summand.label}, index '{leg}' dangles"
                expected, found = f"a second core or a place in the legs of '{core.name}'", f"'{reference.core}' alone"
                fix = f"Name '{leg}' in another core, or in `legs`."
                problems.add(reference.position, what, expected, found, fix, core=core.name, index=leg)
    for leg in before:
        if leg not in uses:
            fix = near_miss(leg, uses) or f"Name a core that has '{leg}', or remove it."
            where = core.places.get(leg, core.position)
            expected = "a core of `of`, or a map, that it comes from"
            problems.add(where, f"{summand.label}, leg '{leg}'", expected, "neither", fix, core=core.name, index=leg)


def _index(core: Core, number: int, call: MapCall, cores: Mapping[str, Core], problems: Problems) -> None:
    name = index_of(call)
    if name is None:
        return
    what, where = f"core '{core.name}', map {number}, `at={name}`", call.position or core.position
    index = cores.get(name)
    if index is None:
        fix = near_miss(name, cores) or "Add it to `cores`."
        problems.add(where, what, "names of `cores`", f"'{name}'", fix, core=core.name)
    elif not index.is_index:
        fix = f"Give '{name}' one of the inits choice, random, largest, smallest and places, and `frozen: true`."
        problems.add(where, what, "an index core", f"'{name}' of init `{index.init}`", fix, core=core.name)


def _init_legs(core: Core, known: Set[str], problems: Problems) -> None:
    """Index cores are frozen, and hold places among legs of the network; `same` names legs of the core."""
    where = core.init.position or core.position
    for leg in getattr(core.init.arguments.get("legs"), "legs", ()):
        if leg not in known:
            fix = near_miss(leg, known) or "Name indices that a core has."
            what = f"index core '{core.name}', `{core.init.name}`"
            problems.add(where, what, "legs of the network", f"'{leg}'", fix, core=core.name)
    if core.is_index and not core.frozen:
        fix = "Add `frozen: true`: whole numbers have no gradient."
        problems.add(where, f"index core '{core.name}'", "a frozen core", "one that trains", fix, core=core.name)
    same = core.init.arguments.get("same")
    for leg in getattr(same, "legs", ()):
        if leg not in core.legs:
            fix = near_miss(leg, core.legs) or f"Its legs are {' '.join(core.legs)}."
            problems.add(where, f"core '{core.name}', `same`", "legs of this core", f"'{leg}'", fix, core=core.name)


def _value(core: Core, cores: Mapping[str, Core], problems: Problems) -> None:
    """`value(NAME)` names a derived core with the legs of this core, which belongs to one layer alone."""
    name = core.init.arguments.get("core")
    if core.init.name != "value" or not isinstance(name, str):
        return
    what, where, derived = f"core '{core.name}', `value({name})`", core.init.position or core.position, cores.get(name)
    if derived is None or derived.derivation is None:
        known = [each.name for each in cores.values() if each.derivation is not None]
        found = "a stored one" if derived is not None else f"'{name}'"
        fix = near_miss(name, known) or "Name a core with `of`."
        problems.add(where, what, "a derived core", found, fix, core=core.name)
    elif derived.legs != core.legs:
        found = " ".join(derived.legs)
        problems.add(where, what, f"the legs {' '.join(core.legs)}", found, "Give both the same legs.", core=core.name)
    elif core.shared is not None:
        fix = "Remove `shared`: each layer has a value of its own."
        problems.add(where, what, "a core of one layer", f"`shared: {core.shared}`", fix, core=core.name)


def _references(spec: Declaration) -> Iterator[tuple[str, Reference]]:
    """Every reference, with a name for the place where it is."""
    for term in spec.terms:
        label = term.label.removesuffix(", `weight`")
        yield from ((label, reference) for reference in term.references)
    for derivation in spec.derivations.values():
        for summand in derivation.summands:
            yield from ((summand.label, reference) for reference in summand.references)


def _axes_of(label: str, reference: Reference, cores: Mapping[str, Core], problems: Problems) -> None:
    """A reference names the core's axes one by one."""
    core = cores.get(reference.core)
    if core is None or reference.axes is None:
        return
    axes = core.axes if core.derivation is None else tuple((leg,) for leg in core.legs)
    spread = (ELLIPSIS,) in axes, (ELLIPSIS,) in reference.axes
    # `k...` is as many axes as the layer has: only one of the two may leave them out where they are split by name.
    if len(axes) != len(reference.axes) and spread[0] == spread[1]:
        shown = " ".join(axis[0] if len(axis) == 1 else f"({' '.join(axis)})" for axis in axes)
        expected = f"'{core.name}' has {len(axes)} {'axis' if len(axes) == 1 else 'axes'} ({shown})"
        fix = "Name each of them; parentheses split one."
        found = str(len(reference.axes))
        problems.add(reference.position, f"{label}, `{reference.label}`", expected, found, fix, core=core.name)


def _index_outside(label: str, reference: Reference, cores: Mapping[str, Core], problems: Problems) -> None:
    core = cores.get(reference.core)
    if core is not None and core.is_index:
        fix = f"Name it in a map, `scatter(n -> o i, at={core.name})` say."
        found = f"'{core.name}', an index core"
        problems.add(reference.position, label, "cores of numbers: an index core stands in `at=`", found, fix)


def stored_in(spec: Declaration, term: Term) -> list[Core]:
    """The stored cores in a term, directly or through its derived cores."""
    cores, found, pending = cores_by_name(spec), dict[str, None](), list(term.cores)
    while pending:
        name = pending.pop()
        if name in found:
            continue
        found[name] = None
        if derivation := cores[name].derivation:
            pending += derivation.sources
    return [core for core in spec.cores if core.name in found and core.derivation is None]


def zeros_in(spec: Declaration, term: Term) -> list[Core]:
    """The stored cores of zeros that make a term zero, without those whose zeros a map turns into other numbers."""
    cores = cores_by_name(spec)
    zeros = [core for core in stored_in(spec, term) if core.init.name == "zeros"]
    return [core for core in zeros if any(_vanishes(each, core.name, cores) for each in term.cores)] or zeros[:1]


def _vanishes(name: str, zeros: str, cores: Mapping[str, Core]) -> bool:
    """Whether a core is zero while the core `zeros` is, as far as can be told."""
    derivation = cores[name].derivation
    if derivation is None:
        return name == zeros
    if any(call.name in NOT_ZERO for call in derivation.maps):
        return False
    return all(any(_vanishes(each.core, zeros, cores) for each in one.references) for one in derivation.summands)


def check_zero_through_maps(
    spec: Declaration, where: Position, what: str, term: Term, zeros: Core, problems: Problems
) -> None:
    """The zeros reach the term: directly, or through derived cores that are zero there with a slope other than zero."""
    cores = cores_by_name(spec)
    if zeros.name in term.cores:
        return
    for reference in term.references:
        stopped = _stopped(reference.core, zeros.name, cores)
        if stopped is None:
            return
    stops = [stop for each in term.references if (stop := _stopped(each.core, zeros.name, cores)) is not None]
    name, call = next((stop for stop in stops if stop[1] is not None), stops[0])
    if call is not None:
        found = f"`{call.name}` in '{name}', which is not zero with a slope where its input is zero"
        fix = "Put them after it, or write `start: frozen_copy`."
        problems.add(where, what, f"the zeros of '{zeros.name}' to pass", found, fix, core=zeros.name)
    else:
        fix = "Put the zeros in every one of them, or write `start: frozen_copy`."
        expected = f"the zeros of '{zeros.name}' in every product of '{name}'"
        problems.add(where, what, expected, "a product without", fix, core=zeros.name)


def _stopped(name: str, zeros: str, cores: Mapping[str, Core]) -> tuple[str, MapCall | None] | None:
    """The derived core and the map that stop the zeros; None if the core is zero, with a slope, while `zeros` is."""
    derivation = cores[name].derivation
    if derivation is None:
        return None if name == zeros else (name, None)
    for summand in derivation.summands:
        reasons = [_stopped(reference.core, zeros, cores) for reference in summand.references]
        if None not in reasons:
            return next((reason for reason in reasons if reason and reason[1]), (name, None))
    call = next((call for call in derivation.maps if not passes_zero(call)), None)
    return None if call is None else (name, call)


def sized_by_hand(spec: Declaration) -> set[str]:
    """The legs that maps take or make: `bond` does not size them."""
    return {leg for each in spec.derivations.values() for call in each.maps for leg in arrow_legs(call)}
