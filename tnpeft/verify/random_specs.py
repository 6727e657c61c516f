"""Random valid specs, as YAML that goes through the whole compiler, and the networks that they make."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tnpeft.network import Network, Spec
from tnpeft.spec.pattern import KINDS
from tnpeft.verify.properties import st
from tnpeft.verify.random_derived import Body, Role, stand_in, stored, turn
from tnpeft.verify.strategies import checked_kinds, params_of, signatures

__all__ = ["networks", "specs"]

_BONDS = ("r", "r", "1", "2", "3", "r + 1", "max(1, r - 1)")
_WIDE = ("2", "3", "r + 1")  # of at least two, whatever r is
_SCALES = ("1", "0.5", "-2", "alpha / r")
_NAMED = {1: "ka", 2: "ka kb", 3: "ka kb kc"}


@st.composite
def specs(draw: st.DrawFn, *, max_cores: int = 5, kinds: Sequence[str] = tuple(KINDS), derived: bool = True) -> Spec:
    """Specs of up to `max_cores` cores on some of `kinds`; they fit layers of every size.

    They have trees and cycles of bonds, indices that three cores share or that stay open in several, kernel indices on
    any core, disconnected parts, scalars, frozen and shared cores, the base weight as a core, sums of two terms that
    share cores, `compose: dora` and both starts. Shared cores name the scope `block`. With `derived` some have derived
    cores with maps in place of stored ones, index cores, grouped legs, and cores that occur twice in a product.
    """
    chosen = draw(st.lists(st.sampled_from(checked_kinds(kinds)), min_size=1, max_size=3, unique=True))
    axes = {KINDS[kind] for kind in chosen}
    named = _NAMED[next(iter(axes))].split() if len(axes) == 1 and axes != {0} and draw(st.booleans()) else None
    count = draw(st.integers(1, max_cores))
    legs: list[list[str]] = [[] for _ in range(count)]
    body = Body()
    weight: list[str] = []
    for letter, channels in (("o", "out_channels"), ("i", "in_channels")):
        parts = [f"{letter}{number}" for number in range(draw(st.integers(1, 3)))]
        body.sizes[" ".join(parts)] = channels if len(parts) == 1 else f"factorize({channels}, {len(parts)})"
        weight.append(f"({' '.join(parts)})")
        for part in parts:
            _place(draw, legs, part, 1)
    for part in named or ["k..."]:
        _place(draw, legs, part, 1)
    if named:
        body.sizes[" ".join(named)] = "kernel_size" if len(named) > 1 else "kernel_size[0]"
    bonds = [f"b{number}" for number in range(draw(st.integers(0, 4)) if count > 1 else 0)]
    for bond in bonds:
        body.sizes[bond] = draw(st.sampled_from(_BONDS))
        _place(draw, legs, bond, 2)
    pattern = " ".join([*weight, *(named or ["k..."])])
    second = derived and draw(st.booleans())
    turns = _turns(draw, body, legs, bonds) if second else []
    rest = _rest(draw, body, legs, pattern, turns, second)
    return _spec(draw, chosen, body, rest, 2 if second else 1)


def _spec(draw: st.DrawFn, kinds: Sequence[str], body: Body, rest: Sequence[str], version: int) -> Spec:
    scale = draw(st.sampled_from(_SCALES))
    read = " ".join([*body.sizes.values(), *body.lines, *rest, scale])
    params = [f"{name}: {value}" for name, value in (("r", 2), ("alpha", 3)) if re.search(rf"\b{name}\b", read)]
    lines = [
        f"tnpeft: {version}",
        "name: random",
        f"layers: [{', '.join(kinds)}]",
        f"params: {{{', '.join(params)}}}",
        "sizes:",
        *(f"  {names}: {size}" for names, size in body.sizes.items()),
        "cores:",
        *body.lines,
        *rest,
        f"scale: {scale}",
        f"seed: {draw(st.integers(0, 9))}",
    ]
    return Spec.from_yaml("\n".join(lines) + "\n", file="<random>")


def _place(draw: st.DrawFn, legs: list[list[str]], name: str, fewest: int) -> None:
    """Put an index on some cores, anywhere among their legs."""
    most = min(len(legs), fewest + 1)
    for core in draw(st.lists(st.integers(0, len(legs) - 1), min_size=fewest, max_size=most, unique=True)):
        legs[core].insert(draw(st.integers(0, len(legs[core]))), name)


def _turns(draw: st.DrawFn, body: Body, legs: list[list[str]], bonds: Sequence[str]) -> list[str]:
    """Square matrices between the cores of some bonds, one of them on two bonds of one size perhaps."""
    wide = [bond for bond in bonds if body.sizes[bond] in _WIDE]
    chosen = draw(st.lists(st.sampled_from(wide), max_size=2, unique=True)) if wide else []
    names: list[str] = []
    made: dict[str, str] = {}  # by size
    for bond in chosen:
        size, other = body.sizes[bond], f"{bond}_"
        body.sizes[other] = size
        core = draw(st.sampled_from([core for core in legs if bond in core]))
        core[core.index(bond)] = other
        if size in made and draw(st.booleans()):
            names.append(f'"{made[size]}({bond} {other})"')
            continue
        made[size] = f"turn{len(made)}"
        turn(draw, body, made[size], (bond, other))
        names.append(made[size])
    return names


def _rest(
    draw: st.DrawFn, body: Body, legs: list[list[str]], pattern: str, turns: Sequence[str], derived: bool
) -> list[str]:
    """What is made of the cores, and the start; at zero, one trainable core of each term holds zeros."""
    zeros = draw(st.integers(0, len(legs) - 1)) if draw(st.booleans()) else None
    trained = draw(st.integers(0, len(legs) - 1)) if zeros is None else zeros
    names = [f"core{number}" for number in range(len(legs))]
    roles = [Role(number == zeros, number == trained) for number in range(len(legs))]
    for name, own, role in zip(names, legs, roles, strict=True):
        _core(draw, body, name, own, role, derived)
    first, second = [*names, *turns], []
    if draw(st.integers(0, 4)) == 4:
        body.lines.append(f'  weight: {{legs: "{pattern}", from: weight}}')
        first.append("weight")
    if draw(st.integers(0, 2)) == 2:  # a second term: some cores stand in both, others have a twin
        for number, (name, own) in enumerate(zip(names, legs, strict=True)):
            # The trained core always has one: two equal terms would cancel for ever.
            if number != trained and draw(st.booleans()):
                second.append(name)
            else:
                second.append(f"twin{number}")
                _core(draw, body, second[-1], own, roles[number], derived)
        second += turns
    start = f"start: {'frozen_copy' if zeros is None else 'zero'}"
    compose = ["compose: dora"] if draw(st.integers(0, 5)) == 5 else []
    if not second and not any("(" in name for name in first):
        return [f"weight: {pattern}", *compose, start]
    terms = [(first, draw(st.sampled_from(("1", "alpha"))))]
    terms += [(second, draw(st.sampled_from(("-1", "0.5"))))] if second else []
    listed = [f'  - {{cores: [{", ".join(cores)}], weight: "{pattern}", scale: {scale}}}' for cores, scale in terms]
    return ["terms:", *listed, *compose, start]


def _core(draw: st.DrawFn, body: Body, name: str, legs: Sequence[str], role: Role, derived: bool) -> None:
    if derived and draw(st.integers(0, 1)):
        stand_in(draw, body, name, legs, role)
    else:
        stored(draw, body, name, legs, role, derived)


@st.composite
def networks(draw: st.DrawFn, max_cores: int = 5, kinds: Sequence[str] = tuple(KINDS), derived: bool = True) -> Network:
    """Networks of random specs on random layers of up to 12 channels, with random params."""
    spec = draw(specs(max_cores=max_cores, kinds=kinds, derived=derived))
    return spec.bind(draw(signatures(spec.layers, max_channels=12)), **draw(params_of(spec)))
