"""Whether two specs are the same network under other names and in another order: a labelled graph of all that counts.

Nodes are params, cores with their axes and legs, terms, references, maps and indices. The only names in labels are
those of layers, inits and maps. Expressions are in labels with params as numbered places; in sizes, the indices that
they read are written out.
"""

from __future__ import annotations

import ast
import copy
import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tnpeft.spec.canonical_form import canonical_form
from tnpeft.spec.declaration import Core, Declaration, Term
from tnpeft.spec.derived import Reference, index_of, legs_before_maps
from tnpeft.spec.expression import Expression, parse_expression
from tnpeft.spec.inits import Entry, Init, Last, Legs, init_function
from tnpeft.spec.legs import cores_by_name
from tnpeft.spec.pattern import ELLIPSIS

__all__ = ["Canonical", "canonical"]

_SAME = {"out_features": "out_channels", "in_features": "in_channels"}
_BY_FIRST_LEG = ("orthogonal", "cosine", "sine")  # inits for which a core's first leg is another matter than the rest
_TUPLES = ("factorize", "kernel_size")


class Canonical(NamedTuple):
    """The canonical `form` of a network, and `hash`, the SHA-256 of it."""

    form: str
    hash: str


def canonical(spec: Declaration) -> Canonical:
    """The canonical form of a spec; see `Spec.canonical`."""
    graph = _Graph(spec)
    form = canonical_form(graph.labels, graph.edges)
    return Canonical(form, hashlib.sha256(form.encode()).hexdigest())


class _Graph:
    def __init__(self, spec: Declaration) -> None:
        self.spec, self.cores = spec, cores_by_name(spec)
        self.labels: list[str] = []
        self.edges: list[tuple[int, int, str]] = []
        self.rules = {name: rule for rule in spec.sizes for name in rule.names}
        self.params: dict[str, int] = {}
        for name, default in spec.params.items():
            self.params[name] = self.node("param", expressions={"default": default})
        self.indices: dict[tuple[object, str], int] = {}
        self.scopes: dict[str, int] = {}
        about = {"scale": spec.scale, "start_std": spec.start_std}
        table = sorted(spec.factors.items()) if spec.factors and "factorize" in spec.text else ()
        kinds = " ".join(sorted(spec.layers))
        self.node("spec", kinds, spec.start, spec.compose or "", repr(table), expressions=about)
        self.core_nodes = {core.name: self.node(*self._label(core)) for core in spec.cores}
        self.axes = {core.name: self._axes(core) for core in spec.cores}
        for core in spec.cores:
            (self._stored if core.derivation is None else self._derived)(core)
        for term in spec.terms:
            self._term(term)

    def node(self, *label: str, expressions: dict[str, Expression | None] | None = None) -> int:
        """A new node; its expressions stand in its label, with edges to the params that they read."""
        reads: list[tuple[str, str]] = []
        parts = [*label]
        for role, expression in (expressions or {}).items():
            if expression is not None:
                text, names = self._text(expression.tree)
                parts.append(f"{role}={text}")
                reads += [(f"{role} {place}", name) for place, name in enumerate(names)]
        self.labels.append(" | ".join(parts))
        number = len(self.labels) - 1
        for role, name in reads:
            self.edges.append((number, self.params[name], role))
        return number

    def _text(self, tree: ast.expr) -> tuple[str, list[str]]:
        """An expression with its params as numbered places, and their names in that order."""
        names: dict[str, int] = {}
        whole = _Written(self).visit(copy.deepcopy(tree))
        for node in ast.walk(whole):
            if isinstance(node, ast.Name) and node.id in self.spec.params:
                node.id = f"p{names.setdefault(node.id, len(names))}_"
        return ast.unparse(whole), [*names]

    def size(self, leg: str) -> Expression | None:
        """The size of a leg; None for `k...`, whose sizes are the kernel's."""
        if leg == ELLIPSIS:
            return None
        if leg in self.spec.params:
            return parse_expression(leg)
        rule = self.rules.get(leg)
        if rule is None:
            return self.spec.bond
        if len(rule.names) == 1 or not _is_tuple(rule.expression.tree):
            return rule.expression
        return parse_expression(f"({rule.expression.text})[{rule.names.index(leg)}]")

    def _leg(self, leg: str, what: str = "leg") -> int:
        return self.node(what, ELLIPSIS if leg == ELLIPSIS else "", expressions={"size": self.size(leg)})

    def _label(self, core: Core) -> tuple[str, ...]:
        if core.derivation is not None:
            return ("derived",)
        sharing = core.shared if core.shared in (None, "model") else "scope"
        return "core", "frozen" if core.frozen else "trained", str(sharing), core.origin or "", core.init.name

    def _axes(self, core: Core) -> list[tuple[int, tuple[int, ...]]]:
        """The stored axes of a core, each with its legs."""
        groups = core.axes if core.derivation is None and core.axes else tuple((leg,) for leg in core.legs)
        ordered = init_function(core.init.name) is not None
        axes = []
        for place, group in enumerate(groups):
            axis = self.node("axis")
            first = core.init.name in _BY_FIRST_LEG and place == 0
            self.edges.append((self.core_nodes[core.name], axis, f"axis {place if ordered else 'first' * first}"))
            legs = tuple(self._leg(leg) for leg in group)
            self.edges += [(axis, leg, f"leg {number}") for number, leg in enumerate(legs)]
            axes.append((axis, legs))
        return axes

    def _stored(self, core: Core) -> None:
        node = self.core_nodes[core.name]
        flat = [leg for _, legs in self.axes[core.name] for leg in legs]
        by_name = dict(zip((leg for axis in core.axes or () for leg in axis), flat, strict=False))
        if core.shared not in (None, "model"):
            scope = self.scopes.get(str(core.shared))
            self.scopes[str(core.shared)] = scope = self.node("scope") if scope is None else scope
            self.edges.append((node, scope, "shared"))
        self._init(core.init, node, [*core.legs], by_name)

    def _init(self, init: Init, node: int, legs: list[str], places: dict[str, int]) -> None:
        """An init's arguments: expressions as nodes, legs as edges to those of the core, or by their sizes."""
        fan: Iterable[str] = legs[1:] if init.name == "kaiming_uniform" and "fan" not in init.arguments else ()
        for key, value in init.arguments.items():
            if isinstance(value, Expression):
                self.edges.append((node, self.node("argument", expressions={key: value}), key))
            elif isinstance(value, Entry):
                self._entry(value, node, places)
            elif isinstance(value, str):
                self.edges.append(
                    (node, self.core_nodes[value], key) if value in self.core_nodes else (node, node, value)
                )
            elif isinstance(value, Last):
                fan = legs[-value.count :]
            elif isinstance(value, Legs) and key == "fan":
                fan = value.legs
            elif isinstance(value, Legs):
                for number, leg in enumerate(value.legs):
                    inside = key == "same" and leg in places
                    target = places[leg] if inside else self._leg(leg, "named")
                    self.edges.append((node, target, key if inside else f"{key} {number}"))
        self.edges += [(node, places[leg], "fan") for leg in fan if leg in places]

    def _entry(self, entry: Entry, node: int, places: dict[str, int]) -> None:
        """What each entry is, the core's legs in it numbered as they come."""
        tree = copy.deepcopy(entry.expression.tree)
        names = [name for name in entry.expression.names if name in places]
        for each in ast.walk(tree):
            if isinstance(each, ast.Name) and each.id in names:
                each.id = f"position.{names.index(each.id)}"
        argument = self.node("entry", expressions={"entry": Expression("", tree)})
        self.edges += [(node, argument, "entry"), *((argument, places[name], f"{n}") for n, name in enumerate(names))]

    def _index(self, scope: object, leg: str) -> int:
        key = (scope, leg)
        if key not in self.indices:
            self.indices[key] = self._leg(leg, "index")
        return self.indices[key]

    def _references(self, owner: int, references: Sequence[Reference], scope: object, shared: set[str]) -> None:
        """Each occurrence of a core: its axes, in order, under the indices of the product that it stands in."""
        inner = (scope, owner)
        for reference in references:
            node = self.node("reference")
            self.edges += [(owner, node, "of"), (node, self.core_nodes[reference.core], "core")]
            core = self.cores[reference.core]
            own = core.axes if core.derivation is None and core.axes else tuple((leg,) for leg in core.legs)
            axes = self.axes[reference.core]
            for place, group in enumerate(own if reference.axes is None else reference.axes):
                occurrence = self.node("occurrence", "" if place < len(axes) else str(place))
                self.edges.append((node, occurrence, "axis"))
                if place < len(axes):
                    self.edges.append((occurrence, axes[place][0], "at"))
                for number, leg in enumerate(group):
                    index = self._index(scope if leg in shared else inner, leg)
                    self.edges.append((occurrence, index, f"index {number}"))

    def _derived(self, core: Core) -> None:
        derivation, node = core.derivation, self.core_nodes[core.name]
        assert derivation is not None
        before = set(legs_before_maps(core.legs, derivation.maps))
        for summand in derivation.summands:
            about = {"scale": summand.scale, "factor": derivation.scale}
            part = self.node("summand", expressions=dict(about))
            self.edges.append((node, part, "sum"))
            self._references(part, summand.references, core.name, before)
        for number, call in enumerate(derivation.maps):
            words = [f"{key}={value}" for key, value in sorted(call.arguments.items()) if isinstance(value, str)]
            named = [word for word in words if not word.startswith("at=")]
            step = self.node("map", call.name, *named, expressions=dict(sorted(call.expressions())))
            self.edges.append((node, step, f"map {number}"))
            if (at := index_of(call)) is not None:
                self.edges.append((step, self.core_nodes[at], "at"))
            for role, legs in (("takes", call.takes), ("gives", call.gives)):
                self.edges += [(step, self._index(core.name, leg), f"{role} {n}") for n, leg in enumerate(legs)]
        for leg, (axis, _) in zip(core.legs, self.axes[core.name], strict=True):
            self.edges.append((axis, self._index(core.name, leg), "is"))

    def _term(self, term: Term) -> None:
        node = self.node("term", expressions={"scale": term.scale})
        self._references(node, term.references, id(term), set(term.places))
        for place, axis in enumerate(term.weight):
            made = self.node("weight axis")
            self.edges.append((node, made, f"weight {place}"))
            self.edges += [(made, self._index(id(term), leg), f"index {number}") for number, leg in enumerate(axis)]


class _Written(ast.NodeTransformer):
    """Indices that a size reads written out as their own sizes; one word for each of the layer's numbers."""

    def __init__(self, graph: _Graph) -> None:
        self.graph = graph

    def visit_Name(self, node: ast.Name) -> ast.expr:
        name = _SAME.get(node.id, node.id)
        rule = self.graph.rules.get(name)
        if name in self.graph.spec.params or rule is None:
            return ast.Name(name, node.ctx)
        size = self.graph.size(name)
        assert size is not None
        tree: ast.expr = self.visit(copy.deepcopy(size.tree))
        return tree


def _is_tuple(tree: ast.expr) -> bool:
    """Whether a size of several names is unpacked: a factorisation, the kernel, or numbers in parentheses."""
    if isinstance(tree, ast.Call):
        return isinstance(tree.func, ast.Name) and tree.func.id in _TUPLES
    if isinstance(tree, ast.BinOp):
        return _is_tuple(tree.left) or _is_tuple(tree.right)
    return isinstance(tree, ast.Tuple) or (isinstance(tree, ast.Name) and tree.id in _TUPLES)
