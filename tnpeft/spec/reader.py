"""YAML nodes → a draft whose every part is parsed, or missing with the reason reported → a `Spec`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tnpeft.documents.nodes import Node, read_document
from tnpeft.documents.schema import check_shape, entries_problem, is_remnant, with_text_keys
from tnpeft.errors import Position, Problem, Problems, SpecError, clip, near_miss
from tnpeft.spec.draft import Draft, DraftCore, DraftRule, DraftTerm
from tnpeft.spec.expression import Expression, ExpressionError, is_name, parse_expression
from tnpeft.spec.factorize import MAX_NUMBER, Table
from tnpeft.spec.inits import DEFAULT_INIT, Init, parse_init
from tnpeft.spec.pattern import ELLIPSIS, KINDS, Axes, check_index, check_name, parse_axes, parse_legs
from tnpeft.spec.schema import SPEC

__all__ = ["SHORT_KINDS", "parse_draft", "parse_table"]

MAX_CORES = 256

SHORT_KINDS = {
    "any": tuple(KINDS),
    "conv": tuple(kind for kind in KINDS if kind.startswith("Conv") and "Transpose" not in kind),
    "conv_transpose": tuple(kind for kind in KINDS if "Transpose" in kind),
}


def parse_draft(
    text: str | bytes, file: str, tables: Mapping[str, Table], problems: Problems, known_inits: bool = True
) -> Draft:
    """Parse every part of the file; what is wrong is reported and left out."""
    root = read_document(text, file)
    expected = "a spec, with `layers`, `cores`, `weight` and `start`"
    if problem := _recipe_problem(root) or entries_problem(root, expected):
        raise SpecError(problem)
    root = with_text_keys(root, problems)
    broken = check_shape(root, problems, SPEC)
    draft = Draft(file, text if isinstance(text, str) else text.decode("utf-8"), root)
    # A misspelt key is reported once, not again through all that its value would have said.
    absent = {path[0] for path in broken if len(path) == 1 and root.get(path[0]) is None}
    draft.whole = {
        "params": "params" not in absent,
        "sizes": not absent & {"sizes", "bond"},
        "cores": not absent & {"cores", "weight", "terms"},
    }
    draft.places = {str(key.value): value.position for key, value in root.items()}
    parse = _Parser(draft, broken, problems, known_inits)
    parse.scalars()
    parse.layers()
    parse.params()
    parse.table(tables)
    parse.sizes()
    parse.cores()
    parse.terms()
    return draft


def _recipe_problem(root: Node) -> Problem | None:
    """What is said of a whole recipe where a spec is expected."""
    key = next((key for key, _ in root.items() if key.value == "adapters"), None)
    if key is None or root.get("cores") is not None:
        return None
    takers = "`tnpeft.attach`, `tnpeft count` and `tnpeft extract` take recipes."
    fix = f"Name a spec here, such as one of its entries'; {takers}"
    return Problem("the file", "a spec", "a recipe, by its `adapters`", fix, key.position)


class _Parser:
    def __init__(self, draft: Draft, broken: set[tuple[str | int, ...]], problems: Problems, known_inits: bool) -> None:
        self.draft, self.broken, self.problems, self.known_inits = draft, broken, problems, known_inits

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
        for key in ("name", "title", "source", "start", "seed", "compose"):
            node = self._node(key)
            if node is not None and node.value is not None:
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
            words = SHORT_KINDS.get(item.value, (item.value,))
            if words[0] in KINDS:
                kinds.update(dict.fromkeys(words))
                continue
            known = (*KINDS, *SHORT_KINDS)
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
            self.draft.param_places[name] = key.position
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
            parsed = parse_init(default, self.problems, self.known_inits)
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
        origin, shared = self._option(path, fields, "from"), self._option(path, fields, "shared")
        axes: Axes = ()
        if origin == "weight":
            axes, places = parse_axes(legs_node, f"core '{name}'", self.problems)
        else:
            places = dict(parse_legs(legs_node, name, self.problems))
        if len(self.problems) > before:
            self.draft.whole["cores"] = False
        init: Init | None = default
        own = fields.get("init")
        named = default_named
        if (*path, "init") in self.broken:
            init, named = None, True
        elif own is not None and own.value is not None:
            init, named = parse_init(own, self.problems, self.known_inits), True
        if origin is not None:
            init, named = Init(f"from {origin}", {}, f"from {origin}"), True
        self._options(name, fields, origin, shared)
        frozen = origin is not None or ("frozen" in fields and fields["frozen"].value is True)
        where = legs_node.position if value.kind != "scalar" else key.position
        core = DraftCore(name, tuple(places), places, init, named, frozen, where, shared, origin, axes)
        self.draft.cores.append(core)

    def _option(self, path: tuple[str, ...], fields: dict[str, Node], key: str) -> str | None:
        """A core's `shared` or `from`, None where it is absent or wrong."""
        node = None if (*path, key) in self.broken else fields.get(key)
        return node.value if node is not None else None

    def _options(self, name: str, fields: dict[str, Node], origin: str | None, shared: str | None) -> None:
        """What does not go together in one core."""
        what = f"core '{name}'"
        if shared is not None and not is_name(shared):
            fix, where = (
                "Use letters, digits and `_`, or `model`: one tensor for all layers.",
                fields["shared"].position,
            )
            self.problems.add(where, what, "an ASCII word", f"scope {clip(shared)}", fix, core=name)
        if origin is None:
            return
        for key, fix in (("init", "Remove one of them."), ("shared", "Remove it: each layer has its own weight.")):
            if key in fields and fields[key].value is not None:
                expected = f"no `{key}` beside `from`"
                self.problems.add(fields[key].position, what, expected, f"`from: {origin}` and it", fix, core=name)
        if "frozen" in fields and fields["frozen"].value is False:
            fix = "Remove it; the inits `svd_us` and `svd_vs` give cores that train."
            self.problems.add(fields["frozen"].position, what, "a frozen core", f"`from: {origin}`", fix, core=name)

    def terms(self) -> None:
        """The terms of a sum; a file with one `weight` has one term of all cores."""
        node, weight = self._node("terms"), self._node("weight")
        if node is None:
            if weight is not None:
                names = tuple(core.name for core in self.draft.cores)
                self._term(weight, names, parse_expression("1"), None, "`weight`")
            self.draft.whole["cores"] &= weight is not None  # `terms` may be there, and wrong
            return
        if weight is not None:
            fix = "Write the weight of each term in `terms`, or `weight` alone."
            self.problems.add(weight.position, "`weight`", "no `weight` beside `terms`", "both", fix)
        if not node.value:
            fix = "For example `terms: [{cores: [up, down], weight: o i}]`."
            self.problems.add(node.position, "`terms`", "at least one term", "none", fix)
        if not node.value or any(path[0] == "terms" for path in self.broken):
            self.draft.whole["cores"] = False
            return
        for number, term in enumerate(node.value):
            label = f"`terms`, entry {number + 1}"
            cores, pattern, scale = term.get("cores"), term.get("weight"), term.get("scale")
            factor = parse_expression("1") if scale is None else self._expression(scale, f"{label}, `scale`")
            names = self._members(cores, label)
            if factor is None:
                self.draft.whole["cores"] = False
            else:
                self._term(pattern, names, factor, scale.position if scale is not None else None, f"{label}, `weight`")

    def _members(self, node: Node, label: str) -> tuple[str, ...]:
        """The names of a term's cores."""
        known = [str(key.value) for key, _ in (self._node("cores") or node).items()]
        names: dict[str, None] = {}
        for item in node.value:
            if item.value in names:
                fix = "A core appears once in each term."
                self.problems.add(item.position, label, "each core once", f"{clip(item.value)} twice", fix)
            elif item.value not in known:
                fix = near_miss(str(item.value), known) or "Add it to `cores`."
                self.problems.add(item.position, label, "names of `cores`", clip(item.value), fix)
                self.draft.whole["cores"] = False
            else:
                names[item.value] = None
        if not node.value:
            fix = "Name its cores, or remove the term."
            self.problems.add(node.position, label, "at least one core", "none", fix)
            self.draft.whole["cores"] = False
        order = {name: place for place, name in enumerate(known)}
        return tuple(sorted(names, key=lambda name: order[name]))

    def _term(
        self, node: Node, names: tuple[str, ...], scale: Expression, scale_position: Position | None, label: str
    ) -> None:
        before = len(self.problems)
        axes, places = parse_axes(node, label, self.problems)
        if len(self.problems) > before:
            self.draft.whole["cores"] = False  # a leg may be missing: no check over all legs
        elif not axes:
            fix = "For example `weight: o i k...`."
            self.problems.add(node.position, label, "a pattern of open legs", "nothing", fix)
            self.draft.whole["cores"] = False
        self.draft.terms.append(DraftTerm(names, axes, places, scale, node.position, scale_position, label))


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
