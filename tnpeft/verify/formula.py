"""The value of a parameter formula, read from its text as papers write it: `(i1 i2 + o1) r^2 + 3r`."""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Mapping, Sequence

from tnpeft.network import Network
from tnpeft.spec.expression import FUNCTIONS, parse_expression
from tnpeft.spec.pattern import ELLIPSIS
from tnpeft.spec.resolve import layer_names

__all__ = ["formula_value"]

_TOKEN = re.compile(r"\d+(?:\.\d+)?|[A-Za-z_]\w*|\^|[-+*/%<>=!]+|[(),\[\].]")
_KERNEL = "every_kernel_size"  # what `k...` is called while it is evaluated


def formula_value(formula: str, network: Network) -> float:
    """The number that `formula` states for this network; side by side means times."""
    layer = network.layer
    names: dict[str, int | float] = {
        **{leg: size for leg, size in network.sizes.items() if leg.isidentifier()},
        **network.params,
        _KERNEL: math.prod(size for leg, size in network.sizes.items() if leg.startswith("k.")),
    }
    text = _as_python(formula.replace(ELLIPSIS, _KERNEL), names)
    known = {**layer_names(layer.weight_shape, layer.groups), **names}
    return float(parse_expression(text).number(known))


def _as_python(formula: str, names: Mapping[str, object]) -> str:
    written: list[str] = []
    tokens = _TOKEN.findall(formula)
    for place, token in enumerate(tokens):
        if token == "^":
            continue
        before = tokens[place - 1] if place else ""
        if before == "^":  # times itself, for the language has no powers
            written.extend(["*", *_last_factor(written)] * (int(token) - 1))
            continue
        if place and _ends(before) and _begins(token, before):
            written.append("*")
        written.append(token)
    return " ".join(written)


def _last_factor(tokens: Sequence[str]) -> list[str]:
    """The name, number or parenthesis at the end."""
    start, depth = len(tokens) - 1, 0
    while True:
        depth += (tokens[start] == ")") - (tokens[start] == "(")
        if not depth:
            return list(tokens[start:])
        start -= 1


def _ends(token: str) -> bool:
    return token == ")" or token[0].isdigit() or _is_word(token)


def _begins(token: str, before: str) -> bool:
    if token == "(":
        return before not in FUNCTIONS
    return token[0].isdigit() or _is_word(token)


def _is_word(token: str) -> bool:
    return token.isidentifier() and not keyword.iskeyword(token)
