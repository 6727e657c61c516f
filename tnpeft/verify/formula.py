"""The value of a parameter formula, read from its text as papers write it: `(i1 i2 + o1) r^2 + 3r`."""

from __future__ import annotations

import ast
import keyword
import math
import re
from functools import reduce

from tnpeft.network import Network
from tnpeft.spec.expression import FUNCTIONS, Expression
from tnpeft.spec.pattern import ELLIPSIS
from tnpeft.spec.resolve import layer_names

__all__ = ["formula_value"]

_TOKEN = re.compile(r"\d+(?:\.\d+)?|[A-Za-z_]\w*|\^|[-+*/%<>=!]+|[(),\[\].]")
_KERNEL = "every_kernel_size"  # what `k...` is called while it is evaluated


def formula_value(formula: str, network: Network) -> float:
    """The value of `formula` for this network; factors side by side are multiplied."""
    text = before = ""
    for token in _TOKEN.findall(formula.replace(ELLIPSIS, _KERNEL)):
        ends = before == ")" or _is_value(before)
        begins = before not in FUNCTIONS if token == "(" else _is_value(token)
        text += f" * {token}" if ends and begins else f" {token}"
        before = token
    tree = _Powers().visit(ast.parse(text.replace("^", "**").strip(), mode="eval").body)
    values = {
        **layer_names(network.layer.weight_shape, network.layer.groups),
        **{leg: size for leg, size in network.sizes.items() if leg.isidentifier()},
        **network.params,
        _KERNEL: math.prod(size for leg, size in network.sizes.items() if leg.startswith("k.")),
    }
    return float(Expression(formula, tree).number(values))


def _is_value(token: str) -> bool:
    return token[:1].isdigit() or (token.isidentifier() and not keyword.iskeyword(token))


class _Powers(ast.NodeTransformer):
    """`x ** 3` as `x * x * x`: expressions have no powers."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Pow):
            return node
        factors = [node.left] * ast.literal_eval(node.right)
        return reduce(lambda product, factor: ast.BinOp(product, ast.Mult(), factor), factors)
