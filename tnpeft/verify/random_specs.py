"""Random valid specs, as YAML that goes through the whole compiler, and the networks that they make."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tnpeft.network import Network, Spec
from tnpeft.spec.pattern import KINDS
from tnpeft.verify.properties import st
from tnpeft.verify.strategies import checked_kinds, params_of, signatures

__all__ = ["networks", "specs"]

_INITS = ("normal(0.5)", "uniform(1)", "ones", "constant(0.5)")
_BONDS = ("r", "r", "1", "2", "3", "r + 1", "max(1, r - 1)")
_SCALES = ("1", "0.5", "-2", "alpha / r")
_NAMED = {1: "ka", 2: "ka kb", 3: "ka kb kc"}


@st.composite
def specs(draw: st.DrawFn, *, max_cores: int = 5, kinds: Sequence[str] = tuple(KINDS)) -> Spec:
    """Specs of up to `max_cores` cores on some of `kinds`; every size of layer fits them.

    Trees and cycles of bonds, indices that three cores share or that stay open in several, kernel indices on any core,
    disconnected parts, scalars, frozen and shared cores, the base weight as a core, sums of two terms that share cores,
    `compose: dora`, both starts. Shared cores name the scope `block`.
    """
    chosen = draw(st.lists(st.sampled_from(checked_kinds(kinds)), min_size=1, max_size=3, unique=True))
    axes = {KINDS[kind] for kind in chosen}
    named = _NAMED[next(iter(axes))].split() if len(axes) == 1 and axes != {0} and draw(st.booleans()) else None
    count = draw(st.integers(1, max_cores))
    legs: list[list[str]] = [[] for _ in range(count)]
    sizes: dict[str, str] = {}
    weight: list[str] = []
    for letter, channels in (("o", "out_channels"), ("i", "in_channels")):
        parts = [f"{letter}{number}" for number in range(draw(st.integers(1, 3)))]
        sizes[" ".join(parts)] = channels if len(parts) == 1 else f"factorize({channels}, {len(parts)})"
        weight.append(f"({' '.join(parts)})")
        for part in parts:
            _place(draw, legs, part, 1)
    for part in named or ["k..."]:
        _place(draw, legs, part, 1)
    if named:
        sizes[" ".join(named)] = "kernel_size" if len(named) > 1 else "kernel_size[0]"
    for number in range(draw(st.integers(0, 4)) if count > 1 else 0):
        sizes[f"b{number}"] = draw(st.sampled_from(_BONDS))
        _place(draw, legs, f"b{number}", 2)
    pattern = " ".join([*weight, *(named or ["k..."])])
    body = _body(draw, legs, pattern)
    scale = draw(st.sampled_from(_SCALES))
    read = " ".join([*sizes.values(), *body, scale])
    params = [f"{name}: {value}" for name, value in (("r", 2), ("alpha", 3)) if re.search(rf"\b{name}\b", read)]
    lines = [
        "tnpeft: 1",
        "name: random",
        f"layers: [{', '.join(chosen)}]",
        f"params: {{{', '.join(params)}}}",
        "sizes:",
        *(f"  {names}: {size}" for names, size in sizes.items()),
        *body,
        f"scale: {scale}",
        f"seed: {draw(st.integers(0, 9))}",
    ]
    return Spec.from_yaml("\n".join(lines) + "\n", file="<random>")


def _place(draw: st.DrawFn, legs: list[list[str]], name: str, fewest: int) -> None:
    """Put an index on some cores, anywhere among their legs."""
    most = min(len(legs), fewest + 1)
    for core in draw(st.lists(st.integers(0, len(legs) - 1), min_size=fewest, max_size=most, unique=True)):
        legs[core].insert(draw(st.integers(0, len(legs[core]))), name)


def _body(draw: st.DrawFn, legs: list[list[str]], pattern: str) -> list[str]:
    """The cores, what is made of them, and the start; at zero, one trainable core of each term holds zeros."""
    zeros = draw(st.integers(0, len(legs) - 1)) if draw(st.booleans()) else None
    trained = draw(st.integers(0, len(legs) - 1)) if zeros is None else zeros
    names = [f"core{number}" for number in range(len(legs))]
    lines = [
        _core(draw, name, " ".join(own), number == zeros, number == trained)
        for number, (name, own) in enumerate(zip(names, legs, strict=True))
    ]
    first, second = list(names), []
    if draw(st.integers(0, 4)) == 4:
        lines.append(f'  weight: {{legs: "{pattern}", from: weight}}')
        first.append("weight")
    if draw(st.integers(0, 2)) == 2:  # a second term: some cores stand in both, others have a twin
        for number, (name, own) in enumerate(zip(names, legs, strict=True)):
            # The trained core always has one: two equal terms would cancel for ever.
            if number != trained and draw(st.booleans()):
                second.append(name)
            else:
                second.append(f"twin{number}")
                lines.append(_core(draw, second[-1], " ".join(own), number == zeros, number == trained))
    start = f"start: {'frozen_copy' if zeros is None else 'zero'}"
    compose = ["compose: dora"] if draw(st.integers(0, 5)) == 5 else []
    if not second:
        return ["cores:", *lines, f"weight: {pattern}", *compose, start]
    terms = [(first, draw(st.sampled_from(("1", "alpha")))), (second, draw(st.sampled_from(("-1", "0.5"))))]
    listed = [f'  - {{cores: [{", ".join(cores)}], weight: "{pattern}", scale: {scale}}}' for cores, scale in terms]
    return ["cores:", *lines, "terms:", *listed, *compose, start]


def _core(draw: st.DrawFn, name: str, legs: str, zeros: bool, trained: bool) -> str:
    init = "zeros" if zeros else draw(st.sampled_from(_INITS))
    frozen = ", frozen: true" if not trained and draw(st.integers(0, 3)) == 3 else ""
    shared = draw(st.sampled_from(("", "", "", ", shared: model", ", shared: block")))
    return f'  {name}: {{legs: "{legs}", init: {init}{frozen}{shared}}}'


@st.composite
def networks(draw: st.DrawFn, max_cores: int = 5, kinds: Sequence[str] = tuple(KINDS)) -> Network:
    """Networks of random specs on random layers of up to 12 channels, with random params."""
    spec = draw(specs(max_cores=max_cores, kinds=kinds))
    return spec.bind(draw(signatures(spec.layers, max_channels=12)), **draw(params_of(spec)))
