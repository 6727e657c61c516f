"""Nothing but TnpeftError comes out of the reader, whatever goes in, and nothing takes a second.

3,000 inputs a run, more with the slow test; `python tests/project/test_fuzz.py COUNT SEED` throws as many as one likes.
"""

from __future__ import annotations

import random
import sys
import time

import pytest
from fuzz_inputs import KINDS, SHIPPED, TOKENS, WORDS, mutated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timing import takes_less_than

import tnpeft
from tnpeft.recipe import Recipe
from tnpeft.schedule import plan

LAYERS = (
    tnpeft.Layer("Conv3d", 6, 4, (1, 3, 2)),
    tnpeft.Layer("ConvTranspose2d", 4, 8, (3, 3), 2),
    tnpeft.Layer("Linear", 7, 1),
)


def assert_survives(text: str | bytes) -> None:
    """Read a spec or recipe and bind what could be read, within a second of this process's time."""
    assert takes_less_than(1.0, lambda: read_and_bind(text))


def read_and_bind(text: str | bytes) -> None:
    try:
        if "adapters" in (text if isinstance(text, str) else text.decode("utf-8", "replace")):
            Recipe.from_yaml(text)
            return
        spec = tnpeft.Spec.from_yaml(text)
    except tnpeft.TnpeftError as error:
        str(error).encode("utf-8")  # a message that can be printed anywhere
        return
    for layer in LAYERS:
        try:
            spec.bind(layer)
        except tnpeft.BindError as error:
            str(error).encode("utf-8")


def fuzz(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@fuzz(700)
@given(st.binary(max_size=200))
def test_random_bytes(data):
    assert_survives(data)


@fuzz(1_000)
@given(st.lists(st.sampled_from(TOKENS + WORDS), max_size=60).map("".join))
def test_random_words(text):
    assert_survives(text)


def assert_mutants_survive(text: str, seed: int) -> None:
    """Eight mutants an example: drawing them one by one takes longer than reading them."""
    choose = random.Random(seed)
    for _ in range(8):
        assert_survives(mutated(text, choose))


@fuzz(150)
@given(st.sampled_from(SHIPPED), st.integers(0, 2**32))
def test_mutated_shipped_files(text, seed):
    assert_mutants_survive(text, seed)


@pytest.mark.slow
@fuzz(400)
@given(st.sampled_from(SHIPPED), st.integers(0, 2**32))
def test_more_mutated_shipped_files(text, seed):
    assert_mutants_survive(text, seed)


@fuzz(120)
@given(st.sampled_from(["sizes", "tuples", "long", "recipes", "metadata"]), st.integers(0, 2**32))
def test_what_nobody_would_write(kind, seed):
    """Towers of tuples, long words, thousands of names and aliases, regular expressions, adapter files' metadata."""
    assert_survives(KINDS[kind](random.Random(seed)))


@fuzz(30)
@given(st.integers(0, 2**32))
def test_graphs_of_any_shape_are_planned(seed):
    """Complete graphs, hyperedges, chains, stars, trees, unions, of bonds of 1 to 1,000; the small ones are drawn."""
    try:
        spec = tnpeft.Spec.from_yaml(KINDS["graphs"](random.Random(seed)))
        network = spec.bind("Linear", in_features=7, out_features=5)
    except tnpeft.TnpeftError:
        return  # cores of many large bonds
    if len(spec.cores) <= 16:
        assert takes_less_than(5.0, lambda: str(plan(network, "auto")))
    if len(spec.cores) <= 6:
        assert takes_less_than(5.0, lambda: tnpeft.draw_network(network).page)


def tower(name: str, storeys: int) -> str:
    lines = [f"  {name}0: (in_features, {', '.join(['1'] * 31)})"]
    lines += [f"  {name}{n}: ({', '.join([f'{name}{n - 1}'] * 32)})" for n in range(1, storeys + 1)]
    return "\n".join(lines)


BOMBS = {
    "two towers of tuples": "tnpeft: 1\nname: towers\nlayers: [Linear]\nstart: frozen_copy\nsizes:\n"
    + f"{tower('b', 6)}\n{tower('c', 6)}\n  o: out_features if b6 == c6 else 1\n  i: in_features\n"
    + "cores: {a: o i}\nweight: o i\n",
    "an expression by thousands of aliases": "tnpeft: 1\nsizes:\n  s: &a '"
    + "1+" * 190
    + "1'\n"
    + "\n".join(f"  s{n}: *a" for n in range(3_000)),
    "hundreds of names like another": "tnpeft: 1\nname: near\nlayers: [Linear]\nstart: zero\nsizes:\n"
    + "\n".join(f"  {'a' * 60}{n}: 1" for n in range(200))
    + "\ncores:\n"
    + "\n".join(f"  d{n}: {'a' * 61}{n + 1000}" for n in range(250))
    + "\nweight: o i\n",
    "thousands of keys": "\n".join(f"a{n}: &a{n} x" for n in range(3_900)),
    "a core of more elements than a float holds": "tnpeft: 1\nname: big\nlayers: any\nstart: frozen_copy\n"
    + "params: {r: 16777216}\nbond: r\nsizes: {o: out_channels, i: in_channels}\ncores:\n"
    + f"  c: o i k... {' '.join(f'r{n}' for n in range(3_000))}\n  d: {' '.join(f'r{n}' for n in range(3_000))}\n"
    + "weight: o i k...\n",
    "one line of thousands of names that reads them": "tnpeft: 1\nname: many\nlayers: any\nstart: frozen_copy\n"
    + f"sizes:\n  ? {' '.join(f'n{n}' for n in range(8_000))}\n  : max({', '.join(f'n{n}' for n in range(60))})\n"
    + "  o: out_channels\n  i: in_channels\ncores: {a: o i k...}\nweight: o i k...\n",
    "nested brackets": "tnpeft: 1\nname: " + "[" * 50_000,
    "nested parentheses": "tnpeft: 1\nsizes: {o: " + "(" * 5_000 + ")" * 5_000 + "}",
    "an expression of minus signs": "tnpeft: 1\nsizes: {o: '" + "-" * 390 + "1'}",
    "many cores": "tnpeft: 1\ncores:\n" + "\n".join(f"  c{n}: i{n} i{n + 1}" for n in range(2_000)),
    "many sizes in a chain": "tnpeft: 1\nsizes:\n" + "\n".join(f"  s{n}: s{n + 1}" for n in range(2_000)),
    "one core of many legs": "tnpeft: 1\ncores: {c: " + " ".join(f"i{n}" for n in range(9_000)) + "}",
    "one weight of many legs": "tnpeft: 1\nweight: " + " ".join(f"i{n}" for n in range(9_000)),
    "laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "\n".join(
        f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "a chain of sizes that is read": "\n".join(
        (
            *("tnpeft: 1", "name: chain", "layers: any", "start: frozen_copy", "weight: o i k...", "sizes:"),
            *(f"  s{n}: s{n + 1}" for n in range(1_500)),
            *("  s1500: 3", "  o: out_channels", "  i: in_channels", "cores: {a: o i k...}", "scale: s0"),
        )
    ),
    "a network of many cores": "\n".join(
        (
            *("tnpeft: 1", "name: chain", "layers: any", "start: frozen_copy", "weight: o i k...", "bond: 2"),
            *("sizes: {o: out_channels, i: in_channels}", "cores:", "  a: o b0", "  z: b1200 i k..."),
            *(f"  c{n}: b{n} b{n + 1}" for n in range(1_200)),
        )
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_take_no_second(name):
    assert_survives(BOMBS[name])


def throw(count: int, seed: int) -> None:
    choose = random.Random(seed)
    worst = 0.0
    for _ in range(count):
        kind = choose.random()
        if kind < 0.5:
            text: str | bytes = mutated(choose.choice(SHIPPED), choose)
        elif kind < 0.75:
            text = choose.randbytes(choose.randrange(200))
        else:
            text = "".join(choose.choices(TOKENS + WORDS, k=choose.randrange(80)))
        started = time.perf_counter()
        assert_survives(text)
        worst = max(worst, time.perf_counter() - started)
    sys.stdout.write(f"{count} inputs of seed {seed}: nothing but TnpeftError; the slowest took {worst:.3f} s\n")


if __name__ == "__main__":
    throw(int(sys.argv[1]), int(sys.argv[2]))
