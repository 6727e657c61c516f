"""Completion and hover, at a cursor that `|` marks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnpeft.editing.completion import complete
from tnpeft.editing.cursor import cursor_at
from tnpeft.editing.document import NEW
from tnpeft.editing.hover import hover_at
from tnpeft.network import Network, Spec
from tnpeft.spec.json_schema import spec_schema

SPEC = Spec.from_yaml(NEW)


def at(marked: str) -> tuple[str, int, int]:
    head, tail = marked.split("|")
    return head + tail, head.count("\n") + 1, len(head) - head.rfind("\n")


def labels(marked: str, spec: Spec | None = SPEC) -> list[str]:
    return [item.label for item in complete(*at(marked), spec)[0]]


@pytest.mark.parametrize(
    ("marked", "place", "path", "word"),
    [
        ("|", "key", (), ""),
        ("tnpeft: 1\nla|", "key", (), "la"),
        ("layers: Con|", "value", ("layers",), "Con"),
        ("cores:\n  up: {legs: o r, in|}", "key", ("cores", "up"), "in"),
        ("cores:\n  up: {legs: o r, init: z|}", "value", ("cores", "up", "init"), "z"),
        ("cores:\n  up: {\n    legs: o r,\n    in|", "key", ("cores", "up"), "in"),
        ("cores:\n  up:\n    legs: o |\n", "value", ("cores", "up", "legs"), ""),
        ("cores:\n  up:\n    legs: o r\n  d|", "key", ("cores",), "d"),
        ("cores:\n  up:\n    legs: o r\nw|", "key", (), "w"),
        ("terms:\n  - cores: [up, d|]\n    weight: o i", "value", ("terms", "-", "cores", "-"), "d"),
        ("terms:\n  - cores: [up]\n    w|", "key", ("terms", "-"), "w"),
        ("terms:\n  - cores: [up]\n  - |", "key", ("terms", "-"), ""),
        ("adapters:\n  - {spec: lo|", "value", ("adapters", "-", "spec"), "lo"),
        ('title: "a: b, {c|', "value", ("title",), "c"),
        ("# any: {wor|", "comment", (), ""),
        ("params: {r: 4} # la|", "comment", (), ""),
    ],
)
def test_where_the_cursor_stands(marked: str, place: str, path: tuple[str, ...], word: str):
    cursor = cursor_at(*at(marked))
    assert (cursor.place, cursor.path, cursor.word) == (place, path, word)


def test_keys_are_the_schemas_less_those_that_are_there():
    properties = spec_schema()["properties"]
    assert labels("tnpeft: 1\n|\nstart: zero\n") == [key for key in properties if key not in ("tnpeft", "start")]
    assert labels("cores:\n  up: {legs: o r, |}") == [
        key for key in properties["cores"]["additionalProperties"]["anyOf"][1]["properties"] if key != "legs"
    ]


@pytest.mark.parametrize(
    ("marked", "found"),
    [
        ("start: |", ["zero", "frozen_copy"]),
        ("compose: |", ["dora"]),
        ("layers: Conv1|", ["Conv1d"]),
        ("cores:\n  up: {init: ze|}", ["zeros"]),
        ("cores:\n  up: {frozen: |}", ["true", "false"]),
        ("cores:\n  up: o |", ["k...", "r", "o", "i"]),
        ("terms:\n  - cores: [u|]", ["up", "up"][:1]),
        ("scale: al|", ["alpha / r"]),
        ("bond: in_c|", ["in_channels"]),
        ("tnpeft: 2\ncores:\n  q: {of: R, map: ca|}", ["cayley(x y)"]),
        ("adapters:\n  - {spec: lora_x|", ["lora_xs"]),
        ("# st|", []),
    ],
)
def test_values(marked: str, found: list[str]):
    assert sorted(labels(marked)) == sorted(found)


def test_a_whole_spec_is_offered_where_there_is_none():
    (snippet,) = [item for item in complete("", 1, 1)[0] if item.kind == "snippet"]
    assert Spec.from_yaml(snippet.text).name == "my_adapter"


def test_details_are_the_schemas_sentences():
    (item,) = complete(*at("lay|"))[0]
    assert item.detail == spec_schema()["properties"]["layers"]["description"]
    assert item.text == "layers: "


@given(st.integers(0, len(NEW)), st.text(st.sampled_from("{}[]:,#'\"\n k-oir&"), max_size=5))
def test_any_cursor_in_any_text_gets_an_answer(where: int, put: str):
    text = NEW[:where] + put + NEW[where:]
    head = text[: where + len(put)]
    line, column = head.count("\n") + 1, len(head) - head.rfind("\n")
    found, cursor = complete(text, line, column, SPEC)
    assert 0 <= cursor.start <= column - 1
    assert len({item.label for item in found}) == len(found)
    hover_at(text, line, column, network())


@pytest.mark.parametrize("line", [-100, 0, 100])
def test_a_line_that_is_not_there_gets_an_answer(line: int):
    assert complete(NEW, line, 1, SPEC)[1].path == ()
    assert hover_at(NEW, line, 1, network()) is None


def network() -> Network:
    return SPEC.bind("Conv2d", in_channels=8, out_channels=6, kernel_size=3)


@pytest.mark.parametrize(
    ("marked", "said"),
    [
        (NEW.replace("legs: o r", "legs: |o r"), "index o = 6 on Conv2d(8, 6, 3x3): up, weight out"),
        (NEW.replace("up:   ", "|up:   "), "core up: 6 x 4, legs o r, zeros"),
        (NEW.replace("r i k...", "r i |k..."), "the kernel's axes: 3 x 3, on Conv2d(8, 6, 3x3)"),
        (NEW.replace("{r: 4}", "{|r: 4}"), "param r = 4\nindex r = 4 on Conv2d(8, 6, 3x3): down, up"),
        (
            NEW.replace("start: ", "|start: "),
            "`zero`: one core starts as zeros, and so does the update. `frozen_copy`: the update is "
            "T(now) - T(start), where T is the contracted network.",
        ),
    ],
)
def test_hover_says_sizes_shapes_and_sentences(marked: str, said: str):
    found = hover_at(*at(marked), network())
    assert found is not None
    assert found.text.replace("\n\n", "\n") == said


def test_hover_over_nothing_says_nothing():
    assert hover_at(NEW, 1, 8) is None
    assert hover_at(NEW, 99, 1) is None
    assert hover_at("# up\n" + NEW, 1, 3, network()) is None
