"""`start_std`: the size of T at the start, set by one factor on all trained cores of a layer.

T must be homogeneous for that: f times the cores give f^K times T, K the number of trained cores in every term.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tnpeft.errors import Position, Problems
from tnpeft.spec.declaration import Core, Declaration
from tnpeft.spec.legs import cores_by_name
from tnpeft.spec.maps import map_kind

__all__ = ["check_start_std", "degree_of"]

_WHAT = "`start_std`"


def degree_of(spec: Declaration) -> int:
    """K: how many trained cores are multiplied in each term."""
    cores = cores_by_name(spec)
    return _degree((reference.core for reference in spec.terms[0].references), cores)


def check_start_std(spec: Declaration, problems: Problems) -> None:
    """Report why one factor on all trained cores would not set the size of T."""
    where, cores = spec.place("start_std"), cores_by_name(spec)
    if spec.start != "frozen_copy":
        fix = "Write `start: frozen_copy`, or remove `start_std`."
        problems.add(where, _WHAT, "`start: frozen_copy` beside it", f"`start: {spec.start}`, where T is zero", fix)
        return
    if _refused(spec, where, problems) or _maps_bend(spec, cores, where, problems):
        return
    degrees: dict[int, str] = {}
    for derivation in spec.derivations.values():
        inside: dict[int, str] = {}
        for summand in derivation.summands:
            inside.setdefault(_degree((each.core for each in summand.references), cores), summand.label)
        if _differ(inside, where, problems):
            return
    for term in spec.terms:
        degrees.setdefault(_degree((each.core for each in term.references), cores), term.label)
    _differ(degrees, where, problems)


def _refused(spec: Declaration, where: Position, problems: Problems) -> bool:
    for core in spec.cores:
        found = ""
        if core.shared is not None and not core.frozen:
            found = f"'{core.name}', which layers share: it has one size for all of them"
        elif core.init.name == "value":
            found = f"'{core.name}', whose `init: {core.init}` is a value of before"
        if found:
            fix = "Remove `start_std`, or give the cores inits of that size."
            problems.add(where, _WHAT, "cores with values of their own", found, fix, core=core.name)
            return True
    return False


def _maps_bend(spec: Declaration, cores: Mapping[str, Core], where: Position, problems: Problems) -> bool:
    """Whether a trained core goes through a map that is not linear."""
    for name, derivation in spec.derivations.items():
        if not any(_degree((each.core for each in summand.references), cores) for summand in derivation.summands):
            continue
        for call in derivation.maps:
            kind = map_kind(call.name)
            if kind is None or not kind.linear:
                found = f"`{call.name}` in core '{name}'"
                fix = "Remove `start_std`, or give the cores inits of that size."
                problems.add(where, _WHAT, "linear maps alone on trained cores", found, fix, core=name)
                return True
    return False


def _differ(degrees: Mapping[int, str], where: Position, problems: Problems) -> bool:
    if len(degrees) < 2:
        return False
    (one, first), (other, second) = [*degrees.items()][:2]
    found = f"{one} in {first.removesuffix(', `weight`')} and {other} in {second.removesuffix(', `weight`')}"
    fix = "Remove `start_std`: one factor would change the terms' shares."
    problems.add(where, _WHAT, "as many trained cores in every term", found, fix)
    return True


def _degree(names: Iterable[str], cores: Mapping[str, Core]) -> int:
    """How many trained cores a product of some cores has."""
    total = 0
    for name in names:
        core = cores[name]
        if core.derivation is None:
            total += not core.frozen
        else:
            total += max(_degree((each.core for each in one.references), cores) for one in core.derivation.summands)
    return total
