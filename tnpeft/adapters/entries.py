"""Cores whose entries follow from their positions: `entries(cos(pi * x * f / n))`, `places(x - y + n - 1)`."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from tnpeft.spec.expression import POSITION_FUNCTIONS, Expression, ExpressionError, Value

__all__ = ["entries"]


def entries(expression: Expression, legs: Sequence[str], sizes: Sequence[int], numbers: Mapping[str, Value]) -> Tensor:
    """(*sizes), float64: the expression, with each leg standing for its position and other names for `numbers`.

    Raises ExpressionError if it is no number at some position.
    """
    positions = {
        leg: torch.arange(size, dtype=torch.float64, device="cpu").reshape(-1, *[1] * (len(legs) - place - 1))
        for place, (leg, size) in enumerate(zip(legs, sizes, strict=True))
    }
    value = _Entries(positions, {**numbers, "pi": math.pi}).visit(expression.tree)
    if isinstance(value, tuple):
        raise ExpressionError("a number", f"{len(value)} numbers", "Pick one with `[0]`, or multiply with `prod`.")
    table = torch.as_tensor(value, dtype=torch.float64, device="cpu").broadcast_to(tuple(sizes))
    if not bool(torch.isfinite(table).all()):
        raise ExpressionError("a finite number at every position", "nan or inf", "Guard divisors with `max(..., 1)`.")
    return table


Operand = Tensor | Value


class _Entries:
    """Visits an expression with tensors in place of the legs' names; parts without legs are evaluated as elsewhere."""

    def __init__(self, positions: Mapping[str, Tensor], numbers: Mapping[str, Value]) -> None:
        self.positions, self.numbers = positions, numbers

    def visit(self, node: ast.expr) -> Operand:
        names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
        if names.isdisjoint({*self.positions, *POSITION_FUNCTIONS}):
            return Expression("", node).evaluate(self.numbers)
        value: Operand = getattr(self, f"_{type(node).__name__.lower()}")(node)
        return value

    def _tensor(self, node: ast.expr) -> Tensor:
        value = self.visit(node)
        if isinstance(value, tuple):
            raise ExpressionError("a number", f"{len(value)} numbers", "Pick one with `[0]`, or multiply with `prod`.")
        return torch.as_tensor(value, dtype=torch.float64, device="cpu")

    def _name(self, node: ast.Name) -> Tensor:
        if node.id not in self.positions:
            raise ExpressionError("a value", f"the function `{node.id}`", f"Call it: `{node.id}(...)`.")
        return self.positions[node.id]

    def _binop(self, node: ast.BinOp) -> Tensor:
        return _BINARY[type(node.op)](self._tensor(node.left), self._tensor(node.right))

    def _unaryop(self, node: ast.UnaryOp) -> Tensor:
        value = self._tensor(node.operand)
        if isinstance(node.op, ast.Not):
            return (value == 0).double()
        return -value if isinstance(node.op, ast.USub) else value

    def _boolop(self, node: ast.BoolOp) -> Tensor:
        """The last operand that counts, as Python's `and` and `or` have it."""
        value = self._tensor(node.values[0])
        for item in node.values[1:]:
            decided = value == 0 if isinstance(node.op, ast.And) else value != 0
            value = torch.where(decided, value, self._tensor(item))
        return value

    def _compare(self, node: ast.Compare) -> Tensor:
        operands = [self._tensor(item) for item in (node.left, *node.comparators)]
        pairs = zip(node.ops, operands, operands[1:], strict=False)
        return reduce(torch.logical_and, [_COMPARE[type(each)](left, right) for each, left, right in pairs]).double()

    def _ifexp(self, node: ast.IfExp) -> Tensor:
        return torch.where(self._tensor(node.test) != 0, self._tensor(node.body), self._tensor(node.orelse))

    def _call(self, node: ast.Call) -> Tensor:
        name = node.func.id  # type: ignore[attr-defined]  # the parser let only names of functions through
        values = [self._tensor(item) for item in node.args]
        count = _COUNTS.get(name)
        if name == "factorize" or not values or count not in (None, len(values)):
            expected = f"{count or 'some'} number{'' if count == 1 else 's'} in `{name}`"
            found = "positions" if name == "factorize" else str(len(values))
            fix = "Give factors a line in `sizes`." if name == "factorize" else f"Write `{name}(x)`, or `{name}(x, y)`."
            raise ExpressionError(expected, found, fix)
        return _CALLS[name](*values)

    def _tuple(self, node: ast.Tuple) -> Tensor:
        raise ExpressionError("one number at each position", "a tuple", "Write `a if x == 0 else b`.")

    _subscript = _tuple


def _walsh(a: Tensor, b: Tensor) -> Tensor:
    """-1 where an odd number of binary digits is 1 in both, else 1."""
    common = a.long() & b.long()
    for shift in (32, 16, 8, 4, 2, 1):
        common = common ^ (common >> shift)
    return 1.0 - 2.0 * (common & 1).double()


def _gcd(*values: Tensor) -> Tensor:
    return reduce(torch.gcd, [value.long() for value in values]).double()


_BINARY: dict[type[ast.operator], Callable[[Tensor, Tensor], Tensor]] = {
    ast.Add: torch.add,
    ast.Sub: torch.sub,
    ast.Mult: torch.mul,
    ast.Div: torch.div,
    ast.FloorDiv: torch.floor_divide,
    ast.Mod: torch.remainder,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Tensor, Tensor], Tensor]] = {
    ast.Eq: torch.eq,
    ast.NotEq: torch.ne,
    ast.Lt: torch.lt,
    ast.LtE: torch.le,
    ast.Gt: torch.gt,
    ast.GtE: torch.ge,
}
_CALLS: dict[str, Callable[..., Tensor]] = {
    "ceil": torch.ceil,
    "cos": torch.cos,
    "floor": torch.floor,
    "gcd": _gcd,
    "max": lambda *values: reduce(torch.maximum, values),
    "min": lambda *values: reduce(torch.minimum, values),
    "prod": lambda *values: reduce(torch.mul, values),
    "sin": torch.sin,
    "sqrt": torch.sqrt,
    "walsh": _walsh,
}
_COUNTS = {"ceil": 1, "cos": 1, "floor": 1, "sin": 1, "sqrt": 1, "walsh": 2}
