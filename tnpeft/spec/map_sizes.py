"""Whether sizes fit a map: they are checked, never inferred."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from tnpeft.errors import clip
from tnpeft.spec.factorize import times
from tnpeft.spec.map_kinds import MapCall, RegisteredMap, registered_map
from tnpeft.spec.wavelets import wavelet_filters

__all__ = ["MAX_TERMS", "size_problem"]

MAX_TERMS = 100

Sizes = tuple[int, ...]
Arguments = Mapping[str, float | str]
Trouble = tuple[str, str, str] | None  # expected, found, fix


def size_problem(call: MapCall, sizes_taken: Sizes, sizes_made: Sizes, arguments: Arguments) -> Trouble:
    """What is expected of these sizes and arguments, what was found and how to fix it; None if they fit.

    Sizes are those of the legs with `k...` expanded.
    """
    registered = registered_map(call.name)
    if registered is not None:
        return _registered(call, registered, sizes_taken, sizes_made, arguments)
    check = _CHECKS.get(call.name)
    return check(call, sizes_taken, sizes_made, arguments) if check else None


def _registered(call: MapCall, registered: RegisteredMap, taken: Sizes, made: Sizes, arguments: Arguments) -> Trouble:
    fix = f"Change the legs' sizes, or the `shape` that `{call.name}` is registered with."
    try:
        shape = registered.shape(taken, **arguments)
        wanted = tuple(int(size) for size in shape)
    except Exception as error:  # noqa: BLE001 - whatever the user's function raises is the finding
        found = clip(f"{type(error).__name__}: {error}")[1:-1]
        return f"sizes that `{call.name}` takes", f"{_shape(taken)} ({found})", fix
    if wanted != made:
        return f"{_legs(call.gives)} of {_shape(wanted)}", _shape(made), fix
    return None


def _shape(sizes: Sizes) -> str:
    return times(sizes) or "one number"


def _legs(legs: tuple[str, ...]) -> str:
    return " ".join(legs) or "no legs"


def _whole(key: str, arguments: Arguments, low: int, high: int, fix: str) -> Trouble:
    value = float(arguments[key])
    if value == int(value) and low <= value <= high:
        return None
    return f"a whole `{key}` from {low} to {high:,}", f"{value:g}", fix


def _topk(call: MapCall, taken: Sizes, made: Sizes, arguments: Arguments) -> Trouble:
    return _whole("k", arguments, 1, math.prod(taken), f"Change `k`, or the size of {_legs(call.takes)}.")


def _unit(call: MapCall, taken: Sizes, made: Sizes, arguments: Arguments) -> Trouble:
    floor = float(arguments.get("floor", 1))
    return None if floor > 0 else ("a positive `floor`", f"{floor:g}", "Write `floor=1e-4`, or leave it out.")


def _qr(call: MapCall, taken: Sizes, made: Sizes, arguments: Arguments) -> Trouble:
    rows, columns = math.prod(taken[:-1]), taken[-1]
    if columns <= rows:
        return None
    *row, column = call.takes
    expected = f"{column} of at most {rows:,}, the size of {_legs(tuple(row))}"
    return expected, f"{columns:,}", f"Lower {column}: so many rows have no more orthonormal columns."


def _square(call: MapCall, taken: Sizes, made: Sizes, arguments: Arguments) -> Trouble:
    return _equal(call.takes, taken)


def _equal(legs: tuple[str, ...], sizes: Sizes) -> Trouble:
    if sizes[0] == sizes[1]:
        return None
    return f"{legs[0]} and {legs[1]} of one size", f"{sizes[0]:,} and {sizes[1]:,}", "Give both legs one size."


def _neumann(call: MapCall, taken: Sizes, made: Sizes, arguments: Arguments) -> Trouble:
    fix = "With 1 it would be the identity; where many are needed, `cayley` is exact."
    return _equal(call.takes, taken) or _whole("terms", arguments, 2, MAX_TERMS, fix)


def _skew(call: MapCall, taken: Sizes, made: Sizes, arguments: Arguments) -> Trouble:
    (leg,), (first, second), (size,), side = call.takes, call.gives, taken, made[0]
    if side != made[1]:
        return _equal((first, second), made)
    if side < 2:
        return f"{first} and {second} of at least 2", f"{side}", f"Raise {first} and {second}."
    entries = side * (side - 1) // 2
    if size == entries:
        return None
    expected = f"{leg} = {first} ({first} - 1) / 2 = {entries:,}"
    return expected, f"{size:,}", f"Write `{leg}: {first} * ({first} - 1) // 2` under `sizes`."


def _scatter(call: MapCall, taken: Sizes, made: Sizes, arguments: Arguments) -> Trouble:
    count, places = math.prod(taken), math.prod(made)
    if count <= places:
        return None
    expected = f"at most {places:,} places, the entries of {_legs(call.gives)}"
    return expected, f"{count:,}", f"Lower {_legs(call.takes)}: no place is written twice."


def _pad(call: MapCall, taken: Sizes, made: Sizes, arguments: Arguments) -> Trouble:
    if math.prod(made) >= taken[0]:
        return None
    fix = f"Raise {call.gives[-1]}: zeros are added, nothing is cut."
    return f"{_legs(call.gives)} of at least {taken[0]:,} entries", f"{math.prod(made):,}", fix


def _wavelet(call: MapCall, taken: Sizes, made: Sizes, arguments: Arguments) -> Trouble:
    half, band = call.takes
    if taken[0] != 2:
        return f"{half} = 2, the low and the high band", f"{taken[0]:,}", f"Write `{half}: 2` under `sizes`."
    length = len(wavelet_filters(str(arguments["family"]))[0])
    entries = 2 * taken[1] - length + 2
    if entries >= made[0]:
        return None
    expected = f"at least {made[0]:,} entries for {call.gives[0]}"
    return expected, f"{max(entries, 0):,}", f"Raise {band} to {-(-(made[0] + length - 2) // 2):,}."


_CHECKS: dict[str, Callable[[MapCall, Sizes, Sizes, Arguments], Trouble]] = {
    "topk_softmax": _topk,
    "unit": _unit,
    "qr": _qr,
    "antisymmetric": _square,
    "skew": _skew,
    "cayley": _square,
    "expm": _square,
    "neumann": _neumann,
    "reflections": _square,
    "scatter": _scatter,
    "pad": _pad,
    "wavelet": _wavelet,
}
