"""The parameter count as a formula in the params, as papers write it."""

from __future__ import annotations

import ast
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from tnpeft.spec.expression import Expression
from tnpeft.spec.pattern import ELLIPSIS

__all__ = ["parameter_formula"]

Powers = tuple[tuple[str, int], ...]  # of params, e.g. (("r", 2),)


def parameter_formula(cores: Iterable[Sequence[str]], symbols: Mapping[str, Expression], order: Sequence[str]) -> str:
    """The sum over `cores` (each its legs) of the product of leg sizes, grouped by powers of the params.

    `symbols` gives the legs whose size is an expression of params alone; every other leg stands for
    its own size. `order` is the order of legs within a group. For TenVOO-L this is Eq. (6) of the paper.
    """
    groups: dict[Powers, Counter[tuple[str, ...]]] = defaultdict(Counter)
    rank = {leg: place for place, leg in enumerate(order)}
    for legs in cores:
        coefficient, powers, own = _monomial(legs, symbols, rank)
        groups[powers][own] += coefficient
    if not groups:
        return "0"
    ordered = sorted(groups.items(), key=lambda item: (sum(power for _, power in item[0]), item[0]))
    return " + ".join(_group(powers, terms, rank) for powers, terms in ordered)


def _monomial(
    legs: Sequence[str], symbols: Mapping[str, Expression], rank: Mapping[str, int]
) -> tuple[int, Powers, tuple[str, ...]]:
    coefficient = 1
    powers: Counter[str] = Counter()
    own: dict[str, None] = {}
    for leg in legs:
        if leg in symbols:
            number, names = _factors(symbols[leg])
            coefficient *= number
            powers.update(names)
        else:
            own[ELLIPSIS if leg.startswith("k.") else leg] = None
    return coefficient, tuple(sorted(powers.items())), tuple(sorted(own, key=lambda leg: rank.get(leg, len(rank))))


def _factors(size: Expression) -> tuple[int, Counter[str]]:
    """`2 * r * s` as a number and names; anything else stands for itself in parentheses."""
    number, names, pending = 1, Counter[str](), [size.tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            pending += [node.left, node.right]
        elif isinstance(node, ast.Name):
            names[node.id] += 1
        elif isinstance(node, ast.Constant) and isinstance(node.value, int):
            number *= node.value
        else:
            return 1, Counter([f"({size})"])
    return number, names


def _group(powers: Powers, terms: Counter[tuple[str, ...]], rank: Mapping[str, int]) -> str:
    # Constants come last, as in the paper's (i3 + o3 + kd + kh + kw + 1) r^3.
    listed = sorted(terms.items(), key=lambda item: (not item[0], [rank.get(leg, len(rank)) for leg in item[0]]))
    power = " ".join(name if exponent == 1 else f"{name}^{exponent}" for name, exponent in powers)
    texts = [_term(own, coefficient) for own, coefficient in listed]
    if not power:
        return " + ".join(texts)
    if len(listed) > 1:
        common = math.gcd(*terms.values())
        inside = " + ".join(_term(own, coefficient // common) for own, coefficient in listed)
        return f"{common if common > 1 else ''}({inside}) {power}"
    (own, coefficient) = listed[0]
    if own:
        return f"{texts[0]} {power}"
    blank = " " if re.match(r"[eE]\d", power) else ""  # 2e3 is a number
    return power if coefficient == 1 else f"{coefficient}{blank}{power}"


def _term(own: tuple[str, ...], coefficient: int) -> str:
    if not own:
        return str(coefficient)
    return " ".join(own) if coefficient == 1 else f"{coefficient} {' '.join(own)}"
