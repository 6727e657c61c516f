"""The cores and terms of a spec file, parsed part by part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from tnpeft.documents.nodes import Node
from tnpeft.errors import Position, Problems, clip, near_miss
from tnpeft.spec.declaration import Core, Term
from tnpeft.spec.derived import Derivation, Reference, Summand, parse_reference
from tnpeft.spec.expression import Expression, ExpressionError, is_name, parse_expression
from tnpeft.spec.inits import DEFAULT_INIT, Init, parse_init
from tnpeft.spec.maps import parse_map
from tnpeft.spec.pattern import ELLIPSIS, parse_axes, parse_legs

__all__ = ["CoreReader"]

MAX_CORES = 256

# What checks wait for, and the keys that say it.
_PARTS = {"params": ("params",), "sizes": ("sizes", "bond"), "cores": ("cores", "weight", "terms")}

T = TypeVar("T")


class CoreReader:
    """Reads part by part; `incomplete` has the names of parts in which something is missing."""

    def __init__(self, root: Node, broken: set[tuple[str | int, ...]], problems: Problems, known_inits: bool) -> None:
        self.root, self.broken, self.problems, self.known_inits = root, broken, problems, known_inits
        # A misspelt key is reported once, not again through all that its value would have said.
        absent = {path[0] for path in broken if len(path) == 1 and root.get(path[0]) is None}
        self.incomplete = {part for part, keys in _PARTS.items() if not absent.isdisjoint(keys)}

    def _node(self, key: str) -> Node | None:
        """The part under a key of the file, None where it is absent or of the wrong type."""
        return None if (key,) in self.broken else self.root.get(key)

    def _lacks(self, part: str, where: Position, *problem: str, core: str | None = None) -> None:
        """Report a mistake that leaves a part incomplete: checks of the whole part are then left out."""
        self.problems.add(where, *problem, core=core)
        self.incomplete.add(part)

    def _value(self, key: str, default: T) -> T:
        node = self._node(key)
        value: T = default if node is None or node.value is None else node.value
        return value

    def _expression(self, node: Node, what: str) -> Expression | None:
        if node.kind == "list":
            text = "(" + "".join(f"{_number(item)}, " for item in node.value) + ")"
        else:
            text = _number(node)
        try:
            return parse_expression(text)
        except ExpressionError as error:
            where = node.at(error.offset) if node.kind == "scalar" else node.position
            self.problems.add(where, what, error.expected, error.found, error.fix)
            return None

    def _cores(self) -> tuple[Core, ...]:
        default = self._node("init")
        default_init = self._init(("init",), default, DEFAULT_INIT) or DEFAULT_INIT
        named = default is not None and default.value is not None
        node = self._node("cores")
        if node is None:
            self.incomplete.add("cores")
            return ()
        if not node.items():
            fix = "For example `cores: {up: o r}`."
            self._lacks("cores", node.position, "`cores`", "at least one core", "none", fix)
        if len(node.items()) > MAX_CORES:
            fix = "Write a smaller network."
            found = str(len(node.items()))
            self._lacks("cores", node.position, "`cores`", f"at most {MAX_CORES} cores", found, fix)
            return ()
        cores = [self._core(key, value, default_init, named) for key, value in node.items()]
        return tuple(core for core in cores if core is not None)

    def _core(self, key: Node, value: Node, default: Init, named: bool) -> Core | None:
        """One core; `named` says whether the file names an init for all. None if its legs are unknown."""
        name = str(key.value)
        path = ("cores", name)
        fields: dict[str, Any] = {word.value: item for word, item in value.items()}
        legs_node = value if value.kind == "scalar" else fields.get("legs")
        if not name.isascii() or not name.isidentifier():
            fix = "Use letters, digits and `_`, starting with a letter."
            self._lacks("cores", key.position, f"core {clip(name)}", "an ASCII word", clip(name), fix, core=name)
            return None
        if legs_node is None or path in self.broken or (*path, "legs") in self.broken:
            self.incomplete.add("cores")
            return None
        before = len(self.problems)
        origin, shared = self._option(path, fields, "from"), self._option(path, fields, "shared")
        if origin == "weight" or "(" in legs_node.text or "1" in legs_node.text.split():
            axes, places = parse_axes(legs_node, f"core '{name}'", self.problems)
        else:
            places = dict(parse_legs(legs_node, name, self.problems))
            axes = tuple((leg,) for leg in places)
        if len(self.problems) > before:
            self.incomplete.add("cores")
        where = legs_node.position if value.kind != "scalar" else key.position
        derivation = self._derivation(name, fields) if "of" in fields else None
        if derivation is not None or "of" in fields:
            self._only_derived(name, fields)
            if derivation is None:
                self.incomplete.add("cores")
                return None
            made = Init("derived", {}, "derived")
            return Core(name, tuple(places), made, False, where, None, None, axes, places, derivation)
        self._only_stored(name, fields)
        init = self._init((*path, "init"), fields.get("init"), default)
        self._options(name, fields, origin, shared)
        frozen = origin is not None or ("frozen" in fields and fields["frozen"].value is True)
        if origin is not None:
            init = Init(f"from {origin}", {}, f"from {origin}")
        elif init is default and not named and len(places) < 2 and ELLIPSIS not in places:
            what = f"core '{name}' of {'one leg' if places else 'no legs'}"
            fix = f"For example `{name}: {{legs: {' '.join(places) or chr(34) * 2}, init: normal(0.02)}}`."
            self.problems.add(where, what, "an init", "none", fix, core=name)
        if init is None:
            self.incomplete.add("inits")
            init = Init("", {}, "")
        return Core(name, tuple(places), init, frozen, where, shared, origin, axes, places)

    def _derivation(self, name: str, fields: Mapping[str, Node]) -> Derivation | None:
        """What a core is made of, by `of`, `map` and `scale`; None, with the reason reported, if that is wrong."""
        if any(path[:2] == ("cores", name) for path in self.broken):
            return None
        before, owner = len(self.problems), f"core '{name}'"
        of, factor = fields["of"], self._scale(fields.get("scale"), f"{owner}, `scale`")
        summands: list[Summand] = []
        if of.kind == "list" and any(item.kind == "mapping" for item in of.value):
            for number, item in enumerate(of.value):
                label = f"{owner}, `of`, entry {number + 1}"
                scale = item.get("scale")
                references = self._references(item.get("cores"), f"{label}, `cores`")
                expression = self._scale(scale, f"{label}, `scale`")
                if expression is not None:
                    summands.append(Summand(references, expression, label, scale.position if scale else None))
        else:
            summands.append(Summand(self._references(of, f"{owner}, `of`"), parse_expression("1"), f"{owner}, `of`"))
        node = fields.get("map")
        items = () if node is None or node.value is None else node.value if node.kind == "list" else (node,)
        maps = [parse_map(item, self.problems, owner, self.known_inits) for item in items]
        if len(self.problems) > before or factor is None:
            return None
        where = fields["scale"].position if "scale" in fields else None
        return Derivation(tuple(summands), factor, tuple(call for call in maps if call is not None), where)

    def _references(self, node: Node | None, owner: str) -> tuple[Reference, ...]:
        """The cores that `of` or `cores` names: at least one, and none twice under the same legs."""
        items = () if node is None or node.value is None else node.value if node.kind == "list" else (node,)
        references: dict[str, Reference] = {}
        for item in items:
            reference = parse_reference(item, owner, self.problems)
            if reference is None:
                self.incomplete.add("cores")
            elif reference.label in references:
                fix = "Name it with other legs the second time, `up(o s)` say."
                if reference.axes is None:
                    fix = "A core appears once in each term, or again with other legs, as `up(o s)` has."
                self.problems.add(item.position, owner, "each core once", f"{clip(reference.label)} twice", fix)
            elif reference.core not in self._known_cores():
                fix = near_miss(reference.core, self._known_cores()) or "Add it to `cores`."
                self._lacks("cores", item.position, owner, "names of `cores`", clip(reference.core), fix)
            else:
                references[reference.label] = reference
        if not items:
            where = node.position if node is not None else self.root.position
            fix = "Name its cores, or remove the term." if owner.startswith("`terms`") else "Name what it is made of."
            self._lacks("cores", where, owner, "at least one core", "none", fix)
        return tuple(references.values())

    def _known_cores(self) -> list[str]:
        node = self._node("cores")
        return [str(key.value) for key, _ in node.items()] if node is not None else []

    def _scale(self, node: Node | None, what: str) -> Expression | None:
        """An expression, 1 where there is none; None where it is wrong."""
        return parse_expression("1") if node is None or node.value is None else self._expression(node, what)

    def _only_derived(self, name: str, fields: Mapping[str, Node]) -> None:
        """A derived core stores nothing: keys on stored values belong on its sources."""
        for key in ("init", "frozen", "shared", "from"):
            if key in fields and fields[key].value is not None:
                fix = "Write it on a core that is stored, one that `of` names."
                found = f"`{key}` on a core with `of`"
                self.problems.add(
                    fields[key].position, f"core '{name}'", f"no `{key}` beside `of`", found, fix, core=name
                )

    def _only_stored(self, name: str, fields: Mapping[str, Node]) -> None:
        for key in ("map", "scale"):
            if key in fields and fields[key].value is not None:
                fix = "Write `of` with the core that it acts on, or remove it."
                found = f"`{key}` without `of`"
                self.problems.add(fields[key].position, f"core '{name}'", f"`of` beside `{key}`", found, fix, core=name)

    def _init(self, path: tuple[str, ...], node: Node | None, default: Init) -> Init | None:
        """The init that a core names, or the default; None where it is wrong."""
        if path in self.broken:
            return None
        if node is None or node.value is None:
            return default
        return parse_init(node, self.problems, self.known_inits)

    def _option(self, path: tuple[str, ...], fields: dict[str, Node], key: str) -> str | None:
        """A core's `shared` or `from`, None where it is absent or wrong."""
        node = None if (*path, key) in self.broken else fields.get(key)
        return node.value if node is not None else None

    def _options(self, name: str, fields: dict[str, Node], origin: str | None, shared: str | None) -> None:
        """Report keys of one core that exclude each other."""
        what = f"core '{name}'"
        if shared is not None and not is_name(shared):
            fix = "Use letters, digits and `_`, or `model`: one tensor for all layers."
            self.problems.add(fields["shared"].position, what, "an ASCII word", f"scope {clip(shared)}", fix, core=name)
        if origin is None:
            return
        for key, fix in (("init", "Remove one of them."), ("shared", "Remove it: each layer has its own weight.")):
            if key in fields and fields[key].value is not None:
                expected = f"no `{key}` beside `from`"
                self.problems.add(fields[key].position, what, expected, f"`from: {origin}` and it", fix, core=name)
        if "frozen" in fields and fields["frozen"].value is False:
            fix = "Remove it; the inits `svd_u`, `svd_us` and their kin give cores that train."
            self.problems.add(fields["frozen"].position, what, "a frozen core", f"`from: {origin}`", fix, core=name)

    def _terms(self, cores: Sequence[Core]) -> Iterator[Term]:
        """The terms of a sum; a file with one `weight` has one term of all cores."""
        node, weight = self._node("terms"), self._node("weight")
        if node is None:
            if weight is None:  # `terms` may be there, and wrong
                self.incomplete.add("cores")
            else:
                inner = _named_inside(cores)
                outer = [Reference(core.name, None, core.position) for core in cores if core.name not in inner]
                yield self._term(weight, tuple(outer), parse_expression("1"), None, "`weight`")
            return
        if weight is not None:
            fix = "Write the weight of each term in `terms`, or `weight` alone."
            self.problems.add(weight.position, "`weight`", "no `weight` beside `terms`", "both", fix)
        if not node.value:
            fix = "For example `terms: [{cores: [up, down], weight: o i}]`."
            self.problems.add(node.position, "`terms`", "at least one term", "none", fix)
        if not node.value or any(path[0] == "terms" for path in self.broken):
            self.incomplete.add("cores")
            return
        for number, term in enumerate(node.value):
            label = f"`terms`, entry {number + 1}"
            scale = term.get("scale")
            factor = parse_expression("1") if scale is None else self._expression(scale, f"{label}, `scale`")
            references = self._members(term.get("cores"), label)
            if factor is None:
                self.incomplete.add("cores")
            else:
                where = scale.position if scale is not None else None
                yield self._term(term.get("weight"), references, factor, where, f"{label}, `weight`")

    def _members(self, node: Node, label: str) -> tuple[Reference, ...]:
        """The cores of a term in the order of the file's cores."""
        references = self._references(node, label)
        order = {name: place for place, name in enumerate(self._known_cores())}
        return tuple(sorted(references, key=lambda reference: order[reference.core]))

    def _term(
        self,
        node: Node,
        references: tuple[Reference, ...],
        scale: Expression,
        scale_position: Position | None,
        label: str,
    ) -> Term:
        before = len(self.problems)
        axes, places = parse_axes(node, label, self.problems)
        if len(self.problems) > before:
            self.incomplete.add("cores")  # a leg may be missing: no check over all legs
        elif not axes:
            fix = "For example `weight: o i k...`."
            self._lacks("cores", node.position, label, "a pattern of open legs", "nothing", fix)
        return Term(references, axes, scale, node.position, scale_position, label, places)


def _named_inside(cores: Sequence[Core]) -> set[str]:
    """The cores that a derived core, a map or an init names: they are not by themselves in a term."""
    named = {source for core in cores if core.derivation is not None for source in core.derivation.sources}
    for core in cores:
        value = core.init.arguments.get("core")
        named |= {value} if isinstance(value, str) else set()
    return named


def _number(node: Node) -> str:
    """A scalar's text as an expression: numbers as Python writes them (YAML's 007 is 7)."""
    return node.text if isinstance(node.value, str) else repr(node.value)
