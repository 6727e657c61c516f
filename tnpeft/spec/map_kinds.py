"""The maps of derived cores: which there are, what each takes and makes, and those that users register."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tnpeft.errors import Position, Problem, SpecError, clip
from tnpeft.spec.expression import Expression, is_name

__all__ = [
    "NOT_ZERO",
    "WORDS",
    "MapCall",
    "MapKind",
    "RegisteredMap",
    "map_kind",
    "map_names",
    "map_usages",
    "passes_zero",
    "place_legs",
    "places_legs",
    "register_map",
    "registered_map",
    "registered_maps",
    "repeats_places",
    "unregistered_map",
]

WORDS = ("at", "family")
"""The arguments of built-in maps that are words; all others are expressions."""

Counts = tuple[int, int | None]
Legs = tuple[str, ...]
MapFunction = Callable[..., Any]
ShapeFunction = Callable[..., tuple[int, ...]]


@dataclass(frozen=True)
class MapCall:
    """One map of a derived core as a file writes it.

    `takes` are its legs as written, `k...` unexpanded; none for elementwise maps. `gives` are the legs after the arrow.
    Without an arrow they equal `takes`, and for `norm`, which removes its legs, there are none.
    """

    name: str
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    arguments: Mapping[str, Expression | str]
    text: str
    position: Position | None = None

    def expressions(self) -> Iterator[tuple[str, Expression]]:
        """The arguments that are expressions, by name."""
        return ((key, value) for key, value in self.arguments.items() if isinstance(value, Expression))

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, eq=False)
class MapKind:
    """What a map takes and makes.

    `takes` and `gives` bound how many legs are before and after the arrow (None: any number); `gives` is None if the
    map has no arrow. `linear`: f(a + b) = f(a) + f(b). `zero`: f(0) = 0 with a slope other than 0 there.
    """

    usage: str
    takes: Counts
    gives: Counts | None = None
    arguments: Mapping[str, bool] = field(default_factory=dict)  # name → whether it must be given
    words: tuple[str, ...] = WORDS
    linear: bool = False
    zero: bool = False
    removes: bool = False


@dataclass(frozen=True, eq=False)
class RegisteredMap:
    """A user's map: `function(x, **arguments)` on trailing axes, and `shape(sizes, **arguments)` of what it makes."""

    function: MapFunction
    shape: ShapeFunction
    kind: MapKind


NOT_ZERO = ("cos", "exp", "sigmoid", "topk_softmax", "cayley", "expm", "neumann", "reflections")
"""The built-in maps that are not zero where their input is."""

_ANY: Counts = (1, None)
_AT = {"at": True}

_BUILT_IN: dict[str, MapKind] = {
    **{name: MapKind(name, (0, 0), zero=True) for name in ("tanh", "sin", "gelu", "silu")},
    **{name: MapKind(name, (0, 0)) for name in ("relu", "cos", "exp", "sigmoid")},
    "topk_softmax": MapKind("topk_softmax(v, k=2)", _ANY, arguments={"k": True}),
    "unit": MapKind("unit(i k..., floor=1e-4)", _ANY, arguments={"floor": False}),
    "norm": MapKind("norm(o)", _ANY, removes=True),
    "qr": MapKind("qr(d r)", (2, None)),
    "antisymmetric": MapKind("antisymmetric(x y)", (2, 2), linear=True, zero=True),
    "skew": MapKind("skew(e -> x y)", (1, 1), (2, 2), linear=True, zero=True),
    "cayley": MapKind("cayley(x y)", (2, 2)),
    "expm": MapKind("expm(x y)", (2, 2)),
    "neumann": MapKind("neumann(x y, terms=5)", (2, 2), arguments={"terms": True}),
    "reflections": MapKind("reflections(r s)", (2, 2)),
    "scatter": MapKind("scatter(n -> o i k..., at=places)", _ANY, _ANY, _AT, linear=True, zero=True),
    "gather": MapKind("gather(d -> r i, at=places)", _ANY, _ANY, _AT, linear=True, zero=True),
    "roll": MapKind("roll(y -> x y)", (1, 2), (2, 2), linear=True, zero=True),
    "pad": MapKind("pad(r -> p a)", (1, 1), _ANY, linear=True, zero=True),
    "wavelet": MapKind(
        "wavelet(h a -> o, family=db2)", (2, 2), (1, 1), arguments={"family": True}, linear=True, zero=True
    ),
}

_registered: dict[str, RegisteredMap] = {}


def register_map(
    name: str, function: MapFunction, shape: ShapeFunction, linear: bool = False, zero: bool = False
) -> None:
    """Make `name` a map of the language: `function(x, **arguments) -> Tensor`.

    `x` has leading axes of any kind, then the legs that the map takes: (..., *taken) -> (..., *made). `shape` gives the
    sizes of what is made: `shape(sizes taken, **arguments) -> sizes made`. The function's further parameters are
    arguments that a spec may pass: numbers, and words where a parameter is annotated `str`. `linear` promises f(a + b)
    = f(a) + f(b). `zero` promises f(0) = 0 with a slope other than 0 there, so that a core of zeros before the map
    starts an update of zero that trains. Raises SpecError for a name that is built in or no ASCII word, and for
    functions that cannot be called so.
    """
    if not isinstance(name, str) or not is_name(name) or name in _BUILT_IN:
        raise SpecError(Problem("register_map", "a new ASCII word", clip(name), "Choose another name."))
    what = f"register_map '{name}'"
    fixes = {
        "function": "Pass `function(x, **arguments) -> Tensor`.",
        "shape": "Pass `shape(sizes, **arguments) -> sizes`.",
    }
    arguments: dict[str, inspect.Parameter] = {}
    for role, given in (("function", function), ("shape", shape)):
        if not callable(given):
            raise SpecError(Problem(what, f"a function as `{role}`", clip(given), fixes[role]))
        parameters = _further_parameters(given)
        if parameters is None:
            expected = f"a `{role}` of one value and named arguments"
            raise SpecError(Problem(what, expected, "one that cannot be called so", fixes[role]))
        if role == "function":
            arguments = parameters
    if "at" in arguments:
        fix = "Name the parameter otherwise: index cores are for `scatter` and `gather`."
        raise SpecError(Problem(what, "arguments that are numbers or words", "`at`", fix))
    words = tuple(key for key, one in arguments.items() if one.annotation in (str, "str") or type(one.default) is str)
    required = {key: one.default is one.empty for key, one in arguments.items()}
    kind = MapKind(name, (0, None), (0, None), required, words, linear=bool(linear), zero=bool(linear or zero))
    _registered[name] = RegisteredMap(function, shape, kind)


def _further_parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
    """The named parameters of a function after its first; None if it cannot be called so, or has no signature."""
    try:
        parameters = [*inspect.signature(function).parameters.values()]
    except (TypeError, ValueError):  # some built-in functions have none
        return None
    places = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    variadic = any(one.kind is one.VAR_POSITIONAL for one in parameters)
    if not places and not variadic:
        return None
    further = [one for one in parameters if one not in places[:1]]
    if any(one.kind is one.POSITIONAL_ONLY and one.default is one.empty for one in further):
        return None
    return {one.name: one for one in further if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}


def registered_map(name: str) -> RegisteredMap | None:
    """What is registered under `name`, or None for built-in maps."""
    return _registered.get(name)


def unregistered_map(name: str, where: str | None = None) -> Problem:
    """The problem of a map that is not registered here, and whose function is needed."""
    fix = f'Call `tnpeft.register_map("{name}", function, shape)` first.'
    return Problem(f"map `{name}`", "a registered function", "none of that name", fix, where=where)


def registered_maps() -> tuple[tuple[str, RegisteredMap], ...]:
    """All registered maps: what a spec means depends on them."""
    return tuple(_registered.items())


def map_names() -> tuple[str, ...]:
    """Every map a spec may name."""
    return (*_BUILT_IN, *_registered)


def map_usages() -> list[str]:
    """How a file writes each built-in map."""
    return [kind.usage for kind in _BUILT_IN.values()]


def map_kind(name: str) -> MapKind | None:
    """What a map takes and makes; None for an unknown map."""
    return _BUILT_IN.get(name) or (_registered[name].kind if name in _registered else None)


def passes_zero(call: MapCall) -> bool:
    """Whether zeros stay zeros and can train; assumed for a map of a saved spec that is not registered here."""
    kind = map_kind(call.name)
    return kind is None or kind.linear or kind.zero or (call.name == "unit" and "floor" in call.arguments)


def place_legs(name: str, takes: Legs, gives: Legs) -> tuple[Legs, Legs]:
    """For a map with `at=`: the legs of its index core, in order, and the legs whose sizes multiply to its bound."""
    return (gives, takes) if name == "gather" else (takes, gives)


def repeats_places(name: str) -> bool:
    """Whether a place may occur twice in the index core of a map with `at=`."""
    return name == "gather"


def places_legs(call: MapCall) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """The legs of the index core of `at=`, in order, and the legs whose sizes' product bounds its places."""
    if "at" not in call.arguments:
        return None
    return place_legs(call.name, call.takes, call.gives)
