"""A spec bound to a layer: every size worked out and checked."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from tnpeft.errors import BindError, Problem, clip, near_miss
from tnpeft.network.bind_derived import derived_cores, factors_of, stored_cores
from tnpeft.network.formula import parameter_formula
from tnpeft.network.layer import Layer
from tnpeft.network.model import BoundCore, BoundInit, BoundTerm, Network
from tnpeft.network.signature import layer_of
from tnpeft.network.stack import stacked
from tnpeft.spec.declaration import Core, Declaration
from tnpeft.spec.expression import MAX_ABSOLUTE
from tnpeft.spec.habits import unknown_params
from tnpeft.spec.inits import SINGULAR_INITS, Legs
from tnpeft.spec.pattern import KINDS, LAYER_NAMES, expand, expand_axes
from tnpeft.spec.resolve import Resolved, layer_names, resolve

__all__ = ["bind", "param_problems"]


def bind(spec: Declaration, layer: Any, params: Mapping[str, Any]) -> Network:
    """The network of a spec for one layer; see `Spec.bind`."""
    given = dict(params)
    if isinstance(layer, str):
        layer = _layer_from(layer, {key: given.pop(key) for key in LAYER_NAMES if key in given})
    elif not isinstance(layer, Layer):
        layer = layer_of(layer)
    _check_kind(spec, layer)
    if layer.slices:
        return stacked(bind(spec, replace(layer, slices=0), params), layer)
    values = _check_params(spec, given)
    resolved = resolve(spec, layer.kind, layer_names(layer.weight_shape, layer.groups), values)
    if resolved.faults:
        raise BindError(*(replace(fault.problem, on=str(layer)) for fault in resolved.faults))
    network = _network(spec, layer, resolved)
    if too_wide := [*_rank_problems(network)]:
        raise BindError(*too_wide)
    return network


def _network(spec: Declaration, layer: Layer, resolved: Resolved) -> Network:
    cores = tuple(_core(core, resolved, layer) for core in spec.cores if core.derivation is None)
    order = [name for rule in spec.sizes for name in rule.names]
    trained = [resolved.legs[core.name] for core in cores if not core.frozen]
    if spec.compose == "dora":
        trained.append(("out_channels",))
    formula = parameter_formula(trained, resolved.symbols, order)
    terms = tuple(
        BoundTerm(tuple(reference.label for reference in term.references), weight, scale)
        for term, weight, scale in zip(spec.terms, resolved.weights, resolved.scales, strict=True)
    )
    derived, factors = derived_cores(spec, resolved, layer), factors_of(spec, resolved, layer)
    return Network(
        spec, layer, resolved.params, resolved.sizes, cores, terms, resolved.scale, formula,
        derived=derived, factors=factors, start_std=resolved.start_std,
    )  # fmt: skip


def _core(core: Core, resolved: Resolved, layer: Layer) -> BoundCore:
    legs = resolved.legs[core.name]
    # The base weight has the legs of its pattern, one by one: it is no tensor that somebody stores in that form.
    axes = expand_axes(core.axes, KINDS[layer.kind]) if core.origin != "weight" else [(leg,) for leg in legs]
    shape = tuple(math.prod(resolved.sizes[leg] for leg in axis) for axis in axes)
    arguments = core.init.arguments.values()
    named = next((each.legs for each in arguments if isinstance(each, Legs)), ()) if core.init.names_legs else ()
    value = next((each for each in arguments if isinstance(each, str)), None)
    named = expand(named, KINDS[layer.kind])
    sizes = tuple(resolved.sizes[leg] for leg in named)
    by_position = core.init.entry, resolved.entries.get(core.name, {})
    init = BoundInit(core.init.name, resolved.inits[core.name], named, sizes, value, *by_position)
    split = tuple(resolved.sizes[leg] for leg in legs)
    bound = BoundCore(core.name, legs, shape, init, core.frozen, core.shared, core.origin)
    return bound if split == shape else replace(bound, split=split)


_SINGULAR = ("from svd_u", "from svd_s", "from svd_v", *SINGULAR_INITS)


def _rank_problems(network: Network) -> Iterator[Problem]:
    """Cores of singular vectors may have no more of them than the weight, unfolded as out x rest, has."""
    limit = min(network.layer.out_channels, network.layer.numel // network.layer.out_channels)
    for core, declared in zip(network.cores, stored_cores(network.spec), strict=True):
        if core.init.name not in _SINGULAR:
            continue
        (bond,) = (leg for leg in core.legs if leg not in network.open_legs_of(core))
        what, on = f"core '{core.name}', `{core.origin or core.init.name}`", str(network.layer)
        skip = core.init.arguments.get("skip", 0.0)
        if skip != int(skip) or skip < 0:
            expected, fix = "a whole number as `skip`, not below 0", "Use `//`, `floor` or `max`."
            yield Problem(what, expected, f"{skip:g}", fix, declared.position, core=core.name, on=on)
        elif network.sizes[bond] + skip > limit:
            expected, fix = f"a bond of at most {limit}, the rank of the weight", f"Lower the size of `{bond}`."
            found = f"{network.sizes[bond]}{f' after {skip:g}' if skip else ''}"
            yield Problem(what, expected, found, fix, declared.position, core=core.name, on=on)


def _check_kind(spec: Declaration, layer: Layer) -> None:
    if layer.kind not in spec.layers:
        expected = f"one of {', '.join(spec.layers)}"
        fix = "Choose another spec, or add the kind to its `layers`."
        raise BindError(Problem(f"spec '{spec.name}'", expected, layer.kind, fix))


def _check_params(spec: Declaration, given: Mapping[str, Any]) -> dict[str, int | float]:
    if problems := [*param_problems(spec, given, LAYER_NAMES)]:
        raise BindError(*problems)
    numbers_given = {name: float(value) for name, value in given.items()}
    return {name: int(value) if value.is_integer() else value for name, value in numbers_given.items()}


def param_problems(spec: Declaration, given: Mapping[str, Any], also: Collection[str] = ()) -> Iterator[Problem]:
    """What is wrong with `given` as params of the spec: unknown names, values that are no numbers.

    `also` are names that the caller accepts besides params, and that may be meant.
    """
    yield from unknown_params(f"params of spec '{spec.name}'", given, spec.params, also)
    for name, value in given.items():
        if name not in spec.params:
            continue
        size: Any = abs(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
        if not size <= MAX_ABSOLUTE:
            expected, found = "a finite number", ""
            if MAX_ABSOLUTE < size < math.inf:
                expected, found = f"a number of at most {MAX_ABSOLUTE:g}", "a larger one"
            found = found or clip(value)  # thousands of digits have no text
            yield Problem(f"spec '{spec.name}', param '{name}'", expected, found, f"Write `{name}=4`.")


def _layer_from(kind: str, arguments: dict[str, Any]) -> Layer:
    """A layer from a kind's name and its numbers, as in `bind("Conv3d", in_channels=64, ...)`."""
    if kind not in KINDS:
        fix = near_miss(kind, KINDS) or "Choose one of them."
        raise BindError(Problem("layer kind", f"one of {', '.join(KINDS)}", clip(kind), fix))
    sides = {}
    for side in ("in", "out"):
        given = [arguments[key] for key in (f"{side}_channels", f"{side}_features") if key in arguments]
        key = f"{side}_features" if kind == "Linear" else f"{side}_channels"
        if len(given) != 1:
            raise BindError(Problem(kind, f"`{key}` once", f"it {len(given)} times", f"Give `{key}=...`."))
        sides[side] = _whole(kind, key, given[0])
    spatial = KINDS[kind]
    kernel_size = arguments.get("kernel_size", ())
    if isinstance(kernel_size, list | tuple):
        kernel = tuple(kernel_size)
    else:
        kernel = (_whole(kind, "kernel_size", kernel_size),) * spatial
    if len(kernel) != spatial or (spatial and "kernel_size" not in arguments):
        expected = f"{spatial} kernel sizes" if spatial else "no `kernel_size`"
        fix = "Give one number, or one per kernel axis." if spatial else "Remove it."
        raise BindError(Problem(kind, expected, str(len(kernel)), fix))
    groups = _whole(kind, "groups", arguments.get("groups", 1))
    if sides["in"] % groups or sides["out"] % groups:
        found = f"{sides['in']} and {sides['out']} with groups={groups}"
        raise BindError(Problem(kind, "channels that `groups` divides", found, "Change `groups`."))
    return Layer(kind, sides["in"], sides["out"], tuple(_whole(kind, "kernel_size", size) for size in kernel), groups)


def _whole(kind: str, key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise BindError(Problem(f"{kind}, `{key}`", "a positive whole number", clip(value), f"Give `{key}=64`, say."))
    return int(value)
