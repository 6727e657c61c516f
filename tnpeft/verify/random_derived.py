"""Random derived cores that may replace a stored core, with the same legs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tnpeft.spec.pattern import ELLIPSIS
from tnpeft.verify.properties import st

__all__ = ["Body", "Role", "stand_in", "stored", "turn"]

_INITS = ("normal(0.5)", "uniform(1)", "ones", "constant(0.5)")
_DRAWN = ("normal(0.5)", "uniform(1)")
_SMOOTH = ("tanh", "sin", "gelu", "silu")  # zero at zero
_OTHERS = ("cos", "sigmoid", "relu")
_SHARED = ("", "", "", ", shared: model", ", shared: block")


@dataclass
class Body:
    """The lines of `cores`, and the sizes of indices that they add."""

    lines: list[str] = field(default_factory=list)
    sizes: dict[str, str] = field(default_factory=dict)


class Role(NamedTuple):
    """What a core must be: of zeros, or one that trains."""

    zeros: bool = False
    trained: bool = False


def stored(
    draw: st.DrawFn,
    body: Body,
    name: str,
    legs: Sequence[str],
    role: Role,
    grouped: bool = True,
    inits: Sequence[str] = _INITS,
) -> None:
    """A stored core; with `grouped` some of its legs are grouped, some of its values the same."""
    init = "zeros" if role.zeros else draw(st.sampled_from(inits))
    if grouped and init in _DRAWN and legs and draw(st.integers(0, 3)) == 3:
        init = f"{init[:-1]}, same=[{draw(st.sampled_from(legs))}])"
    frozen = ", frozen: true" if not role.trained and draw(st.integers(0, 3)) == 3 else ""
    shared = draw(st.sampled_from(_SHARED))
    shown = _grouped(draw, legs) if grouped else " ".join(legs)
    body.lines.append(f'  {name}: {{legs: "{shown}", init: "{init}"{frozen}{shared}}}')


def _grouped(draw: st.DrawFn, legs: Sequence[str]) -> str:
    """The legs, two neighbours in one axis perhaps, or none as an axis of size one."""
    if not legs:
        return draw(st.sampled_from(("", "1")))
    if len(legs) < 2 or draw(st.integers(0, 2)) < 2:
        return " ".join(legs)
    first = draw(st.integers(0, len(legs) - 2))
    return " ".join([*legs[:first], f"({legs[first]} {legs[first + 1]})", *legs[first + 2 :]])


def stand_in(draw: st.DrawFn, body: Body, name: str, legs: Sequence[str], role: Role) -> None:
    """A core with these legs that is derived, from stored ones that nothing else names."""
    ways: list[Callable[[st.DrawFn, Body, str, list[str], Role], None]] = [_elementwise, _product]
    ways += [_scattered, _wavelet, _grown] if any(leg != ELLIPSIS for leg in legs) else []
    ways += [_gathered] if legs else []
    ways += [] if role.zeros else [_sum, _length, _picked]
    ways += [] if role.zeros or role.trained else [_valued]
    draw(st.sampled_from(ways))(draw, body, name, list(legs), role)


def _line(body: Body, name: str, of: str, legs: Sequence[str], maps: Sequence[str] = (), scale: str = "") -> None:
    shown = ", ".join(f'"{one}"' for one in maps)
    parts = [f"of: {of}", f'legs: "{" ".join(legs)}"']
    parts += [f"scale: {scale}"] if scale else []
    parts += [f"map: [{shown}]"] if maps else []
    body.lines.append(f"  {name}: {{{', '.join(parts)}}}")


def _elementwise(draw: st.DrawFn, body: Body, name: str, legs: list[str], role: Role) -> None:
    names = _SMOOTH if role.zeros else (*_SMOOTH, *_OTHERS)
    maps = draw(st.lists(st.sampled_from(names), min_size=1, max_size=2))
    # Behind `relu` only what is larger than zero trains.
    stored(draw, body, f"{name}_x", legs, role, inits=("ones", "constant(0.5)") if "relu" in maps else _INITS)
    _line(body, name, f"{name}_x", legs, maps, draw(st.sampled_from(("", "0.5"))))


def _product(draw: st.DrawFn, body: Body, name: str, legs: list[str], role: Role) -> None:
    """Of two cores, a bond between them; behind a map perhaps."""
    bond = f"{name}_b"
    body.sizes[bond] = draw(st.sampled_from(("1", "2", "3")))
    cut = draw(st.integers(0, len(legs)))
    stored(draw, body, f"{name}_x", [*legs[:cut], bond], role)
    stored(draw, body, f"{name}_y", [bond, *legs[cut:]], Role())
    maps = draw(st.sampled_from(((), ("tanh",), ("sin",))))
    _line(body, name, f"[{name}_x, {name}_y]", legs, maps)


def _sum(draw: st.DrawFn, body: Body, name: str, legs: list[str], role: Role) -> None:
    stored(draw, body, f"{name}_x", legs, role)
    stored(draw, body, f"{name}_y", legs, Role())
    maps = draw(st.sampled_from(((), ("silu",), ("cos",))))
    _line(body, name, f"[{{cores: [{name}_x]}}, {{cores: [{name}_y], scale: 0.7}}]", legs, maps)


def _gathered(draw: st.DrawFn, body: Body, name: str, legs: list[str], role: Role) -> None:
    bank, shown = f"{name}_d", " ".join(legs)
    body.sizes[bank] = draw(st.sampled_from(("1", "3", "r")))
    _places(draw, body, f"{name}_at", shown, f"random({bank})")
    stored(draw, body, f"{name}_x", [bank], role)
    _line(body, name, f"{name}_x", legs, [f"gather({bank} -> {shown}, at={name}_at)"])


def _places(draw: st.DrawFn, body: Body, name: str, legs: str, init: str) -> None:
    shared = draw(st.sampled_from(_SHARED))
    body.lines.append(f'  {name}: {{legs: "{legs}", frozen: true, init: {init}{shared}}}')


def _apart(draw: st.DrawFn, legs: list[str]) -> tuple[str, list[str]]:
    """One leg that is no `k...`, and the others."""
    leg = draw(st.sampled_from([leg for leg in legs if leg != ELLIPSIS]))
    return leg, [other for other in legs if other != leg]


def _scattered(draw: st.DrawFn, body: Body, name: str, legs: list[str], role: Role) -> None:
    """Some entries along a leg, and the next leg perhaps."""
    leg, others = _apart(draw, legs)
    made = [leg, *others[: draw(st.integers(0, 1))]]
    few = f"{name}_n"
    body.sizes[few] = draw(st.sampled_from(("1", f"max(1, {leg} - 1)", leg)))
    _places(draw, body, f"{name}_at", few, f"choice({' '.join(made)})")
    stored(draw, body, f"{name}_x", [few, *(other for other in others if other not in made)], role)
    maps = [f"scatter({few} -> {' '.join(made)}, at={name}_at)", *draw(st.sampled_from(((), ("tanh",))))]
    _line(body, name, f"{name}_x", legs, maps)


def _grown(draw: st.DrawFn, body: Body, name: str, legs: list[str], role: Role) -> None:
    leg, others = _apart(draw, legs)
    short = f"{name}_q"
    body.sizes[short] = f"max(1, {leg} - {draw(st.integers(0, 2))})"
    stored(draw, body, f"{name}_x", [short, *others], role)
    _line(body, name, f"{name}_x", legs, [f"pad({short} -> {leg})"])


def _wavelet(draw: st.DrawFn, body: Body, name: str, legs: list[str], role: Role) -> None:
    leg, others = _apart(draw, legs)
    row, half, band = f"{name}_w", f"{name}_h", f"{name}_a"
    family, more = draw(st.sampled_from((("db1", 0), ("db2", 2), ("db3", 4))))
    body.sizes |= {row: leg, half: "2", band: f"ceil(({leg} + {more}) / 2)"}
    stored(draw, body, f"{name}_x", [*others, row], role)
    maps = [f"pad({row} -> {half} {band})", f"wavelet({half} {band} -> {leg}, family={family})"]
    _line(body, name, f"{name}_x", legs, maps)


def _length(draw: st.DrawFn, body: Body, name: str, legs: list[str], role: Role) -> None:
    body.sizes[f"{name}_v"] = "2"
    stored(draw, body, f"{name}_x", [f"{name}_v", *legs], role)
    _line(body, name, f"{name}_x", legs, [f"norm({name}_v)"])


def _picked(draw: st.DrawFn, body: Body, name: str, legs: list[str], role: Role) -> None:
    """Of a bank, by weights that a map makes of a row."""
    row = f"{name}_v"
    body.sizes[row] = "3"
    call = draw(st.sampled_from((f"topk_softmax({row}, k=2)", f"unit({row})", f"unit({row}, floor=0.5)")))
    stored(draw, body, f"{name}_x", [*legs, row], role, inits=_DRAWN)
    stored(draw, body, f"{name}_y", [row], Role(), inits=("normal(0.5)",))
    _line(body, f"{name}_p", f"{name}_x", [*legs, row], [call])
    _line(body, name, f"[{name}_p, {name}_y]", legs)


def _valued(draw: st.DrawFn, body: Body, name: str, legs: list[str], role: Role) -> None:
    """Stored, and equal at the start to a derived core that nothing else names."""
    body.lines.append(f'  {name}_x: {{legs: "{" ".join(legs) or 1}", frozen: true, init: normal(0.5)}}')
    _line(body, f"{name}_s", f"{name}_x", legs, ["cos"])
    body.lines.append(f'  {name}: {{legs: "{" ".join(legs) or 1}", init: value({name}_s)}}')


def turn(draw: st.DrawFn, body: Body, name: str, legs: tuple[str, str]) -> None:
    """A square matrix on a bond of two or more: orthogonal, triangular, circulant or symmetric."""
    first, second = legs
    ways = {
        "cayley": [f"antisymmetric({first} {second})", f"cayley({first} {second})"],
        "expm": [f"antisymmetric({first} {second})", f"expm({first} {second})"],
        "neumann": [f"antisymmetric({first} {second})", f"neumann({first} {second}, terms=4)"],
        "reflections": [f"reflections({first} {second})"],
        "qr": [f"qr({first} {second})"],
        "roll": [f"roll({first} {second} -> {first} {second})"],
        "skew": [f"skew({name}_e -> {first} {second})", f"cayley({first} {second})"],
        "circulant": [f"roll({second} -> {first} {second})"],
        "gram": [],
    }
    way = draw(st.sampled_from([*ways]))
    products = way in ("gram", "reflections")  # of columns, each with each
    own = [f"{name}_g", first] if products else {"skew": [f"{name}_e"], "circulant": [second]}.get(way, [first, second])
    if way == "skew":
        body.sizes[f"{name}_e"] = f"{first} * ({first} - 1) // 2"
    if products:
        body.sizes[f"{name}_g"] = "2"
    body.lines.append(f'  {name}_x: {{legs: "{" ".join(own)}", init: normal(0.5)}}')
    of = f'[{name}_x, "{name}_x({name}_g {second})"]' if products else f"{name}_x"
    _line(body, name, of, legs, ways[way])
