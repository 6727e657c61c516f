"""What must hold between the parts of a spec, before any layer is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import networkx

from tnpeft.documents.nodes import Node
from tnpeft.errors import Position, Problems, near_miss
from tnpeft.spec.draft import Draft, DraftCore, DraftTerm
from tnpeft.spec.expression import Expression, spelling
from tnpeft.spec.inits import Last, Legs
from tnpeft.spec.pattern import ELLIPSIS, KINDS, LAYER_NAMES, expand_axes
from tnpeft.spec.resolve import Fault, layer_names, resolve

__all__ = ["SAMPLES", "check"]

MAX_SHOWN = 20  # names of a circle


def check(draft: Draft, problems: Problems, saved: bool = False) -> None:
    """Report every mistake between parts; checks over all parts wait until none is missing.

    Of a `saved` spec, which worked when it was written, params that do nothing are no mistake.
    """
    _names(draft, problems)
    _cycles(draft, problems)
    _ellipsis(draft, problems)
    _inits(draft, problems)
    _start(draft, problems)
    _trained(draft, problems)
    if draft.whole["cores"]:
        _members(draft, problems)
        _occurrences(draft, problems)
        _singular(draft, problems)
        if draft.whole["sizes"] and draft.whole["params"]:
            _sized(draft, problems)
            _unused(draft, problems)
    _kinds(draft, problems)
    if not len(problems) and not saved:  # another mistake may be why nothing reads a param
        _unused_params(draft, problems)


def _expressions(draft: Draft) -> Iterator[tuple[str, Expression, Node | Position | None]]:
    """Every expression but those of params and inits: whose it is, and where it stands."""
    for rule in draft.sizes:
        yield f"`sizes`, {' '.join(rule.names)}", rule.expression, rule.node
    if draft.bond is not None:
        yield "`bond`", draft.bond, draft.root.get("bond")
    if draft.scale is not None:
        yield "`scale`", draft.scale, draft.root.get("scale")
    for term in draft.terms:
        yield f"{term.label.removesuffix(', `weight`')}, `scale`", term.scale, term.scale_position


def _names(draft: Draft, problems: Problems) -> None:
    """Fine rule 2: a name is a param, else a layer name, else an index in `sizes`."""
    sized = [name for rule in draft.sizes for name in rule.names if name != ELLIPSIS]
    known = {*draft.params, *LAYER_NAMES, *sized}
    if not (draft.whole["params"] and draft.whole["sizes"]):
        return
    for what, expression, node in _expressions(draft):
        for name in expression.names:
            if name not in known:
                where = node.position if isinstance(node, Node) else node or draft.root.position
                if isinstance(node, Node) and node.kind == "scalar":
                    where = node.at(max(0, node.text.find(name)))
                fix = near_miss(name, known) or spelling(name) or "Add it to `params`, or give it a line in `sizes`."
                problems.add(where, what, "params, layer names and indices in `sizes`", f"'{name}'", fix, index=name)
    for core in draft.cores:
        for key, argument in core.init.arguments.items() if core.init is not None else ():
            for name in argument.names if isinstance(argument, Expression) else ():
                if name not in known and core.init is not None:
                    fix = near_miss(name, known) or spelling(name) or "Add it to `params`."
                    where = core.init.position or core.position
                    problems.add(
                        where, f"`{key}` of init", "params, layer names and indices in `sizes`", f"'{name}'", fix
                    )
    for rule in draft.sizes:
        for name in rule.names:
            if name in draft.params and rule.expression.text != name:
                fix = (
                    f"Remove it from `sizes`, or name the index otherwise; a param's index is written `{name}: {name}`."
                )
                found = f"`{rule.expression.text}`"
                problems.add(rule.places[name], f"`sizes`, '{name}'", "the param's value", found, fix, index=name)


def _cycles(draft: Draft, problems: Problems) -> None:
    graph: networkx.DiGraph[int] = networkx.DiGraph()  # of lines, for one line may have thousands of names
    line_of = {name: number for number, rule in enumerate(draft.sizes) for name in rule.names}
    for number, rule in enumerate(draft.sizes):
        if rule.names[0] not in draft.params:
            graph.add_edges_from((number, line_of[read]) for read in rule.expression.names if read in line_of)
    for component in networkx.strongly_connected_components(graph):
        lines = [draft.sizes[number] for number in sorted(component)]
        if len(lines) > 1 or any(graph.has_edge(number, number) for number in component):
            read = {name for rule in lines for name in rule.expression.names}
            ring = [next(name for name in rule.names if name in read) for rule in lines]
            shown = [*ring[:MAX_SHOWN], *(["..."] if len(ring) > MAX_SHOWN else []), ring[0]]
            fix = "Give one of them a size of its own."
            where = lines[0].places[ring[0]]
            problems.add(where, "circular `sizes`", "no circle", " -> ".join(shown), fix, index=ring[0])


def _ellipsis(draft: Draft, problems: Problems) -> None:
    """Fine rule 5: a `k` beside `k...` could not be told apart from it."""
    legs = {leg: where for core in draft.cores for leg, where in core.places.items()}
    for term in draft.terms:
        legs |= term.weight_places
    if ELLIPSIS in legs and "k" in legs:
        problems.add(legs["k"], "index 'k'", f"no `k` beside `{ELLIPSIS}`", "both", "Choose another name.", index="k")


def _inits(draft: Draft, problems: Problems) -> None:
    for core in draft.cores:
        if len(core.legs) < 2 and ELLIPSIS not in core.legs and not core.names_init:
            what = f"core '{core.name}' of {'one leg' if core.legs else 'no legs'}"
            fix = f"For example `{core.name}: {{legs: {' '.join(core.legs) or chr(34) * 2}, init: normal(0.02)}}`."
            problems.add(core.position, what, "an init", "none", fix, core=core.name)
        if core.shared is not None and core.init is not None and core.init.name in ("svd_us", "svd_vs"):
            fix = "Remove `shared`: each layer has its own weight."
            found = f"`{core.init.name}`, which reads one layer's weight"
            problems.add(core.position, f"shared core '{core.name}'", "another init", found, fix, core=core.name)
        fan = core.init.arguments.get("fan") if core.init is not None else None
        where = (core.init.position if core.init is not None else None) or core.position
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


def _start(draft: Draft, problems: Problems) -> None:
    """Fine rule 14: `zero` holds by construction, in each term through exactly one trainable core of zeros."""
    if draft.start != "zero" or not draft.whole["cores"] or any(core.init is None for core in draft.cores):
        return
    node = draft.root.get("start")
    where = node.position if node is not None else draft.root.position
    for number, term in enumerate(draft.terms):
        members = [core for core in draft.cores if core.name in term.cores]
        what = "`start: zero`" if len(draft.terms) == 1 else f"`start: zero`, term {number + 1}"
        _zero_term(where, what, members, problems)


def _zero_term(where: Position, what: str, members: list[DraftCore], problems: Problems) -> None:
    zeros = [core for core in members if core.init is not None and core.init.name == "zeros"]
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


def _trained(draft: Draft, problems: Problems) -> None:
    if draft.whole["cores"] and draft.cores and all(core.frozen for core in draft.cores):
        fix = "Remove one `frozen: true`: nothing would train."
        where = draft.places["cores"]
        problems.add(where, "`cores`", "at least one that is trained", "all of them frozen", fix)
    elif draft.whole["cores"]:
        trained = {core.name for core in draft.cores if not core.frozen}
        for number, term in enumerate(draft.terms):
            if trained.isdisjoint(term.cores):
                fix = "Remove it: it would never change."
                what = f"`terms`, entry {number + 1}"
                problems.add(term.position, what, "at least one core that is trained", "all of them frozen", fix)


def _members(draft: Draft, problems: Problems) -> None:
    """Every core stands in a term; a trained magnitude has a name of its own."""
    named = {name for term in draft.terms for name in term.cores}
    for core in draft.cores:
        if draft.terms and core.name not in named:
            fix = "Name it in the `cores` of a term, or remove it."
            problems.add(core.position, f"core '{core.name}'", "a term that has it", "none", fix, core=core.name)
        if draft.compose == "dora" and core.name == "magnitude":
            fix = "Choose another name."
            found = "`magnitude`, which `compose: dora` trains beside the cores"
            problems.add(core.position, "core 'magnitude'", "a name of its own", found, fix, core=core.name)


def _occurrences(draft: Draft, problems: Problems) -> None:
    for term in draft.terms:
        _occurrences_in(term, [core for core in draft.cores if core.name in term.cores], problems)


def _occurrences_in(term: DraftTerm, members: list[DraftCore], problems: Problems) -> None:
    """In each term, an index of one core alone dangles, and the weight has no index that no core has."""
    uses = Counter(leg for core in members for leg in core.legs)
    used = set(uses)
    for core in members:
        for leg, where in core.places.items():
            if uses[leg] > 1 or leg in term.weight_places:
                continue
            others = {name for name in used | set(term.weight_places) if name != leg and len(name) > 1}
            fix = f"Add '{leg}' to another core, or to `weight`. {near_miss(leg, others)}".strip()
            what, expected = f"core '{core.name}', index '{leg}' dangles", "a second core or a place in `weight`"
            if term.label != "`weight`":
                what = f"{term.label.removesuffix(', `weight`')}, {what}"
            found = f"core '{core.name}' alone"
            problems.add(where, what, expected, found, fix, core=core.name, index=leg)
    for leg, where in term.weight_places.items():
        if leg not in used:
            fix = near_miss(leg, used) or f"Add '{leg}' to a core, or remove it from `weight`."
            problems.add(where, f"{term.label}, index '{leg}'", "a core that has it", "none", fix, index=leg)


# What each takes of the weight unfolded as out x rest, beside a bond: the legs of which of the weight's axes.
_SINGULAR = {"svd_u": slice(0, 1), "svd_us": slice(0, 1), "svd_s": slice(0, 0)}
_SINGULAR |= {"svd_v": slice(1, None), "svd_vs": slice(1, None)}


def _singular(draft: Draft, problems: Problems) -> None:
    """Fine rule 10: singular vectors have the legs of one side of the weight and a bond, the values a bond alone."""
    for core in draft.cores:
        kind = core.origin or (core.init.name if core.init is not None else "")
        term = next((term for term in draft.terms if core.name in term.cores), None)
        if kind not in _SINGULAR or term is None or core.shared is not None:
            continue
        legs = [leg for axis in term.weight[_SINGULAR[kind]] for leg in axis]
        bonds = [leg for leg in core.legs if leg not in term.weight_places]
        if len(bonds) == 1 and set(core.legs) == {*legs, *bonds}:
            continue
        expected = f"the legs {', '.join(map(repr, legs))} and one bond" if legs else "one bond"
        found = ", ".join(map(repr, core.legs)) or "none"
        fix = "Choose its legs by the weight, which is unfolded as out x rest."
        problems.add(core.position, f"core '{core.name}', `{kind}`", expected, found, fix, core=core.name)


def _sized(draft: Draft, problems: Problems) -> None:
    """Fine rule 3: `bond` sizes what two cores share and `weight` has not; all else needs `sizes`."""
    sized = {name for rule in draft.sizes for name in rule.names} | set(draft.params) | {ELLIPSIS}
    opened = {leg for term in draft.terms for leg in term.weight_places}
    reported: set[str] = set()
    for core in draft.cores:
        for leg, where in core.places.items():
            if leg in sized or leg in reported:
                continue
            reported.add(leg)
            is_open = leg in opened
            if is_open or draft.bond is None:
                expected = "a line in `sizes`" if is_open else "`bond`, or a line in `sizes`"
                fix = near_miss(leg, sized - set(draft.params)) or f"Add `{leg}: ...` to `sizes`."
                what = f"core '{core.name}', index '{leg}' has no size"
                found = "none" if is_open else "neither"
                problems.add(where, what, expected, found, fix, core=core.name, index=leg)


def _read(draft: Draft) -> set[str]:
    """Every name that an expression or a weight has."""
    read = {name for _, expression, _ in _expressions(draft) for name in expression.names}
    read |= {
        name
        for core in draft.cores
        if core.init is not None
        for argument in core.init.arguments.values()
        if isinstance(argument, Expression)
        for name in argument.names
    }
    return read | {leg for term in draft.terms for leg in term.weight_places}


def _unused_params(draft: Draft, problems: Problems) -> None:
    """A param that nothing reads: often the size of an index that `sizes` leaves out, which then has the bond's."""
    legs = dict.fromkeys(leg for core in draft.cores for leg in core.legs)
    read = _read(draft).union(legs, *(expression.names for expression in draft.params.values()))
    sized = {name for rule in draft.sizes for name in rule.names} | {*draft.params, ELLIPSIS}
    bonds = [leg for leg in legs if leg not in sized]
    for name in draft.params:
        if name not in read:
            meant = near_miss(name, bonds)[len("Did you mean `") : -len("`?")]
            meant = meant or next((leg for leg in bonds if name.startswith(leg)), "")
            fix = "Remove it, or write it where it belongs."
            if meant:
                fix = f"Write `{meant}: {name}` in `sizes` if it is the size of '{meant}', which has the bond's now."
            expected = "an index, or an expression, that reads it"
            what = f"param `{name}` is used nowhere"
            problems.add(draft.param_places[name], what, expected, "none", fix)


def _unused(draft: Draft, problems: Problems) -> None:
    read, legs = _read(draft), {leg for core in draft.cores for leg in core.legs}
    for rule in draft.sizes:
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


def _kinds(draft: Draft, problems: Problems) -> None:
    """Fine rule 4: try every kind in `layers` without a layer."""
    for kind in draft.layers:
        spatial = KINDS[kind]
        patterns = [(term.label, term.weight, term.position) for term in draft.terms]
        patterns += [
            (f"core '{core.name}'", core.axes, core.position) for core in draft.cores if core.origin == "weight"
        ]
        for label, pattern, where in patterns if draft.whole["cores"] else ():
            axes = expand_axes(pattern, spatial)
            if len(axes) != 2 + spatial:
                fix = "The axes are out_channels, in_channels and each kernel axis; parentheses group legs."
                problems.add(where, label, f"{2 + spatial} axes for {kind}", str(len(axes)), fix)
    ready = all(draft.whole.values()) and draft.scale is not None and all(core.init is not None for core in draft.cores)
    if not ready:
        return
    for kind in draft.layers:
        runs = []
        for sample in SAMPLES:
            runs.append(_try(draft, kind, sample))
            if all(fault.structural for fault in runs[-1]):  # none, or such as hold for every sample
                break
        certain = [fault for faults in runs for fault in faults if fault.structural]
        for fault in certain if runs[-1] == [] else certain + runs[0]:
            problems.put(fault.problem)


def _try(draft: Draft, kind: str, sample: tuple[int, int, int, int]) -> list[Fault]:
    in_channels, out_channels, side, groups = sample
    groups = 1 if kind == "Linear" else groups
    kernel = (side,) * KINDS[kind]
    names = layer_names((out_channels, in_channels // groups, *kernel), groups)
    return resolve(draft, kind, names, {}).faults  # type: ignore[arg-type]  # a draft with every part is a source
