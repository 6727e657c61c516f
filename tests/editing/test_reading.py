"""Mistakes have places: the characters that a page underlines are those that are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnpeft.editing.document import NEW, shipped_text
from tnpeft.editing.reading import Mistake, bound, mistakes_of, read_spec
from tnpeft.network import Layer
from tnpeft.spec import list_specs


def underlined(text: str, mistake: Mistake) -> str:
    return text.split("\n")[mistake.line - 1][mistake.column - 1 : mistake.end - 1]


@pytest.mark.parametrize(
    ("before", "after", "found", "said"),
    [
        ("zeros", "zeos", ["zeos"], "Did you mean `zeros`?"),
        ("weight: o i k...", "weight: o i k... j", ["j"], "index 'j'"),
        ("layers: any", "layer: any", ["layer"], "unknown key 'layer'"),
        ("layers: any", "layers: [Linear, Conv4d]", ["Conv4d"], "Did you mean `Conv3d`?"),
        ("params: {r: 4}", "params: {r: s}", ["s"], "numbers and earlier params"),
        ("start: zero", "start: one", ["one"], "`start`"),
        ("start: zero", "start: [", ["["], "not valid YAML"),
        ('params: {r: 4}', 'params: {r: "4 +"}', ["4"], "param 'r'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_underlined(before: str, after: str, found: list[str], said: str):
    text = NEW.replace(before, after)
    reading = read_spec(text)
    assert reading.spec is None
    assert [underlined(text, mistake) for mistake in reading.mistakes if said in mistake.text][: len(found)] == found
    assert all("<spec>" not in mistake.text for mistake in reading.mistakes)  # the place is not said twice


def test_every_mistake_is_found_at_once():
    text = NEW.replace("zeros", "zeos").replace("start: zero", "start: one")
    assert [(mistake.line, mistake.column) for mistake in read_spec(text).mistakes] == [(8, 27), (10, 8)]


def test_an_index_that_dangles_is_underlined_where_it_stands():
    text = NEW.replace("legs: o r", "legs: o q")
    reading = read_spec(text)
    assert {underlined(text, mistake) for mistake in reading.mistakes} == {"r", "q"}


def test_nothing_to_underline_is_still_underlined():
    assert read_spec("").mistakes == (
        Mistake("the file is empty: expected a mapping, found nothing. Write `tnpeft: 1` first.", 1, 1, 2),
    )


@pytest.mark.parametrize("name", list_specs())
def test_shipped_specs_have_no_mistakes(name: str):
    assert mistakes_of(shipped_text(name), "<spec>") == ()


@given(
    st.integers(0, len(NEW)),
    st.text(st.sampled_from("{}[]:,#'\"\n k.oir&*!|>%@\t\\é😀"), max_size=4),
    st.integers(0, 8),
)
def test_places_lie_in_the_text_whatever_it_is(at: int, put: str, cut: int):
    text = NEW[:at] + put + NEW[at + cut :]
    lines = text.split("\n")
    for mistake in read_spec(text).mistakes:
        assert mistake.text
        if mistake.has_place:
            assert 1 <= mistake.line <= len(lines)
            assert 1 <= mistake.column < mistake.end <= len(lines[mistake.line - 1]) + 2


def test_a_layer_that_does_not_fit_is_a_mistake_without_a_place():
    spec = read_spec(shipped_text("tenvoo_l")).spec
    assert spec is not None
    network, mistakes = bound(spec, Layer("Linear", 8, 8), {})
    assert network is None
    assert [mistake.has_place for mistake in mistakes] == [False]
    assert "Conv3d" in mistakes[0].text


def test_recipes_and_factor_tables_are_read_as_what_they_are(tmp_path: Path):
    recipe = "tnpeft: 1\nname: mine\nadapters:\n  - {spec: lorra, match: all}\n"
    (found,) = mistakes_of(recipe, str(tmp_path / "mine.yaml"))
    assert "Did you mean `lora`?" in found.text
    assert underlined(recipe, found) == "lorra"
    assert mistakes_of("32: [4, 4, 2]\n", "factors.yaml") == ()
    (found,) = mistakes_of("32: [4, 4, 3]\n", "factors.yaml")
    assert found.line == 1


def test_a_mistake_in_another_file_names_it(tmp_path: Path):
    (tmp_path / "broken.yaml").write_text(NEW.replace("zeros", "zeos"))
    recipe = "tnpeft: 1\nname: mine\nadapters:\n  - {spec: broken.yaml, match: all}\n"
    (found,) = mistakes_of(recipe, str(tmp_path / "mine.yaml"))
    assert not found.has_place
    assert found.text.startswith(f"{tmp_path / 'broken.yaml'}:8:27: unknown init 'zeos'")
