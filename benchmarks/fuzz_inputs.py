"""Inputs made to break the reader, the planner and the commands: what people mistype, and what nobody would write."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence

import networkx

from tnpeft.spec.library import shipped_folder

__all__ = ["KINDS", "SHIPPED", "mutated", "spec_of_graph"]

SHIPPED = [path.read_text() for path in sorted(shipped_folder().rglob("*.yaml")) if path.parent.name != "factors"]
WORDS = sorted({word for text in SHIPPED for word in text.split()})
TOKENS = [
    *(": ", "- ", "{", "}", "[", "]", "&a ", "*a", '"', "'", "|\n", ">\n", "!!str ", "#", "\n", "  ", "\t", ",", "? "),
    *("k...", "k", "...", "---", "~", "null", "true", "1e-3", ".inf", ".nan", "-1", "0", "9" * 30, "<<: *a"),
    *("%YAML 1.1\n", "factorize(i, 3)", "pad=true", "at_most=0", "(o1 o2)", ")", "(", "1/0", "r//0", " if ", " else "),
    *("last(9)", "sqrt(-1)", "prod(kernel_size)", "i[0]", "kernel_size[7]", "uniform(bound=r)", "[i, k...]", "max()"),
    *("not r", "terms", "terms:\n  - {cores: [up, down], weight: o i, scale: -1}\n", "shared", "shared: model", "from"),
    *("from: weight", "from: svd_u", "compose: dora", "scopes: {block: (.)}", "frozen: true", "svd_us", "orthogonal"),
    *("zeros", "any", "Linear", "tnpeft: 1\n", "adapters", "(1, (2, 3))", "(kernel_size, r)", "x" * 300, "1e12", "e3"),
    *("\x00", "\x85", "\u2028", "\ufeff", "\ud800", "é", "\U0001f4a5", "\\", '"\\UFFFFFFFF"', '"\\xZZ"', "\x07"),
]
_HEAD = "tnpeft: 1\nname: made\nlayers: any\nstart: frozen_copy\n"
_PARAMS = f"{_HEAD}params: {{r: 2}}\n"
_OPEN = "  o: out_channels\n  i: in_channels\n"
_CORE = "cores: {a: o i k...}\nweight: o i k...\n"


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
            char = chr(choose.choice((choose.randrange(128), choose.randrange(0x110000))))
            text = text[:start] + char + text[start + 1 :]
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


def _mutant(choose: random.Random) -> str:
    return mutated(choose.choice(SHIPPED), choose)


def _words(choose: random.Random) -> str:
    return "".join(choose.choices(TOKENS + WORDS, k=choose.randrange(80)))


def expression(choose: random.Random, names: Sequence[str], depth: int = 3) -> str:
    """A size expression of any shape, tuples of tuples among them."""
    if depth == 0 or choose.random() < 0.2:
        return choose.choice((*names, *names, str(choose.randrange(9)), "1e12", "0.5", "-1", "true", "kernel_size"))
    one, other, third = (expression(choose, names, depth - 1) for _ in range(3))
    many = ", ".join([one] * choose.choice((1, 2, 3, 30)))
    return choose.choice(
        (
            f"({one} {choose.choice(['+', '-', '*', '/', '//', '%', '<', '==', 'and', 'or'])} {other})",
            f"({one} if {other} else {third})",
            f"{choose.choice(['max', 'min', 'prod', 'gcd', 'sqrt', 'ceil', 'floor'])}({one}, {other})",
            f"factorize({one}, {choose.randrange(10)}{choose.choice(['', ', pad=true', f', at_most={other}'])})",
            f"({many},)",
            f"({one})[{choose.randrange(-2, 3)}]",
            f"-{one}",
        )
    )


def _sizes(choose: random.Random) -> str:
    """Towers of sizes, each line of which reads those before it."""
    names, lines = ["in_channels", "out_channels", "r"], []
    for number in range(choose.choice((1, 3, 8))):
        text = expression(choose, names, choose.choice((1, 2, 3)))
        lines.append(f"  s{number}: {json.dumps(text)}\n")
        names.append(f"s{number}")
    scale = json.dumps(expression(choose, names, 2))
    return f"{_PARAMS}sizes:\n{_OPEN}{''.join(lines)}{_CORE}scale: {scale}\n"


def spec_of_graph(graph: networkx.Graph, hyperedges: Sequence[Sequence[int]] = (), bond: int = 2) -> str:
    """A core for each node, a bond for each edge, an index for each hyperedge; the first and last core are open."""
    legs: list[list[str]] = [[] for _ in graph]
    for number, edge in enumerate(graph.edges):
        for node in edge:
            legs[node].append(f"b{number}")
    for number, nodes in enumerate(hyperedges):
        for node in nodes:
            legs[node].append(f"h{number}")
    legs[0].append("o")
    legs[-1].append("i")
    cores = "".join(f"  c{number}: {{legs: '{' '.join(own)}', init: ones}}\n" for number, own in enumerate(legs))
    head = _HEAD.replace("any", "[Linear]")
    return f"{head}params: {{r: {bond}}}\nbond: r\nsizes:\n{_OPEN}cores:\n{cores}weight: o i\n"


def _graph(choose: random.Random) -> str:
    count, seed = choose.choice((2, 4, 6, 8, 12, 16)), choose.randrange(10**6)
    if choose.random() < 0.02:
        count = choose.choice((40, 100, 256))
    makers: tuple[Callable[[], networkx.Graph], ...] = (
        lambda: networkx.path_graph(count),
        lambda: networkx.cycle_graph(count),
        lambda: networkx.star_graph(count - 1),
        lambda: networkx.complete_graph(min(count, 40)),
        lambda: networkx.random_labeled_tree(count, seed=seed),
        lambda: networkx.gnp_random_graph(count, 2.5 / count, seed=seed),
        lambda: networkx.empty_graph(count),
    )
    graph = choose.choice(makers)()
    sets = [choose.sample(range(len(graph)), min(3, len(graph))) for _ in range(choose.choice((0, 0, 1, count // 2)))]
    return spec_of_graph(graph, sets, choose.choice((1, 2, 2, 3, 20, 1000)))


def _long(choose: random.Random) -> str:
    """Long words, many names, many aliases."""
    length = choose.choice((255, 256, 300, 5_000, 30_000))
    letters = "".join(choose.choices("ab", k=length))
    many = " ".join(f"n{number}" for number in range(length // 6))
    key = f"? {many}\n  : {choose.choice(['r', 'n1', 'max(n0, n1)', '(r, r)'])}"
    return choose.choice(
        (
            f"{_PARAMS}sizes:\n{_OPEN}  {key}\n{_CORE}",
            f"{_PARAMS}sizes:\n{_OPEN}cores: {{a: o i k... {many}, b: {many}}}\nweight: o i k...\nbond: r\n",
            f"{_HEAD}sizes:\n{_OPEN}  {letters[:60]}a: 1\ncores: {{a: o i k... {letters[:60]}b}}\nweight: o i k...\n",
            f"{_HEAD.replace('made', letters)}sizes:\n{_OPEN}{_CORE}factors: {letters}\n",
            f"{_HEAD}x: &a {letters}\ny: [{', '.join(['*a'] * 300)}]\n",
            "".join(f"{letters[:40]}{number}: {number}\n" for number in range(length // 40)),
        )
    )


def _recipe(choose: random.Random) -> str:
    spec = choose.choice(("lora", "quanta", "x" * 300, "x" * 300 + ".yaml", "a/" * 3000, "..", "\\0", "lora.yaml"))
    match = choose.choice(("to_q", "(", "(a+)+$", ".*", "[", "\\d{1000000}", "x" * 500))
    params = choose.choice(("{}", "{r: 4}", "{r: 1e400}", "{r: 999999999999}", "{rank: 4}", "{r: -1}", "{r: 0}"))
    entry = f"{{spec: {json.dumps(spec)}, match: {json.dumps(match)}, params: {params}}}"
    text = f"tnpeft: 1\nname: made\nadapters: [{entry}]\n"
    return mutated(text, choose) if choose.random() < 0.5 else text


def _name(choose: random.Random) -> str:
    """What may be written where a name or a path is expected."""
    parts = (
        "x" * 300,
        "lora",
        ".yaml",
        "/",
        "..",
        "\0",
        "\ud800",
        "é" * 200,
        "\n",
        "~",
        " ",
        ".svg",
        "d/" * 2100,
        "lorra",
    )
    return "".join(choose.choices(parts, k=choose.randint(0, 4)))


def _command(choose: random.Random) -> str:
    """A command line as a JSON list."""
    name = _name(choose)
    name = name if name.strip("/. \n~") else "lorra"  # a folder's files would all be checked
    layer = choose.choice(("Linear:4,4", "Conv3d:4,4,3", "Linear:999999999,999999999", "x", ""))
    setting = choose.choice(("r=2", "r=1e400", "r=" + "9" * 500, "r=-1", "r", "=", "r=nan"))
    return json.dumps(
        choose.choice(
            (
                ["show", name],
                ["show", "lora", "--layer", layer, "--set", setting],
                ["check", name],
                ["draw", name, "-o", "/dev/null/" + _name(choose)],
                ["verify", name + ".yaml"],
                ["budget", name, "--model", "x:y", "--params", "10"],
                ["convert", name, "/dev/null/" + _name(choose), "--model", "x:y"],
                ["extract", name, name, "--model", "x:y", "--spec", name, "--match", "x", "-o", "/dev/null/" + name],
                [name],
            )
        )
    )


def _metadata(choose: random.Random) -> str:
    """The metadata of an adapter file: JSON with a spec in it, whole or broken."""
    text = _sizes(choose) if choose.random() < 0.3 else _mutant(choose)
    layer = {"spec": 0, "params": {"r": choose.choice((2, 10**30, 1e300, -1, "x"))}, "seed": 0, "mode": "auto"}
    fields = {
        "format": choose.choice((1, 2, 3, 99, "1")),
        "name": _name(choose)[:40],
        "specs": [{"text": text, "file": _name(choose)[:300], "tables": {}}],
        "layers": {choose.choice(("0", "1", "x" * 300)): layer},
        "base": {},
        "about": choose.choice(({}, {"trained": 3}, [], None)),
        "trained": [],
        "statistics": [],
        "scale": choose.choice((1.0, 1e308, "x")),
    }
    written = json.dumps(fields)
    return mutated(written, choose) if choose.random() < 0.3 else written


def _tuples(choose: random.Random) -> str:
    """Two towers of tuples of tuples, which are compared."""
    width, storeys = choose.choice((2, 8, 32)), choose.randint(1, 8)
    lines = []
    for tower in "bc":
        lines.append(f"  {tower}0: (in_channels, {', '.join(['1'] * width)})\n")
        for storey in range(1, storeys + 1):
            lines.append(f"  {tower}{storey}: ({', '.join([f'{tower}{storey - 1}'] * width)})\n")
    last = f"  o: out_channels if b{storeys} == c{storeys} else 1\n  i: in_channels\n"
    return f"{_HEAD}sizes:\n{''.join(lines)}{last}cores: {{a: o i k...}}\nweight: o i k...\n"


KINDS: dict[str, Callable[[random.Random], str]] = {
    "mutants": _mutant,
    "words": _words,
    "sizes": _sizes,
    "tuples": _tuples,
    "long": _long,
    "graphs": _graph,
    "recipes": _recipe,
    "names": _name,
    "commands": _command,
    "metadata": _metadata,
}
# The long ones are few.
SHARES = dict.fromkeys(KINDS, 1.0) | {"mutants": 6.0, "words": 3.0, "sizes": 4.0, "graphs": 0.3, "commands": 0.5}
