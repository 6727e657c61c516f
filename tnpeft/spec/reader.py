"""YAML nodes → a draft whose every part is parsed, or missing with the reason reported → a `Spec`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tnpeft.errors import Position, near_miss
from tnpeft.spec.document import Node, Problems, clip, read_document
from tnpeft.spec.expression import Expression, ExpressionError, parse_expression
from tnpeft.spec.factorize import MAX_NUMBER, Table
from tnpeft.spec.inits import DEFAULT_INIT, Init, parse_init
from tnpeft.spec.pattern import ELLIPSIS, KINDS, Axes, check_index, check_name, parse_legs, parse_weight
from tnpeft.spec.schema import SPEC
from tnpeft.spec.shape import check_shape, is_remnant, with_text_keys

__all__ = ["Draft", "DraftCore", "DraftRule", "parse_draft", "parse_table"]

MAX_CORES = 256

_SHORT = {
    "any": tuple(KINDS),
    "conv": tuple(kind for kind in KINDS if kind.startswith("Conv") and "Transpose" not in kind),
    "conv_transpose": tuple(kind for kind in KINDS if "Transpose" in kind),
}


@dataclass
class DraftCore:
    name: str
    legs: tuple[str, ...]
    places: dict[str, Position]
    init: Init | None  # None: it was wrong, and reported
    names_init: bool
    frozen: bool
    position: Position


@dataclass
class DraftRule:
    names: tuple[str, ...]
    expression: Expression
    position: Position
    places: dict[str, Position]
    node: Node


@dataclass
class Draft:
    """What could be read of a file. `whole` is False where a part is missing, so that checks over all parts wait."""

    file: str
    text: str
    root: Node
    name: str = ""
    title: str = ""
    source: str = ""
    layers: tuple[str, ...] = ()
    params: dict[str, Expression] = field(default_factory=dict)
    bond: Expression | None = None
    sizes: list[DraftRule] = field(default_factory=list)
    factors: Table | None = None
    tables: dict[str, Table] = field(default_factory=dict)
    cores: list[DraftCore] = field(default_factory=list)
    weight: Axes = ()
    weight_places: dict[str, Position] = field(default_factory=dict)
    weight_position: Position | None = None
    scale: Expression | None = None
    start: str | None = None
    seed: int = 0
    places: dict[str, Position] = field(default_factory=dict)  # of values, by key
    whole: dict[str, bool] = field(default_factory=lambda: {"params": True, "sizes": True, "cores": True})


def parse_draft(text: str | bytes, file: str, tables: Mapping[str, Table], problems: Problems) -> Draft:
    """Parse every part of the file; what is wrong is reported and left out."""
    root = with_text_keys(read_document(text, file), problems)
    broken = check_shape(root, problems, SPEC)
    draft = Draft(file, text if isinstance(text, str) else text.decode("utf-8"), root)
    # A misspelt key is reported once, not again through all that its value would have said.
    absent = {path[0] for path in broken if len(path) == 1 and root.get(path[0]) is None}
    draft.whole = {
        "params": "params" not in absent,
        "sizes": not absent & {"sizes", "bond"},
        "cores": not absent & {"cores", "weight"},
    }
    draft.places = {str(key.value): value.position for key, value in root.items()}
    parse = _Parser(draft, broken, problems)
    parse.scalars()
    parse.layers()
    parse.params()
    parse.table(tables)
    parse.sizes()
    parse.cores()
    parse.weight()
    return draft


class _Parser:
    def __init__(self, draft: Draft, broken: set[tuple[str | int, ...]], problems: Problems) -> None:
        self.draft, self.broken, self.problems = draft, broken, problems

    def _node(self, key: str) -> Node | None:
        """The part under a key of the file, None where it is absent or of the wrong type."""
        return None if (key,) in self.broken else self.draft.root.get(key)

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

    def _whole_pairs(self, node: Node | None, part: str) -> list[tuple[Node, Node]]:
        """The pairs of a mapping but those that a comma split in two, which the shape has reported."""
        pairs = list(node.items()) if node is not None else []
        split = {place for place, pair in enumerate(pairs) if is_remnant(*pair)}
        if split:
            self.draft.whole[part] = False
        return [pair for place, pair in enumerate(pairs) if place not in split and place + 1 not in split]

    def scalars(self) -> None:
        draft = self.draft
        for key in ("name", "title", "source", "start", "seed"):
            node = self._node(key)
            if node is not None:
                setattr(draft, key, node.value)
        node = self._node("name")
        if node is not None:
            check_plain = (
                all(char.isalnum() or char in "_-." for char in draft.name) and draft.name.isascii() and draft.name
            )
            if not check_plain:
                fix = "Use letters, digits, `_`, `-` and `.`."
                self.problems.add(node.position, "`name`", "an ASCII word", clip(draft.name), fix)
        bond = self._node("bond")
        draft.bond = self._expression(bond, "`bond`") if bond is not None and bond.value is not None else None
        scale = self._node("scale")
        if ("scale",) not in self.broken:
            draft.scale = parse_expression("1") if scale is None else self._expression(scale, "`scale`")

    def layers(self) -> None:
        node = self._node("layers")
        if node is None or any(path[0] == "layers" for path in self.broken):
            return
        kinds: dict[str, None] = {}
        for item in node.value if node.kind == "list" else (node,):
            words = _SHORT.get(item.value, (item.value,))
            if words[0] in KINDS:
                kinds.update(dict.fromkeys(words))
                continue
            known = (*KINDS, *_SHORT)
            fix = near_miss(item.value, known) or "Choose one of them."
            self.problems.add(item.position, "`layers`", f"one of {', '.join(known)}", clip(item.value), fix)
        self.draft.layers = tuple(kinds)
        if node.kind == "list" and not node.value:
            self.problems.add(node.position, "`layers`", "at least one kind", "none", "For example `layers: [Linear]`.")

    def params(self) -> None:
        node = self._node("params")
        for key, value in self._whole_pairs(node, "params"):
            name = str(key.value)
            good = check_name(name, key.position, f"param {clip(name)}", self.problems)
            expression = None if ("params", name) in self.broken else self._expression(value, f"param {clip(name)}")
            if expression is None or not good:
                self.draft.whole["params"] = False
                continue
            unknown = [read for read in expression.names if read not in self.draft.params]
            if unknown:
                fix = near_miss(unknown[0], self.draft.params) or "A default may read the params above it."
                where = value.at(0)
                self.problems.add(where, f"param '{name}'", "numbers and earlier params", f"'{unknown[0]}'", fix)
                self.draft.whole["params"] = False
                continue
            self.draft.params[name] = expression
        if ("params",) in self.broken:
            self.draft.whole["params"] = False

    def table(self, tables: Mapping[str, Table]) -> None:
        node = self._node("factors")
        if node is None or node.value is None or any(path[0] == "factors" for path in self.broken):
            return
        if node.kind == "mapping":
            self.draft.factors = parse_table(node, self.problems)
        elif node.value in tables:
            self.draft.factors = tables[node.value]
            self.draft.tables[node.value] = tables[node.value]
        else:
            known = ", ".join(sorted(tables)) or "no table"
            fix = near_miss(str(node.value), tables) or "Write the table here: `factors: {32: [4, 4, 2]}`."
            self.problems.add(node.position, "`factors`", f"one of {known}", clip(node.value), fix)

    def sizes(self) -> None:
        node = self._node("sizes")
        if ("sizes",) in self.broken:
            self.draft.whole["sizes"] = False
        for key, value in self._whole_pairs(node, "sizes"):
            places: dict[str, Position] = {}
            good = not any(path[:2] == ("sizes", key.value) for path in self.broken)
            for word, where in key.words() if isinstance(key.value, str) else ():
                if word in places or any(word in rule.places for rule in self.draft.sizes):
                    fix = "Give each index one size."
                    self.problems.add(where, f"`sizes`, '{word}'", "each name once", "it again", fix, index=word)
                    good = False
                elif word == ELLIPSIS or check_index(word, where, "`sizes`", self.problems):
                    places[word] = where
                else:
                    good = False
            expression = self._expression(value, f"`sizes`, {clip(key.text)[1:-1]}") if good else None
            if expression is None or not places:
                self.draft.whole["sizes"] = False
                continue
            rule = DraftRule(tuple(places), expression, value.position, places, value)
            self.draft.sizes.append(rule)

    def cores(self) -> None:
        default = self._node("init")
        default_init = DEFAULT_INIT
        if default is not None and default.value is not None:
            parsed = parse_init(default, self.problems)
            default_init = parsed if parsed is not None else DEFAULT_INIT
        node = self._node("cores")
        self.draft.whole["cores"] &= node is not None and bool(node.items())
        if node is not None and not node.items():
            self.problems.add(node.position, "`cores`", "at least one core", "none", "For example `cores: {up: o r}`.")
        if node is not None and len(node.items()) > MAX_CORES:
            fix = "Write a smaller network."
            found = str(len(node.items()))
            self.problems.add(node.position, "`cores`", f"at most {MAX_CORES} cores", found, fix)
            self.draft.whole["cores"] = False
            return
        named = default is not None and default.value is not None
        for key, value in node.items() if node is not None else ():
            self._core(key, value, default_init, named)

    def _core(self, key: Node, value: Node, default: Init, default_named: bool) -> None:
        name = str(key.value)
        path = ("cores", name)
        fields: dict[str, Any] = {word.value: item for word, item in value.items()}
        legs_node = value if value.kind == "scalar" else fields.get("legs")
        if not name.isascii() or not name.isidentifier():
            fix = "Use letters, digits and `_`, starting with a letter."
            self.problems.add(key.position, f"core {clip(name)}", "an ASCII word", clip(name), fix, core=name)
            self.draft.whole["cores"] = False
            return
        if legs_node is None or path in self.broken or (*path, "legs") in self.broken:
            self.draft.whole["cores"] = False
            return
        before = len(self.problems)
        places = dict(parse_legs(legs_node, name, self.problems))
        if len(self.problems) > before:
            self.draft.whole["cores"] = False
        init: Init | None = default
        own = fields.get("init")
        named = default_named
        if (*path, "init") in self.broken:
            init, named = None, True
        elif own is not None and own.value is not None:
            init, named = parse_init(own, self.problems), True
        frozen = fields["frozen"].value is True if "frozen" in fields else False
        where = legs_node.position if value.kind != "scalar" else key.position
        self.draft.cores.append(DraftCore(name, tuple(places), places, init, named, frozen, where))

    def weight(self) -> None:
        node = self._node("weight")
        if node is not None:
            self.draft.weight_position = node.position
            before = len(self.problems)
            self.draft.weight, self.draft.weight_places = parse_weight(node, self.problems)
            if len(self.problems) > before:
                self.draft.whole["cores"] = False  # a leg may be missing: no check over all legs
            elif not self.draft.weight:
                fix = "For example `weight: o i k...`."
                self.problems.add(node.position, "`weight`", "a pattern of open legs", "nothing", fix)


def _number(node: Node) -> str:
    """A scalar's text as an expression: numbers as Python writes them (YAML's 007 is 7)."""
    return node.text if isinstance(node.value, str) else repr(node.value)


def parse_table(node: Node, problems: Problems) -> Table:
    """A factor table, number → its factors; each product must be the number (fine rule 15)."""
    table: dict[int, tuple[int, ...]] = {}
    for key, value in node.items():
        number, factors = key.value, value.plain()
        good = isinstance(number, int) and isinstance(factors, list) and all(type(item) is int for item in factors)
        if not good or not 1 <= number <= MAX_NUMBER or any(item < 1 for item in factors):
            fix = "For example `32: [4, 4, 2]`."
            problems.add(key.position, "`factors`", "a positive number with a list of its factors", clip(factors), fix)
            continue
        product = 1
        for item in factors:
            product = min(product * item, 2 * MAX_NUMBER)
        if product != number:
            found = f"{' x '.join(map(str, factors))} = {product}"
            fix = "Mend the entry; others are factorised by rule."
            problems.add(key.position, f"`factors`, {number}", f"factors with product {number}", clip(found)[1:-1], fix)
            continue
        table[number] = tuple(factors)
    return table
