"""Factor tables: how a file says that numbers are split."""

from __future__ import annotations

from tnpeft.documents.nodes import Node
from tnpeft.errors import Problems, clip
from tnpeft.spec.factorize import MAX_NUMBER, Table, bounded_product

__all__ = ["parse_table"]


def parse_table(node: Node, problems: Problems) -> Table:
    """A factor table, from numbers to their factors; the product of the factors must be the number."""
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
