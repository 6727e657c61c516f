"""What must hold between the parts of a spec, before any layer is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Set
from dataclasses import replace

import networkx

from tnpeft.documents.nodes import Node
from tnpeft.errors import Position, Problems, closest, near_miss
from tnpeft.spec.declaration import Core, Declaration, Term
from tnpeft.spec.derived_checks import (
    check_derived,
    check_zero_through_maps,
    is_circular,
    sized_by_hand,
    stored_in,
    zeros_in,
)
from tnpeft.spec.expression import Expression, spelling
from tnpeft.spec.inits import SINGULAR_INITS, Last, Legs
from tnpeft.spec.legs import cores_by_name, inner_legs, legs_of
from tnpeft.spec.pattern import ELLIPSIS, KINDS, LAYER_NAMES, expand_axes
from tnpeft.spec.resolve import Fault, layer_names, resolve
from tnpeft.spec.start_std import check_start_std

__all__ = ["SAMPLES", "check"]

MAX_SHOWN = 20  # names of a circle


def check(spec: Declaration, incomplete: Set[str], problems: Problems, saved: bool = False) -> None:
    """Report every mistake between parts; a check that needs a whole part is left out while something of it is missing.

    In a `saved` spec, which worked when it was written, params without effect are no mistake.
    """
    sized = not incomplete & {"params", "sizes"}
    if sized:
        _names(spec, problems)
    _cycles(spec, problems)
    _ellipsis(spec, problems)
    _inits(spec, problems)
    if "cores" not in incomplete:
        check_derived(spec, problems)
    if "cores" not in incomplete and not is_circular(spec):
        if spec.start == "zero" and "inits" not in incomplete:
            _start(spec, problems)
        if spec.start_std is not None:
            check_start_std(spec, problems)
        _trained(spec, problems)
        _members(spec, problems)
        for term in spec.terms:
            _occurrences(term, cores_by_name(spec), problems)
        _singular(spec, problems)
        if sized:
            _sized(spec, problems)
            _unused(spec, problems)
        _axes(spec, problems)
    if not incomplete:
        _kinds(spec, problems)
    if not len(problems) and not saved:  # another mistake may be why nothing reads a param
        _unused_params(spec, problems)


def _expressions(spec: Declaration) -> Iterator[tuple[str, Expression, Node | Position | None]]:
    """Every expression but those of params and inits: whose it is, and where it stands."""
    for rule in spec.sizes:
        yield f"`sizes`, {' '.join(rule.names)}", rule.expression, rule.node
    if spec.bond is not None:
        yield "`bond`", spec.bond, spec.root.get("bond")
    if spec.start_std is not None:
        yield "`start_std`", spec.start_std, spec.root.get("start_std")
    yield "`scale`", spec.scale, spec.root.get("scale")
    for term in spec.terms:
        yield f"{term.label.removesuffix(', `weight`')}, `scale`", term.scale, term.scale_position
    for name, derivation in spec.derivations.items():
        yield f"core '{name}', `scale`", derivation.scale, derivation.scale_position
        for summand in derivation.summands:
            yield f"{summand.label}, `scale`", summand.scale, summand.scale_position
        for number, call in enumerate(derivation.maps, start=1):
            yield from (
                (f"core '{name}', map {number}, `{key}`", each, call.position) for key, each in call.expressions()
            )


def _names(spec: Declaration, problems: Problems) -> None:
    """A name is a param, else a layer name, else an index in `sizes`."""
    known = {*spec.sized, *LAYER_NAMES} - {ELLIPSIS}
    for what, expression, node in _expressions(spec):
        for name in expression.names:
            if name not in known:
                where = node.position if isinstance(node, Node) else node
                if isinstance(node, Node) and node.kind == "scalar":
                    where = node.at(max(0, node.text.find(name)))
                fix = near_miss(name, known) or spelling(name) or "Add it to `params`, or give it a line in `sizes`."
                problems.add(where, what, "params, layer names and indices in `sizes`", f"'{name}'", fix, index=name)
    for core in spec.cores:
        where = core.init.position or core.position
        for key, argument in core.init.expressions():
            for name in argument.names:
                if name not in known:
                    fix = near_miss(name, known) or spelling(name) or "Add it to `params`."
                    expected = "params, layer names and indices in `sizes`"
                    problems.add(where, f"`{key}` of init", expected, f"'{name}'", fix)
        for name in core.init.entry.names if core.init.entry else ():
            if name not in known and name not in core.legs:
                fix = near_miss(name, {*known, *core.legs}) or spelling(name) or "Add it to `params`."
                expected = "the core's legs, params, layer names and indices in `sizes`"
                problems.add(where, f"core '{core.name}', `{core.init.name}`", expected, f"'{name}'", fix)
    for rule in spec.sizes:
        for name in rule.names:
            if name in spec.params and rule.expression.text != name:
                fix = (
                    f"Remove it from `sizes`, or name the index otherwise; a param's index is written `{name}: {name}`."
                )
                found = f"`{rule.expression.text}`"
                problems.add(rule.places[name], f"`sizes`, '{name}'", "the param's value", found, fix, index=name)


def _cycles(spec: Declaration, problems: Problems) -> None:
    graph: networkx.DiGraph[int] = networkx.DiGraph()  # of lines, for one line may have thousands of names
    line_of = {name: number for number, rule in enumerate(spec.sizes) for name in rule.names}
    for number, rule in enumerate(spec.sizes):
        if rule.names[0] not in spec.params:
            graph.add_edges_from((number, line_of[read]) for read in rule.expression.names if read in line_of)
    for component in networkx.strongly_connected_components(graph):
        lines = [spec.sizes[number] for number in sorted(component)]
        if len(lines) > 1 or any(graph.has_edge(number, number) for number in component):
            read = {name for rule in lines for name in rule.expression.names}
            ring = [next(name for name in rule.names if name in read) for rule in lines]
            shown = [*ring[:MAX_SHOWN], *(["..."] if len(ring) > MAX_SHOWN else []), ring[0]]
            fix = "Give one of them a size of its own."
            where = lines[0].places[ring[0]]
            problems.add(where, "circular `sizes`", "no circle", " -> ".join(shown), fix, index=ring[0])


def _ellipsis(spec: Declaration, problems: Problems) -> None:
    """An index `k` beside `k...` could not be told apart from it."""
    legs = {leg: where for core in spec.cores for leg, where in core.places.items()}
    for term in spec.terms:
        legs |= term.places
    if ELLIPSIS in legs and "k" in legs:
        problems.add(legs["k"], "index 'k'", f"no `k` beside `{ELLIPSIS}`", "both", "Choose another name.", index="k")


def _inits(spec: Declaration, problems: Problems) -> None:
    for core in spec.cores:
        if core.shared is not None and core.init.name in SINGULAR_INITS:
            fix = "Remove `shared`: each layer has its own weight."
            found = f"`{core.init.name}`, which reads one layer's weight"
            problems.add(core.position, f"shared core '{core.name}'", "another init", found, fix, core=core.name)
        fan = core.init.arguments.get("fan")
        where = core.init.position or core.position
        if isinstance(fan, Legs):
            for leg in fan.legs:
                if leg not in core.legs:
                    fix = near_miss(leg, core.legs) or f"Its legs are {' '.join(core.legs)}."
                    problems.add(
                        where, f"core '{core.name}', `fan`", "legs of this core", f"'{leg}'", fix, core=core.name
                    )
        if isinstance(fan, Last) and fan.count > len(core.legs) and ELLIPSIS not in core.legs:
            found = f"last({fan.count}) of {len(core.legs)}"
            problems.add(where, f"core '{core.name}', `fan`", "legs it has", found, "Lower the count.", core=core.name)


def _start(spec: Declaration, problems: Problems) -> None:
    """`start: zero` holds by construction: each term has exactly one trainable core of zeros."""
    where = spec.place("start")
    for number, term in enumerate(spec.terms):
        what = "`start: zero`" if len(spec.terms) == 1 else f"`start: zero`, term {number + 1}"
        _zero_term(spec, where, what, term, problems)


def _zero_term(spec: Declaration, where: Position, what: str, term: Term, problems: Problems) -> None:
    zeros = zeros_in(spec, term)
    expected = "exactly one trainable core with `init: zeros`"
    if not zeros:
        fix = "Give one core `init: zeros`, or write `start: frozen_copy`."
        problems.add(where, what, expected, "none", fix)
    elif len(zeros) > 1:
        names = ", ".join(f"'{core.name}'" for core in zeros)
        fix = "Two never receive a gradient: give all but one another init."
        problems.add(where, what, expected, f"{len(zeros)}, {names}", fix)
    elif zeros[0].frozen:
        found = f"'{zeros[0].name}' frozen"
        problems.add(where, what, expected, found, "Train that core: the update would be zero for ever.")
    else:
        check_zero_through_maps(spec, where, what, term, zeros[0], problems)


def _trained(spec: Declaration, problems: Problems) -> None:
    if spec.cores and all(core.frozen for core in spec.cores if core.derivation is None):
        fix = "Remove one `frozen: true`: nothing would train."
        problems.add(spec.place("cores"), "`cores`", "at least one that is trained", "all of them frozen", fix)
    else:
        for number, term in enumerate(spec.terms):
            if all(core.frozen for core in stored_in(spec, term)):
                fix = "Remove it: it would never change."
                what = f"`terms`, entry {number + 1}"
                problems.add(term.position, what, "at least one core that is trained", "all of them frozen", fix)


def _members(spec: Declaration, problems: Problems) -> None:
    """Every core is in a term, or another core is made of it; no core has the name of a trained magnitude."""
    named = {name for term in spec.terms for name in term.cores}
    for core in spec.cores:
        named.update(core.derivation.sources if core.derivation else ())
        named |= {value} if isinstance(value := core.init.arguments.get("core"), str) else set()
    for core in spec.cores:
        if spec.terms and core.name not in named:
            fix = "Name it in the `cores` of a term, or remove it."
            problems.add(core.position, f"core '{core.name}'", "a term that has it", "none", fix, core=core.name)
        if spec.compose == "dora" and core.name == "magnitude":
            fix = "Choose another name."
            found = "`magnitude`, which `compose: dora` trains beside the cores"
            problems.add(core.position, "core 'magnitude'", "a name of its own", found, fix, core=core.name)


def _occurrences(term: Term, cores: Mapping[str, Core], problems: Problems) -> None:
    """In each term, an index of one core alone dangles, and the weight has no index that no core has."""
    uses = Counter(leg for reference in term.references for leg in legs_of(reference, cores))
    used = set(uses)
    for reference in term.references:
        core = cores[reference.core]
        for leg, where in (core.places if reference.axes is None else reference.places).items():
            if uses[leg] > 1 or leg in term.places:
                continue
            others = {name for name in used | set(term.places) if name != leg and len(name) > 1}
            fix = f"Add '{leg}' to another core, or to `weight`. {near_miss(leg, others)}".strip()
            what, expected = f"core '{core.name}', index '{leg}' dangles", "a second core or a place in `weight`"
            if term.label != "`weight`":
                what = f"{term.label.removesuffix(', `weight`')}, {what}"
            found = f"core '{core.name}' alone"
            problems.add(where, what, expected, found, fix, core=core.name, index=leg)
    for leg, where in term.places.items():
        if leg not in used:
            fix = near_miss(leg, used) or f"Add '{leg}' to a core, or remove it from `weight`."
            problems.add(where, f"{term.label}, index '{leg}'", "a core that has it", "none", fix, index=leg)


# What each takes of the weight unfolded as out x rest, beside a bond: the legs of which of the weight's axes.
_SINGULAR = {"svd_u": slice(0, 1), "svd_us": slice(0, 1), "svd_s": slice(0, 0)}
_SINGULAR |= {"svd_v": slice(1, None), "svd_vs": slice(1, None)}


def _singular(spec: Declaration, problems: Problems) -> None:
    """Singular vectors have the legs of one side of the weight and a bond, singular values only a bond."""
    for core in spec.cores:
        kind = core.origin or core.init.name
        term = next((term for term in spec.terms if core.name in term.cores), None)
        if kind not in _SINGULAR or term is None or core.shared is not None:
            continue
        legs = [leg for axis in term.weight[_SINGULAR[kind]] for leg in axis]
        bonds = [leg for leg in core.legs if leg not in term.places]
        if len(bonds) == 1 and set(core.legs) == {*legs, *bonds}:
            continue
        expected = f"the legs {', '.join(map(repr, legs))} and one bond" if legs else "one bond"
        found = ", ".join(map(repr, core.legs)) or "none"
        fix = "Choose its legs by the weight, which is unfolded as out x rest."
        problems.add(core.position, f"core '{core.name}', `{kind}`", expected, found, fix, core=core.name)


def _sized(spec: Declaration, problems: Problems) -> None:
    """`bond` sizes indices that two cores share and `weight` does not have; all others need `sizes`."""
    sized = spec.sized
    opened = {leg for term in spec.terms for leg in term.places}
    by_hand = sized_by_hand(spec)
    reported: set[str] = set()
    placed = [(core, core.places) for core in spec.cores]
    placed += [
        (owner, dict.fromkeys(legs, owner.position)) for owner, legs in inner_legs(spec) if isinstance(owner, Core)
    ]
    for core, places in placed:
        for leg, where in places.items():
            if leg in sized or leg in reported:
                continue
            reported.add(leg)
            is_open = leg in opened or leg in by_hand
            if is_open or spec.bond is None:
                expected = "a line in `sizes`" if is_open else "`bond`, or a line in `sizes`"
                fix = near_miss(leg, sized - set(spec.params)) or f"Add `{leg}: ...` to `sizes`."
                what = f"core '{core.name}', index '{leg}' has no size"
                found = "none" if is_open else "neither"
                problems.add(where, what, expected, found, fix, core=core.name, index=leg)


def _read(spec: Declaration) -> set[str]:
    """Every name that an expression or a weight has."""
    read = {name for _, expression, _ in _expressions(spec) for name in expression.names}
    read |= {name for core in spec.cores for _, argument in core.init.expressions() for name in argument.names}
    read |= {leg for _, legs in inner_legs(spec) for leg in legs}
    for core in spec.cores:
        read |= {*getattr(core.init.arguments.get("legs"), "legs", ())}
        read |= {*core.init.entry.names} - {*core.legs} if core.init.entry else set()
    return read | {leg for term in spec.terms for leg in term.places}


def _unused_params(spec: Declaration, problems: Problems) -> None:
    """A param that nothing reads: often the size of an index that `sizes` leaves out, which then has the bond's."""
    legs = dict.fromkeys(leg for core in spec.cores for leg in core.legs)
    read = _read(spec).union(legs, *(expression.names for expression in spec.params.values()))
    sized = spec.sized
    bonds = [leg for leg in legs if leg not in sized]
    params = spec.root.get("params")
    for key, _ in params.items() if params is not None else ():
        name: str = key.value
        if name not in read:
            meant = closest(name, bonds) or next((leg for leg in bonds if name.startswith(leg)), "")
            fix = "Remove it, or write it where it belongs."
            if meant:
                fix = f"Write `{meant}: {name}` in `sizes` if it is the size of '{meant}', which has the bond's now."
            expected = "an index, or an expression, that reads it"
            what = f"param `{name}` is used nowhere"
            problems.add(key.position, what, expected, "none", fix)


def _unused(spec: Declaration, problems: Problems) -> None:
    read, legs = _read(spec), {leg for core in spec.cores for leg in core.legs}
    for rule in spec.sizes:
        for name, where in rule.places.items():
            if name not in legs and name not in read:
                fix = near_miss(name, legs) or "Remove it."
                problems.add(
                    where, f"`sizes`, '{name}'", "a core or an expression that uses it", "none", fix, index=name
                )


# Layers tried for every kind in `layers`: in and out channels, kernel, groups. A mistake that depends on numbers is
# one only if no layer is spared.
SAMPLES = (
    (64, 128, 3, 1),
    (256, 256, 3, 1),
    (512, 768, 1, 1),
    (12, 18, 3, 2),
    (1024, 1024, 5, 1),
    (7, 13, 3, 1),
    (1, 1, 1, 1),
)


def _axes(spec: Declaration, problems: Problems) -> None:
    """Every weight pattern has the axes of each kind in `layers`."""
    patterns = [(term.label, term.weight, term.position) for term in spec.terms]
    patterns += [(f"core '{core.name}'", core.axes, core.position) for core in spec.cores if core.origin == "weight"]
    for kind in spec.layers:
        count = 2 + KINDS[kind]
        for label, pattern, where in patterns:
            axes = expand_axes(pattern, KINDS[kind])
            if len(axes) != count:
                fix = "The axes are out_channels, in_channels and each kernel axis; parentheses group legs."
                problems.add(where, label, f"{count} axes for {kind}", str(len(axes)), fix)


def _kinds(spec: Declaration, problems: Problems) -> None:
    """Try the spec on sample layers of every kind in `layers`."""
    for kind in spec.layers:
        runs = []
        for sample in SAMPLES:
            runs.append(_try(spec, kind, sample))
            if all(fault.structural for fault in runs[-1]):  # none, or such as hold for every sample
                break
        for fault in (fault for faults in runs for fault in faults if fault.structural):
            problems.put(fault.problem)
        alike = {str(fault.problem) for fault in runs[-1]}  # whatever the layer
        for fault in runs[0] if runs[-1] else ():
            on = None if str(fault.problem) in alike else _shown(kind, SAMPLES[0])
            if not fault.structural:
                problems.put(replace(fault.problem, on=on))


def _shown(kind: str, sample: tuple[int, int, int, int]) -> str:
    """The first of the sample layers, none of which the spec fits, in words."""
    in_channels, out_channels, side, _ = sample
    return f"{kind}({in_channels}, {out_channels}{f', {side}' if KINDS[kind] else ''}), as on all layers tried"


def _try(spec: Declaration, kind: str, sample: tuple[int, int, int, int]) -> list[Fault]:
    in_channels, out_channels, side, groups = sample
    groups = 1 if kind == "Linear" else groups
    kernel = (side,) * KINDS[kind]
    names = layer_names((out_channels, in_channels // groups, *kernel), groups)
    return resolve(spec, kind, names, {}).faults
