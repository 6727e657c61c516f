"""`attach(init=...)`: values for the cores of layers, in place of those that their inits draw."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

from torch import Tensor

from tnpeft.adapters import Captured
from tnpeft.adapters.given import given_misfit
from tnpeft.adapters.sharing import sharing_key
from tnpeft.errors import AttachError, Problem, TnpeftError, clip, near_miss
from tnpeft.network import BoundCore, Network

__all__ = ["Start", "given_values"]

Start = Mapping[str, Tensor] | Callable[[str, str, Network], Tensor | None]
"""Tensors by `layer.core`, or a function of a layer's name, a core's name and the layer's network."""

_USAGE = (
    'For example `init={"layer.core": tensor}`, or a function (layer, core, network) -> tensor or None, perhaps of an '
    "object with `prepare(layers)`."
)


def given_values(
    start: object, networks: Mapping[str, Network], captured: Mapping[str, Captured], aliases: Mapping[str, str]
) -> dict[str, dict[str, Tensor]]:
    """The values that `start` gives for the cores of each layer; `aliases` are other names of layers.

    A core that layers share is asked for once, under the first of these layers; a mapping may name any of them. Raises
    AttachError with everything that cannot be a core's value.
    """
    held = _Held(networks, captured)
    if isinstance(start, Mapping):
        found = _from_mapping(start, held, aliases)
    elif callable(start):
        found = _from_function(start, held, networks)
    else:
        raise AttachError(Problem("`init`", "tensors by name, or a function", clip(start), _USAGE))
    values: dict[str, dict[str, Tensor]] = {}
    problems: list[Problem] = []
    for layer, core, value in found:
        network = networks[layer]
        if misfit := _misfit(network, core, value):
            problems.append(Problem(f"`init`, core '{core.name}'", *misfit, core=core.name, layers=(layer,)))
        else:
            values.setdefault(layer, {})[core.name] = value
    if problems:
        raise AttachError(*problems)
    return values


def _misfit(network: Network, core: BoundCore, value: Any) -> tuple[str, str, str] | None:
    if network.start_std is not None and not core.frozen:
        found = "a value for a core that trains"
        return "values that inits draw, which `start_std` scales", found, "Remove `start_std` from the spec."
    return given_misfit(network, core, value)


class _Held:
    """Every stored core of some layers, once: a shared one under the first layer that has it."""

    def __init__(self, networks: Mapping[str, Network], captured: Mapping[str, Captured]) -> None:
        self.cores: dict[tuple[str, str], BoundCore] = {}
        self.places: dict[str, tuple[str, str]] = {}  # by every name of a core
        self.not_stored: dict[str, str] = {}  # how to give a core that is made of others
        first: dict[Hashable, tuple[str, str]] = {}
        for layer, network in networks.items():
            for made in network.derived:
                roots = ", ".join(f"'{root}'" for root in network.roots_of(made.name))
                self.not_stored[key_of(layer, made.name)] = f"It is derived: give values for {roots}."
            for core in network.cores:
                if core.origin == "weight":
                    self.not_stored[key_of(layer, core.name)] = "It is the layer's own weight: leave it out."
                    continue
                place = (layer, core.name)
                if core.shared is not None:
                    place = first.setdefault(sharing_key(network.spec, core, captured[layer]), place)
                self.cores.setdefault(place, core)
                self.places[key_of(layer, core.name)] = place


def key_of(layer: str, core: str) -> str:
    """The name of a core in a mapping."""
    return f"{layer}.{core}" if layer else core


_Found = Iterator[tuple[str, BoundCore, Any]]


def _from_mapping(start: Mapping[Any, Any], held: _Held, aliases: Mapping[str, str]) -> _Found:
    """Each value with its place. Raises AttachError for names of no core, and several values for a shared one."""
    problems, named = [], dict[tuple[str, str], str]()
    for key in start:
        layer, _, core = key.rpartition(".") if isinstance(key, str) else ("", "", "")
        name = key_of(aliases[layer], core) if layer in aliases else key
        if not isinstance(key, str) or name not in held.places:
            fix = held.not_stored.get(name) or near_miss(str(key), held.places)
            fix = fix or "Name a stored core as `layer.core`: layers as `model.named_modules()` has them."
            problems.append(Problem("`init`", "names of stored cores", clip(key), fix))
            continue
        first = named.setdefault(held.places[name], key)
        if first != key and not _same(start[first], start[key]):
            fix = "Give it once: its layers have one tensor."
            problems.append(Problem(f"`init`, {clip(key)}", "one value for a shared core", f"also {clip(first)}", fix))
    if problems:
        raise AttachError(*problems)
    return iter([(place[0], held.cores[place], start[key]) for place, key in named.items()])


def _same(one: Any, other: Any) -> bool:
    both = isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape
    return one is other or (both and bool((one == other).all()))


def _from_function(start: Callable[..., Any], held: _Held, networks: Mapping[str, Network]) -> _Found:
    """What a function gives for each core, after its `prepare`, if it has one, saw all layers. Raises AttachError."""
    prepare = getattr(start, "prepare", None)
    if prepare is not None:
        _called(functools.partial(prepare, dict(networks)), "`init`, `prepare(layers)`", ())
    found = []
    for (layer, name), core in held.cores.items():
        value = _called(functools.partial(start, layer, name, networks[layer]), f"`init`, core '{name}'", (layer,))
        if value is not None:
            found.append((layer, core, value))
    return iter(found)


def _called(call: Callable[[], Any], what: str, layers: tuple[str, ...]) -> Any:
    """What a user's function returns. Raises AttachError for what it raises, except for tnpeft's own errors."""
    try:
        return call()
    except TnpeftError:
        raise
    except Exception as error:
        found = clip(f"{type(error).__name__}: {error}")[1:-1]
        problem = Problem(what, "a tensor or None", found, "Mend the function given as `init`.", layers=layers)
        raise AttachError(problem) from error
