"""Nothing but TnpeftError comes out of the reader, whatever goes in, and nothing takes a second.

13,000 inputs a run; `python tests/test_fuzz.py COUNT SEED` throws as many more as one likes.
"""

from __future__ import annotations

import random
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timing import takes_less_than

import tnpeft
from tnpeft.recipe import Recipe
from tnpeft.spec.library import shipped_folder

SHIPPED = [path.read_text() for path in sorted(shipped_folder().rglob("*.yaml")) if path.parent.name != "factors"]
WORDS = sorted({word for text in SHIPPED for word in text.split()})
TOKENS = [
    *(": ", "- ", "{", "}", "[", "]", "&a ", "*a", '"', "'", "|\n", ">\n", "!!str ", "#", "\n", "  ", "\t", ",", "? "),
    *(
        "k...",
        "k",
        "...",
        "---",
        "~",
        "null",
        "true",
        "1e-3",
        ".inf",
        ".nan",
        "-1",
        "0",
        "9" * 30,
        "<<: *a",
        "%YAML 1.1\n",
    ),
    *("factorize(i, 3)", "pad=true", "at_most=0", "(o1 o2)", ")", "(", "1/0", "r//0", " if ", " else ", "last(9)"),
    *("sqrt(-1)", "prod(kernel_size)", "i[0]", "kernel_size[7]", "uniform(bound=r)", "[i, k...]", "max()", "not r"),
    *(
        "terms",
        "terms:\n  - {cores: [up, down], weight: o i, scale: -1}\n",
        "shared",
        "shared: model",
        "from",
        "from: weight",
        "from: svd_u",
        "compose: dora",
        "scopes: {block: (.)}",
        "frozen: true",
        "svd_us",
        "orthogonal",
        "zeros",
        "any",
        "Linear",
        "tnpeft: 1\n",
        "adapters",
    ),
    *("\x00", "\x85", "\u2028", "\ufeff", "\ud800", "é", "\U0001f4a5", "\\", '"\\UFFFFFFFF"', '"\\xZZ"', "\x07"),
]
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


def mutated(text: str, choose: random.Random) -> str:
    """A few edits of the kinds that people and broken disks make."""
    for _ in range(choose.randint(1, 6)):
        start, end = sorted(choose.choices(range(len(text) + 1), k=2))
        kind = choose.randrange(7)
        if kind == 0:
            text = text[:start] + text[min(end, start + 20) :]
        elif kind in (1, 2):
            text = text[:start] + choose.choice(TOKENS if kind == 1 else WORDS) + text[start:]
        elif kind == 3:
            text = (
                text[:start]
                + chr(choose.choice((choose.randrange(128), choose.randrange(0x110000))))
                + text[start + 1 :]
            )
        elif kind == 4:
            lines = text.split("\n")
            lines.insert(choose.randrange(len(lines) + 1), choose.choice(lines))
            text = "\n".join(lines)
        elif kind == 5:
            words = text.split(" ")
            words[choose.randrange(len(words))] = choose.choice(WORDS)
            text = " ".join(words)
        else:
            text = text[:end] + text[start:end] + text[end:]
    return text


def fuzz(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@fuzz(2_000)
@given(st.binary(max_size=200))
def test_random_bytes(data):
    assert_survives(data)


@fuzz(3_000)
@given(st.lists(st.sampled_from(TOKENS + WORDS), max_size=60).map("".join))
def test_random_words(text):
    assert_survives(text)


@fuzz(1_000)
@given(st.sampled_from(SHIPPED), st.integers(0, 2**32))
def test_mutated_shipped_files(text, seed):
    """Eight mutants an example: drawing them one by one takes longer than reading them."""
    choose = random.Random(seed)
    for _ in range(8):
        assert_survives(mutated(text, choose))


BOMBS = {
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
