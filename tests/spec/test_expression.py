"""Size expressions: values against Python's own, refusals with their text, and `factorize` against all products."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tnpeft.spec.expression import ExpressionError, parse_expression
from tnpeft.spec.factorize import factorize

NAMES = {"r": 4, "i": 64, "alpha": 2.5, "kernel_size": (3, 1, 5)}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 * r + 1", 9),
        ("i / r", 16),
        ("i / 3", 64 / 3),
        ("-r // 3", -2),
        ("i % 7", 1),
        ("min(r, i, 3)", 3),
        ("max(kernel_size)", 5),
        ("prod(kernel_size)", 15),
        ("kernel_size[-1]", 5),
        ("sqrt(i)", 8),
        ("ceil(alpha)", 3),
        ("floor(alpha)", 2),
        ("gcd(i, 24)", 8),
        ("r if i >= 64 else 1", 4),
        ("1 if r > 4 or not i else 2", 2),
        ("3 < r <= 4 and 7", 7),
        ("(r, i)[1]", 64),
        ("factorize(i, 3)", (4, 4, 4)),
        ("factorize(13, 2, pad=true)", (5, 3)),
        ("factorize(i, 2, at_most=4)", (16, 4)),
    ],
)
def test_values(text, value):
    assert parse_expression(text).evaluate(NAMES) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("i ** 2", "expected a size expression, found `**`"),
        (
            "__import__('os')",
            "expected one of ceil, factorize, floor, gcd, max, min, prod, sqrt, found '__import__'(...)",
        ),
        ("i.real", "expected a size expression, found Python's Attribute"),
        ("[x for x in r]", "expected a size expression, found Python's ListComp"),
        ("'a'", "expected a number, found 'a'"),
        ("1 +", "expected an expression, found '1 +'"),
        ("r + r" * 200, "expected at most 400 characters, found 1000"),
        ("-" * 60 + "1", "expected at most 40 nested levels, found more"),
        ("i // 0", "expected a divisor other than zero, found zero"),
        ("sqrt(-1)", "expected no negative number, found -1"),
        ("kernel_size + 1", "expected a number, found 3 numbers"),
        ("kernel_size[3]", "expected a subscript below 3, found 3"),
        ("r[0]", "expected several numbers before `[`, found one number"),
        ("kernel_size < 2", "expected two numbers, found a number and a tuple"),
        ("factorize(i)", "expected a number and a count in `factorize`, found 1 of them"),
        ("factorize(i, 9)", "expected 1 to 8 factors, found 9"),
        ("factorize(i / 3, 2)", "expected an argument of `factorize` that is whole, found 21.3333"),
        ("factorize(0, 2)", "expected a number from 1 to 1048576, found 0"),
        ("prod(i, i, i, i, i, i, i, i)", "expected a number of at most 1e+12, found 4.4e+12"),
        ("max", "expected a value, found the function `max`"),
        ("((1, 2), r)[0]", "expected a tuple of numbers, found a tuple in a tuple"),
        ("(r, kernel_size)[0]", "expected a tuple of numbers, found 3 numbers in place of one"),
        ("(factorize(i, 2), factorize(i, 2))", "expected a tuple of numbers, found 2 numbers in place of one"),
        ("r if r > 100 else (r, ())", "expected a tuple of numbers, found a tuple in a tuple"),
        ("é", "expected ASCII text, found '\\xe9'"),
    ],
)
def test_refusals(text, message):
    with pytest.raises(ExpressionError) as caught:
        parse_expression(text).evaluate(NAMES)
    assert f"expected {caught.value.expected}, found {caught.value.found}" == message


def test_names_are_listed_once_in_order():
    assert parse_expression("a + max(b, a) * true").names == ("a", "b")


numbers = st.integers(-20, 20).map(str) | st.sampled_from(["r", "i", "alpha"])
expressions = st.recursive(
    numbers,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "//", "%", "<", "=="]), inner).map(
            lambda t: f"({' '.join(t)})"
        ),
        st.tuples(inner, inner, inner).map(lambda t: f"({t[0]} if {t[1]} else {t[2]})"),
        st.tuples(st.sampled_from(["min", "max"]), inner, inner).map(lambda t: f"{t[0]}({t[1]}, {t[2]})"),
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(expressions)
def test_values_are_pythons(text):
    """Oracle: Python itself, on expressions that hold nothing but arithmetic."""
    try:
        expected = eval(text, {"__builtins__": {}, "min": min, "max": max}, dict(NAMES))
    except ZeroDivisionError:
        with pytest.raises(ExpressionError):
            parse_expression(text).evaluate(NAMES)
        return
    assert parse_expression(text).evaluate(NAMES) == expected


def products(number: int, count: int, bound: int) -> list[tuple[int, ...]]:
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    found = itertools.combinations_with_replacement(sorted(divisors, reverse=True), count)
    return [parts for parts in found if math.prod(parts) == number and all(part <= bound for part in parts[1:])]


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 128), st.integers(1, 4), st.integers(1, 140))
def test_factorize_is_the_best_of_all_products(number, count, bound):
    best = min(products(number, count, bound), key=lambda parts: (sum(parts), parts[0], parts))
    assert factorize(number, count, at_most=bound) == best


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 45))
def test_padding_takes_the_number_with_the_smallest_sum(number, count, bound):
    candidates = [parts for m in range(number, 2 * number + 1) for parts in products(m, count, min(bound, 2 * number))]
    best = min(candidates, key=lambda parts: (sum(parts), math.prod(parts), parts[0], parts))
    assert factorize(number, count, at_most=bound, pad=True) == best


def test_a_table_comes_first_where_it_fits():
    table = {32: (4, 4, 2), 12: (6, 2)}
    assert factorize(32, 3, table=table) == (4, 4, 2)
    assert factorize(12, 2, table=table) == (6, 2)
    assert factorize(12, 2, at_most=1, table=table) == (12, 1)
    assert factorize(32, 2, table=table) == (8, 4)
