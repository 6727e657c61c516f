"""What must hold between the parts of a spec, before any layer is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import networkx

from tnpeft.errors import near_miss
from tnpeft.spec.document import Problems
from tnpeft.spec.expression import Expression
from tnpeft.spec.inits import Last, Legs
from tnpeft.spec.pattern import ELLIPSIS, KINDS, LAYER_NAMES, expand_axes
from tnpeft.spec.reader import Draft, DraftRule
from tnpeft.spec.resolve import Fault, layer_names, resolve

__all__ = ["check"]


def check(draft: Draft, problems: Problems) -> None:
    """Report every mistake between parts; checks over all parts wait until none is missing."""
    _names(draft, problems)
    _cycles(draft, problems)
    _ellipsis(draft, problems)
    _inits(draft, problems)
    _start(draft, problems)
    _trained(draft, problems)
    if draft.whole["cores"]:
        _occurrences(draft, problems)
        if draft.whole["sizes"] and draft.whole["params"]:
            _sized(draft, problems)
            _unused(draft, problems)
    _kinds(draft, problems)


def _expressions(draft: Draft) -> Iterator[tuple[str, Expression, DraftRule | None]]:
    for rule in draft.sizes:
        yield f"`sizes`, {' '.join(rule.names)}", rule.expression, rule
    if draft.bond is not None:
        yield "`bond`", draft.bond, None
    if draft.scale is not None:
        yield "`scale`", draft.scale, None


def _names(draft: Draft, problems: Problems) -> None:
    """Fine rule 2: a name is a param, else a layer name, else an index in `sizes`."""
    sized = [name for rule in draft.sizes for name in rule.names if name != ELLIPSIS]
    known = {*draft.params, *LAYER_NAMES, *sized}
    if not (draft.whole["params"] and draft.whole["sizes"]):
        return
    for what, expression, rule in _expressions(draft):
        node = rule.node if rule is not None else draft.root.get(what.strip("`"))
        for name in expression.names:
            if name not in known:
                where = node.position if node is not None else draft.root.position
                if node is not None and node.kind == "scalar":
                    where = node.at(max(0, node.text.find(name)))
                fix = near_miss(name, known) or "Add it to `params`, or give it a line in `sizes`."
                problems.add(where, what, "params, layer names and indices in `sizes`", f"'{name}'", fix, index=name)
    for core in draft.cores:
        for key, argument in core.init.arguments.items() if core.init is not None else ():
            for name in argument.names if isinstance(argument, Expression) else ():
                if name not in known and core.init is not None:
                    fix = near_miss(name, known) or "Add it to `params`."
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
    graph: networkx.DiGraph[str] = networkx.DiGraph()
    rules = {name: rule for rule in draft.sizes for name in rule.names}
    for name, rule in rules.items():
        graph.add_edges_from(
            (name, read) for read in rule.expression.names if read in rules and name not in draft.params
        )
    for component in networkx.strongly_connected_components(graph):
        first = min(component, key=list(rules).index)
        if len(component) > 1 or graph.has_edge(first, first):
            ring = " -> ".join([*sorted(component, key=list(rules).index), first])
            fix = "Give one of them a size of its own."
            problems.add(rules[first].places[first], "circular `sizes`", "no circle", ring, fix, index=first)


def _ellipsis(draft: Draft, problems: Problems) -> None:
    """Fine rule 5: a `k` beside `k...` could not be told apart from it."""
    legs = {leg: where for core in draft.cores for leg, where in core.places.items()} | draft.weight_places
    if ELLIPSIS in legs and "k" in legs:
        problems.add(legs["k"], "index 'k'", f"no `k` beside `{ELLIPSIS}`", "both", "Choose another name.", index="k")


def _inits(draft: Draft, problems: Problems) -> None:
    for core in draft.cores:
        if len(core.legs) < 2 and ELLIPSIS not in core.legs and not core.names_init:
            what = f"core '{core.name}' of {'one leg' if core.legs else 'no legs'}"
            fix = f"For example `{core.name}: {{legs: {' '.join(core.legs) or chr(34) * 2}, init: normal(0.02)}}`."
            problems.add(core.position, what, "an init", "none", fix, core=core.name)
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
    """Fine rule 14: `zero` holds by construction, through exactly one trainable core of zeros."""
    if draft.start != "zero" or not draft.whole["cores"] or any(core.init is None for core in draft.cores):
        return
    zeros = [core for core in draft.cores if core.init is not None and core.init.name == "zeros"]
    trained = [core for core in zeros if not core.frozen]
    node = draft.root.get("start")
    where = node.position if node is not None else draft.root.position
    expected = "exactly one trainable core with `init: zeros`"
    if not zeros:
        problems.add(
            where, "`start: zero`", expected, "none", "Give one core `init: zeros`, or write `start: frozen_copy`."
        )
    elif len(zeros) > 1:
        names = ", ".join(f"'{core.name}'" for core in zeros)
        fix = "Two never receive a gradient: give all but one another init."
        problems.add(where, "`start: zero`", expected, f"{len(zeros)}, {names}", fix)
    elif not trained:
        found = f"'{zeros[0].name}' frozen"
        problems.add(where, "`start: zero`", expected, found, "Train that core: the update would be zero for ever.")


def _trained(draft: Draft, problems: Problems) -> None:
    if draft.whole["cores"] and draft.cores and all(core.frozen for core in draft.cores):
        fix = "Remove one `frozen: true`: nothing would train."
        where = draft.places["cores"]
        problems.add(where, "`cores`", "at least one that is trained", "all of them frozen", fix)


def _occurrences(draft: Draft, problems: Problems) -> None:
    uses = Counter(leg for core in draft.cores for leg in core.legs)
    used = set(uses)
    for core in draft.cores:
        for leg, where in core.places.items():
            if uses[leg] == 1 and leg not in draft.weight_places and draft.weight:
                what = f"core '{core.name}', index '{leg}' dangles"
                found = f"core '{core.name}' alone"
                others = {name for name in used | set(draft.weight_places) if name != leg and len(name) > 1}
                fix = f"Add '{leg}' to another core, or to `weight`."
                hint = near_miss(leg, others)
                problems.add(
                    where,
                    what,
                    "a second core or a place in `weight`",
                    found,
                    f"{fix} {hint}".strip(),
                    core=core.name,
                    index=leg,
                )
    for leg, where in draft.weight_places.items():
        if leg not in used:
            fix = near_miss(leg, used) or f"Add '{leg}' to a core, or remove it from `weight`."
            problems.add(where, f"`weight`, index '{leg}'", "a core that has it", "none", fix, index=leg)


def _sized(draft: Draft, problems: Problems) -> None:
    """Fine rule 3: `bond` sizes what two cores share and `weight` has not; all else needs `sizes`."""
    sized = {name for rule in draft.sizes for name in rule.names} | set(draft.params) | {ELLIPSIS}
    reported: set[str] = set()
    for core in draft.cores:
        for leg, where in core.places.items():
            if leg in sized or leg in reported:
                continue
            reported.add(leg)
            is_open = leg in draft.weight_places
            if is_open or draft.bond is None:
                expected = "a line in `sizes`" if is_open else "`bond`, or a line in `sizes`"
                fix = near_miss(leg, sized - set(draft.params)) or f"Add `{leg}: ...` to `sizes`."
                what = f"core '{core.name}', index '{leg}' has no size"
                problems.add(
                    where, what, expected, "neither" if not is_open else "none", fix, core=core.name, index=leg
                )


def _unused(draft: Draft, problems: Problems) -> None:
    read = {name for _, expression, _ in _expressions(draft) for name in expression.names}
    read |= {
        name
        for core in draft.cores
        if core.init is not None
        for argument in core.init.arguments.values()
        if isinstance(argument, Expression)
        for name in argument.names
    }
    legs = {leg for core in draft.cores for leg in core.legs}
    for rule in draft.sizes:
        for name, where in rule.places.items():
            if name not in legs and name not in read | set(draft.weight_places):
                fix = near_miss(name, legs) or "Remove it."
                problems.add(
                    where, f"`sizes`, '{name}'", "a core or an expression that uses it", "none", fix, index=name
                )


# Layers tried for every kind in `layers`: a mistake that depends on numbers is one only if no layer is spared.
_SAMPLES = (
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
        axes = expand_axes(draft.weight, spatial)
        if draft.weight and draft.whole["cores"] and len(axes) != 2 + spatial and draft.weight_position is not None:
            fix = "The axes are out_channels, in_channels and each kernel axis; parentheses group legs."
            expected = f"{2 + spatial} axes for {kind}"
            problems.add(draft.weight_position, "`weight`", expected, str(len(axes)), fix)
    ready = all(draft.whole.values()) and draft.scale is not None and all(core.init is not None for core in draft.cores)
    if not ready:
        return
    for kind in draft.layers:
        runs = []
        for sample in _SAMPLES:
            runs.append(_try(draft, kind, sample))
            if not runs[-1]:
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
