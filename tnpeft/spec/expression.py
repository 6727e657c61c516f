"""Small expressions over sizes: parsed by Python's `ast`, evaluated over a whitelist, never as code.

One grammar serves `sizes`, `bond`, `scale`, `params` and the arguments of inits. Every result is
bounded, so an expression can neither run long nor grow large.
"""

from __future__ import annotations

import ast
import keyword
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tnpeft.errors import clip, near_miss
from tnpeft.spec.factorize import MAX_FACTORS, MAX_NUMBER, Table, factorize

__all__ = [
    "FUNCTIONS",
    "POSITION_FUNCTIONS",
    "Expression",
    "ExpressionError",
    "Number",
    "Value",
    "is_name",
    "parse_expression",
    "spelling",
    "split_at_commas",
]

Number = int | float
Value = Number | tuple[Number, ...]
"""Tuples hold numbers alone: one that held tuples could double with each of six lines, and be compared for ever."""

MAX_LENGTH = 400  # characters
MAX_NESTING = 40
MAX_ABSOLUTE = 1e12

FUNCTIONS = ("ceil", "factorize", "floor", "gcd", "max", "min", "prod", "sqrt")
POSITION_FUNCTIONS = ("cos", "sin", "walsh")  # beside these in `entries` and `places`, where `pi` is a number too
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a // b if isinstance(a, int) and isinstance(b, int) and a % b == 0 else a / b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Value, Value], bool]] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Lt: lambda a, b: a < b,  # type: ignore[operator]
    ast.LtE: lambda a, b: a <= b,  # type: ignore[operator]
    ast.Gt: lambda a, b: a > b,  # type: ignore[operator]
    ast.GtE: lambda a, b: a >= b,  # type: ignore[operator]
}


class ExpressionError(Exception):
    """A mistake in an expression; `offset` counts characters into its text.

    `structural` mistakes do not depend on the numbers: they hold for every layer.
    """

    def __init__(self, expected: str, found: str, fix: str, *, offset: int = 0, structural: bool = True) -> None:
        super().__init__(expected, found, fix)
        self.expected, self.found, self.fix = expected, found, fix
        self.offset, self.structural = offset, structural


def is_name(word: str) -> bool:
    """Whether `word` is an ASCII word that may name an index or a param (keywords may not)."""
    return _NAME.fullmatch(word) is not None and not keyword.iskeyword(word)


def split_at_commas(text: str) -> list[str]:
    """Split at the commas outside all brackets."""
    parts, depth, start = [], 0, 0
    for place, char in enumerate(text):
        depth += (char in "([") - (char in ")]")
        if char == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


@dataclass(frozen=True)
class Expression:
    """A parsed expression: its text and the names it reads, in order."""

    text: str
    tree: ast.expr = field(repr=False, compare=False)
    names: tuple[str, ...] = ()
    pads: bool = False  # reads factorize(..., pad=true)

    def evaluate(self, names: Mapping[str, Value], table: Table | None = None) -> Value:
        """The value for these names; raises ExpressionError if it cannot be worked out."""
        return _Evaluator(names, table).visit(self.tree)

    def number(self, names: Mapping[str, Value], table: Table | None = None) -> Number:
        """The value, which must be a single finite number."""
        return _Evaluator(names, table).number(self.tree)

    def __str__(self) -> str:
        return self.text


def parse_expression(text: str, positions: bool = False) -> Expression:
    """Parse `text`; with `positions` it gives each entry of a core by its position. Raises ExpressionError."""
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"at most {MAX_LENGTH} characters", str(len(text)), "Split it over several sizes.")
    if not text.isascii():
        offset = next(number for number, char in enumerate(text) if not char.isascii())
        raise ExpressionError("ASCII text", clip(text[offset]), "Names and operators are ASCII.", offset=offset)
    tree = _parse(text.strip())
    _check_nesting(tree)
    names: dict[str, None] = {}
    pads = False
    functions = (*FUNCTIONS, *POSITION_FUNCTIONS) if positions else FUNCTIONS
    words = {*_WORDS, "pi"} if positions else _WORDS
    for node in ast.walk(tree):
        _check_node(node, functions)
        if isinstance(node, ast.Name) and node.id not in functions and node.id not in words:
            names[node.id] = None
        if isinstance(node, ast.keyword) and node.arg == "pad":
            pads = True
    return Expression(text.strip(), tree, tuple(names), pads)


_WORDS = {"true": 1, "false": 0}


_SPELLINGS = {
    **dict.fromkeys(("True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON"), "Write `true`."),
    **dict.fromkeys(("False", "FALSE", "no", "No", "NO", "off", "Off", "OFF"), "Write `false`."),
    **dict.fromkeys(("None", "none", "null", "Null", "NULL", "nil"), "Nothing has no name here: write a number."),
    **dict.fromkeys(("&&", "AND", "BitAnd"), "Write `and`."),
    **dict.fromkeys(("||", "OR", "BitOr"), "Write `or`."),
    **dict.fromkeys(("!", "NOT", "Invert"), "Write `not`."),
    "<>": "Write `!=`.",
    "?": "Write `a if c else b`.",
    "=": "Write `==` to compare.",
}


def spelling(word: str) -> str:
    """How to write here what other languages, Python or YAML write differently; empty for all else."""
    return _SPELLINGS.get(word, "")


def _parse(text: str) -> ast.expr:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "1if" and the like warn before they fail
            return ast.parse(text, mode="eval").body
    except SyntaxError as error:
        offset = max(0, (error.offset or 1) - 1)
        foreign = re.search(r"&&|\|\||!(?!=)|<>|\?|\b(AND|OR|NOT)\b|(?<![=<>!])=(?!=)", text)
        fix = spelling(foreign.group() if foreign else "") or "Write it as Python would: `2 * r`."
        raise ExpressionError("an expression", clip(text), fix, offset=offset) from None
    except (ValueError, RecursionError, MemoryError):
        raise ExpressionError("an expression", clip(text), "Write a simpler one.") from None


def _check_nesting(tree: ast.expr) -> None:
    level, layer = 0, [tree]
    while layer:
        level += 1
        if level > MAX_NESTING:
            raise ExpressionError(f"at most {MAX_NESTING} nested levels", "more", "Split it over several sizes.")
        layer = [child for node in layer for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]


_ALLOWED = (
    ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Tuple, ast.Subscript, ast.Call, ast.Name,
    ast.Constant, ast.keyword, ast.Load, ast.And, ast.Or, ast.Not, ast.USub, ast.UAdd, *_BINARY, *_COMPARE,
)  # fmt: skip


def _check_node(node: ast.AST, functions: tuple[str, ...]) -> None:
    offset = getattr(node, "col_offset", 0)
    if not isinstance(node, _ALLOWED):
        what = "`**`" if isinstance(node, ast.Pow) else f"Python's {type(node).__name__}"
        known = "Sizes know + - * / // %, comparisons, `a if c else b`, tuples, subscripts and functions."
        fix = spelling(type(node).__name__) or known
        raise ExpressionError("a size expression", what, fix, offset=offset)
    if isinstance(node, ast.Tuple) and (inner := [item for item in node.elts if isinstance(item, ast.Tuple)]):
        fix = "Pick one with `[0]`, or write the entries out."
        raise ExpressionError("a tuple of numbers", "a tuple in a tuple", fix, offset=inner[0].col_offset)
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool) or not isinstance(node.value, int | float):
            fix = spelling(str(node.value)) or "Write a number or a name, without quotes."
            raise ExpressionError("a number", clip(node.value), fix, offset=offset)
        if not abs(node.value) <= MAX_ABSOLUTE:
            found = "a larger number"
            raise ExpressionError(f"at most {MAX_ABSOLUTE:g}", found, "Write a smaller number.", offset=offset)
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else "this"
        if name not in functions:
            known = ", ".join(functions)
            fix = near_miss(name, functions) or "Use one of these functions."
            raise ExpressionError(f"one of {known}", f"{clip(name)}(...)", fix, offset=offset)
        if name != "factorize" and node.keywords:
            raise ExpressionError("values only", "a named argument", f"`{name}` takes values by place.", offset=offset)


class _Evaluator:
    """Visits the whitelisted nodes; each result is checked against the bounds before it is used."""

    def __init__(self, names: Mapping[str, Value], table: Table | None) -> None:
        self.names, self.table = names, table

    def visit(self, node: ast.AST) -> Value:
        value: Value = getattr(self, f"visit_{type(node).__name__.lower()}")(node)
        if not isinstance(value, tuple) and not abs(value) <= MAX_ABSOLUTE:
            found = "no finite number" if value != value or abs(value) == math.inf else f"{value:.3g}"
            raise self._error(
                node, f"a number of at most {MAX_ABSOLUTE:g}", found, "Make it smaller.", structural=False
            )
        return value

    def _error(self, node: ast.AST, expected: str, found: str, fix: str, *, structural: bool = True) -> ExpressionError:
        return ExpressionError(expected, found, fix, offset=getattr(node, "col_offset", 0), structural=structural)

    def number(self, node: ast.AST, in_tuple: bool = False) -> Number:
        value = self.visit(node)
        if isinstance(value, tuple) and in_tuple:
            found = f"{len(value)} numbers in place of one"
            raise self._error(node, "a tuple of numbers", found, "Pick one with `[0]`, or write the entries out.")
        if isinstance(value, tuple):
            found = f"{len(value)} numbers"
            raise self._error(node, "a number", found, "Pick one with `[0]`, or multiply with `prod`.")
        return value

    def _whole(self, node: ast.AST, what: str) -> int:
        value = self.number(node)
        if value != int(value):
            raise self._error(node, f"{what} that is whole", f"{value:g}", "Use `//` or `floor`.", structural=False)
        return int(value)

    def visit_constant(self, node: ast.Constant) -> Value:
        value: Value = node.value  # type: ignore[assignment]
        return value

    def visit_name(self, node: ast.Name) -> Value:
        if node.id in _WORDS:
            return _WORDS[node.id]
        if node.id in FUNCTIONS:
            raise self._error(node, "a value", f"the function `{node.id}`", f"Call it: `{node.id}(...)`.")
        return self.names[node.id]

    def visit_tuple(self, node: ast.Tuple) -> Value:
        return tuple(self.number(item, in_tuple=True) for item in node.elts)

    def visit_binop(self, node: ast.BinOp) -> Value:
        left, right = self.number(node.left), self.number(node.right)
        try:
            return _BINARY[type(node.op)](left, right)
        except (ZeroDivisionError, OverflowError):
            fix = "Guard it with `max(..., 1)`."
            raise self._error(node, "a divisor other than zero", "zero", fix, structural=False) from None

    def visit_unaryop(self, node: ast.UnaryOp) -> Value:
        if isinstance(node.op, ast.Not):
            return int(not self.visit(node.operand))
        value = self.number(node.operand)
        return -value if isinstance(node.op, ast.USub) else value

    def visit_boolop(self, node: ast.BoolOp) -> Value:
        value: Value = 0
        for item in node.values:
            value = self.visit(item)
            if bool(value) is isinstance(node.op, ast.Or):
                break
        return value

    def visit_compare(self, node: ast.Compare) -> Value:
        left = self.visit(node.left)
        for operator, item in zip(node.ops, node.comparators, strict=True):
            right = self.visit(item)
            try:
                holds = _COMPARE[type(operator)](left, right)
            except TypeError:
                raise self._error(node, "two numbers", "a number and a tuple", "Compare like with like.") from None
            if not holds:
                return 0
            left = right
        return 1

    def visit_ifexp(self, node: ast.IfExp) -> Value:
        return self.visit(node.body if self.visit(node.test) else node.orelse)

    def visit_subscript(self, node: ast.Subscript) -> Value:
        value = self.visit(node.value)
        if not isinstance(value, tuple):
            raise self._error(node, "several numbers before `[`", "one number", "Remove the subscript.")
        index = self._whole(node.slice, "a subscript")
        if not -len(value) <= index < len(value):
            fix = f"Subscripts run from 0 to {len(value) - 1}."
            raise self._error(node, f"a subscript below {len(value)}", str(index), fix)
        return value[index]

    def visit_call(self, node: ast.Call) -> Value:
        name = node.func.id  # type: ignore[attr-defined]  # the parser let only names of functions through
        if name == "factorize":
            return self._factorize(node)
        values = [self.visit(item) for item in node.args]
        flat: list[Number] = []
        for value in values:
            flat.extend(value if isinstance(value, tuple) else (value,))
        if name in ("sqrt", "ceil", "floor") and len(flat) != 1:
            raise self._error(node, f"one number in `{name}`", f"{len(flat)}", f"Write `{name}(x)`.")
        if name == "prod" and values and not flat:
            return 1  # `prod(kernel_size)` of a Linear
        if not flat:
            raise self._error(node, f"numbers in `{name}`", "none", f"Write `{name}(a, b)`.")
        return self._apply(node, name, flat)

    def _apply(self, node: ast.Call, name: str, values: list[Number]) -> Number:
        if name == "sqrt":
            if values[0] < 0:
                raise self._error(
                    node, "no negative number", f"{values[0]:g}", "Guard it with `max`.", structural=False
                )
            root = math.isqrt(int(values[0])) if values[0] == int(values[0]) else 0
            return root if root * root == values[0] else math.sqrt(values[0])
        if name == "gcd":
            if any(value != int(value) for value in values):
                raise self._error(node, "whole numbers in `gcd`", "a fraction", "Use `floor`.", structural=False)
            return math.gcd(*(int(value) for value in values))
        if name == "prod":
            product: Number = 1
            for value in values:
                product *= value
                if abs(product) > MAX_ABSOLUTE:
                    break
            return product
        if name in ("ceil", "floor"):
            return math.ceil(values[0]) if name == "ceil" else math.floor(values[0])
        return min(values) if name == "min" else max(values)

    def _factorize(self, node: ast.Call) -> Value:
        known = {"at_most", "pad"}
        wrong = [keyword.arg for keyword in node.keywords if keyword.arg not in known]
        if len(node.args) != 2 or wrong:
            fix = "Write `factorize(in_channels, 3)`; `at_most=` and `pad=true` are optional."
            found = f"{wrong[0]}=" if wrong else f"{len(node.args)} of them"
            raise self._error(node, "a number and a count in `factorize`", found, fix)
        number, count = (self._whole(item, "an argument of `factorize`") for item in node.args)
        options = {keyword.arg: self._whole(keyword.value, f"`{keyword.arg}`") for keyword in node.keywords}
        if not 1 <= count <= MAX_FACTORS:
            found = str(count)
            raise self._error(node, f"1 to {MAX_FACTORS} factors", found, "Change the count of factors.")
        if not 1 <= number <= MAX_NUMBER:
            fix = "Factor a positive number."
            raise self._error(node, f"a number from 1 to {MAX_NUMBER}", str(number), fix, structural=False)
        if options.get("at_most", 1) < 1:
            raise self._error(node, "`at_most` of at least 1", str(options["at_most"]), "Raise it.", structural=False)
        pad = bool(options.get("pad", 0))
        return factorize(number, count, at_most=options.get("at_most"), pad=pad, table=self.table)
