"""From YAML nodes to a `Declaration`, of which every part is parsed, or missing with the reason reported."""

from __future__ import annotations

from collections.abc import Mapping

from tnpeft.documents.nodes import Node, read_document
from tnpeft.documents.schema import check_shape, entries_problem, is_remnant, with_text_keys
from tnpeft.errors import Position, Problem, Problems, SpecError, clip, near_miss
from tnpeft.spec.checks import check
from tnpeft.spec.core_reader import CoreReader
from tnpeft.spec.declaration import Declaration, SizeRule
from tnpeft.spec.expression import Expression, parse_expression
from tnpeft.spec.factorize import Table
from tnpeft.spec.pattern import ELLIPSIS, KINDS, check_index, check_name
from tnpeft.spec.schema import SPEC
from tnpeft.spec.tables import parse_table

__all__ = ["SHORT_KINDS", "read_declaration"]

SHORT_KINDS = {
    "any": tuple(KINDS),
    "conv": tuple(kind for kind in KINDS if kind.startswith("Conv") and "Transpose" not in kind),
    "conv_transpose": tuple(kind for kind in KINDS if "Transpose" in kind),
}


def read_declaration(
    text: str | bytes, file: str, tables: Mapping[str, Table], known_inits: bool = True
) -> Declaration:
    """What a text declares, checked as far as possible without a layer; raises SpecError with every mistake."""
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
    """The problem of a recipe where a spec is expected."""
    key = next((key for key, _ in root.items() if key.value == "adapters"), None)
    if key is None or root.get("cores") is not None:
        return None
    takers = "`tnpeft.attach`, `tnpeft count` and `tnpeft fit` take recipes."
    fix = f"Name a spec here, such as one of its entries'; {takers}"
    return Problem("the file", "a spec", "a recipe, by its `adapters`", fix, key.position)


class _Parser(CoreReader):
    """Reads the whole file: the header here, cores and terms in `CoreReader`."""

    def declaration(self, text: str, file: str, tables: Mapping[str, Table]) -> Declaration:
        name = self._name()
        bond, scale, std = self._node("bond"), self._node("scale"), self._node("start_std")
        size = self._expression(bond, "`bond`") if bond is not None and bond.value is not None else None
        factor = parse_expression("1") if scale is None else self._expression(scale, "`scale`")
        if factor is None or ("scale",) in self.broken:
            self.incomplete.add("scale")
        start_std = self._expression(std, "`start_std`") if std is not None and std.value is not None else None
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
            start_std=start_std,
            seed=self._value("seed", 0),
            file=file,
            text=text,
            root=self.root,
            tables={named: factors} if isinstance(named, str) and factors is not None else {},
        )

    def _whole_pairs(self, node: Node | None, part: str) -> list[tuple[Node, Node]]:
        """The pairs of a mapping without those that a comma split in two, which are reported already."""
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
