"""Maps of derived cores as files write them: what is read, and the whole text of every refusal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnpeft
from tnpeft.documents.nodes import Node
from tnpeft.errors import Position, Problem, Problems
from tnpeft.spec import map_kinds
from tnpeft.spec.expression import Expression, parse_expression
from tnpeft.spec.maps import (
    MapCall,
    map_kind,
    map_names,
    parse_map,
    passes_zero,
    places_legs,
    register_map,
    registered_maps,
    size_problem,
)
from tnpeft.spec.wavelets import FAMILIES, wavelet_filters

OWNER = "core 'h'"
PLACE = Position("demo.yaml", 7, 12)


def node_of(text: str) -> Node:
    return Node("scalar", text, PLACE, text)


def read(text: str, known: bool = True) -> MapCall:
    problems = Problems()
    call = parse_map(node_of(text), problems, OWNER, known)
    assert problems.found == []
    assert call is not None
    return call


def mistake(text: str, known: bool = True) -> str:
    problems = Problems()
    assert parse_map(node_of(text), problems, OWNER, known) is None
    return "\n".join(str(problem) for problem in problems.found)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_kinds, "_registered", {})


def clean(x, power, mode="sum", shift: float = 0):
    return x


def same_sizes(sizes, **arguments):
    return sizes


@pytest.mark.parametrize(
    ("text", "takes", "gives", "arguments"),
    [
        ("tanh", "", "", {}),
        (" tanh( ) ", "", "", {}),
        ("topk_softmax(v, k=top + 1)", "v", "v", {"k": "top + 1"}),
        ("unit(i k..., floor=1e-4)", "i k...", "i k...", {"floor": "1e-4"}),
        ("unit(i k...)", "i k...", "i k...", {}),
        ("norm(o)", "o", "", {}),
        ("qr(i k... r)", "i k... r", "i k... r", {}),
        ("skew(e->x y)", "e", "x y", {}),
        ("neumann(x  y,terms = min(a, 5))", "x y", "x y", {"terms": "min(a, 5)"}),
        ("scatter(n -> o i k..., at=places)", "n", "o i k...", {"at": "places"}),
        ("gather(d -> r i, at=places)", "d", "r i", {"at": "places"}),
        ("roll(y -> x y)", "y", "x y", {}),
        ("roll(x y -> x y)", "x y", "x y", {}),
        ("roll(x y)", "x y", "x y", {}),
        ("pad(r -> p a)", "r", "p a", {}),
        ("wavelet(h a -> o, family=sym4)", "h a", "o", {"family": "sym4"}),
    ],
)
def test_what_is_read(text, takes, gives, arguments):
    call = read(text)
    assert (call.takes, call.gives) == (tuple(takes.split()), tuple(gives.split()))
    assert {key: str(value) for key, value in call.arguments.items()} == arguments
    words = {key for key, value in call.arguments.items() if isinstance(value, str)}
    assert words == {*arguments} & {"at", "family"}
    assert {key: str(value) for key, value in call.expressions()} == {
        key: value for key, value in arguments.items() if key not in words
    }
    assert (str(call), call.position) == (text.strip(), PLACE)


LEGS = st.lists(st.sampled_from(list("abcdefghijlmnopqrstuvwxyz")), min_size=4, max_size=4, unique=True)
BLANKS = st.sampled_from(["", " ", "  "])
GAPS = st.sampled_from([" ", "  "])
VALUES = {
    "k": st.sampled_from(["2", "top", "min(top, 3)"]),
    "floor": st.sampled_from(["1e-4", "1 / 1000"]),
    "terms": st.sampled_from(["5", "max(2, t)"]),
    "at": st.sampled_from(["places", "at_1"]),
    "family": st.sampled_from(FAMILIES),
}


@st.composite
def calls(draw) -> tuple[str, MapCall]:
    """A text of random names, legs and blanks, and the call that it says."""
    name = draw(st.sampled_from(map_names()))
    kind = map_kind(name)
    assert kind is not None
    legs, gap, blank = draw(LEGS), draw(GAPS), draw(BLANKS)
    (low, high), made = kind.takes, kind.gives
    takes = tuple(legs[: draw(st.integers(low, high if high is not None else 2 if low < 2 else 3))])
    if high is None and name != "qr" and draw(st.booleans()):
        takes = (*takes, "k...")
    gives = takes
    if name == "roll":
        gives = (legs[3], *takes) if len(takes) == 1 else takes
    elif made is not None:
        gives = tuple(reversed(legs))[: made[1] or draw(st.integers(1, 2))]
    arrow = f"{blank}->{blank}{gap.join(gives)}" if made is not None else ""
    arguments: dict[str, Expression | str] = {}
    parts = [gap.join(takes) + arrow] if takes else []
    for key, must in kind.arguments.items():
        if must or draw(st.booleans()):
            value = draw(VALUES[key])
            parts.append(f"{key}{blank}={blank}{value}")
            arguments[key] = value if key in map_kinds.WORDS else parse_expression(value)
    text = name if not parts else f"{name}{blank}({blank}{f'{blank},{gap}'.join(parts)}{blank})"
    return text, MapCall(name, takes, () if kind.removes else gives, arguments, text, PLACE)


@given(case=calls())
def test_texts_say_what_was_put_in_them(case):
    text, wanted = case
    call = read(f" {text} ")
    assert call == wanted
    assert read(str(call)) == call


USED = "`unit(i k..., floor=1e-4)`"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ", a map: expected a name with legs in parentheses, found ''. "
             "For example `cayley(x y)`, or `skew(e -> x y)`."),
        ("2 * x", ", a map: expected a name with legs in parentheses, found '2 * x'. "
                  "For example `cayley(x y)`, or `skew(e -> x y)`."),
        ("neumann(x y", ", a map: expected a name with legs in parentheses, found 'neumann(x y'. "
                        'Close the parentheses; in a list, quote what has a comma: `"neumann(x y, terms=5)"`.'),
        ("cayly(x y)", f", unknown map 'cayly': expected one of {', '.join(map_names())}, found `cayly`. "
                       "Did you mean `cayley`?"),
        ("fourier(x)", f", unknown map 'fourier': expected one of {', '.join(map_names())}, found `fourier`. "
                       "Use one of them, or register yours with `tnpeft.register_map`."),
        ("tanh(x)", ", map `tanh`: expected `tanh`, found `tanh(x)`. It works entry by entry: write `tanh`."),
        ("norm(o -> i)", ", map `norm`: expected `norm(o)`, found `norm(o -> i)`. "
                         "It removes its legs: take the arrow out."),
        ("cayley(x y -> x y)", ", map `cayley`: expected `cayley(x y)`, found `cayley(x y -> x y)`. "
                               "Take the arrow out: its legs stay."),
        ("cayley(x)", ", map `cayley`: expected `cayley(x y)`, found `cayley(x)`. It takes two legs."),
        ("cayley", ", map `cayley`: expected `cayley(x y)`, found `cayley`. It takes two legs."),
        ("unit", f", map `unit`: expected {USED}, found `unit`. It takes one leg or more."),
        ("antisymmetric(x k...)", ", map `antisymmetric`: expected `antisymmetric(x y)`, found `antisymmetric(x k...)`."
                                  " It takes two legs, and `k...` may be any number: name them."),
        ("qr(r)", ", map `qr`: expected `qr(d r)`, found `qr(r)`. It takes two legs or more."),
        ("qr(r k...)", ", map `qr`: expected `qr(d r)`, found `qr(r k...)`. "
                       "Its last leg counts the columns: name one."),
        ("skew(e)", ", map `skew`: expected `skew(e -> x y)`, found `skew(e)`. "
                    "Write the legs that it makes after `->`."),
        ("skew(e -> x)", ", map `skew`: expected `skew(e -> x y)`, found `skew(e -> x)`. It makes two legs."),
        ("skew(x y)", ", map `skew`: expected `skew(e -> x y)`, found `skew(x y)`. It takes one leg."),
        ("scatter(n ->, at=c)", ", map `scatter`: expected `scatter(n -> o i k..., at=places)`, "
                                "found `scatter(n ->, at=c)`. It makes one leg or more."),
        ("roll(x -> y z)", ", map `roll`: expected `roll(y -> x y)`, found `roll(x -> y z)`. Write `roll(y -> x y)` "
                           "for the rolls of a vector, or `roll(x y -> x y)` for those of a matrix's rows."),
        ("roll(x -> k... x)", ", map `roll`: expected `roll(y -> x y)`, found `roll(x -> k... x)`. Write "
                              "`roll(y -> x y)` for the rolls of a vector, or `roll(x y -> x y)` for those of a "
                              "matrix's rows."),
        ("skew(e -> x -> y)", ", map `skew`: expected one arrow, found 2 of them. "
                              "Write each step as a map of its own."),
        ("unit((i k...))", ", map `unit`: expected legs without parentheses, found `(i k...)`. "
                           "Name the legs one by one: `unit(i k...)`."),
        ("unit(x x)", ", map `unit`: expected each leg once, found `x` twice. Name the second one otherwise."),
        ("unit(d...)", ", map `unit`: expected `k...` as the only open-ended name, found `d...`. "
                       "Write `k...`, one index per kernel axis."),
        ("unit(max)", ", map `unit`, index 'max': expected a name of its own, found `max`, a function. "
                      "Choose another name."),
        ("cayley(x, y)", ", map `cayley`: expected `name=value` after the legs, found 'y'. "
                         f"Blanks separate legs, and arguments have a name: {USED}."),
        ("topk_softmax(v, 2)", ", map `topk_softmax`: expected `name=value` after the legs, found '2'. "
                               "Write `topk_softmax(v, k=2)`."),
        ("unit(i, flor=1)", ", map `unit`: expected `floor`, found `flor=1`. Did you mean `floor`?"),
        ("cayley(x y, terms=2)", ", map `cayley`: expected no arguments, found `terms=2`. Remove it."),
        ("unit(i, floor=1, floor=2)", ", map `unit`: expected each argument once, found `floor` twice. "
                                      "Remove one of the two."),
        ("topk_softmax(v)", ", map `topk_softmax`: expected `k`, found it missing. "
                            "Write it as in `topk_softmax(v, k=2)`."),
        ("unit(i, floor=1 +)", ", map `unit`, `floor`: expected an expression, found '1 +'. "
                               "Write it as Python would: `2 * r`."),
        ("wavelet(h a -> o, family=db)", f", map `wavelet`: expected `family` as one of {', '.join(FAMILIES)}, "
                                         "found `db`. Did you mean `db9`?"),
        ("wavelet(h a -> o, family=meyer)", f", map `wavelet`: expected `family` as one of {', '.join(FAMILIES)}, "
                                            "found `meyer`. Use one of them."),
        ("gather(d -> r, at=2 + c)", ", map `gather`, `at`: expected the name of an index core, found `2 + c`. "
                                     "Write one word, without quotes."),
    ],
)  # fmt: skip
def test_refusals(text, message):
    where, _, rest = mistake(text).partition(f": {OWNER}")
    assert rest == message
    inside = {"unit(x x)": 19, "unit(d...)": 17, "unit(max)": 17}
    assert where == f"demo.yaml:7:{inside.get(text, 12)}"


def test_what_is_no_text_is_refused():
    problems = Problems()
    assert parse_map(Node("list", (), PLACE), problems, OWNER) is None
    assert [str(problem) for problem in problems.found] == [
        "demo.yaml:7:12: core 'h', a map: expected a name with legs in parentheses, found a list. "
        "For example `cayley(x y)`, or `skew(e -> x y)`."
    ]


def test_all_mistakes_of_a_call_are_told():
    assert mistake("neumann(x x 2, trms=5, 7)").splitlines() == [
        "demo.yaml:7:22: core 'h', map `neumann`: expected each leg once, found `x` twice. Name the second one "
        "otherwise.",
        "demo.yaml:7:24: core 'h', map `neumann`, index '2': expected an ASCII word that is no Python keyword, "
        "found '2'. Use letters, digits and `_`, starting with a letter.",
        "demo.yaml:7:12: core 'h', map `neumann`: expected `terms`, found `trms=5`. Did you mean `terms`?",
        "demo.yaml:7:12: core 'h', map `neumann`: expected `name=value` after the legs, found '7'. "
        "Write `neumann(x y, terms=5)`.",
    ]


@given(text=st.text(alphabet="xyzk. (),=->1+*'\"[]\t\n" + "cayleyskew", max_size=40))
def test_no_text_brings_the_reader_down(text):
    problems = Problems()
    for known in (True, False):
        call = parse_map(node_of(text), problems, OWNER, known)
        assert call is not None or problems.found


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        *((name, True) for name in ("tanh", "sin", "gelu", "silu")),
        *((name, False) for name in ("relu", "cos", "exp", "sigmoid")),
        ("topk_softmax(v, k=2)", False),
        ("unit(i, floor=1e-4)", True),
        ("unit(i)", False),
        ("norm(i)", False),
        ("qr(d r)", False),
        ("antisymmetric(x y)", True),
        ("skew(e -> x y)", True),
        ("cayley(x y)", False),
        ("expm(x y)", False),
        ("neumann(x y, terms=5)", False),
        ("reflections(x y)", False),
        ("scatter(n -> o, at=c)", True),
        ("gather(n -> o, at=c)", True),
        ("roll(y -> x y)", True),
        ("pad(r -> p)", True),
        ("wavelet(h a -> o, family=haar)", True),
    ],
)
def test_what_zeros_pass(text, passes):
    assert passes_zero(read(text)) is passes
    kind = map_kind(read(text).name)
    assert kind is not None
    assert not kind.linear or passes


def test_which_legs_an_index_core_has():
    assert places_legs(read("scatter(n -> o i, at=c)")) == (("n",), ("o", "i"))
    assert places_legs(read("gather(d -> r i, at=c)")) == (("r", "i"), ("d",))
    assert places_legs(read("skew(e -> x y)")) is None


SIZES = [
    ("cayley(x y)", (4, 8), (4, 8), {}, ("x and y of one size", "4 and 8", "Give both legs one size.")),
    ("expm(x y)", (4, 8), (4, 8), {}, ("x and y of one size", "4 and 8", "Give both legs one size.")),
    ("reflections(r s)", (1, 2), (1, 2), {}, ("r and s of one size", "1 and 2", "Give both legs one size.")),
    ("neumann(x y, terms=t)", (3, 2), (3, 2), {"terms": 1.0},
     ("x and y of one size", "3 and 2", "Give both legs one size.")),
    ("neumann(x y, terms=t)", (3, 3), (3, 3), {"terms": 1.0},
     ("a whole `terms` from 2 to 100", "1", "With 1 it would be the identity; where many are needed, `cayley` is "
                                            "exact.")),
    ("skew(e -> x y)", (500,), (32, 32), {},
     ("e = x (x - 1) / 2 = 496", "500", "Write `e: x * (x - 1) // 2` under `sizes`.")),
    ("skew(e -> x y)", (6,), (4, 5), {}, ("x and y of one size", "4 and 5", "Give both legs one size.")),
    ("skew(e -> x y)", (1,), (1, 1), {}, ("x and y of at least 2", "1", "Raise x and y.")),
    ("topk_softmax(v, k=k)", (8,), (8,), {"k": 9.0},
     ("a whole `k` from 1 to 8", "9", "Change `k`, or the size of v.")),
    ("topk_softmax(v, k=k)", (8,), (8,), {"k": 1.5},
     ("a whole `k` from 1 to 8", "1.5", "Change `k`, or the size of v.")),
    ("unit(i, floor=f)", (8,), (8,), {"floor": 0.0},
     ("a positive `floor`", "0", "Write `floor=1e-4`, or leave it out.")),
    ("qr(i k... r)", (2, 3, 7), (2, 3, 7), {},
     ("r of at most 6, the size of i k...", "7", "Lower r: so many rows have no more orthonormal columns.")),
    ("scatter(n -> o i, at=c)", (9000,), (64, 128), {},
     ("at most 8,192 places, the entries of o i", "9,000", "Lower n: no place is written twice.")),
    ("pad(r -> p a)", (9,), (2, 4), {},
     ("p a of at least 9 entries", "8", "Raise a: zeros are added, nothing is cut.")),
    ("wavelet(h a -> o, family=db2)", (2, 32), (64,), {"family": "db2"},
     ("at least 64 entries for o", "62", "Raise a to 33.")),
    ("wavelet(h a -> o, family=db10)", (2, 5), (1,), {"family": "db10"},
     ("at least 1 entries for o", "0", "Raise a to 10.")),
    ("wavelet(h a -> o, family=db2)", (3, 32), (4,), {"family": "db2"},
     ("h = 2, the low and the high band", "3", "Write `h: 2` under `sizes`.")),
]  # fmt: skip


@pytest.mark.parametrize(("text", "taken", "made", "arguments", "problem"), SIZES)
def test_sizes_that_do_not_fit(text, taken, made, arguments, problem):
    assert size_problem(read(text), taken, made, arguments) == problem


@pytest.mark.parametrize(
    ("text", "taken", "made", "arguments"),
    [
        ("tanh", (), (), {}),
        ("norm(o)", (3,), (), {}),
        ("unit(k...)", (), (), {}),
        ("unit(i)", (3,), (3,), {}),
        ("qr(k... r)", (6, 6), (6, 6), {}),
        ("skew(e -> x y)", (496,), (32, 32), {}),
        ("neumann(x y, terms=5)", (3, 3), (3, 3), {"terms": 100.0}),
        ("topk_softmax(v, k=2)", (8,), (8,), {"k": 8.0}),
        ("scatter(n -> o, at=c)", (8,), (8,), {}),
        ("gather(d -> r, at=c)", (1,), (8,), {}),
        ("roll(y -> x y)", (4,), (9, 4), {}),
        ("pad(r -> p a)", (8,), (2, 4), {}),
        ("wavelet(h a -> o, family=db2)", (2, 33), (64,), {"family": "db2"}),
    ],
)
def test_sizes_that_fit(text, taken, made, arguments):
    assert size_problem(read(text), taken, made, arguments) is None


@given(data=st.data(), family=st.sampled_from(FAMILIES), size=st.integers(1, 80))
def test_what_a_wavelet_problem_advises_is_enough_and_no_more(data, family, size):
    call = read(f"wavelet(h a -> o, family={family})")
    problem = size_problem(call, (2, 0), (size,), {"family": family})
    assert problem is not None
    advised = int(problem[2].removeprefix("Raise a to ").removesuffix("."))
    assert size_problem(call, (2, advised), (size,), {"family": family}) is None
    assert size_problem(call, (2, advised - 1), (size,), {"family": family}) is not None


@pytest.mark.usefixtures("registry")
def test_registered_maps_are_read_and_checked():
    register_map("clean", clean, lambda sizes, power, mode="sum", shift=0: (*sizes[:-1], sizes[-1] // int(power)))
    assert [name for name, _ in registered_maps()] == ["clean"]
    call = read("clean(a b -> a c, power=2 * n, mode=max)")
    assert (call.takes, call.gives) == (("a", "b"), ("a", "c"))
    assert {key: str(value) for key, value in call.arguments.items()} == {"power": "2 * n", "mode": "max"}
    assert dict(call.expressions()) == {"power": parse_expression("2 * n")}
    assert size_problem(call, (3, 8), (3, 4), {"power": 2.0, "mode": "max"}) is None
    fix = "Change the legs' sizes, or the `shape` that `clean` is registered with."
    assert size_problem(call, (3, 8), (3, 5), {"power": 2.0}) == ("a c of 3 x 4", "3 x 5", fix)
    assert size_problem(call, (3, 8), (3, 5), {"power": 0.0}) == (
        "sizes that `clean` takes",
        "3 x 8 (ZeroDivisionError: integer division or modulo by zero)",
        fix,
    )
    assert mistake("clean(a)") == (
        "demo.yaml:7:12: core 'h', map `clean`: expected `power`, found it missing. Write it as in `clean(power=...)`."
    )
    assert mistake("clean(a, power=2, mode=1 + 1)") == (
        "demo.yaml:7:12: core 'h', map `clean`, `mode`: expected a word, found `1 + 1`. Write one word, without quotes."
    )
    assert mistake("clean(a, power=2, mod=b)") == (
        "demo.yaml:7:12: core 'h', map `clean`: expected `power` and `mode` and `shift`, found `mod=b`. "
        "Did you mean `mode`?"
    )
    assert not passes_zero(call)


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("linear", "zero", "passes"), [(False, False, False), (True, False, True), (False, True, True)]
)
def test_what_registered_maps_promise(linear, zero, passes):
    register_map("mine", lambda x: x, same_sizes, linear=linear, zero=zero)
    assert passes_zero(read("mine(a)")) is passes
    kind = map_kind("mine")
    assert kind is not None
    assert kind.linear is linear


@pytest.mark.usefixtures("registry")
def test_a_map_that_nobody_registered_may_be_somebodys():
    call = read("theirs(a b -> c, at=places, power=2 + n, mode=max)", known=False)
    assert (call.takes, call.gives) == (("a", "b"), ("c",))
    assert call.arguments == {"at": "places", "power": parse_expression("2 + n"), "mode": "max"}
    assert passes_zero(call)  # as it did where the spec was accepted
    assert size_problem(call, (2, 3), (4,), {}) is None
    assert mistake("theirs(a, 5)", known=False) == (
        "demo.yaml:7:12: core 'h', map `theirs`: expected `name=value` after the legs, found '5'. Write `name=value`."
    )
    assert "expected two legs" not in mistake("cayley(x)", known=False)  # built-in maps are known all the same


FUNCTION_FIX = "Pass `function(x, **arguments) -> Tensor`."


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("register", "message"),
    [
        (lambda: register_map("tanh", clean, same_sizes),
         "register_map: expected a new ASCII word, found 'tanh'. Choose another name."),
        (lambda: register_map("a b", clean, same_sizes),
         "register_map: expected a new ASCII word, found 'a b'. Choose another name."),
        (lambda: register_map("mine", 5, same_sizes),  # type: ignore[arg-type]
         f"register_map 'mine': expected a function as `function`, found 5. {FUNCTION_FIX}"),
        (lambda: register_map("mine", clean, (2, 3)),  # type: ignore[arg-type]
         "register_map 'mine': expected a function as `shape`, found (2, 3). "
         "Pass `shape(sizes, **arguments) -> sizes`."),
        (lambda: register_map("mine", lambda: 5, same_sizes),
         "register_map 'mine': expected a `function` of one value and named arguments, "
         f"found one that cannot be called so. {FUNCTION_FIX}"),
        (lambda: register_map("mine", lambda x, y, /: 5, same_sizes),
         "register_map 'mine': expected a `function` of one value and named arguments, "
         f"found one that cannot be called so. {FUNCTION_FIX}"),
        (lambda: register_map("mine", lambda x, at: 5, same_sizes),
         "register_map 'mine': expected arguments that are numbers or words, found `at`. "
         "Name the parameter otherwise: index cores are for `scatter` and `gather`."),
    ],
)  # fmt: skip
def test_what_cannot_be_registered(register: Callable[[], None], message: str):
    with pytest.raises(tnpeft.SpecError) as caught:
        register()
    assert str(caught.value) == message
    assert isinstance(caught.value.problems[0], Problem)
    assert registered_maps() == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_wavelets_are_orthonormal_and_have_their_vanishing_moments(family):
    """What defines them: the filters' even shifts are orthonormal, and the high-pass is blind to polynomials."""
    low, high = wavelet_filters(family)
    length = len(low)
    for shift in range(0, length, 2):
        within = range(length - shift)
        same = 1.0 if shift == 0 else 0.0
        assert abs(sum(low[k] * low[k + shift] for k in within) - same) < 1e-14
        assert abs(sum(high[k] * high[k + shift] for k in within) - same) < 1e-14
        assert abs(sum(low[k] * high[k + shift] for k in within)) < 1e-14
        assert abs(sum(high[k] * low[k + shift] for k in within)) < 1e-14
    number = 1 if family == "haar" else int(family.lstrip("dbsymcoif"))
    assert length == (6 if family.startswith("coif") else 2) * number
    middle = (length - 1) / 2
    for power in range(2 * number if family.startswith("coif") else number):
        assert abs(sum(tap * ((k - middle) / length) ** power for k, tap in enumerate(high))) < 1e-14
