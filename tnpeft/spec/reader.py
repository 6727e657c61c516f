"""YAML nodes → a `Declaration` whose every part is parsed, or missing with the reason reported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from tnpeft.documents.nodes import Node, read_document
from tnpeft.documents.schema import check_shape, entries_problem, is_remnant, with_text_keys
from tnpeft.errors import Position, Problem, Problems, SpecError, clip, near_miss
from tnpeft.spec.checks import check
from tnpeft.spec.declaration import Core, Declaration, SizeRule, Term
from tnpeft.spec.expression import Expression, ExpressionError, is_name, parse_expression
from tnpeft.spec.factorize import MAX_NUMBER, Table, bounded_product
from tnpeft.spec.inits import DEFAULT_INIT, Init, parse_init
from tnpeft.spec.pattern import ELLIPSIS, KINDS, Axes, check_index, check_name, parse_axes, parse_legs
from tnpeft.spec.schema import SPEC

__all__ = ["SHORT_KINDS", "parse_table", "read_declaration"]

MAX_CORES = 256

# What checks wait for, and the keys that say it.
_PARTS = {"params": ("params",), "sizes": ("sizes", "bond"), "cores": ("cores", "weight", "terms")}

T = TypeVar("T")

SHORT_KINDS = {
    "any": tuple(KINDS),
    "conv": tuple(kind for kind in KINDS if kind.startswith("Conv") and "Transpose" not in kind),
    "conv_transpose": tuple(kind for kind in KINDS if "Transpose" in kind),
}


def read_declaration(
    text: str | bytes, file: str, tables: Mapping[str, Table], known_inits: bool = True
) -> Declaration:
    """What a text declares, checked as far as no layer is needed; raises SpecError with every mistake."""
    if not isinstance(text, str | bytes):
        fix = "Pass the YAML itself, or use `load_spec` for a file."
        raise SpecError(Problem("spec", "YAML text", clip(text), fix))
    root = read_document(text, file)
    expected = "a spec, with `layers`, `cores`, `weight` and `start`"
    if problem := _recipe_problem(root) or entries_problem(root, expected):
        raise SpecError(problem)
    problems = Problems()
    root = with_text_keys(root, problems)
    parser = _Parser(root, check_shape(root, problems, SPEC), problems, known_inits)
    declaration = parser.declaration(text if isinstance(text, str) else text.decode("utf-8"), file, tables)
    check(declaration, parser.incomplete, problems, saved=not known_inits)
    problems.raise_if_any()
    return declaration


def _recipe_problem(root: Node) -> Problem | None:
    """What is said of a whole recipe where a spec is expected."""
    key = next((key for key, _ in root.items() if key.value == "adapters"), None)
    if key is None or root.get("cores") is not None:
        return None
    takers = "`tnpeft.attach`, `tnpeft count` and `tnpeft extract` take recipes."
    fix = f"Name a spec here, such as one of its entries'; {takers}"
    return Problem("the file", "a spec", "a recipe, by its `adapters`", fix, key.position)


class _Parser:
    """Reads part by part; the names of parts of which something is missing are `incomplete`."""

    def __init__(self, root: Node, broken: set[tuple[str | int, ...]], problems: Problems, known_inits: bool) -> None:
        self.root, self.broken, self.problems, self.known_inits = root, broken, problems, known_inits
        # A misspelt key is reported once, not again through all that its value would have said.
        absent = {path[0] for path in broken if len(path) == 1 and root.get(path[0]) is None}
        self.incomplete = {part for part, keys in _PARTS.items() if not absent.isdisjoint(keys)}

    def declaration(self, text: str, file: str, tables: Mapping[str, Table]) -> Declaration:
        name = self._name()
        bond, scale = self._node("bond"), self._node("scale")
        size = self._expression(bond, "`bond`") if bond is not None and bond.value is not None else None
        factor = parse_expression("1") if scale is None else self._expression(scale, "`scale`")
        if factor is None or ("scale",) in self.broken:
            self.incomplete.add("scale")
        layers, params, factors = self._layers(), self._params(), self._factors(tables)
        sizes, cores = self._sizes(), self._cores()
        named = self._value("factors", "")
        return Declaration(
            name=name,
            title=self._value("title", ""),
            source=self._value("source", ""),
            layers=layers,
            params=params,
            bond=size,
            sizes=sizes,
            factors=factors,
            cores=cores,
            terms=tuple(self._terms(cores)),
            scale=factor or parse_expression("1"),
            compose=self._value("compose", None),
            start=self._value("start", ""),
            seed=self._value("seed", 0),
            file=file,
            text=text,
            root=self.root,
            tables={named: factors} if isinstance(named, str) and factors is not None else {},
        )

    def _node(self, key: str) -> Node | None:
        """The part under a key of the file, None where it is absent or of the wrong type."""
        return None if (key,) in self.broken else self.root.get(key)

    def _lacks(self, part: str, where: Position, *problem: str, core: str | None = None) -> None:
        """Report a mistake that leaves a part without something: what is checked of the whole part then waits."""
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

    def _whole_pairs(self, node: Node | None, part: str) -> list[tuple[Node, Node]]:
        """The pairs of a mapping but those that a comma split in two, which the shape has reported."""
        pairs = list(node.items()) if node is not None else []
        split = {place for place, pair in enumerate(pairs) if is_remnant(*pair)}
        if split:
            self.incomplete.add(part)
        return [pair for place, pair in enumerate(pairs) if place not in split and place + 1 not in split]

    def _name(self) -> str:
        node, name = self._node("name"), self._value("name", "")
        good = name and name.isascii() and all(char.isalnum() or char in "_-." for char in name)
        if node is not None and not good:
            fix = "Use letters, digits, `_`, `-` and `.`."
            self.problems.add(node.position, "`name`", "an ASCII word", clip(name), fix)
        return name

    def _layers(self) -> tuple[str, ...]:
        node = self._node("layers")
        if node is None or any(path[0] == "layers" for path in self.broken):
            return ()
        kinds: dict[str, None] = {}
        for item in node.value if node.kind == "list" else (node,):
            words = SHORT_KINDS.get(item.value, (item.value,))
            if words[0] in KINDS:
                kinds.update(dict.fromkeys(words))
                continue
            known = (*KINDS, *SHORT_KINDS)
            fix = near_miss(item.value, known) or "Choose one of them."
            self.problems.add(item.position, "`layers`", f"one of {', '.join(known)}", clip(item.value), fix)
        if node.kind == "list" and not node.value:
            self.problems.add(node.position, "`layers`", "at least one kind", "none", "For example `layers: [Linear]`.")
        return tuple(kinds)

    def _params(self) -> dict[str, Expression]:
        params: dict[str, Expression] = {}
        node = self._node("params")
        for key, value in self._whole_pairs(node, "params"):
            name = str(key.value)
            good = check_name(name, key.position, f"param {clip(name)}", self.problems)
            expression = None if ("params", name) in self.broken else self._expression(value, f"param {clip(name)}")
            if expression is None or not good:
                self.incomplete.add("params")
                continue
            unknown = [read for read in expression.names if read not in params]
            if unknown:
                fix = near_miss(unknown[0], params) or "A default may read the params above it."
                where = value.at(0)
                self._lacks("params", where, f"param '{name}'", "numbers and earlier params", f"'{unknown[0]}'", fix)
                continue
            params[name] = expression
        if ("params",) in self.broken:
            self.incomplete.add("params")
        return params

    def _factors(self, tables: Mapping[str, Table]) -> Table | None:
        node = self._node("factors")
        if node is None or node.value is None or any(path[0] == "factors" for path in self.broken):
            return None
        if node.kind == "mapping":
            return parse_table(node, self.problems)
        if node.value not in tables:
            known = ", ".join(sorted(tables)) or "no table"
            fix = near_miss(str(node.value), tables) or "Write the table here: `factors: {32: [4, 4, 2]}`."
            self.problems.add(node.position, "`factors`", f"one of {known}", clip(node.value), fix)
        return tables.get(node.value)

    def _sizes(self) -> tuple[SizeRule, ...]:
        rules: list[SizeRule] = []
        node = self._node("sizes")
        if ("sizes",) in self.broken:
            self.incomplete.add("sizes")
        for key, value in self._whole_pairs(node, "sizes"):
            places: dict[str, Position] = {}
            good = not any(path[:2] == ("sizes", key.value) for path in self.broken)
            for word, where in key.words() if isinstance(key.value, str) else ():
                if word in places or any(word in rule.places for rule in rules):
                    fix = "Give each index one size."
                    self.problems.add(where, f"`sizes`, '{word}'", "each name once", "it again", fix, index=word)
                    good = False
                elif word == ELLIPSIS or check_index(word, where, "`sizes`", self.problems):
                    places[word] = where
                else:
                    good = False
            expression = self._expression(value, f"`sizes`, {clip(key.text)[1:-1]}") if good else None
            if expression is None or not places:
                self.incomplete.add("sizes")
                continue
            rules.append(SizeRule(tuple(places), expression, value, places))
        return tuple(rules)

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
        """One core, `named` where the file names an init for all; None where its legs cannot be told."""
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
        axes: Axes = ()
        if origin == "weight":
            axes, places = parse_axes(legs_node, f"core '{name}'", self.problems)
        else:
            places = dict(parse_legs(legs_node, name, self.problems))
        if len(self.problems) > before:
            self.incomplete.add("cores")
        init = self._init((*path, "init"), fields.get("init"), default)
        self._options(name, fields, origin, shared)
        frozen = origin is not None or ("frozen" in fields and fields["frozen"].value is True)
        where = legs_node.position if value.kind != "scalar" else key.position
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
        """What does not go together in one core."""
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
            fix = "Remove it; the inits `svd_us` and `svd_vs` give cores that train."
            self.problems.add(fields["frozen"].position, what, "a frozen core", f"`from: {origin}`", fix, core=name)

    def _terms(self, cores: Sequence[Core]) -> Iterator[Term]:
        """The terms of a sum; a file with one `weight` has one term of all cores."""
        node, weight = self._node("terms"), self._node("weight")
        if node is None:
            if weight is None:  # `terms` may be there, and wrong
                self.incomplete.add("cores")
            else:
                yield self._term(weight, tuple(core.name for core in cores), parse_expression("1"), None, "`weight`")
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
            names = self._members(term.get("cores"), label)
            if factor is None:
                self.incomplete.add("cores")
            else:
                where = scale.position if scale is not None else None
                yield self._term(term.get("weight"), names, factor, where, f"{label}, `weight`")

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
                self._lacks("cores", item.position, label, "names of `cores`", clip(item.value), fix)
            else:
                names[item.value] = None
        if not node.value:
            fix = "Name its cores, or remove the term."
            self._lacks("cores", node.position, label, "at least one core", "none", fix)
        return tuple(name for name in known if name in names)

    def _term(
        self, node: Node, names: tuple[str, ...], scale: Expression, scale_position: Position | None, label: str
    ) -> Term:
        before = len(self.problems)
        axes, places = parse_axes(node, label, self.problems)
        if len(self.problems) > before:
            self.incomplete.add("cores")  # a leg may be missing: no check over all legs
        elif not axes:
            fix = "For example `weight: o i k...`."
            self._lacks("cores", node.position, label, "a pattern of open legs", "nothing", fix)
        return Term(names, axes, scale, node.position, scale_position, label, places)


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
        product = min(bounded_product(factors, 2 * MAX_NUMBER), 2 * MAX_NUMBER)
        if product != number:
            found = f"{' x '.join(map(str, factors))} = {product}"
            fix = "Mend the entry; others are factorised by rule."
            problems.add(key.position, f"`factors`, {number}", f"factors with product {number}", clip(found)[1:-1], fix)
            continue
        table[number] = tuple(factors)
    return table
