"""Sizes of a spec for given numbers: the one place where expressions meet a layer.

Used twice: at load, for sample layers of every kind in `layers`, and at `bind`, for the real one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter

from tnpeft.errors import Position, Problem, clip
from tnpeft.spec.declaration import Core, Declaration, SizeRule, Term
from tnpeft.spec.derived import arrow_legs
from tnpeft.spec.expression import Expression, ExpressionError, Number, Value, parse_expression
from tnpeft.spec.factorize import bounded_product, times
from tnpeft.spec.legs import inner_legs, uses_of
from tnpeft.spec.maps import MapCall, size_problem
from tnpeft.spec.pattern import ELLIPSIS, KINDS, Axes, expand, expand_axes, kernel_indices

__all__ = ["Fault", "Resolved", "layer_names", "resolve"]

MAX_SIZE = 1 << 24  # of one index
MAX_NUMEL = 1 << 32  # of one core
MAX_PRODUCT = 10**18  # of what is multiplied out for a message


@dataclass(frozen=True)
class Fault:
    """A mistake found while sizes are worked out; a `structural` one holds for every layer of the kind."""

    problem: Problem
    structural: bool


@dataclass
class Resolved:
    """All that the numbers decide; incomplete if there are `faults`, which say why."""

    params: dict[str, Number] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)  # every leg, `k...` expanded, in order of appearance
    legs: dict[str, tuple[str, ...]] = field(default_factory=dict)  # by core
    weights: list[Axes] = field(default_factory=list)  # of the terms
    scales: list[float] = field(default_factory=list)  # of the terms
    scale: float = 1.0
    start_std: float | None = None
    inits: dict[str, dict[str, float]] = field(default_factory=dict)  # arguments by core
    entries: dict[str, dict[str, Value]] = field(default_factory=dict)  # numbers that each entry is made of, by core
    maps: dict[str, list[dict[str, float]]] = field(default_factory=dict)  # their arguments, by derived core
    sums: dict[str, list[float]] = field(default_factory=dict)  # scales of the summands, by derived core
    symbols: dict[str, Expression] = field(default_factory=dict)  # legs whose size is an expression of params alone
    faults: list[Fault] = field(default_factory=list)


def layer_names(weight_shape: Sequence[int], groups: int) -> dict[str, Value]:
    """The layer's numbers by their names in expressions; `in_channels` is the weight's second axis."""
    out_channels, in_channels, *kernel = weight_shape
    return {
        "out_channels": out_channels,
        "out_features": out_channels,
        "in_channels": in_channels,
        "in_features": in_channels,
        "groups": groups,
        "kernel_size": tuple(kernel),
    }


def resolve(source: Declaration, kind: str, layer: Mapping[str, Value], given: Mapping[str, Number]) -> Resolved:
    """Work out params, sizes, legs, axes, scales and init arguments for a layer of `kind`; never raises."""
    return _Resolver(source, kind, layer, given).run()


class _Resolver:
    def __init__(self, source: Declaration, kind: str, layer: Mapping[str, Value], given: Mapping[str, Number]) -> None:
        self.source, self.given = source, given
        self.spatial = KINDS[kind]
        self.kernel = kernel_indices(self.spatial)
        self.kind = kind
        self.layer = layer
        self.values: dict[str, Value] = dict(layer)
        self.failed: set[str] = set()
        self.rules = {name: rule for rule in source.sizes for name in rule.names}
        self.padded: set[str] = set()
        # Worked out once; thousands of legs may have its size.
        self.bond: Value | ExpressionError | None = None
        self.bond_place = source.place("bond")
        # Expressions that read params alone.
        own = {"bond": source.bond, **{rule.names[0]: rule.expression for rule in source.sizes}}
        self.plain = {key for key, rule in own.items() if rule is not None and not {*rule.names} - {*source.params}}
        self.uses = uses_of(source)
        self.arrows = {leg for each in source.derivations.values() for call in each.maps for leg in arrow_legs(call)}
        self.open = {leg for term in source.terms for axis in term.weight for leg in axis}
        self.out = Resolved()

    def run(self) -> Resolved:
        self._params()
        self._rules()
        self._legs()
        self._axes()
        self._scales()
        self._inits()
        self._derived()
        self._start_std()
        return self.out

    def _fault(
        self, where: Position, what: str, error: ExpressionError, core: str | None = None, index: str | None = None
    ) -> None:
        problem = Problem(what, error.expected, error.found, error.fix, where, core, index)
        self.out.faults.append(Fault(problem, error.structural))

    def _params(self) -> None:
        for name, expression in self.source.params.items():
            try:
                value = self.given[name] if name in self.given else expression.number(self.values)
            except (ExpressionError, KeyError) as error:
                self.failed.add(name)
                if isinstance(error, ExpressionError):
                    self._fault(self.source.place("params"), f"param '{name}'", error)
                continue
            self.values[name] = self.out.params[name] = value

    def _rules(self) -> None:
        """Work out the lines of `sizes`, each after those that it reads."""
        reads = {
            rule.names[0]: {self.rules[name].names[0] for name in rule.expression.names if name in self.rules}
            for rule in self.source.sizes
            if rule.names[0] not in self.source.params
        }
        try:
            order = [*TopologicalSorter(reads).static_order()]
        except CycleError:  # reported where the circle can be shown whole
            self.failed.update(self.rules)
            return
        for name in order:
            self._rule(self.rules[name])

    def _rule(self, rule: SizeRule) -> None:
        if any(name not in self.values for name in rule.expression.names):
            self.failed.update(rule.names)  # reported where it broke
            return
        if rule.names[0] in self.source.params:
            return
        try:
            value = rule.expression.evaluate(self.values, self.source.factors)
            self._unpack(rule, value)
        except ExpressionError as error:
            self.failed.update(rule.names)
            self._fault(rule.node.position, f"`sizes`, {' '.join(rule.names)}", error, index=rule.names[0])
            return
        if rule.expression.pads or any(read in self.padded for read in rule.expression.names):
            self.padded.update(rule.names)

    def _unpack(self, rule: SizeRule, value: Value) -> None:
        names = rule.names
        if names == (ELLIPSIS,):
            items = value if isinstance(value, tuple) else (value,) * self.spatial
            if len(items) != self.spatial:
                raise ExpressionError(
                    f"{self.spatial} sizes for {self.kind}", str(len(items)), "Give one per kernel axis."
                )
            self.values[ELLIPSIS] = items
        elif len(names) == 1:
            # One index takes a tuple of one; a name that only expressions read may hold a longer one.
            if isinstance(value, tuple) and len(value) == 1 and names[0] in self.uses:
                value = value[0]
            self.values[names[0]] = value
        elif not isinstance(value, tuple):
            self.values.update(dict.fromkeys(names, value))
        elif len(value) != len(names):
            found = f"{len(value)} ({self.kind})"
            fix = f"Name {len(value)} indices, or change `{rule.expression.text}`."
            if not value:
                fix = f"Write `{ELLIPSIS}` for one index per kernel axis, or leave {self.kind} out of `layers`."
            raise ExpressionError(f"{len(names)} sizes to unpack", found, fix)
        else:
            self.values.update(zip(names, value, strict=True))

    def _legs(self) -> None:
        for core in self.source.cores:
            self.out.legs[core.name] = legs = expand(core.legs, self.spatial)
            for leg in legs:
                if leg not in self.out.sizes and leg not in self.failed:
                    self._leg(leg, core)
            sizes = [self.out.sizes[leg] for leg in legs if leg in self.out.sizes]
            if bounded_product(sizes, MAX_NUMEL) > MAX_NUMEL:
                expected = f"at most {MAX_NUMEL} elements"
                error = ExpressionError(expected, times(sizes), "Use smaller sizes.", structural=False)
                self._fault(core.position, f"core '{core.name}'", error, core=core.name)
        for owner, named in inner_legs(self.source):
            for leg in expand(named, self.spatial):
                if leg not in self.out.sizes and leg not in self.failed:
                    self._leg(leg, owner)

    def _leg(self, leg: str, core: Core | Term) -> None:
        where = core.position
        what, name = (f"core '{core.name}'", core.name) if isinstance(core, Core) else (core.label, None)
        rule = self.rules.get(leg)
        if leg in self.kernel:
            kernel = self.values.get(ELLIPSIS, self.layer["kernel_size"])
            if ELLIPSIS in self.failed or not isinstance(kernel, tuple):
                return
            value: Value = kernel[self.kernel.index(leg)]
        elif leg in self.values and (rule or leg in self.source.params):
            value = self.values[leg]
            if rule is not None:
                where = rule.node.position
            self._symbol(leg, rule)
        elif leg not in self.failed and self._is_bond(leg):
            self._bond(leg)
            return
        else:
            return
        self._size(leg, value, where, f"{what}, index '{leg}'", name)

    def _is_bond(self, leg: str) -> bool:
        """Whether `bond` sizes a leg: two or more cores share it, and `weight` does not have it."""
        return self.uses[leg] > 1 and leg not in self.open and leg not in self.arrows

    def _bond(self, leg: str) -> None:
        bond = self.source.bond
        if bond is None:
            return
        if self.bond is None:
            if any(name not in self.values for name in bond.names):
                return
            try:
                self.bond = bond.number(self.values, self.source.factors)
            except ExpressionError as error:
                self._fault(self.bond_place, "`bond`", error)
                self.bond = error
        if isinstance(self.bond, ExpressionError):
            return
        if "bond" in self.plain:
            self.out.symbols[leg] = bond
        self._size(leg, self.bond, self.bond_place, "`bond`")

    def _symbol(self, leg: str, rule: SizeRule | None) -> None:
        if rule is None:
            self.out.symbols[leg] = parse_expression(leg)
        elif rule.names[0] in self.plain and not isinstance(self.values[leg], tuple):
            self.out.symbols[leg] = rule.expression

    def _size(self, leg: str, value: Value, where: Position, what: str, core: str | None = None) -> None:
        if isinstance(value, tuple):
            fix = "Name one index for each on the left." if len(value) > 1 else "Leave this kind out of `layers`."
            error = ExpressionError("one size", f"{len(value)} sizes", fix)
        elif value != int(value):
            fix = "Use `//`, `floor` or `ceil`."
            error = ExpressionError("a whole size", f"{value:g}", fix, structural=False)
        elif not 1 <= value <= MAX_SIZE:
            error = ExpressionError(f"a size from 1 to {MAX_SIZE}", f"{value:g}", "Change its size.", structural=False)
        else:
            self.out.sizes[leg] = int(value)
            return
        self.failed.add(leg)
        self._fault(where, what, error, core=core, index=leg if core else None)

    def _axes(self) -> None:
        """The weight of each term, axis by axis, and the base weight if it is a core."""
        for term in self.source.terms:
            axes = expand_axes(term.weight, self.spatial)
            self.out.weights.append(axes)
            self._products(axes, term.label, term.position, None)
        for core in self.source.cores:
            if core.origin == "weight":
                self._products(expand_axes(core.axes, self.spatial), f"core '{core.name}'", core.position, core.name)

    def _products(self, axes: Axes, label: str, where: Position, core: str | None) -> None:
        """The legs of each axis must multiply to its size. Those of padded axes, but in a base core, may exceed it."""
        shape = (self.layer["out_channels"], self.layer["in_channels"], *self._kernel())
        if len(axes) != len(shape):
            return  # checked, with the pattern's place, where the pattern is at hand
        for number, (axis, size) in enumerate(zip(axes, shape, strict=True)):
            if any(leg not in self.out.sizes for leg in axis):
                continue
            sizes = [self.out.sizes[leg] for leg in axis]
            product = bounded_product(sizes, MAX_PRODUCT)
            padded = any(leg in self.padded for leg in axis) and core is None
            if product == size or (padded and isinstance(size, int) and product > size):
                continue
            name = ("out_channels", "in_channels")[number] if number < 2 else f"kernel_size[{number - 2}]"
            result = str(product) if product <= MAX_PRODUCT else f"more than {MAX_PRODUCT}"
            found = f"{times(sizes)} = {result}" if len(axis) > 1 else result
            fix = "Change `sizes` or `factors`, or group the legs of `weight` otherwise."
            if core is not None and any(leg in self.padded for leg in axis):
                fix = "The base weight has no padding: factorise without `pad=true`."
            what = f"{label}, axis {number + 1} ({clip(' '.join(axis) or '1')[1:-1]})"
            error = ExpressionError(f"a product of {size} ({name})", found, fix, structural=False)
            self._fault(where, what, error, core=core)

    def _kernel(self) -> tuple[Value, ...]:
        kernel = self.layer["kernel_size"]
        return kernel if isinstance(kernel, tuple) else ()

    def _scales(self) -> None:
        for term in self.source.terms:
            what = f"{term.label.removesuffix(', `weight`')}, `scale`"
            self.out.scales.append(self._scale(term.scale, term.scale_position or term.position, what))
        self.out.scale = self._scale(self.source.scale, self.source.place("scale"), "`scale`")

    def _scale(self, expression: Expression, where: Position, what: str) -> float:
        if any(name not in self.values for name in expression.names):
            return 1.0
        try:
            scale = expression.number(self.values, self.source.factors)
            if scale == 0:
                fix = "A scale of zero trains nothing; the published code has it below rank 4."
                raise ExpressionError("a number other than zero", "0", fix, structural=False)
            return float(scale)
        except ExpressionError as error:
            self._fault(where, what, error)
            return 1.0

    def _start_std(self) -> None:
        expression = self.source.start_std
        if expression is None or any(name not in self.values for name in expression.names):
            return
        try:
            self.out.start_std = float(expression.number(self.values, self.source.factors))
            if not self.out.start_std > 0:
                fix = "For example `start_std: 0.01`."
                raise ExpressionError("a positive number", f"{self.out.start_std:g}", fix, structural=False)
        except ExpressionError as error:
            self._fault(self.source.place("start_std"), "`start_std`", error)

    def _derived(self) -> None:
        """Scales and maps of derived cores, and whether the sizes fit the arrows."""
        for name, derivation in self.source.derivations.items():
            core = next(core for core in self.source.cores if core.name == name)
            self.out.sums[name] = [
                self._scale(summand.scale, summand.scale_position or core.position, f"{summand.label}, `scale`")
                * self._scale(derivation.scale, derivation.scale_position or core.position, f"core '{name}', `scale`")
                for summand in derivation.summands
            ]
            self.out.maps[name] = [
                self._map(core, number, call) for number, call in enumerate(derivation.maps, start=1)
            ]

    def _map(self, core: Core, number: int, call: MapCall) -> dict[str, float]:
        what, where = f"core '{core.name}', map {number}", call.position or core.position
        arguments: dict[str, float] = {}
        for key, argument in call.arguments.items():
            if isinstance(argument, str):
                continue
            if any(name not in self.values for name in argument.names):
                return arguments
            try:
                arguments[key] = float(argument.number(self.values, self.source.factors))
            except ExpressionError as error:
                self._fault(where, f"{what}, `{key}`", error, core=core.name)
                return arguments
        taken, made = (
            tuple(self.out.sizes.get(leg, 0) for leg in expand(legs, self.spatial)) for legs in (call.takes, call.gives)
        )
        if all(taken) and all(made):
            words = {key: argument for key, argument in call.arguments.items() if isinstance(argument, str)}
            problem = size_problem(call, taken, made, {**arguments, **words})
            if problem is not None:
                self._fault(where, what, ExpressionError(*problem, structural=False), core=core.name)
        return arguments

    def _inits(self) -> None:
        for core in self.source.cores:
            legs = self.out.legs[core.name]
            arguments: dict[str, float] = {}
            for key, argument in core.init.expressions():
                if any(name not in self.values for name in argument.names):
                    return
                try:
                    arguments[key] = float(argument.number(self.values, self.source.factors))
                except ExpressionError as error:
                    self._init_fault(core, key, error)
            if core.init.name == "kaiming_uniform":
                self._fan(core, legs, arguments)
            if core.init.entry is not None:
                names = {*core.init.entry.names} - {*core.legs}
                self.out.entries[core.name] = {name: self.values[name] for name in names if name in self.values}
            self.out.inits[core.name] = arguments

    def _init_fault(self, core: Core, key: str, error: ExpressionError) -> None:
        self._fault(core.init.position or core.position, f"core '{core.name}', `{key}`", error, core=core.name)

    def _fan(self, core: Core, legs: tuple[str, ...], arguments: dict[str, float]) -> None:
        arguments.setdefault("gain", 1.0)
        if "fan" not in core.init.arguments or "fan" not in arguments:
            over = core.init.legs_of_fan(legs, self.spatial)
            over = legs[1:] if over is None else over
            if any(leg not in self.out.sizes for leg in over):
                return
            product = bounded_product([self.out.sizes[leg] for leg in over], MAX_NUMEL)
            if product > MAX_NUMEL:
                expected, fix = f"a fan of at most {MAX_NUMEL}", "Name fewer legs, or use smaller sizes."
                error = ExpressionError(expected, f"the product of {len(over)} legs", fix, structural=False)
                self._init_fault(core, "fan", error)
                return
            arguments["fan"] = float(product)
        if not arguments["fan"] > 0:
            error = ExpressionError("a positive fan", f"{arguments['fan']:g}", "Change `fan`.", structural=False)
            self._init_fault(core, "fan", error)
